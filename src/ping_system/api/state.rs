//! The state that all routes share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::error::{ApiError, ApiResult};
use crate::ping_system::address_policy::AddressPolicy;
use crate::ping_system::clock::PingClock;
use crate::ping_system::evaluate::PingPolicy;
use crate::ping_system::feed::Feed;
use crate::ping_system::metrics::PingMetrics;
use crate::ping_system::observer::Observer;
use crate::ping_system::pinger::Pinger;
use crate::ping_system::store::{AgentRecord, Store};

/// The state that all routes share.
pub(crate) struct AppState {
    pub store: Arc<dyn Store>,
    pub pinger: Arc<Pinger>,
    pub clock: Arc<PingClock>,
    pub observer: Arc<Observer>,
    /// Publishes new pings.
    pub feed: Arc<Feed>,
    /// Which agent addresses are allowed.
    pub address_policy: AddressPolicy,
    pub metrics: Arc<PingMetrics>,
    /// What intervals begin with.
    pub rules: PingPolicy,
    /// How long history is kept.
    pub retention: Duration,
    /// The bound on event streams.
    pub streams: Arc<Semaphore>,
}

impl AppState {
    /// An agent of this name.
    pub(super) async fn find(&self, agent_id: &str) -> ApiResult<AgentRecord> {
        // An invalid id is not looked up: a database may refuse it (NUL bytes in PostgreSQL).
        if agent_id.contains('\0') {
            return Err(ApiError::NoAgent);
        }
        self.store.agent(agent_id).await?.ok_or(ApiError::NoAgent)
    }
}
