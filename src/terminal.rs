//! The terminal that results and log may share: colour, width, and the status line that both must
//! clear before they write.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

/// Moves the cursor to the beginning of the line and clears it.
const CLEAR_LINE: &[u8] = b"\r\x1b[2K";

/// Whether the cursor is at the end of a status line.
static STATUS_SHOWN: AtomicBool = AtomicBool::new(false);

/// Notes that a status line was written.
pub fn status_shown() {
    STATUS_SHOWN.store(true, Ordering::Relaxed);
}

/// The bytes to write before anything else: they clear the status line, if there is one.
#[must_use]
pub fn clear_status() -> &'static [u8] {
    if STATUS_SHOWN.swap(false, Ordering::Relaxed) {
        CLEAR_LINE
    } else {
        b""
    }
}

/// Whether `stream` is a terminal whose user wants colour (`NO_COLOR` is empty or not set).
#[must_use]
pub fn wants_colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The width of standard output, if it is a terminal that can move its cursor.
#[must_use]
pub fn columns() -> Option<usize> {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() || std::env::var_os("TERM").is_some_and(|term| term == "dumb") {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(stdout).ok()?;
    Some(if size.ws_col == 0 {
        80
    } else {
        size.ws_col.into()
    })
}

/// Writes text to standard output.
///
/// # Errors
/// When that takes no more.
pub fn print(text: &[u8]) -> anyhow::Result<()> {
    io::stdout()
        .write_all(text)
        .context("standard output cannot be written")
}
