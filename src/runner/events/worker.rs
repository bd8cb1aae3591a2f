//! A thread beside the runtime, joined at the end.

use std::io;
use std::thread::JoinHandle;

use parking_lot::Mutex;

/// A running thread.
#[derive(Debug)]
pub(crate) struct Worker {
    name: &'static str,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Worker {
    /// Starts it.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(
        name: &'static str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work)?;
        Ok(Self {
            name,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Joins the thread. Its queue must have been closed before.
    ///
    /// # Errors
    /// When it panicked.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        let thread = self.thread.lock().take();
        let Some(thread) = thread else {
            return Ok(());
        };
        match tokio::task::spawn_blocking(|| thread.join()).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(io::Error::other(format!(
                "the thread '{}' panicked",
                self.name
            ))),
        }
    }
}
