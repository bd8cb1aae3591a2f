//! Sends one job to the gateway and tells what came of it.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
    USER_AGENT, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, Request, Response, StatusCode, Uri};
use chrono::{DateTime, Utc};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::capture_connection;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::net::client::cause_of;
use crate::net::dial::watch_addresses;
use crate::net::job_client::{Dialled, JobClient};
use crate::runner::events::event::JobAnswer;
use crate::runner::roster::CapabilityIndex;
use crate::wire::expectation::{Expectation, ExpectedBody, MAX_EXPECTED_BYTES};
use crate::wire::gateway::{
    BALANCE_HEADER, JOB_HEADER, METADATA_HEADER, ORCHESTRATOR_HEADER, balance_wei,
};
use crate::wire::gateway_probe::{Probed, probed};
use crate::wire::job_stream::{JobStream, StreamState};
use crate::wire::outcome::{self, AnswerHead, Outcome};

/// What the runner calls itself.
const AGENT: &str = concat!("uptime-runner/", env!("CARGO_PKG_VERSION"));
/// The number of consecutive answers that no gateway gave after which a site is down.
const MAX_BAD_IN_A_ROW: u32 = 5;
/// How often sites that are down are tried again, and for how long.
const REVIVAL_INTERVAL: Duration = Duration::from_secs(1);
const REVIVAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest answer that is read to its end.
const MAX_BODY_BYTES: u64 = 256 << 20;
/// How much of an answer's header is kept.
const MAX_HEADER_BYTES: usize = 4 << 10;
/// How much of an answer that is no success is kept to tell why.
const KEPT_BYTES: usize = 8 << 10;
/// The longest time for which a proxy can hold back all jobs.
const MAX_PATIENCE: Duration = Duration::from_hours(1);
/// How much of it is shown.
const SHOWN_CHARS: usize = 160;

/// A job ready to be sent.
#[derive(Debug)]
pub(crate) struct Job {
    /// Which of the gateway's routes it takes.
    pub capability: CapabilityIndex,
    /// The job header's value.
    pub header: String,
    pub body: Vec<u8>,
    /// Whether it names the one orchestrator that may do it.
    pub is_tied: bool,
    /// The longest wait for the whole answer.
    pub timeout: Duration,
}

/// Where jobs go: the gateway, or a test's stand-in.
pub(crate) trait SendJob: Send + Sync + 'static {
    /// Sends a job once and waits for the whole answer, at most the job's timeout.
    fn send(&self, job: Job) -> impl Future<Output = JobAnswer> + Send;
}

/// A Livepeer BYOC gateway, reached at one of several addresses.
#[derive(Debug)]
pub(crate) struct Gateway {
    /// In the order in which they are preferred; at least one.
    sites: Vec<Site>,
    /// By capability.
    routes: Vec<Route>,
    authorization: Option<HeaderValue>,
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
    /// Whether the user knows that its streams should be tied.
    is_warned: AtomicBool,
}

impl Gateway {
    /// With one route for each capability, at each site.
    #[must_use]
    pub(crate) fn new(
        sites: Vec<Site>,
        routes: Vec<Route>,
        authorization: Option<HeaderValue>,
    ) -> Self {
        Self {
            sites,
            routes,
            authorization,
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
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri.clone();
        let headers = request.headers_mut();
        headers.clone_from(&route.headers);
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
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
        let header = HeaderValue::try_from(job.header)
            .expect("base64 has only characters that a header may have");
        let route = &self.routes[job.capability.0];
        let body = Bytes::from(job.body);
        let mut last = None;
        for site in self.sites() {
            let uri = &site.uris[job.capability.0];
            let mut request = self.request(uri, route, Some(header.clone()), body.clone());
            let mut connection = capture_connection(&mut request);
            let has_connection = async {
                drop(connection.wait_for_connection_metadata().await);
                connected.notify_one();
            };
            let began = std::time::Instant::now();
            let mut answer = pin!(site.client.request(request));
            let answer = tokio::select! {
                biased;
                answer = &mut answer => answer,
                () = has_connection => answer.await,
            };
            let result = match answer {
                Ok(response) => {
                    let dialled = response.extensions().get::<Dialled>();
                    // One that was made for another request, and came first, is an old one.
                    let own = dialled.filter(|dialled| dialled.began >= began);
                    partial.connect = own.map(|dialled| dialled.took);
                    read(response, uri, route, job.is_tied, partial).await
                }
                Err(error) => Err(failure(&error)),
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
    partial.status = Some(response.status().as_u16());
    partial.headers = KeptHeaders::of(response.headers());
    partial.retry_after = retry_after(response.headers(), Utc::now());
    if is_stream(&response) {
        if !is_tied {
            route.warn_of_stream(uri);
        }
        partial.is_stream = true;
        read_stream(response, partial).await
    } else {
        let has_orchestrator = partial.headers.orchestrator.is_some();
        read_whole(response, has_orchestrator, &route.expect).await
    }
}

/// What an answer has said so far.
#[derive(Debug, Default)]
struct PartialAnswer {
    status: Option<u16>,
    headers: KeptHeaders,
    retry_after: Option<Duration>,
    connect: Option<Duration>,
    is_stream: bool,
    /// Its events, if it is a stream.
    stream: JobStream,
    unpaid_since: Option<Instant>,
}

impl Route {
    #[must_use]
    pub(crate) fn new(headers: HeaderMap, expect: Expectation) -> Self {
        Self {
            headers,
            expect,
            is_warned: AtomicBool::new(false),
        }
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
        let mut partial = PartialAnswer::default();
        let connected = Notify::new();
        let result = {
            let mut exchange = pin!(self.exchange(job, &mut partial, &connected));
            // Connecting has a time of its own.
            tokio::select! {
                biased;
                result = &mut exchange => Ok(result),
                () = connected.notified() => tokio::time::timeout(timeout, exchange).await,
            }
        };
        let (outcome, error) = match result {
            Ok(Ok(judged)) => judged,
            Ok(Err(Unread { outcome, error })) => (outcome, Some(error)),
            Err(_) => {
                let error = format!("no whole answer in {}s", timeout.as_secs_f64());
                (Outcome::Timeout, Some(error))
            }
        };
        let PartialAnswer {
            status,
            headers,
            retry_after,
            connect,
            is_stream,
            stream,
            unpaid_since,
        } = partial;
        let balance_wei = stream.balance_wei().map(str::to_owned);
        // Whatever follows: the first thing that went wrong is what it was.
        let (outcome, error) = stream
            .failure()
            .map_or((outcome, error), |(outcome, reason)| {
                (outcome, Some(shown(&reason)))
            });
        JobAnswer {
            outcome,
            status,
            orchestrator: headers.orchestrator,
            balance_wei: balance_wei.or(headers.balance_wei),
            metadata: headers.metadata,
            error,
            is_stream,
            retry_after,
            connect,
            unpaid_since,
        }
    }
}

#[derive(Debug, Default)]
struct KeptHeaders {
    orchestrator: Option<String>,
    balance_wei: Option<String>,
    metadata: Option<String>,
}

impl KeptHeaders {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name: &str| {
            let value = headers.get(name)?.to_str().ok()?.trim();
            // Only ASCII is text here, so that it can be cut anywhere.
            let kept = value.get(..MAX_HEADER_BYTES).unwrap_or(value);
            (!kept.is_empty()).then(|| kept.to_owned())
        };
        let balance = text(BALANCE_HEADER);
        Self {
            orchestrator: text(ORCHESTRATOR_HEADER),
            balance_wei: balance.as_deref().and_then(balance_wei).map(str::to_owned),
            metadata: text(METADATA_HEADER),
        }
    }
}

/// How long a proxy asks not to be asked, at most an hour: seconds, or a time by its own clock, of which only the distance
/// from ours is known.
fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let patience = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let at = DateTime::parse_from_rfc2822(text).ok()?;
        let date = headers.get(DATE).and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok());
        let now = date.map_or(now, |date| date.to_utc());
        (at.to_utc() - now).to_std().unwrap_or_default()
    };
    Some(patience.min(MAX_PATIENCE))
}

/// The outcome of an answer, and the reason unless it is a success.
type Judged = (Outcome, Option<String>);

/// Tells the outcome of a whole answer that is no stream.
fn judge(head: AnswerHead<'_>, body: &[u8], expect: &Expectation) -> Judged {
    let outcome = outcome::of_answer(head, body);
    let said = || said(head.status, body);
    let error = match outcome {
        Outcome::Success => match expect.check(ExpectedBody::cut(body)) {
            Ok(()) => None,
            Err(difference) => return (Outcome::Unexpected, Some(shown(&difference))),
        },
        Outcome::NoOrchestrator => Some(
            "empty answer: all orchestrators failed, or the gateway could not pay them".to_owned(),
        ),
        Outcome::BadGateway if outcome::is_wrong_path(head.status, body) => Some(
            "404 page not found: --gateway-prefix, the port or the address is wrong".to_owned(),
        ),
        Outcome::BadGateway => Some(format!("not the gateway's answer: {}", said())),
        _ => Some(said()),
    };
    (outcome, error)
}

/// A text of another program for one line of a log or terminal.
fn shown(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join(" ").chars().take(SHOWN_CHARS).collect()
}

/// What an answer says, or its status means, for one line.
fn said(status: u16, body_start: &[u8]) -> String {
    let line = shown(&String::from_utf8_lossy(body_start));
    if line.is_empty() {
        let reason = StatusCode::from_u16(status)
            .ok()
            .and_then(|s| s.canonical_reason());
        reason.unwrap_or("no text").to_owned()
    } else {
        line
    }
}

struct Unread {
    outcome: Outcome,
    error: String,
}

fn is_stream(response: &Response<Incoming>) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE);
    let content_type = content_type.map(|kind| kind.as_bytes().to_ascii_lowercase());
    response.status() == StatusCode::OK
        && content_type.is_some_and(|kind| kind.starts_with(b"text/event-stream"))
}

/// Reads pieces until `take` says that these were enough.
async fn read_pieces(
    body: &mut Incoming,
    mut take: impl FnMut(&[u8]) -> bool,
) -> Result<(), Unread> {
    let mut read: u64 = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| lost(cause_of(&error)))?;
        let Ok(piece) = frame.into_data() else {
            continue;
        };
        read += piece.len() as u64;
        if read > MAX_BODY_BYTES {
            return Err(lost(format!("answer over {} MiB", MAX_BODY_BYTES >> 20)));
        }
        if take(&piece) {
            return Ok(());
        }
    }
    Ok(())
}

fn lost(error: String) -> Unread {
    Unread {
        outcome: Outcome::Transport,
        error,
    }
}

/// Reads the body to its end and throws it away but for its start: all that is needed of an error's text, one byte of a
/// success of which nothing is expected.
async fn read_whole(
    response: Response<Incoming>,
    has_orchestrator: bool,
    expect: &Expectation,
) -> Result<Judged, Unread> {
    let (parts, mut body) = response.into_parts();
    let headers = &parts.headers;
    let text = |name: HeaderName| headers.get(name)?.to_str().ok().map(str::to_owned);
    let content_type = text(CONTENT_TYPE);
    let has_nosniff =
        text(X_CONTENT_TYPE_OPTIONS).is_some_and(|kind| kind.eq_ignore_ascii_case("nosniff"));
    let has_retry_after = headers.contains_key(RETRY_AFTER);
    let status = parts.status.as_u16();
    let kept_bytes = match status {
        200 if expect.is_empty() => 1,
        // One byte more tells that it is too long.
        200 => MAX_EXPECTED_BYTES + 1,
        _ => KEPT_BYTES,
    };
    let mut start: Vec<u8> = Vec::new();
    read_pieces(&mut body, |piece| {
        let wanted = kept_bytes.saturating_sub(start.len()).min(piece.len());
        start.extend_from_slice(&piece[..wanted]);
        false
    })
    .await?;
    let head = AnswerHead {
        status,
        content_type: content_type.as_deref(),
        has_nosniff,
        has_retry_after,
        has_orchestrator,
    };
    Ok(judge(head, &start, expect))
}

/// Reads a stream to its end mark. A gateway goes on with the next orchestrator, or with empty lines without end: dropping
/// the response closes the connection.
async fn read_stream(
    response: Response<Incoming>,
    partial: &mut PartialAnswer,
) -> Result<Judged, Unread> {
    let mut state = StreamState::GoesOn;
    let mut body = response.into_body();
    read_pieces(&mut body, |piece| {
        state = partial.stream.push(piece);
        if partial.unpaid_since.is_none() && partial.stream.is_unpaid() {
            partial.unpaid_since = Some(Instant::now());
        }
        state != StreamState::GoesOn
    })
    .await?;
    match state {
        StreamState::Done => Ok((Outcome::Success, None)),
        StreamState::Cut => Err(lost(
            "event stream was cut: only empty lines came".to_owned(),
        )),
        StreamState::GoesOn => Err(lost("event stream ended before [DONE]".to_owned())),
    }
}

fn failure(error: &hyper_util::client::legacy::Error) -> Unread {
    let outcome = if error.is_connect() {
        Outcome::Connect
    } else {
        Outcome::Transport
    };
    Unread {
        outcome,
        error: cause_of(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_seconds_or_a_time_by_the_servers_clock() {
        let now = "2026-11-24T12:00:00Z".parse().unwrap();
        let patience = |value: &str, date: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            if let Some(date) = date {
                headers.insert(DATE, date.parse().unwrap());
            }
            retry_after(&headers, now).map(|patience| patience.as_secs())
        };
        assert_eq!(patience("7", None), Some(7));
        assert_eq!(patience("0", None), Some(0));
        assert_eq!(patience("999999", None), Some(3600));
        let at = "Tue, 24 Nov 2026 12:00:30 GMT";
        assert_eq!(patience(at, None), Some(30));
        assert_eq!(
            patience(at, Some("Tue, 24 Nov 2026 12:00:10 GMT")),
            Some(20)
        );
        assert_eq!(patience("Tue, 24 Nov 2026 11:00:00 GMT", None), Some(0));
        assert_eq!(patience("soon", None), None);
    }

    #[test]
    fn an_errors_text_fits_on_one_line() {
        assert_eq!(
            said(500, b"<html>\n\x1b[2J oops\0</html>"),
            "<html> [2J oops </html>"
        );
        assert_eq!(said(502, b" \n"), "Bad Gateway");
        assert_eq!(said(599, b""), "no text");
        assert!(said(500, &vec![b'x'; 8192]).len() <= SHOWN_CHARS);
    }
}
