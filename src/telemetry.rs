//! The log on standard error, and the `/metrics` route.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::net::server::error;
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

/// Standard error, cleared of the status line where both share a terminal.
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

/// Answers what `text` makes, in Prometheus' text format, at `/metrics`.
pub fn metrics_routes<F>(text: F) -> Router
where
    F: Fn() -> prometheus::Result<String> + Send + Sync + 'static,
{
    let text = Arc::new(text);
    let metrics = get(move || {
        let text = Arc::clone(&text);
        async move { metrics_answer(text()) }
    });
    Router::new().route("/metrics", metrics)
}

/// An answer in Prometheus' text format.
#[must_use]
pub fn metrics_answer(text: prometheus::Result<String>) -> Response {
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(wrong) => error(StatusCode::INTERNAL_SERVER_ERROR, &wrong.to_string()),
    }
}
