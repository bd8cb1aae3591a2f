//! The sampling loop, and the task that writes checkpoints.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use sd_notify::NotifyState;
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::checkpoint::{CheckpointFile, Watermark};
use super::known_gpus::KnownGpus;
use super::ledger::Ledger;
use super::tracker::UptimeTracker;
use crate::agent::probe::gpu::{GpuSnapshot, XidFault};
use crate::agent::probe::prober::Prober;
use crate::clock::SuspendClock;

/// The longest wait for a disk at the end.
const LAST_WRITE: Duration = Duration::from_secs(3);

/// The state that the loop and the routes share.
#[derive(Debug)]
pub(crate) struct AgentState {
    tracker: Mutex<UptimeTracker>,
    clock: SuspendClock,
    started_at: Duration,
    /// Notified when a ping has begun a new window: the watermark must be written.
    pub window_begun: Notify,
    /// Notified when the first probe has ended.
    pub first_probe: Notify,
}

impl AgentState {
    /// `started_at` is the time since the agent's first start now.
    #[must_use]
    pub(crate) fn new(tracker: UptimeTracker, started_at: Duration) -> Self {
        Self {
            tracker: Mutex::new(tracker),
            clock: SuspendClock::start(),
            started_at,
            window_begun: Notify::new(),
            first_probe: Notify::new(),
        }
    }

    /// What is known, including that the machine was suspended, and the time since the agent's first start.
    pub(crate) fn tracker(&self) -> (MutexGuard<'_, UptimeTracker>, Duration) {
        let mut tracker = self.tracker.lock();
        let elapsed = self.clock.elapsed();
        let now = self.started_at.saturating_add(elapsed.total);
        tracker.record_suspend(now, elapsed.suspended);
        (tracker, now)
    }
}

/// Probes at each interval until `stop`, and hands what must survive to the writer.
pub(crate) async fn run(
    shared: &AgentState,
    mut prober: Prober,
    check_interval: Duration,
    checkpoint_every: u64,
    file: CheckpointFile,
    stop: CancellationToken,
) {
    let writer = Arc::new(CheckpointWriter::default());
    let writer_task = tokio::spawn(Arc::clone(&writer).run(file));
    let mut ticks = tokio::time::interval(check_interval);
    // A probe that hung is not followed by several at once: the next one comes at the next whole
    // interval.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut checks: u64 = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = shared.window_begun.notified() => writer.put(None, shared.tracker().0.watermark()),
            _ = ticks.tick() => {
                // A probe that misses its deadline describes the moment when it began.
                let (_, at) = shared.tracker();
                let snapshot = tokio::select! {
                    () = stop.cancelled() => break,
                    snapshot = prober.probe(check_interval) => snapshot,
                };
                log_faults(&snapshot);
                let (mut tracker, _) = shared.tracker();
                let known = tracker.known_gpus().clone();
                let changed = tracker.record_probe(at, snapshot);
                let learned = *tracker.known_gpus() != known;
                if changed {
                    let status = tracker.gpu_status(at).status;
                    tracing::info!("GPU {}: {status}", if tracker.is_up(at) { "up" } else { "down" });
                }
                checks += 1;
                if checks == 1 {
                    shared.first_probe.notify_one();
                    tell_systemd(&[NotifyState::Ready]);
                }
                // This loop is what must not stand still.
                tell_systemd(&[NotifyState::Watchdog]);
                let whole = changed || learned || checks.is_multiple_of(checkpoint_every);
                writer.put(whole.then(|| whole_state(&tracker)), tracker.watermark());
            }
        }
    }
    let (whole, watermark) = {
        let (tracker, _) = shared.tracker();
        (whole_state(&tracker), tracker.watermark())
    };
    writer.put(Some(whole), watermark);
    writer.close();
    if tokio::time::timeout(LAST_WRITE, writer_task).await.is_err() {
        tracing::error!("the disk takes no checkpoint: what came after the last one is lost");
    }
}

fn whole_state(tracker: &UptimeTracker) -> WholeState {
    (tracker.ledger().clone(), tracker.known_gpus().clone())
}

/// Where systemd did not start the agent, this does nothing.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("systemd cannot be told: {error}");
    }
}

fn log_faults(snapshot: &GpuSnapshot) {
    for XidFault {
        gpu,
        xid,
        of_the_application,
    } in &snapshot.faults
    {
        if *of_the_application {
            tracing::info!(gpu, xid, "a fault of the application, not of the GPU");
        } else {
            tracing::warn!(
                gpu,
                xid,
                "a fault of the GPU, which holds until it is reset"
            );
        }
    }
}

/// What a checkpoint holds beside the watermark.
type WholeState = (Ledger, KnownGpus);

/// What is waiting to be written: a slow disk delays no check, and only the latest state counts.
#[derive(Debug, Default)]
struct CheckpointWriter {
    pending: Mutex<Pending>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    whole: Option<(WholeState, Watermark)>,
    watermark: Option<Watermark>,
    closed: bool,
}

impl CheckpointWriter {
    fn put(&self, whole: Option<WholeState>, watermark: Watermark) {
        let mut pending = self.pending.lock();
        if let Some(whole) = whole {
            pending.whole = Some((whole, watermark.clone()));
        }
        pending.watermark = Some(watermark);
        self.filled.notify_one();
    }

    fn close(&self) {
        self.pending.lock().closed = true;
        self.filled.notify_one();
    }

    async fn run(self: Arc<Self>, file: CheckpointFile) {
        let file = Arc::new(file);
        let mut failing = false;
        // It is written again where somebody removed the file, or its folder.
        let mut last = None;
        loop {
            self.filled.notified().await;
            let (whole, watermark, closed) = {
                let mut pending = self.pending.lock();
                (
                    pending.whole.take(),
                    pending.watermark.take(),
                    pending.closed,
                )
            };
            let path = Arc::clone(&file);
            let before = last.take();
            let written = tokio::task::spawn_blocking(move || {
                // The order matters: a watermark refers to a checkpoint that is on disk.
                let is_new = whole.is_some();
                let current: Option<(WholeState, Watermark)> = whole.or(before);
                let must_write = is_new || !path.exists();
                let written = match &current {
                    Some(((ledger, gpus), of)) if must_write => path.write(ledger, of, gpus),
                    _ => Ok(()),
                };
                let written = written.and_then(|()| match (&watermark, &current) {
                    (None, _) => Ok(()),
                    (Some(watermark), Some(((ledger, gpus), _))) if path.is_in_place() => {
                        path.write(ledger, watermark, gpus)
                    }
                    (Some(watermark), _) => path.write_watermark(watermark),
                });
                (written, current)
            });
            let written = match written.await {
                Ok((written, current)) => {
                    last = current;
                    written
                }
                Err(panicked) => Err(std::io::Error::other(panicked)),
            };
            match written {
                Ok(()) if failing => {
                    failing = false;
                    tracing::info!("checkpoint {} is written again", file.path().display());
                }
                Err(error) => {
                    // Retried with the next watermark, unless a newer one is pending by then.
                    let mut pending = self.pending.lock();
                    pending.whole = pending.whole.take().or_else(|| last.take());
                    drop(pending);
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!(
                            "checkpoint {} cannot be written: {error}; after a restart, what is not written counts as unwatched",
                            file.path().display()
                        );
                    }
                }
                _ => {}
            }
            if closed {
                return;
            }
        }
    }
}
