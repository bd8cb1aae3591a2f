//! One outage of the ping system is one warning, however many agents and polls it concerns.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::client::PollError;

/// An outage is over when no poll has failed for so long: answers and failures may alternate.
const QUIET: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct OutageLog {
    stale_after: Duration,
    current: Mutex<Option<Outage>>,
}

#[derive(Debug)]
struct Outage {
    began: Instant,
    last_failure: Instant,
    polls: u64,
}

impl OutageLog {
    /// Of a ping system whose uptimes may be used for `stale_after`.
    #[must_use]
    pub(crate) fn new(stale_after: Duration) -> Self {
        Self {
            stale_after,
            current: Mutex::default(),
        }
    }

    /// A poll had no answer.
    pub(crate) fn failed(&self, error: &PollError) {
        let stale_after = self.stale_after;
        let now = Instant::now();
        let mut outage = self.current.lock();
        let outage = outage.get_or_insert_with(|| {
            tracing::warn!(
                "no good answer from the ping system: uptimes that are known are used for at most {stale_after:?} since they \
                 were received, and without one no job is sent: {error}"
            );
            Outage {
                began: now,
                last_failure: now,
                polls: 0,
            }
        });
        outage.last_failure = now;
        outage.polls += 1;
        tracing::debug!("no good answer from the ping system: {error}");
    }

    /// A poll had an answer.
    pub(crate) fn answered(&self) {
        let mut current = self.current.lock();
        let now = Instant::now();
        if let Some(outage) = &*current
            && now - outage.last_failure >= QUIET
        {
            tracing::info!(
                polls = outage.polls,
                "the ping system answers again, after {} s",
                (now - outage.began).as_secs()
            );
            *current = None;
        }
    }
}
