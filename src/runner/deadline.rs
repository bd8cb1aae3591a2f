//! Waiting for an instant that there may not be.

use tokio::time::Instant;

/// Returns at `deadline`, and never where there is none.
pub(super) async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
