//! The first signal stops a part gently, the second at once.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The tokens that end a part.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Start nothing new, finish what is in progress.
    pub gently: CancellationToken,
    /// Return at once.
    pub at_once: CancellationToken,
}

impl Shutdown {
    /// Follows SIGINT, SIGTERM and, unless it was ignored at the start (nohup), SIGHUP, for as long as the runtime lives.
    ///
    /// # Errors
    /// When the signals cannot be listened to.
    pub fn on_signals() -> std::io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = if is_hangup_ignored() {
            None
        } else {
            Some(signal(SignalKind::hangup())?)
        };
        let shutdown = Self::default();
        let told = shutdown.clone();
        // The one task without an owner: it ends with the program.
        tokio::spawn(async move {
            for token in [&told.gently, &told.at_once] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    () = received(&mut hangup) => {}
                }
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether this process was started with SIGHUP ignored. Listening to it would end that.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Signals are counted from 1, and SIGHUP is the first.
    mask.is_some_and(|mask| mask & 1 == 1)
}
