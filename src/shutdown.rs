//! The first signal stops gently, the second at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How a run is told to end.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Begin nothing new, finish what is under way.
    pub gently: CancellationToken,
    /// Leave everything as it is.
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
