//! Deletes what is older than the retention, a little at a time.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;

use super::store::{PruneFrom, Store};

/// The pause between two steps, so that pings do not wait behind them.
const STEP_PAUSE: Duration = Duration::from_millis(100);
/// The time between two rounds over all agents.
const LONGEST_ROUND: Duration = Duration::from_mins(10);
const SHORTEST_ROUND: Duration = Duration::from_secs(1);

/// The instant before which nothing is kept.
#[must_use]
pub fn begin(now: DateTime<Utc>, retention: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(retention)
        .ok()
        .and_then(|span| now.checked_sub_signed(span))
        .unwrap_or(DateTime::<Utc>::MIN_UTC)
}

/// Prunes until `stop`.
pub async fn run(store: Arc<dyn Store>, retention: Duration, stop: CancellationToken) {
    let round = (retention / 10).clamp(SHORTEST_ROUND, LONGEST_ROUND);
    let mut pause = round;
    while stop
        .run_until_cancelled(tokio::time::sleep(pause))
        .await
        .is_some()
    {
        let mut from = Some(PruneFrom::default());
        let mut deleted = 0;
        pause = round;
        while let Some(here) = from {
            match store.prune(begin(Utc::now(), retention), here).await {
                Ok(pruned) => {
                    deleted += pruned.pings;
                    from = pruned.next;
                    if pruned.more {
                        pause = STEP_PAUSE;
                    }
                }
                Err(error) => {
                    tracing::warn!("old pings cannot be deleted, trying again later: {error}");
                    from = None;
                }
            }
            if stop
                .run_until_cancelled(tokio::time::sleep(STEP_PAUSE))
                .await
                .is_none()
            {
                return;
            }
        }
        if deleted > 0 {
            tracing::debug!(deleted, "old pings are deleted");
        }
    }
}
