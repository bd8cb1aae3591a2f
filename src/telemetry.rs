//! The log on standard error.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::terminal;

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

/// Standard error; clears the status line first if both share a terminal.
struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if stderr.is_terminal() {
            stderr.write_all(terminal::clear_status())?;
        }
        stderr.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
