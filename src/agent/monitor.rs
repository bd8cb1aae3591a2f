//! The sampling loop, and the writing of what it learns.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::checkpoint::{CheckpointFile, Note};
use super::ledger::Ledger;
use super::tracker::Watch;
use crate::agent::probe::prober::Prober;

/// The longest wait for a disk at the end.
const LAST_WRITE: Duration = Duration::from_secs(5);

/// What the loop and the routes share.
#[derive(Debug)]
pub struct Shared {
    watch: Mutex<Watch>,
    started: Instant,
    started_at: Duration,
    /// A ping has begun a new window, which the note must keep.
    pub window_begun: Notify,
    /// The first look at the GPUs is over.
    pub first_look: Notify,
}

impl Shared {
    /// `started_at` is the time since the agent's first start now.
    #[must_use]
    pub fn new(watch: Watch, started_at: Duration) -> Self {
        Self {
            watch: Mutex::new(watch),
            started: Instant::now(),
            started_at,
            window_begun: Notify::new(),
            first_look: Notify::new(),
        }
    }

    /// Time since the agent's first start.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.started_at + self.started.elapsed()
    }

    /// What is known.
    pub fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock()
    }
}

/// Checks at each interval until `stop`, and has everything written that must survive.
pub async fn run(
    shared: &Shared,
    mut prober: Prober,
    check_interval: Duration,
    checkpoint_every: u64,
    file: CheckpointFile,
    stop: CancellationToken,
) {
    let desk = Arc::new(Desk::default());
    let clerk = tokio::spawn(Arc::clone(&desk).write_all_to(file));
    let mut ticks = tokio::time::interval(check_interval);
    // A look that hung does not lead to several at once: the next one is at the next whole
    // interval.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut checks: u64 = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = shared.window_begun.notified() => desk.put(None, shared.watch().note()),
            _ = ticks.tick() => {
                // A look that misses its deadline says something of when it began.
                let at = shared.now();
                let sighting = tokio::select! {
                    () = stop.cancelled() => break,
                    sighting = prober.look(check_interval) => sighting,
                };
                let said = sighting.to_string();
                let mut watch = shared.watch();
                let changed = watch.checked(at, sighting);
                if changed {
                    tracing::info!("GPU {}: {said}", if watch.is_up(at) { "up" } else { "down" });
                }
                checks += 1;
                if checks == 1 {
                    shared.first_look.notify_one();
                }
                let whole = changed || checks.is_multiple_of(checkpoint_every);
                desk.put(whole.then(|| watch.ledger().clone()), watch.note());
            }
        }
    }
    let (ledger, note) = {
        let watch = shared.watch();
        (watch.ledger().clone(), watch.note())
    };
    desk.put(Some(ledger), note);
    desk.close();
    if tokio::time::timeout(LAST_WRITE, clerk).await.is_err() {
        tracing::error!("the disk takes no checkpoint: what came after the last one is lost");
    }
}

/// What waits to be written: a slow disk delays no check, and only the latest counts.
#[derive(Debug, Default)]
struct Desk {
    papers: Mutex<Papers>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Papers {
    ledger: Option<(Ledger, Note)>,
    note: Option<Note>,
    closed: bool,
}

impl Desk {
    fn put(&self, ledger: Option<Ledger>, note: Note) {
        let mut papers = self.papers.lock();
        if let Some(ledger) = ledger {
            papers.ledger = Some((ledger, note.clone()));
        }
        papers.note = Some(note);
        self.filled.notify_one();
    }

    fn close(&self) {
        self.papers.lock().closed = true;
        self.filled.notify_one();
    }

    async fn write_all_to(self: Arc<Self>, file: CheckpointFile) {
        let file = Arc::new(file);
        let mut complained = false;
        loop {
            self.filled.notified().await;
            let (ledger, note, closed) = {
                let mut papers = self.papers.lock();
                (papers.ledger.take(), papers.note.take(), papers.closed)
            };
            let path = Arc::clone(&file);
            let written = tokio::task::spawn_blocking(move || {
                // The note belongs to a checkpoint that is written already.
                let whole = ledger
                    .as_ref()
                    .map_or(Ok(()), |(ledger, of)| path.write(ledger, of));
                let written =
                    whole.and_then(|()| note.map_or(Ok(()), |note| path.write_note(&note)));
                (written, ledger)
            });
            match written.await {
                Ok((Ok(()), _)) if complained => {
                    complained = false;
                    tracing::info!("checkpoint {} is written again", file.path().display());
                }
                Ok((Err(error), unwritten)) => {
                    // Goes with the next note, unless a newer one is there by then.
                    let mut papers = self.papers.lock();
                    papers.ledger = papers.ledger.take().or(unwritten);
                    drop(papers);
                    if !std::mem::replace(&mut complained, true) {
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
