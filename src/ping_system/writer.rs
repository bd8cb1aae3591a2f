//! Stores pings, those that wait at one time together: a commit costs a sync of the disk, however
//! many pings are in it.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::feed::Feed;
use super::store::{Claim, PingRecord, Store};
use crate::wire::ping_system::served::PingEvent;

/// Pings in one transaction at most.
const MAX_BATCH: usize = 256;

/// A ping that could not be stored; the reason is in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ping cannot be stored")]
pub(crate) struct NotStored;

struct Entry {
    ping: (Claim, PingRecord),
    stored: oneshot::Sender<Result<bool, NotStored>>,
}

/// Accepts pings to be stored.
#[derive(Debug, Clone)]
pub(crate) struct PingWriter {
    entries: mpsc::Sender<Entry>,
}

/// The queue of pings; [`Self::run`] stores them.
pub(crate) struct PingWriterTask(mpsc::Receiver<Entry>);

/// A writer, and the task that serves it.
#[must_use]
pub(crate) fn new() -> (PingWriter, PingWriterTask) {
    let (entries, handed_in) = mpsc::channel(MAX_BATCH);
    (PingWriter { entries }, PingWriterTask(handed_in))
}

impl PingWriter {
    /// Stores a ping; `false` if its claim was no longer valid.
    ///
    /// If this is cancelled, the ping may still be stored.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn store(&self, claim: Claim, new: PingRecord) -> Result<bool, NotStored> {
        let (stored, told) = oneshot::channel();
        let ping = (claim, new);
        self.entries
            .send(Entry { ping, stored })
            .await
            .map_err(|_| NotStored)?;
        told.await.unwrap_or(Err(NotStored))
    }
}

impl PingWriterTask {
    /// Stores queued pings and publishes them on `feed`, until every [`PingWriter`] is dropped.
    pub(crate) async fn run(mut self, store: Arc<dyn Store>, feed: Arc<Feed>) {
        let mut batch = Vec::new();
        let mut failing = false;
        while self.0.recv_many(&mut batch, MAX_BATCH).await > 0 {
            let (pings, waiting): (Vec<_>, Vec<_>) = batch
                .drain(..)
                .map(|entry| (entry.ping, entry.stored))
                .unzip();
            let pings: Arc<[(Claim, PingRecord)]> = pings.into();
            match store.record(Arc::clone(&pings)).await {
                Ok(stored) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!("pings are stored again");
                    }
                    for (((_, new), stored), waiting) in pings.iter().zip(stored).zip(waiting) {
                        if stored {
                            feed.publish(&PingEvent::from(new));
                        }
                        // The caller may have been cancelled.
                        let _ = waiting.send(Ok(stored));
                    }
                }
                Err(error) => {
                    // Subscribers must not mistake silence for good news.
                    feed.resync();
                    // The agents are asked again for the same time, so nothing is lost.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!("pings cannot be stored, trying again: {error}");
                    }
                    let claims: Vec<Claim> = pings.iter().map(|(claim, _)| claim.clone()).collect();
                    // If that fails as well, the leases expire.
                    let _ = store.release(&claims).await;
                    for waiting in waiting {
                        let _ = waiting.send(Err(NotStored));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ping_system::store::{
        AgentPage, AgentRecord, Claimed, Cursor, Lease, PruneCursor, Pruned, Registration,
        StoreError, StoreHealth, Sum, Totals,
    };
    use crate::ping_system::testing::{event, known};
    use crate::wire::ping_system::served::Ping;
    use async_trait::async_trait;
    use chrono::{DateTime, Utc};
    use parking_lot::Mutex;

    /// A store that takes no ping, and keeps whose claims were given back.
    #[derive(Debug, Default)]
    struct FullStore {
        released: Mutex<Vec<String>>,
    }

    #[async_trait]
    impl Store for FullStore {
        async fn record(&self, _: Arc<[(Claim, PingRecord)]>) -> Result<Vec<bool>, StoreError> {
            Err(StoreError::Unavailable("full".to_owned()))
        }

        async fn release(&self, claims: &[Claim]) -> Result<(), StoreError> {
            let ids = claims.iter().map(|claim| &claim.known.agent.agent_id);
            self.released.lock().extend(ids.cloned());
            Ok(())
        }

        async fn register(&self, _: &Registration) -> Result<AgentRecord, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn remove(&self, _: &str, _: DateTime<Utc>, _: bool) -> Result<bool, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn agent(&self, _: &str) -> Result<Option<AgentRecord>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn agents(&self, _: AgentPage<'_>) -> Result<Vec<AgentRecord>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn totals(&self, _: DateTime<Utc>) -> Result<Totals, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn claim_due(&self, _: Lease, _: usize) -> Result<Vec<Claim>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn claim(&self, _: Lease, _: &str) -> Result<Claimed, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn next_due_at(&self, _: DateTime<Utc>) -> Result<Option<DateTime<Utc>>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn history(
            &self,
            _: i64,
            _: Cursor,
            _: usize,
        ) -> Result<Vec<(Cursor, Ping)>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn latest(&self, _: i64, _: usize) -> Result<Vec<Ping>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn sums_since(
            &self,
            _: DateTime<Utc>,
            _: Option<&[i64]>,
        ) -> Result<Vec<(i64, Sum)>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn now(&self) -> Result<DateTime<Utc>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn reschedule_overdue(
            &self,
            _: DateTime<Utc>,
            _: DateTime<Utc>,
        ) -> Result<(), StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn void_failures(
            &self,
            _: &Claim,
            _: DateTime<Utc>,
            _: &str,
            _: &AgentRecord,
        ) -> Result<bool, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn retention_now(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn set_retention_now(&self, _: DateTime<Utc>) -> Result<(), StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn prune(&self, _: DateTime<Utc>, _: PruneCursor) -> Result<Pruned, StoreError> {
            unreachable!("the writer only records and releases")
        }
        async fn health(&self) -> Result<StoreHealth, StoreError> {
            unreachable!("the writer only records and releases")
        }
    }

    /// Otherwise the agent is asked again only when its lease has ended.
    #[tokio::test]
    async fn an_agent_whose_ping_was_not_stored_is_given_back() {
        let store = Arc::new(FullStore::default());
        let (writer, task) = new();
        let as_store: Arc<dyn Store> = Arc::clone(&store) as _;
        let running = tokio::spawn(task.run(as_store, Arc::default()));
        let claim = Claim {
            known: known("a"),
            token: "t".to_owned(),
        };
        let ping = PingRecord {
            ping: event("a").ping,
            covered_seconds: 0.0,
            supersedes: None,
            after: known("a"),
        };
        assert_eq!(writer.store(claim, ping).await, Err(NotStored));
        assert_eq!(*store.released.lock(), ["a"]);
        drop(writer);
        running.await.unwrap();
    }
}
