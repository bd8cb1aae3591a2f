//! The log on standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::terminal;
use crate::text::is_printable;

/// Starts the log: `RUST_LOG`, or from `info` upwards.
///
/// # Errors
/// When `RUST_LOG` cannot be read.
pub fn start_log() -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(directives) if !directives.is_empty() => directives.parse::<Targets>().with_context(
            || format!("RUST_LOG='{directives}' is not a log filter: expected for example info or uptime_runner=debug"),
        )?,
        _ => Targets::new().with_default(LevelFilter::INFO),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(terminal::wants_colour(&io::stderr()))
        .with_target(false)
        .with_writer(|| LogWriter);
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    Ok(())
}

/// Lines that wait for standard error.
const QUEUE_LINES: usize = 4096;

/// Hands lines to a thread of its own: the reader of standard error may stop, and no task may wait for that.
struct LogQueue {
    lines: SyncSender<Message>,
    lost: AtomicU64,
}

enum Message {
    Line(Vec<u8>),
    /// To be answered when all before it is written.
    Flush(SyncSender<()>),
}

static QUEUE: LazyLock<LogQueue> = LazyLock::new(|| {
    let (lines, queued) = sync_channel(QUEUE_LINES);
    // Without the thread the queue fills, and lines are lost.
    let _ = thread::Builder::new()
        .name("log".into())
        .spawn(move || write_lines(&queued));
    LogQueue {
        lines,
        lost: AtomicU64::new(0),
    }
});

fn write_lines(queued: &Receiver<Message>) {
    for message in queued {
        match message {
            Message::Line(line) => {
                write(&line);
                let lost = QUEUE.lost.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    write(
                        format!("{lost} lines of the log are lost: standard error took no more\n")
                            .as_bytes(),
                    );
                }
            }
            // Whoever asked may have given up.
            Message::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

/// Clears the status line first if both share a terminal.
fn write(line: &[u8]) {
    let mut stderr = io::stderr().lock();
    if stderr.is_terminal() {
        let _ = stderr.write_all(terminal::clear_status());
    }
    // There is nowhere to tell that it cannot be written.
    let _ = stderr.write_all(line);
}

/// Writes a line to standard error after all that was logged, and never waits.
pub fn say(line: &str) {
    QUEUE.push(format!("{line}\n").into_bytes());
}

/// Waits until all is written, but not for longer than `patience`.
pub fn flush(patience: Duration) {
    let (done, written) = sync_channel(1);
    if QUEUE.lines.try_send(Message::Flush(done)).is_ok() {
        let _ = written.recv_timeout(patience);
    }
}

impl LogQueue {
    fn push(&self, line: Vec<u8>) {
        if self.lines.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What a field of an event brings in must not begin another line, nor change how a terminal shows this one. Escape
/// sequences are the log's own colours: the formatter escapes all others.
fn on_one_line(line: &str) -> String {
    let line = line.strip_suffix('\n').unwrap_or(line);
    let mut safe = String::with_capacity(line.len() + 1);
    for c in line.chars() {
        if c == '\u{1b}' || c == ' ' || is_printable(c) {
            safe.push(c);
        } else {
            safe.extend(c.escape_unicode());
        }
    }
    safe.push('\n');
    safe
}

/// A line of the log; it is formatted as a whole before it is written.
struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        QUEUE.push(on_one_line(&String::from_utf8_lossy(bytes)).into_bytes());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_its_fields_hold() {
        assert_eq!(
            on_one_line("\u{1b}[32mINFO\u{1b}[0m a\nb\0\r\u{202e}c\n"),
            "\u{1b}[32mINFO\u{1b}[0m a\\u{a}b\\u{0}\\u{d}\\u{202e}c\n"
        );
    }
}
