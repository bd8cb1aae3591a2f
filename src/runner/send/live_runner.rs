//! Sends one job to a live runner, and asks its orchestrator what it lists (`.github/docs/protocol.md` section 3.3).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header::{HeaderMap, HeaderName, HeaderValue};
use axum::http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::sync::Notify;
use url::Url;

use super::answer::{Judged, KeptHeaders, PartialAnswer, Unread, WholeAnswer, get, post, within};
use super::capability::Capability;
use super::destination::{Job, SendJob};
use crate::net::client::cause_of;
use crate::net::dial::watch_addresses;
use crate::net::endpoint::with_path;
use crate::net::job_client::JobClient;
use crate::runner::events::event::{JobAnswer, ThrottleScope};
use crate::text::foreign;
use crate::wire::expectation::Expectation;
use crate::wire::job_stream::StreamSource;
use crate::wire::live_runner::{self, DISCOVERY_PATH, JOB_ID_HEADER, ListedRunner, listed_runners};
use crate::wire::outcome::Outcome;

/// The longest wait for an orchestrator's list, and its largest size.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_DISCOVERY_BYTES: usize = 8 << 20;

/// An orchestrator, with its connections.
#[derive(Debug)]
pub(crate) struct Orchestrator {
    url: Url,
    client: JobClient,
    discovery: Uri,
}

/// Why an orchestrator's list could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscoveryError {
    #[error("{0}")]
    Lost(String),
    #[error("no answer in {DISCOVERY_TIMEOUT:?}")]
    TimedOut,
    #[error("it speaks TLS, and was asked in clear text")]
    NeedsTls,
    #[error("status {0}, expected 200 and a list of runners")]
    Status(u16),
    #[error("expected a list of runners, {}", foreign(&.0.to_string(), 200))]
    NoList(#[from] serde_json::Error),
}

impl Orchestrator {
    /// At a base URL.
    ///
    /// # Errors
    /// A URL that no request can be sent to.
    pub(crate) fn new(url: Url, client: JobClient) -> anyhow::Result<Self> {
        let discovery = with_path(&url, DISCOVERY_PATH).as_str().parse()?;
        Ok(Self {
            url,
            client,
            discovery,
        })
    }

    #[must_use]
    pub(crate) fn url(&self) -> &Url {
        &self.url
    }

    /// Leaves connections to addresses that its name no longer has. Never returns.
    pub(crate) async fn tend(&self) {
        watch_addresses(self.client.dialer(), || self.client.leave_connections()).await;
    }

    /// Asks which runners it lists.
    ///
    /// # Errors
    /// No answer in time, or another one than a list.
    pub(crate) async fn discover(&self) -> Result<Vec<ListedRunner>, DiscoveryError> {
        let answered = async {
            let answer = self.client.request(get(&self.discovery)).await;
            let answer = answer.map_err(|error| DiscoveryError::Lost(cause_of(&error)))?;
            let status = answer.status().as_u16();
            let body = Limited::new(answer.into_body(), MAX_DISCOVERY_BYTES);
            let body = body.collect().await;
            let body = body.map_err(|error| DiscoveryError::Lost(error.to_string()))?;
            let body = body.to_bytes();
            match status {
                200 => Ok(listed_runners(&body)?),
                _ if live_runner::needs_tls(status, &body) => Err(DiscoveryError::NeedsTls),
                _ => Err(DiscoveryError::Status(status)),
            }
        };
        let answered = tokio::time::timeout(DISCOVERY_TIMEOUT, answered).await;
        answered.unwrap_or(Err(DiscoveryError::TimedOut))
    }
}

/// What the jobs of a capability have in common.
#[derive(Debug)]
pub(crate) struct RunnerRoute {
    headers: HeaderMap,
    expect: Expectation,
}

impl RunnerRoute {
    #[must_use]
    pub(crate) fn new(capability: &Capability) -> Self {
        Self {
            headers: capability.headers.clone(),
            expect: capability.expect.clone(),
        }
    }
}

/// One agent's live runner.
#[derive(Debug)]
pub(crate) struct LiveRunner {
    orchestrator: Arc<Orchestrator>,
    /// By capability: where its jobs go.
    uris: Vec<Uri>,
    /// By capability.
    routes: Arc<[RunnerRoute]>,
    /// Whether it was there before: a wrong label is answered as a runner that is gone.
    is_seen: AtomicBool,
}

impl LiveRunner {
    #[must_use]
    pub(crate) fn new(
        orchestrator: Arc<Orchestrator>,
        uris: Vec<Uri>,
        routes: Arc<[RunnerRoute]>,
    ) -> Self {
        Self {
            orchestrator,
            uris,
            routes,
            is_seen: AtomicBool::new(false),
        }
    }

    #[must_use]
    pub(crate) fn orchestrator(&self) -> &Arc<Orchestrator> {
        &self.orchestrator
    }

    /// The orchestrator lists it.
    pub(crate) fn listed(&self) {
        self.is_seen.store(true, Ordering::Relaxed);
    }

    /// Sends a job and reads its answer. What it has said so far is in `partial`, also where this is cancelled.
    async fn exchange(
        &self,
        job: Job,
        partial: &mut PartialAnswer,
        connected: &Notify,
    ) -> Result<Judged, Unread> {
        let route = &self.routes[job.capability.0];
        let request = request(&self.uris[job.capability.0], route, job);
        let response = partial
            .request(&self.orchestrator.client, request, connected)
            .await?;
        self.read(response, route, partial).await
    }

    async fn read(
        &self,
        response: Response<Incoming>,
        route: &RunnerRoute,
        partial: &mut PartialAnswer,
    ) -> Result<Judged, Unread> {
        partial.headers = KeptHeaders::of_worker(response.headers());
        if partial.is_stream() {
            return partial.read_stream(response).await;
        }
        let answer = WholeAnswer::read(response, &route.expect).await?;
        Ok(self.judge(&answer, &route.expect))
    }

    /// Tells the outcome of a whole answer that is no stream.
    fn judge(&self, answer: &WholeAnswer, expect: &Expectation) -> Judged {
        let outcome = live_runner::of_answer(answer.head(), answer.body());
        let said = answer.said();
        let error = match (outcome, answer.head().status) {
            (Outcome::Success, _) => return answer.expected(expect),
            (Outcome::Unavailable, _) if !self.is_seen.load(Ordering::Relaxed) => {
                format!("{said}: the orchestrator never listed it; is the label in the address right?")
            }
            // It may hold what tickets are made from.
            (Outcome::Unpaid, 402) => "the orchestrator wants to be paid".to_owned(),
            (Outcome::CutOff, _) => format!("the money ran out: {said}"),
            (Outcome::BadGateway, 404) => format!(
                "{said}: the address is wrong, expected https://ORCHESTRATOR/apps/LABEL/app"
            ),
            (Outcome::BadGateway, _) if said.contains("HTTPS") => {
                "the orchestrator speaks TLS, and was asked in clear text: write the address with https://"
                    .to_owned()
            }
            (Outcome::BadGateway, _) => {
                format!("{said}: it takes sessions; register it with \"mode\": \"single-shot\"")
            }
            _ => said,
        };
        (outcome, Some(error))
    }
}

fn request(uri: &Uri, route: &RunnerRoute, job: Job) -> Request<Full<Bytes>> {
    let mut request = post(uri, &route.headers, job.payload.into());
    let id = HeaderValue::try_from(job.id.to_string())
        .expect("an id has only digits, letters and hyphens");
    let name = HeaderName::from_static(JOB_ID_HEADER);
    request.headers_mut().insert(name, id);
    request
}

impl SendJob for LiveRunner {
    async fn send(&self, job: Job) -> JobAnswer {
        let timeout = job.timeout;
        let mut partial = PartialAnswer::new(StreamSource::Worker);
        let connected = Notify::new();
        let exchange = self.exchange(job, &mut partial, &connected);
        let ended = within(timeout, &connected, exchange).await;
        let answer = partial.conclude(ended, timeout, ThrottleScope::OneAgent);
        if answer.outcome.shows_runner() {
            self.is_seen.store(true, Ordering::Relaxed);
        }
        answer
    }

    fn abandoned(&self) -> &'static str {
        "abandoned: its place at the runner is free again"
    }
}
