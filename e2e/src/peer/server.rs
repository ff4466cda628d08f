//! The server: `VERB ID [NUMBER]` on the first line says what it shall do; what it saw goes to standard output, one line
//! of JSON with that ID.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Condvar, LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::wire::{self, PATIENCE, Pattern, Seen, drain, half_close, line, name, outcome, prepare};
use super::{
    BANNER, BANNER_PORT, BEFORE, CLOSE_PORT, COMMAND_PORT, FIRST_EXTRA_PORT, MIDDLE, PAUSE_MS, PIECE, PIECES,
    RESET_PORT,
};

/// A thread's stack: nothing here recurses. 1,000 idle connections take 256 MB of address space at most.
const STACK: usize = 256 * 1024;
/// Connections waiting to be accepted: a test opens 1,000 at once.
const BACKLOG: i32 = 4096;

/// What slow conversations wait for, and how far they came, by ID.
#[derive(Debug, Default)]
struct Board {
    released: Mutex<HashMap<String, bool>>,
    changed: Condvar,
    progress: Mutex<HashMap<String, u64>>,
}

static BOARD: LazyLock<Board> = LazyLock::new(Board::default);

/// Serves until the process ends. `extra` more ports do what the command port does.
///
/// # Errors
/// A port that cannot be listened on.
pub fn run(extra: u16) -> io::Result<()> {
    let mut listeners = vec![
        listen(COMMAND_PORT, command)?,
        listen(BANNER_PORT, banner)?,
        listen(RESET_PORT, wire::reset)?,
        listen(CLOSE_PORT, drop)?,
    ];
    for port in FIRST_EXTRA_PORT..FIRST_EXTRA_PORT + extra {
        listeners.push(listen(port, command)?);
    }
    println!("{}", json!({"event": "listening", "ports": listeners.len()}));
    for listener in listeners {
        let _ = listener.join();
    }
    Ok(())
}

fn listen(port: u16, serve: fn(TcpStream)) -> io::Result<thread::JoinHandle<()>> {
    // Both families on one socket.
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&std::net::SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    thread::Builder::new().stack_size(STACK).spawn(move || {
        for stream in listener.incoming().flatten() {
            // A machine out of threads drops the connection, and the client says so.
            let _ = thread::Builder::new().stack_size(STACK).spawn(move || serve(stream));
        }
    })
}

fn banner(mut stream: TcpStream) {
    let _ = prepare(&stream);
    let said = stream.write_all(BANNER.as_bytes()).and_then(|()| line(&mut stream));
    match said {
        Ok(id) => {
            let _ = stream.write_all(format!("250 {id}\n").as_bytes());
            report(&id, json!({"heard": true}));
        }
        Err(error) => report("-", json!({"banner": name(&error)})),
    }
}

fn command(mut stream: TcpStream) {
    let _ = prepare(&stream);
    let Ok(text) = line(&mut stream) else { return };
    let mut words = text.split(' ');
    let (verb, id) = (words.next().unwrap_or(""), words.next().unwrap_or("").to_owned());
    let number = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    match verb {
        "echo" => echo(stream),
        "release" => release(&mut stream, &id),
        "progress" => progress(&mut stream, &id),
        "trickle" => trickle(&mut stream, number),
        "half-close-client" => report(&id, half_close_client(stream)),
        "half-close-server" => report(&id, half_close_server(stream)),
        "reset-by-client" => report(&id, reset_by_client(stream)),
        "sink" => report(&id, sink(stream)),
        "source" => report(&id, source(stream)),
        "reset-by-server" => report(&id, reset_by_server(stream, 0, 0)),
        "reset-by-server-upload" => report(&id, reset_by_server(stream, MIDDLE, 0)),
        "reset-by-server-download" => report(&id, reset_by_server(stream, 0, MIDDLE)),
        "reset-after-fin" => report(&id, reset_after_fin(stream)),
        "fin-then-reset" => report(&id, half_close_server(stream)),
        "leave" => report(&id, left(stream)),
        "bulk" => report(&id, bulk(stream, number)),
        "slow-reader" => report(&id, slow_reader(stream, &id)),
        "slow-read" => report(&id, counted_source(stream, &id, number)),
        _ => report(&id, json!({"error": format!("no verb {verb:?}")})),
    }
}

/// One line, whole, even when many conversations end at once.
fn report(id: &str, mut observed: Value) {
    observed["id"] = id.into();
    println!("{observed}");
}

/// Gives everything back until the client ends.
fn echo(mut stream: TcpStream) {
    // Idle connections are part of the test: no timeout.
    let _ = stream.set_read_timeout(None);
    let mut block = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut block) {
        if stream.write_all(&block[..length]).is_err() {
            return;
        }
    }
}

/// `number` lines, a tenth of a second apart.
fn trickle(stream: &mut TcpStream, number: u64) {
    for index in 0..number {
        if stream.write_all(format!("{index}\n").as_bytes()).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(PAUSE_MS));
    }
}

fn release(stream: &mut TcpStream, id: &str) {
    BOARD.released.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned(), true);
    BOARD.changed.notify_all();
    let _ = stream.write_all(b"released\n");
}

fn progress(stream: &mut TcpStream, id: &str) {
    let bytes = BOARD.progress.lock().unwrap_or_else(PoisonError::into_inner).get(id).copied().unwrap_or(0);
    let _ = stream.write_all(format!("{bytes}\n").as_bytes());
}

fn half_close_client(mut stream: TcpStream) -> Value {
    let mut seen = Seen::default();
    let end = drain(&mut stream, u64::MAX, &mut seen);
    let mut pattern = Pattern::new(2);
    let mut sent = Seen::default();
    let mut result = Ok(());
    for _ in 0..PIECES {
        thread::sleep(Duration::from_millis(PAUSE_MS));
        result = result.and_then(|()| pattern.send(&mut stream, PIECE, &mut sent));
    }
    json!({"end": end, "received": seen.report(), "sent": sent.report(), "write": outcome(&result)})
}

fn half_close_server(mut stream: TcpStream) -> Value {
    let mut sent = Seen::default();
    let result = Pattern::new(3).send(&mut stream, BEFORE, &mut sent).and_then(|()| half_close(&stream));
    let mut seen = Seen::default();
    let end = drain(&mut stream, u64::MAX, &mut seen);
    json!({"end": end, "received": seen.report(), "sent": sent.report(), "write": outcome(&result)})
}

fn reset_by_client(mut stream: TcpStream) -> Value {
    let mut seen = Seen::default();
    drain(&mut stream, PIECE, &mut seen);
    let result = stream.write_all(b"go\n");
    let end = drain(&mut stream, u64::MAX, &mut seen);
    json!({"end": end, "received": seen.report(), "write": outcome(&result)})
}

/// Reads everything. How much arrived before a reset is a matter of luck, so it is not told.
fn sink(mut stream: TcpStream) -> Value {
    json!({"end": drain(&mut stream, u64::MAX, &mut Seen::default())})
}

/// Writes until it cannot.
fn source(mut stream: TcpStream) -> Value {
    let result = Pattern::new(4).send(&mut stream, u64::MAX / 2, &mut Seen::default());
    json!({"write": outcome(&result)})
}

fn reset_by_server(mut stream: TcpStream, read: u64, write: u64) -> Value {
    let mut seen = Seen::default();
    drain(&mut stream, read, &mut seen);
    let result = Pattern::new(5).send(&mut stream, write, &mut Seen::default());
    wire::reset(stream);
    json!({"read": seen.bytes, "write": outcome(&result)})
}

/// The client has half-closed and gets an answer that is cut.
fn reset_after_fin(mut stream: TcpStream) -> Value {
    let mut seen = Seen::default();
    let end = drain(&mut stream, u64::MAX, &mut seen);
    let result = Pattern::new(5).send(&mut stream, PIECE, &mut Seen::default());
    thread::sleep(Duration::from_millis(PAUSE_MS));
    wire::reset(stream);
    json!({"end": end, "received": seen.report(), "write": outcome(&result)})
}

/// The client has closed for good: somebody must say so to a writer.
fn left(mut stream: TcpStream) -> Value {
    let end = drain(&mut stream, u64::MAX, &mut Seen::default());
    let result = Pattern::new(5).send(&mut stream, u64::MAX / 2, &mut Seen::default());
    json!({"end": end, "write": outcome(&result)})
}

/// `bytes` each way at once.
fn bulk(mut stream: TcpStream, bytes: u64) -> Value {
    let Ok(mut writing) = stream.try_clone() else { return json!({"error": "no descriptor"}) };
    let writer = thread::spawn(move || {
        let mut sent = Seen::default();
        let result = Pattern::new(6).send(&mut writing, bytes, &mut sent).and_then(|()| half_close(&writing));
        json!({"sent": sent.report(), "write": outcome(&result)})
    });
    let mut seen = Seen::default();
    let end = drain(&mut stream, u64::MAX, &mut seen);
    let written = writer.join().unwrap_or_default();
    json!({"end": end, "received": seen.report(), "sent": written["sent"], "write": written["write"]})
}

/// Reads nothing until it is released.
fn slow_reader(mut stream: TcpStream, id: &str) -> Value {
    let released = BOARD.released.lock().unwrap_or_else(PoisonError::into_inner);
    let waiting = BOARD.changed.wait_timeout_while(released, PATIENCE, |released| !released.contains_key(id));
    let told = waiting.is_ok_and(|(_, wait)| !wait.timed_out());
    let mut seen = Seen::default();
    let end = drain(&mut stream, u64::MAX, &mut seen);
    json!({"released": told, "end": end, "received": seen.report()})
}

/// Writes `bytes` and tells those who ask how far it is.
fn counted_source(mut stream: TcpStream, id: &str, bytes: u64) -> Value {
    let mut sent = Seen::default();
    let mut pattern = Pattern::new(7);
    let mut result = Ok(());
    while sent.bytes < bytes && result.is_ok() {
        let block = pattern.next(bytes - sent.bytes);
        let mut rest = block;
        while !rest.is_empty() && result.is_ok() {
            match stream.write(rest) {
                Ok(length) => {
                    sent.take(&rest[..length]);
                    rest = &rest[length..];
                    let mut progress = BOARD.progress.lock().unwrap_or_else(PoisonError::into_inner);
                    progress.insert(id.to_owned(), sent.bytes);
                }
                Err(error) => result = Err(error),
            }
        }
    }
    json!({"sent": sent.report(), "write": outcome(&result)})
}
