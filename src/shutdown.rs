//! The first signal stops a part gently, the second at once.

use tokio::signal::unix::{SignalKind, signal};
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
    /// Follows SIGINT and SIGTERM, for as long as the runtime lives.
    ///
    /// # Errors
    /// When the signals cannot be listened to.
    pub fn on_signals() -> std::io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let shutdown = Self::default();
        let told = shutdown.clone();
        // The one task without an owner: it ends with the program.
        tokio::spawn(async move {
            for token in [&told.gently, &told.at_once] {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}
