//! Where an agent's jobs go: to a gateway, or to its live runner. The rest of the runner does not know which.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::gateway::Gateway;
use super::live_runner::LiveRunner;
use super::orchestrators::OwnOrchestrator;
use crate::runner::events::event::JobAnswer;
use crate::runner::roster::CapabilityIndex;

/// A job ready to be sent.
#[derive(Debug)]
pub(crate) struct Job {
    pub id: Uuid,
    pub capability: CapabilityIndex,
    /// What the worker is sent.
    pub payload: Vec<u8>,
    /// The one orchestrator that may do it, if it is tied.
    pub orchestrator: Option<Arc<OwnOrchestrator>>,
    /// The longest that the worker may take.
    pub timeout_seconds: u32,
    /// The longest wait for the whole answer.
    pub timeout: Duration,
}

/// Where jobs go.
pub(crate) trait SendJob: Send + Sync + 'static {
    /// Sends a job once and waits for the whole answer, at most the job's timeout.
    fn send(&self, job: Job) -> impl Future<Output = JobAnswer> + Send;

    /// What is told of a job that is abandoned.
    fn abandoned(&self) -> &'static str;
}

/// Where one agent's jobs go.
#[derive(Debug, Clone)]
pub(crate) enum Destination {
    Gateway(Arc<Gateway>),
    LiveRunner(Arc<LiveRunner>),
}

impl SendJob for Destination {
    async fn send(&self, job: Job) -> JobAnswer {
        match self {
            Self::Gateway(gateway) => gateway.send(job).await,
            Self::LiveRunner(runner) => runner.send(job).await,
        }
    }

    fn abandoned(&self) -> &'static str {
        match self {
            Self::Gateway(gateway) => gateway.abandoned(),
            Self::LiveRunner(runner) => runner.abandoned(),
        }
    }
}
