//! Probes GPUs on a thread that may hang, and never waits longer than a deadline.

use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

use super::gpu::{GpuSnapshot, ProbeRequest};
use super::source::GpuSource;

/// Runs probes on one thread. A thread that is stuck in the driver is abandoned and replaced, at most one
/// at a time, so that a broken driver cannot pile up threads.
#[derive(Debug)]
pub(crate) struct Prober {
    source: GpuSource,
    requests: Option<Sender<ProbeRequest>>,
    /// The probe that missed its deadline.
    late: Option<oneshot::Receiver<GpuSnapshot>>,
    /// The late probe of the abandoned thread.
    abandoned: Option<oneshot::Receiver<GpuSnapshot>>,
}

impl Prober {
    /// Probes `source`.
    #[must_use]
    pub(crate) fn new(source: GpuSource) -> Self {
        Self {
            source,
            requests: None,
            late: None,
            abandoned: None,
        }
    }

    /// Probes once. A probe that takes longer than `deadline` finds nothing.
    pub(crate) async fn probe(&mut self, deadline: Duration) -> GpuSnapshot {
        if is_over(&mut self.abandoned) {
            self.abandoned = None;
        }
        if is_over(&mut self.late) {
            self.late = None;
        } else if self.late.is_some() {
            if self.abandoned.is_some() {
                return GpuSnapshot::nothing("timeout: two probes hang in the driver");
            }
            tracing::warn!("a probe hangs in the driver: trying again on another thread");
            self.abandoned = self.late.take();
            self.requests = None;
        }
        let (answer, mut answered) = oneshot::channel();
        if let Err(error) = self.ask(answer) {
            return GpuSnapshot::nothing(format!("no thread to probe from: {error}"));
        }
        match tokio::time::timeout(deadline, &mut answered).await {
            Ok(Ok(snapshot)) => snapshot,
            Ok(Err(_)) => {
                self.requests = None;
                GpuSnapshot::nothing("the probe ended without a result")
            }
            Err(_) => {
                self.late = Some(answered);
                GpuSnapshot::nothing("timeout: the driver does not answer")
            }
        }
    }

    fn ask(&mut self, request: ProbeRequest) -> std::io::Result<()> {
        if let Some(requests) = &self.requests {
            if requests.send(request).is_ok() {
                return Ok(());
            }
            self.requests = None;
            return Err(std::io::Error::other("it ended"));
        }
        let (sender, requests) = channel();
        let probe = self.source.probe();
        // Not joined: a thread that is stuck in the driver would block the program's end.
        thread::Builder::new()
            .name("gpu".into())
            .spawn(move || probe.serve(&requests))?;
        let sent = sender
            .send(request)
            .map_err(|_| std::io::Error::other("it ended"));
        self.requests = Some(sender);
        sent
    }
}

/// Whether a late probe has ended after all.
fn is_over(late: &mut Option<oneshot::Receiver<GpuSnapshot>>) -> bool {
    late.as_mut()
        .is_some_and(|late| late.try_recv() != Err(TryRecvError::Empty))
}
