//! Sends one job to the gateway and tells what came of it.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use serde_json::json;
use tokio::sync::Notify;
use uuid::Uuid;

use super::answer::{
    Judged, KEPT_BYTES, KeptHeaders, PartialAnswer, Unread, WholeAnswer, lost, post, within,
};
use super::capability::Capability;
use super::destination::{Job, SendJob};
use super::orchestrators::OwnOrchestrator;
use crate::net::credentials::Token;
use crate::net::dial::watch_addresses;
use crate::net::job_client::JobClient;
use crate::runner::events::event::{JobAnswer, ThrottleScope};
use crate::wire::expectation::Expectation;
use crate::wire::gateway::{JOB_HEADER, JobHeader};
use crate::wire::gateway_probe::{Probed, probed};
use crate::wire::job_stream::StreamSource;
use crate::wire::outcome::{self, AnswerHead, Outcome};

/// The number of consecutive answers that no gateway gave after which a site is down.
const MAX_BAD_IN_A_ROW: u32 = 5;
/// How often sites that are down are tried again, and for how long.
const REVIVAL_INTERVAL: Duration = Duration::from_secs(1);
const REVIVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A Livepeer BYOC gateway, reached at one of several addresses.
#[derive(Debug)]
pub(crate) struct Gateway {
    /// In the order in which they are preferred; at least one.
    sites: Vec<Site>,
    /// By capability.
    routes: Vec<Route>,
    token: Option<Token>,
}

/// One address of the gateway.
#[derive(Debug)]
pub(crate) struct Site {
    pub client: JobClient,
    /// Where the jobs of each capability go.
    pub uris: Vec<Uri>,
    pub health: SiteHealth,
}

/// Whether a site is sent jobs.
#[derive(Debug, Default)]
pub(crate) struct SiteHealth {
    is_down: AtomicBool,
    bad_in_a_row: AtomicU32,
}

impl SiteHealth {
    /// Takes in how a job ended there. Returns whether the site is down from now on.
    fn ended(&self, outcome: Outcome) -> bool {
        let is_bad = match outcome {
            Outcome::Connect => true,
            Outcome::BadGateway => {
                self.bad_in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_BAD_IN_A_ROW
            }
            _ => {
                self.bad_in_a_row.store(0, Ordering::Relaxed);
                false
            }
        };
        is_bad && !self.is_down.swap(true, Ordering::Relaxed)
    }

    fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    fn is_up_again(&self) {
        self.bad_in_a_row.store(0, Ordering::Relaxed);
        self.is_down.store(false, Ordering::Relaxed);
    }
}

/// What the jobs of a capability have in common.
#[derive(Debug)]
pub(crate) struct Route {
    headers: HeaderMap,
    expect: Expectation,
    job: JobHeader<'static>,
    /// Whether the user knows that its streams should be tied.
    is_warned: AtomicBool,
}

impl Gateway {
    /// With one route for each capability, at each site.
    #[must_use]
    pub(crate) fn new(sites: Vec<Site>, routes: Vec<Route>, token: Option<Token>) -> Self {
        Self {
            sites,
            routes,
            token,
        }
    }

    /// Keeps the sites usable: leaves addresses that are gone, and tries again those that are down. Never returns.
    pub(crate) async fn tend(&self) {
        let watched = self
            .sites
            .iter()
            .map(|site| watch_addresses(site.client.dialer(), || site.client.leave_connections()));
        let revived = async {
            // A single site is used whether it is down or not: its jobs show when it is back.
            while self.sites.len() > 1 {
                tokio::time::sleep(REVIVAL_INTERVAL).await;
                for site in self.sites.iter().filter(|site| site.health.is_down()) {
                    self.revive(site).await;
                }
            }
        };
        tokio::join!(futures_util::future::join_all(watched), revived);
    }

    /// Asks a site without sending a job (`.github/docs/gateway.md`).
    async fn revive(&self, site: &Site) {
        let Some(uri) = site.uris.first() else { return };
        let request = self.request(uri, &self.routes[0], None, Bytes::new());
        let answered = async {
            let answer = site.client.request(request).await.ok()?;
            let status = answer.status().as_u16();
            let body = Limited::new(answer.into_body(), KEPT_BYTES);
            let body = body.collect().await.ok()?.to_bytes();
            Some(probed(status, &body))
        };
        let probed = tokio::time::timeout(REVIVAL_TIMEOUT, answered).await;
        if let Ok(Some(Probed::Gateway)) = probed {
            site.health.is_up_again();
            tracing::info!("the gateway at {uri} answers again");
        }
    }

    fn request(
        &self,
        uri: &Uri,
        route: &Route,
        job_header: Option<HeaderValue>,
        body: Bytes,
    ) -> Request<Full<Bytes>> {
        let mut request = post(uri, &route.headers, body);
        let headers = request.headers_mut();
        if let Some(token) = &self.token {
            headers.insert(AUTHORIZATION, token.header());
        }
        if let Some(job_header) = job_header {
            headers.insert(HeaderName::from_static(JOB_HEADER), job_header);
        }
        request
    }

    /// The sites to try, in this order: those that are up, or all.
    fn sites(&self) -> impl Iterator<Item = &Site> {
        let all_down = self.sites.iter().all(|site| site.health.is_down());
        let sites = self.sites.iter();
        sites.filter(move |site| all_down || !site.health.is_down())
    }

    /// Sends a job and reads its answer. What it has said so far is in `partial`, also where this is cancelled.
    async fn exchange(
        &self,
        job: Job,
        partial: &mut PartialAnswer,
        connected: &Notify,
    ) -> Result<Judged, Unread> {
        let route = &self.routes[job.capability.0];
        let header = route.job_header(&job);
        let is_tied = job.orchestrator.is_some();
        let body = Bytes::from(job.payload);
        let mut last = None;
        for site in self.sites() {
            let uri = &site.uris[job.capability.0];
            let request = self.request(uri, route, Some(header.clone()), body.clone());
            let result = match partial.request(&site.client, request, connected).await {
                Ok(response) => read(response, uri, route, is_tied, partial).await,
                Err(unread) => Err(unread),
            };
            let outcome = match &result {
                Ok((outcome, _)) | Err(Unread { outcome, .. }) => *outcome,
            };
            if site.health.ended(outcome) && self.sites.len() > 1 {
                tracing::warn!("the gateway at {uri} is down: jobs go to the next one");
            }
            // Nothing was sent.
            if outcome != Outcome::Connect {
                return result;
            }
            last = Some(result);
        }
        last.unwrap_or_else(|| Err(lost("there is no gateway".to_owned())))
    }
}

/// Reads an answer to its end.
async fn read(
    response: Response<Incoming>,
    uri: &Uri,
    route: &Route,
    is_tied: bool,
    partial: &mut PartialAnswer,
) -> Result<Judged, Unread> {
    partial.headers = KeptHeaders::of_gateway(response.headers());
    if partial.is_stream() {
        if !is_tied {
            route.warn_of_stream(uri);
        }
        return partial.read_stream(response).await;
    }
    let has_orchestrator = partial.headers.orchestrator.is_some();
    let answer = WholeAnswer::read(response, &route.expect).await?;
    Ok(judge(&answer, has_orchestrator, &route.expect))
}

/// Tells the outcome of a whole answer that is no stream.
fn judge(answer: &WholeAnswer, has_orchestrator: bool, expect: &Expectation) -> Judged {
    let head = AnswerHead {
        has_orchestrator,
        ..answer.head()
    };
    let outcome = outcome::of_answer(head, answer.body());
    let error = match outcome {
        Outcome::Success => return answer.expected(expect),
        Outcome::NoOrchestrator => {
            "empty answer: all orchestrators failed, or the gateway could not pay them".to_owned()
        }
        Outcome::BadGateway if outcome::is_wrong_path(head.status, answer.body()) => {
            "404 page not found: --gateway-prefix, the port or the address is wrong".to_owned()
        }
        Outcome::BadGateway => format!("not the gateway's answer: {}", answer.said()),
        _ => answer.said(),
    };
    (outcome, Some(error))
}

impl Route {
    #[must_use]
    pub(crate) fn new(capability: &Capability) -> Self {
        Self {
            headers: capability.headers.clone(),
            expect: capability.expect.clone(),
            job: JobHeader {
                id: Uuid::nil(),
                request: json!({ "run": capability.run }).to_string().into(),
                parameters: "{}".into(),
                capability: capability.capability.clone().into(),
                timeout_seconds: capability.timeout_seconds,
            },
            is_warned: AtomicBool::new(false),
        }
    }

    fn job_header(&self, job: &Job) -> HeaderValue {
        let parameters = OwnOrchestrator::parameters(job.orchestrator.as_deref());
        let header = JobHeader {
            id: job.id,
            request: Cow::Borrowed(&self.job.request),
            parameters: Cow::Borrowed(parameters),
            capability: Cow::Borrowed(&self.job.capability),
            timeout_seconds: job.timeout_seconds,
        };
        HeaderValue::try_from(header.encode())
            .expect("base64 has only characters that a header may have")
    }

    fn warn_of_stream(&self, uri: &Uri) {
        if !self.is_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{} answers with event streams, and the agent has no orchestrators in the file: a gateway that knows several \
                 has a stream done again by the next one, or loses a place there for good; give each agent its orchestrators",
                uri
            );
        }
    }
}

impl SendJob for Gateway {
    async fn send(&self, job: Job) -> JobAnswer {
        let timeout = job.timeout;
        let mut partial = PartialAnswer::new(StreamSource::Gateway);
        let connected = Notify::new();
        let exchange = self.exchange(job, &mut partial, &connected);
        let ended = within(timeout, &connected, exchange).await;
        partial.conclude(ended, timeout, ThrottleScope::AllAgents)
    }

    fn abandoned(&self) -> &'static str {
        "abandoned: its place at the orchestrator stays taken"
    }
}
