//! What all routes work with.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::error::{Answer, Problem};
use crate::ping_system::address_policy::Reach;
use crate::ping_system::evaluate::Rules;
use crate::ping_system::feed::Feed;
use crate::ping_system::metrics::Metrics;
use crate::ping_system::pinger::Pinger;
use crate::ping_system::store::{Known, Store};

/// What the routes work with.
pub struct Core {
    /// Remembers.
    pub store: Arc<dyn Store>,
    /// Asks agents.
    pub pinger: Arc<Pinger>,
    /// Tells of new pings.
    pub feed: Arc<Feed>,
    /// Where agents may be.
    pub reach: Reach,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// What intervals begin with.
    pub rules: Rules,
    /// How much history there can be.
    pub retention: Duration,
    /// The bound on event streams.
    pub streams: Arc<Semaphore>,
}

impl Core {
    /// An agent of this name.
    pub(super) async fn find(&self, agent_id: &str) -> Answer<Known> {
        // What can be no name is not looked for: a database may refuse to.
        if agent_id.contains('\0') {
            return Err(Problem::NoAgent);
        }
        self.store.agent(agent_id).await?.ok_or(Problem::NoAgent)
    }
}
