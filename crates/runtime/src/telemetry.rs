//! Log lines: text or JSON, written by a thread of their own behind a bounded queue, filtered by a rule that can change
//! while the process runs.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::Dispatch;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::{EnvFilter, Registry};

/// Target of access log lines, one for each finished connection or request: `tracing::info!(target: ACCESS, ...)`.
pub const ACCESS: &str = "access";

/// Lines that may wait for the writer; then whoever logs waits, so that a line is late rather than lost.
/// 10,000 lines of the usual 300 bytes are 3 MB; at the longest allowed line, 160 MB.
pub const QUEUE_LINES: usize = 10_000;

/// Longer lines are cut here.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

/// How long dropping the handle waits for the queue to be written.
const FLUSH: Duration = Duration::from_secs(5);
/// How often a flush looks for room in a full queue.
const FLUSH_RETRY: Duration = Duration::from_millis(5);

/// The shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, fields at the top level.
    Json,
}

/// Keeps the log alive: dropping it writes what is queued (for at most 5 s). Hold it until the end of `main`.
#[derive(Debug)]
pub struct TelemetryHandle {
    filter: FilterHandle,
    queue: SyncSender<Message>,
}

/// Changes what is logged; clones change the same filter. For the admin server's `/logging`.
#[derive(Debug, Clone)]
pub struct FilterHandle {
    reload: reload::Handle<EnvFilter, Registry>,
    /// What the program was started with.
    first: Arc<str>,
}

/// Telemetry could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// Not a filter such as `info` or `info,culvert_xds=debug`.
    #[error("{filter:?} is not a log filter: {reason}")]
    Filter {
        /// The text that was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Something else in this process has set up logging.
    #[error("logging is already set up")]
    AlreadySet,
    /// The writer thread did not start.
    #[error("cannot start the log writer")]
    Thread(#[source] io::Error),
}

enum Message {
    Line(Vec<u8>),
    /// Everything before this is to be written; then the sender of the reply is dropped.
    Flush(SyncSender<()>),
}

/// Sets up logging to standard output for the whole process.
///
/// # Errors
/// If the filter is not one, logging was set up before, or the writer cannot start.
pub fn init(format: Format, filter: &str) -> Result<TelemetryHandle, TelemetryError> {
    let (dispatch, handle) = build(format, filter, io::stdout())?;
    tracing::dispatcher::set_global_default(dispatch).map_err(|_| TelemetryError::AlreadySet)?;
    Ok(handle)
}

/// As [`init`], to any output, without making it the process's own.
///
/// # Errors
/// If the filter is not one, or the writer cannot start.
pub fn build<W: Write + Send + 'static>(
    format: Format,
    filter: &str,
    output: W,
) -> Result<(Dispatch, TelemetryHandle), TelemetryError> {
    let first = filter.into();
    let (filter, reload) = reload::Layer::new(parse(filter)?);
    let (queue, lines) = mpsc::sync_channel(QUEUE_LINES);
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_lines(&lines, output))
        .map_err(TelemetryError::Thread)?;
    let subscriber = Registry::default().with(filter);
    let layer = fmt::layer().with_timer(UtcMicros).with_writer(Queue(queue.clone())).with_ansi(false);
    let dispatch = match format {
        Format::Text => Dispatch::new(subscriber.with(layer)),
        Format::Json => {
            Dispatch::new(subscriber.with(layer.json().flatten_event(true).with_span_list(false)))
        }
    };
    Ok((dispatch, TelemetryHandle { filter: FilterHandle { reload, first }, queue }))
}

fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    EnvFilter::builder()
        .with_regex(false)
        .parse(filter)
        .map_err(|error| TelemetryError::Filter { filter: filter.to_owned(), reason: error.to_string() })
}

impl TelemetryHandle {
    /// The part that changes the filter, to hand to the admin server.
    #[must_use]
    pub fn filter(&self) -> FilterHandle {
        self.filter.clone()
    }

    /// Changes what is logged from now on.
    ///
    /// # Errors
    /// If the filter is not one; the old one stays.
    pub fn set_filter(&self, filter: &str) -> Result<(), TelemetryError> {
        self.filter.set(filter)
    }

    /// Waits until every line logged before is written, for at most `timeout`; whether it was.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let (reply, done) = mpsc::sync_channel(1);
        let mut message = Message::Flush(reply);
        // The queue is full when the reader of the log is slow or stuck; it must not keep the process from ending.
        while let Err(error) = self.queue.try_send(message) {
            let TrySendError::Full(back) = error else { return false };
            if Instant::now() >= deadline {
                return false;
            }
            message = back;
            thread::sleep(FLUSH_RETRY);
        }
        done.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

impl FilterHandle {
    /// The filter in force.
    #[must_use]
    pub fn get(&self) -> String {
        self.reload.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Changes what is logged from now on.
    ///
    /// # Errors
    /// If the filter is not one; the old one stays.
    pub fn set(&self, filter: &str) -> Result<(), TelemetryError> {
        let parsed = parse(filter)?;
        // Reloading fails only once the subscriber is gone, when nothing logs any more.
        let _ = self.reload.reload(parsed);
        Ok(())
    }

    /// Logs again what was logged at the start.
    ///
    /// # Errors
    /// None in fact: that filter was accepted once.
    pub fn reset(&self) -> Result<(), TelemetryError> {
        self.set(&self.first)
    }
}

impl Drop for TelemetryHandle {
    fn drop(&mut self) {
        self.flush(FLUSH);
    }
}

/// Makes a writer for each line.
struct Queue(SyncSender<Message>);

struct Line<'a> {
    queue: &'a SyncSender<Message>,
    bytes: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { queue: &self.0, bytes: Vec::new() }
    }
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let mut line = std::mem::take(&mut self.bytes);
        if line.len() > MAX_LINE_BYTES {
            line.truncate(MAX_LINE_BYTES - 4);
            line.extend_from_slice(b"...\n");
        }
        if !line.is_empty() {
            // Fails only if the writer thread is gone, and then there is nowhere to say so.
            let _ = self.queue.send(Message::Line(line));
        }
    }
}

fn write_lines(lines: &Receiver<Message>, output: impl Write) {
    // Batches the lines of a burst into one write; an empty queue flushes.
    let mut output = io::BufWriter::with_capacity(64 * 1024, output);
    loop {
        let message = match lines.try_recv() {
            Ok(message) => message,
            Err(_) => {
                let _ = output.flush();
                let Ok(message) = lines.recv() else { return };
                message
            }
        };
        match message {
            // A reader that went away (a closed pipe) must not end the process.
            Message::Line(line) => drop(output.write_all(&line)),
            Message::Flush(reply) => {
                let _ = output.flush();
                let _ = reply.send(());
            }
        }
    }
}

/// RFC 3339 in UTC with six digits of microseconds.
struct UtcMicros;

impl FormatTime for UtcMicros {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        writer.write_str(&timestamp(OffsetDateTime::now_utc()))
    }
}

/// A time as log lines show it: `2026-01-02T03:04:05.000006Z`.
#[must_use]
pub fn timestamp(time: OffsetDateTime) -> String {
    const FORMAT: &[BorrowedFormatItem<'_>] =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
    time.to_offset(time::UtcOffset::UTC).format(FORMAT).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn lines(&self) -> Vec<String> {
            String::from_utf8(self.0.lock().clone()).unwrap().lines().map(str::to_owned).collect()
        }
    }

    /// Z109.
    #[test]
    fn json_lines_have_a_timestamp_and_flat_fields() {
        let sink = Sink::default();
        let (dispatch, handle) = build(Format::Json, "info", sink.clone()).unwrap();
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::info!(target: ACCESS, bytes = 7, "done");
            tracing::debug!("not shown");
        });
        drop(handle);
        let lines = sink.lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        let line: serde_json::Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(
            (&line["target"], &line["bytes"], &line["message"]),
            (&"access".into(), &7.into(), &"done".into())
        );
        let time = line["timestamp"].as_str().unwrap();
        assert!(time.len() == 27 && time.ends_with('Z') && &time[10..11] == "T", "{time}");
    }

    /// Z109.
    #[test]
    fn the_filter_changes_at_run_time() {
        let sink = Sink::default();
        let (dispatch, handle) = build(Format::Text, "warn", sink.clone()).unwrap();
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::info!("first");
            handle.set_filter("debug").unwrap();
            assert_eq!(handle.filter().get(), "debug");
            tracing::debug!("second");
            assert!(matches!(handle.set_filter("a=b=c"), Err(TelemetryError::Filter { .. })));
            tracing::debug!("third");
        });
        assert!(handle.flush(FLUSH));
        let text = sink.lines().join("\n");
        assert!(!text.contains("first") && text.contains("second") && text.contains("third"), "{text}");
    }

    /// Z109.
    #[test]
    fn a_burst_longer_than_the_queue_loses_nothing() {
        let sink = Sink::default();
        let (dispatch, handle) = build(Format::Text, "info", sink.clone()).unwrap();
        tracing::dispatcher::with_default(&dispatch, || {
            for line in 0..QUEUE_LINES + 500 {
                tracing::info!(line, "burst");
            }
            tracing::info!("{}", "x".repeat(2 * MAX_LINE_BYTES));
        });
        drop(handle);
        let lines = sink.lines();
        assert_eq!(lines.len(), QUEUE_LINES + 501);
        assert_eq!(lines.last().map(String::len), Some(MAX_LINE_BYTES - 1));
    }

    #[test]
    fn timestamps_are_utc_micros() {
        let time = OffsetDateTime::from_unix_timestamp_nanos(1_767_323_045_000_006_789).unwrap();
        assert_eq!(timestamp(time), "2026-01-02T03:04:05.000006Z");
    }
}
