//! Deletes what is older than the retention, a little at a time.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::store::{PruneCursor, Store};
use crate::units::saturating_sub;

/// The pause between two steps, so that pings do not wait behind them.
const STEP_PAUSE: Duration = Duration::from_millis(100);
/// The time between two rounds over all agents.
const MAX_ROUND: Duration = Duration::from_mins(10);
const MIN_ROUND: Duration = Duration::from_secs(1);

/// Prunes until `stop`.
pub(crate) async fn run(store: Arc<dyn Store>, retention: Duration, stop: CancellationToken) {
    let round = (retention / 10).clamp(MIN_ROUND, MAX_ROUND);
    let mut pause = round;
    while stop
        .run_until_cancelled(tokio::time::sleep(pause))
        .await
        .is_some()
    {
        let mut from = Some(PruneCursor::default());
        let mut deleted = 0;
        pause = round;
        while let Some(here) = from {
            match store
                .prune(saturating_sub(Utc::now(), retention), here)
                .await
            {
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
