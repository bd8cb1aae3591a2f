//! Looks at GPUs from a thread that may hang, without ever waiting longer than a deadline.

use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::gpu::{Look, Sighting};
use super::source::GpuSource;

/// Keeps one thread for looks; one that is stuck in the driver is abandoned and replaced, at most
/// one at a time, so that a broken driver cannot pile up threads.
#[derive(Debug)]
pub struct Prober {
    source: GpuSource,
    looks: Option<Sender<Look>>,
    /// A look that missed its deadline.
    late: Option<oneshot::Receiver<Sighting>>,
    /// The late look of a thread that was abandoned with it.
    abandoned: Option<oneshot::Receiver<Sighting>>,
}

impl Prober {
    /// Looks in this way.
    #[must_use]
    pub fn new(source: GpuSource) -> Self {
        Self {
            source,
            looks: None,
            late: None,
            abandoned: None,
        }
    }

    /// One look. One that takes longer than `deadline` finds nothing.
    pub async fn look(&mut self, deadline: Duration) -> Sighting {
        if is_over(&mut self.abandoned) {
            self.abandoned = None;
        }
        if is_over(&mut self.late) {
            self.late = None;
        } else if self.late.is_some() {
            if self.abandoned.is_some() {
                return Sighting::nothing("timeout: two looks hang in the driver");
            }
            tracing::warn!("a look hangs in the driver: trying again on another thread");
            self.abandoned = self.late.take();
            self.looks = None;
        }
        let (answer, mut answered) = oneshot::channel();
        if let Err(error) = self.ask(answer) {
            return Sighting::nothing(format!("no thread to look from: {error}"));
        }
        match tokio::time::timeout(deadline, &mut answered).await {
            Ok(Ok(sighting)) => sighting,
            Ok(Err(_)) => {
                self.looks = None;
                Sighting::nothing("the look ended without a result")
            }
            Err(_) => {
                self.late = Some(answered);
                Sighting::nothing("timeout: the driver does not answer")
            }
        }
    }

    fn ask(&mut self, look: Look) -> std::io::Result<()> {
        if let Some(looks) = &self.looks {
            if looks.send(look).is_ok() {
                return Ok(());
            }
            self.looks = None;
            return Err(std::io::Error::other("it ended"));
        }
        let (sender, looks) = channel();
        let probe = self.source.probe();
        // Not joined: a thread that is stuck in the driver would hold up the program's end.
        thread::Builder::new()
            .name("gpu".into())
            .spawn(move || probe.serve(&looks))?;
        let sent = sender
            .send(look)
            .map_err(|_| std::io::Error::other("it ended"));
        self.looks = Some(sender);
        sent
    }
}

/// Whether a late look has come to its end after all.
fn is_over(late: &mut Option<oneshot::Receiver<Sighting>>) -> bool {
    late.as_mut()
        .is_some_and(|late| late.try_recv() != Err(TryRecvError::Empty))
}
