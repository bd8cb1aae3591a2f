//! Deletes what is older than the retention, a little at a time.
//!
//! The age of a ping is the time for which the ping system has run since: a clock that is set, or that is wrong at the
//! start, makes nothing older. What it costs is that the time between two runs does not count.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

use super::clock::PingClock;
use super::store::{PruneCursor, Store, StoreError};
use crate::clock::since_boot;
use crate::units::{saturating_add, saturating_sub};

/// The pause between two steps, so that pings do not wait behind them.
const STEP_PAUSE: Duration = Duration::from_millis(100);
/// The time between two rounds over all agents.
const MAX_ROUND: Duration = Duration::from_mins(10);
const MIN_ROUND: Duration = Duration::from_secs(1);

/// Prunes until `stop`.
pub(crate) async fn run(
    store: Arc<dyn Store>,
    clock: Arc<PingClock>,
    retention: Duration,
    stop: CancellationToken,
) {
    let round = (retention / 10).clamp(MIN_ROUND, MAX_ROUND);
    let mut pause = round;
    let mut watermark = Watermark::default();
    while stop
        .run_until_cancelled(tokio::time::sleep(pause))
        .await
        .is_some()
    {
        let pruned = prune(&*store, &clock, retention, &mut watermark);
        let Some(pruned) = stop.run_until_cancelled(pruned).await else {
            return;
        };
        pause = match pruned {
            Ok(true) => STEP_PAUSE,
            Ok(false) => round,
            Err(error) => {
                tracing::warn!("old pings cannot be deleted, trying again later: {error}");
                round
            }
        };
    }
}

/// One round over all agents. Returns whether there is more to be deleted.
async fn prune(
    store: &dyn Store,
    clock: &PingClock,
    retention: Duration,
    watermark: &mut Watermark,
) -> Result<bool, StoreError> {
    let now = watermark.advance(store, clock.now()).await?;
    let before = saturating_sub(now, retention);
    let mut from = Some(PruneCursor::default());
    let mut deleted = 0;
    let mut more = false;
    while let Some(here) = from {
        let pruned = store.prune(before, here).await?;
        deleted += pruned.pings;
        more |= pruned.more;
        from = pruned.next;
        tokio::time::sleep(STEP_PAUSE).await;
    }
    if deleted > 0 {
        tracing::debug!(deleted, "old pings are deleted");
    }
    Ok(more)
}

/// The time that was stored last for the retention, and when this process did that.
#[derive(Debug, Default)]
struct Watermark(Option<(DateTime<Utc>, Duration)>);

impl Watermark {
    /// The time that counts now, which is stored.
    async fn advance(
        &mut self,
        store: &dyn Store,
        now: DateTime<Utc>,
    ) -> Result<DateTime<Utc>, StoreError> {
        let steady = since_boot();
        let before = match self.0 {
            Some((at, read_at)) => Some((at, steady.saturating_sub(read_at))),
            None => store.retention_now().await?.map(|at| (at, Duration::ZERO)),
        };
        let counting = counting_now(before, now);
        store.set_retention_now(counting).await?;
        self.0 = Some((counting, steady));
        Ok(counting)
    }
}

/// The wall clock's time, but no more than has passed since the time that counted before.
fn counting_now(before: Option<(DateTime<Utc>, Duration)>, now: DateTime<Utc>) -> DateTime<Utc> {
    match before {
        Some((at, passed)) => now.min(saturating_add(at, passed)),
        None => now,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::utc;
    use super::*;

    #[test]
    fn a_clock_that_is_set_makes_nothing_older() {
        let at = utc("2026-01-01T00:00:00Z");
        let minute = Duration::from_mins(1);
        for (before, now, expected) in [
            (None, "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z"),
            (
                Some((at, minute)),
                "2026-01-01T00:01:00Z",
                "2026-01-01T00:01:00Z",
            ),
            // Set forward, or not run for a year; set back.
            (
                Some((at, minute)),
                "2027-01-01T00:01:00Z",
                "2026-01-01T00:01:00Z",
            ),
            (
                Some((at, minute)),
                "2025-01-01T00:01:00Z",
                "2025-01-01T00:01:00Z",
            ),
        ] {
            assert_eq!(counting_now(before, utc(now)), utc(expected), "{now}");
        }
    }
}
