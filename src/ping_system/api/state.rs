//! What all routes work with.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::error::{ApiError, ApiResult};
use crate::ping_system::address_policy::AddressPolicy;
use crate::ping_system::evaluate::PingPolicy;
use crate::ping_system::feed::Feed;
use crate::ping_system::metrics::PingMetrics;
use crate::ping_system::pinger::Pinger;
use crate::ping_system::store::{AgentRecord, Store};

/// What the routes work with.
pub(crate) struct AppState {
    pub store: Arc<dyn Store>,
    pub pinger: Arc<Pinger>,
    /// Tells of new pings.
    pub feed: Arc<Feed>,
    /// Where agents may be.
    pub address_policy: AddressPolicy,
    pub metrics: Arc<PingMetrics>,
    /// What intervals begin with.
    pub rules: PingPolicy,
    /// How much history there can be.
    pub retention: Duration,
    /// The bound on event streams.
    pub streams: Arc<Semaphore>,
}

impl AppState {
    /// An agent of this name.
    pub(super) async fn find(&self, agent_id: &str) -> ApiResult<AgentRecord> {
        // What can be no name is not looked for: a database may refuse to.
        if agent_id.contains('\0') {
            return Err(ApiError::NoAgent);
        }
        self.store.agent(agent_id).await?.ok_or(ApiError::NoAgent)
    }
}
