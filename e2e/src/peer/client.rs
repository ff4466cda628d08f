//! The client: one conversation, then one line of JSON with what it saw.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wire::{self, Pattern, Seen, drain, half_close, line, name, outcome, prepare};
use super::{BEFORE, MIDDLE, PAUSE_MS, PIECE, PIECES};

/// As long as a patient program waits for a connection.
const CONNECT: Duration = Duration::from_secs(30);
/// A writer that gets no byte further for so long is blocked.
const BLOCKED: Duration = Duration::from_millis(1500);
/// A conversation beside a blocked one is not stalled if it takes less.
const LIVELY: Duration = Duration::from_secs(2);

/// One conversation.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// What it is, as the server knows it.
    pub verb: String,
    /// Whom with.
    pub target: SocketAddr,
    /// Names it in the server's output.
    pub id: String,
    /// Bytes, connections or lines, depending on the verb.
    pub number: u64,
}

/// Has the conversation; what was seen.
#[must_use]
pub fn run(conversation: &Conversation) -> Value {
    let seen = match conversation.verb.as_str() {
        "half-close-client" => conversation.half_close_client(),
        "half-close-server" => conversation.half_close_server(),
        "reset-by-client" => conversation.reset_by_client(),
        "reset-by-client-upload" => conversation.reset_by_client_upload(),
        "reset-by-client-download" => conversation.reset_by_client_download(),
        "reset-by-server" => conversation.read_to_end("reset-by-server"),
        "reset-by-server-download" => conversation.read_to_end("reset-by-server-download"),
        "reset-by-server-upload" => conversation.write_to_end(),
        "reset-after-fin" => conversation.reset_after_fin(),
        "fin-then-reset" => conversation.fin_then_reset(),
        "leave" => conversation.begin("leave").map(|_closed| json!({})),
        "bulk" => conversation.bulk(),
        "idle" => conversation.idle(),
        "server-first" => conversation.server_first(),
        "slow-reader" => conversation.slow_reader(),
        "slow-read" => conversation.slow_read(),
        "first-byte" => Ok(conversation.first_byte()),
        "trickle" => conversation.trickle(),
        "stay" => conversation.stay(),
        other => Err(io::Error::other(format!("no conversation {other:?}"))),
    };
    seen.unwrap_or_else(|error| json!({"failed": name(&error), "text": error.to_string()}))
}

impl Conversation {
    fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.target, CONNECT)?;
        prepare(&stream)?;
        Ok(stream)
    }

    fn begin(&self, verb: &str) -> io::Result<TcpStream> {
        let mut stream = self.connect()?;
        stream.write_all(format!("{verb} {} {}\n", self.id, self.number).as_bytes())?;
        Ok(stream)
    }

    fn half_close_client(&self) -> io::Result<Value> {
        let mut stream = self.begin("half-close-client")?;
        let mut sent = Seen::default();
        let result = Pattern::new(1).send(&mut stream, BEFORE, &mut sent).and_then(|()| half_close(&stream));
        let mut seen = Seen::default();
        let end = drain(&mut stream, u64::MAX, &mut seen);
        Ok(json!({"end": end, "received": seen.report(), "sent": sent.report(), "write": outcome(&result)}))
    }

    fn half_close_server(&self) -> io::Result<Value> {
        let mut stream = self.begin("half-close-server")?;
        let mut seen = Seen::default();
        let end = drain(&mut stream, u64::MAX, &mut seen);
        let (mut sent, mut pattern, mut result) = (Seen::default(), Pattern::new(8), Ok(()));
        for _ in 0..PIECES {
            thread::sleep(Duration::from_millis(PAUSE_MS));
            result = result.and_then(|()| pattern.send(&mut stream, PIECE, &mut sent));
        }
        Ok(json!({"end": end, "received": seen.report(), "sent": sent.report(), "write": outcome(&result)}))
    }

    fn reset_by_client(&self) -> io::Result<Value> {
        let mut stream = self.begin("reset-by-client")?;
        let mut sent = Seen::default();
        Pattern::new(9).send(&mut stream, PIECE, &mut sent)?;
        // Everything has arrived when the server says so: the reset cannot overtake it.
        let word = line(&mut stream)?;
        wire::reset(stream);
        Ok(json!({"word": word, "sent": sent.report()}))
    }

    fn reset_by_client_upload(&self) -> io::Result<Value> {
        let mut stream = self.begin("sink")?;
        let result = Pattern::new(9).send(&mut stream, MIDDLE, &mut Seen::default());
        wire::reset(stream);
        Ok(json!({"write": outcome(&result)}))
    }

    fn reset_by_client_download(&self) -> io::Result<Value> {
        let mut stream = self.begin("source")?;
        let end = drain(&mut stream, MIDDLE, &mut Seen::default());
        wire::reset(stream);
        Ok(json!({"read": end}))
    }

    fn read_to_end(&self, verb: &str) -> io::Result<Value> {
        let mut stream = self.begin(verb)?;
        Ok(json!({"end": drain(&mut stream, u64::MAX, &mut Seen::default())}))
    }

    fn write_to_end(&self) -> io::Result<Value> {
        let mut stream = self.begin("reset-by-server-upload")?;
        let result = Pattern::new(9).send(&mut stream, u64::MAX / 2, &mut Seen::default());
        Ok(json!({"write": outcome(&result)}))
    }

    fn reset_after_fin(&self) -> io::Result<Value> {
        let mut stream = self.begin("reset-after-fin")?;
        half_close(&stream)?;
        let mut seen = Seen::default();
        let end = drain(&mut stream, u64::MAX, &mut seen);
        Ok(json!({"end": end, "received": seen.report()}))
    }

    /// The server has half-closed; the client answers by a reset.
    fn fin_then_reset(&self) -> io::Result<Value> {
        let mut stream = self.begin("fin-then-reset")?;
        let mut seen = Seen::default();
        let end = drain(&mut stream, u64::MAX, &mut seen);
        wire::reset(stream);
        Ok(json!({"end": end, "received": seen.report()}))
    }

    fn bulk(&self) -> io::Result<Value> {
        let mut stream = self.begin("bulk")?;
        let (mut writing, bytes) = (stream.try_clone()?, self.number);
        let started = Instant::now();
        let writer = thread::spawn(move || {
            let mut sent = Seen::default();
            let result =
                Pattern::new(9).send(&mut writing, bytes, &mut sent).and_then(|()| half_close(&writing));
            json!({"sent": sent.report(), "write": outcome(&result)})
        });
        let mut seen = Seen::default();
        let end = drain(&mut stream, u64::MAX, &mut seen);
        let written = writer.join().unwrap_or_default();
        eprintln!("bulk: {bytes} bytes each way in {:.1} s", started.elapsed().as_secs_f64());
        Ok(json!({"end": end, "received": seen.report(), "sent": written["sent"], "write": written["write"]}))
    }

    /// `number` connections, all open at once, all quiet for a while, all alive afterwards.
    fn idle(&self) -> io::Result<Value> {
        const QUIET: Duration = Duration::from_secs(3);
        let mut streams = Vec::new();
        for index in 0..self.number {
            let mut stream = self.begin("echo")?;
            ask(&mut stream, index)?;
            streams.push(stream);
        }
        thread::sleep(QUIET);
        let mut alive = 0;
        for (index, stream) in (self.number..).zip(&mut streams) {
            match ask(stream, index) {
                Ok(()) => alive += 1,
                Err(error) => eprintln!("connection {index}: {error}"),
            }
        }
        Ok(json!({"opened": self.number, "alive": alive}))
    }

    fn server_first(&self) -> io::Result<Value> {
        let mut stream = self.connect()?;
        let banner = line(&mut stream)?;
        stream.write_all(format!("{}\n", self.id).as_bytes())?;
        let reply = line(&mut stream)?;
        let known = reply.strip_suffix(&self.id).unwrap_or("another's reply");
        let end = drain(&mut stream, u64::MAX, &mut Seen::default());
        Ok(json!({"banner": banner, "reply": known, "end": end}))
    }

    /// The server reads nothing: the writer must block, another conversation must not, and in the end nothing is missing.
    fn slow_reader(&self) -> io::Result<Value> {
        let mut stream = self.begin("slow-reader")?;
        let (mut pattern, mut sent) = (Pattern::new(10), Seen::default());
        stream.set_write_timeout(Some(BLOCKED))?;
        let mut left = Vec::new();
        while sent.bytes < self.number {
            let block = pattern.next(self.number - sent.bytes);
            let mut written = 0;
            while written < block.len() {
                match stream.write(&block[written..]) {
                    Ok(length) => written += length,
                    Err(error) if name(&error) == "timeout" => break,
                    Err(error) => return Err(error),
                }
            }
            sent.take(&block[..written]);
            if written < block.len() {
                left = block[written..].to_vec();
                break;
            }
        }
        let blocked_at = sent.bytes;
        let lively = self.lively();
        self.word("release")?;
        stream.set_write_timeout(Some(wire::PATIENCE))?;
        stream.write_all(&left)?;
        sent.take(&left);
        let rest = self.number - sent.bytes;
        let result = pattern.send(&mut stream, rest, &mut sent).and_then(|()| half_close(&stream));
        let end = drain(&mut stream, u64::MAX, &mut Seen::default());
        eprintln!("slow reader: blocked after {blocked_at} bytes");
        Ok(json!({
            "blocked": blocked_at < self.number, "blocked_at": blocked_at, "lively": lively?,
            "sent": sent.report(), "write": outcome(&result), "end": end,
        }))
    }

    /// The client reads nothing for a while.
    fn slow_read(&self) -> io::Result<Value> {
        let mut stream = self.begin("slow-read")?;
        let (mut before, mut since) = (0, Instant::now());
        while since.elapsed() < BLOCKED {
            thread::sleep(Duration::from_millis(PAUSE_MS));
            let now = self.word("progress")?.parse().map_err(io::Error::other)?;
            if now != before || now == 0 {
                (before, since) = (now, Instant::now());
            }
        }
        let lively = self.lively()?;
        let mut seen = Seen::default();
        let end = drain(&mut stream, u64::MAX, &mut seen);
        eprintln!("slow read: blocked after {before} bytes");
        Ok(json!({
            "blocked": before < self.number, "blocked_at": before, "lively": lively,
            "received": seen.report(), "end": end,
        }))
    }

    /// Whether another conversation with the same server goes on: a hundred questions and 4 MiB each way.
    fn lively(&self) -> io::Result<bool> {
        const QUESTIONS: u64 = 100;
        let started = Instant::now();
        let mut stream = self.begin("echo")?;
        for question in 0..QUESTIONS {
            ask(&mut stream, question)?;
        }
        let beside = Self { id: format!("{}-beside", self.id), number: MIDDLE, ..self.clone() };
        let bulk = beside.bulk()?;
        let took = started.elapsed();
        eprintln!("a conversation beside it took {took:?}");
        Ok(took < LIVELY && bulk["received"]["bytes"] == MIDDLE)
    }

    /// A question to the server on a connection of its own.
    fn word(&self, verb: &str) -> io::Result<String> {
        line(&mut self.begin(verb)?)
    }

    /// Connects, says nothing, and waits for what comes first.
    fn first_byte(&self) -> Value {
        let started = Instant::now();
        let mut stream = match self.connect() {
            Ok(stream) => stream,
            // The reset may come between the handshake and the look at its outcome.
            Err(error) if name(&error) == "ECONNRESET" => {
                return json!({"connect": "ok", "first": "ECONNRESET", "ms": millis(started)});
            }
            Err(error) => return json!({"connect": name(&error), "ms": millis(started)}),
        };
        let mut byte = [0];
        let first = match stream.read(&mut byte) {
            Ok(0) => "eof",
            Ok(_) => "byte",
            Err(error) => name(&error),
        };
        json!({"connect": "ok", "first": first, "ms": millis(started)})
    }

    fn trickle(&self) -> io::Result<Value> {
        let mut stream = self.begin("trickle")?;
        let mut seen = Seen::default();
        // The first line, so that whoever watches knows that it flows.
        line(&mut stream)?;
        println!("{}", json!({"event": "open"}));
        let end = drain(&mut stream, u64::MAX, &mut seen);
        Ok(json!({"end": end, "received": seen.report()}))
    }

    /// Asks twenty times a second until the connection ends or `number` milliseconds are over.
    fn stay(&self) -> io::Result<Value> {
        let mut stream = self.begin("echo")?;
        ask(&mut stream, 0)?;
        println!("{}", json!({"event": "open"}));
        let started = Instant::now();
        let mut asked = 1;
        let end = loop {
            if millis(started) >= self.number {
                break "limit";
            }
            if let Err(error) = ask(&mut stream, asked) {
                break name(&error);
            }
            asked += 1;
            thread::sleep(Duration::from_millis(PAUSE_MS / 2));
        };
        Ok(json!({"end": end, "asked": asked, "ms": millis(started), "at": since_epoch()}))
    }
}

/// One question to an echo.
pub(super) fn ask(stream: &mut TcpStream, question: u64) -> io::Result<()> {
    let question = question.to_be_bytes();
    stream.write_all(&question)?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    if answer == question { Ok(()) } else { Err(io::Error::other("another question's answer")) }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds, to compare with another process's.
fn since_epoch() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
