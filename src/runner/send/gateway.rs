//! Sends one job to the gateway and tells what came of it.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
    X_CONTENT_TYPE_OPTIONS,
};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::time::Instant;

use crate::net::client::root_cause;
use crate::runner::events::event::JobAnswer;
use crate::runner::roster::CapabilityIndex;
use crate::wire::expectation::{Expectation, ExpectedBody, MAX_EXPECTED_BYTES};
use crate::wire::gateway::{
    BALANCE_HEADER, JOB_HEADER, METADATA_HEADER, ORCHESTRATOR_HEADER, balance_wei,
};
use crate::wire::job_stream::{JobStream, StreamState};
use crate::wire::outcome::{self, AnswerHead, Outcome};

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

/// A Livepeer BYOC gateway.
#[derive(Debug)]
pub(crate) struct Gateway {
    client: Client,
    routes: Vec<Route>,
    authorization: Option<HeaderValue>,
}

/// Where the jobs of a capability go, and what it requires of their answers.
#[derive(Debug)]
pub(crate) struct Route {
    url: Url,
    headers: HeaderMap,
    expect: Expectation,
    /// Whether the user knows that its streams should be tied.
    is_warned: AtomicBool,
}

impl Gateway {
    /// A gateway that is reached by `client`, which must not follow redirects, with one route for
    /// each capability.
    #[must_use]
    pub(crate) fn new(
        client: Client,
        routes: Vec<Route>,
        authorization: Option<HeaderValue>,
    ) -> Self {
        Self {
            client,
            routes,
            authorization,
        }
    }

    /// Sends a job and reads its answer. What it has said so far is in `partial`, also where this is cancelled.
    async fn exchange(&self, job: Job, partial: &mut PartialAnswer) -> Result<Judged, Unread> {
        let header = HeaderValue::try_from(job.header)
            .expect("base64 has only characters that a header may have");
        let route = &self.routes[job.capability.0];
        let mut request = self
            .client
            .post(route.url.clone())
            .headers(route.headers.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header(HeaderName::from_static(JOB_HEADER), header)
            .body(job.body);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        let response = request.send().await.map_err(|error| failure(&error))?;
        partial.status = Some(response.status().as_u16());
        partial.headers = KeptHeaders::of(response.headers());
        partial.retry_after = retry_after(response.headers(), Utc::now());
        if is_stream(&response) {
            if !job.is_tied {
                route.warn_of_stream();
            }
            partial.is_stream = true;
            read_stream(response, partial).await
        } else {
            let has_orchestrator = partial.headers.orchestrator.is_some();
            read_whole(response, has_orchestrator, &route.expect).await
        }
    }
}

/// What an answer has said so far.
#[derive(Debug, Default)]
struct PartialAnswer {
    status: Option<u16>,
    headers: KeptHeaders,
    retry_after: Option<Duration>,
    is_stream: bool,
    /// Its events, if it is a stream.
    stream: JobStream,
    unpaid_since: Option<Instant>,
}

impl Route {
    #[must_use]
    pub(crate) fn new(url: Url, headers: HeaderMap, expect: Expectation) -> Self {
        Self {
            url,
            headers,
            expect,
            is_warned: AtomicBool::new(false),
        }
    }

    fn warn_of_stream(&self) {
        if !self.is_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{} answers with event streams, and the agent has no orchestrators in the file: a gateway that knows several \
                 has a stream done again by the next one, or loses a place there for good; give each agent its orchestrators",
                self.url
            );
        }
    }
}

impl SendJob for Gateway {
    async fn send(&self, job: Job) -> JobAnswer {
        let timeout = job.timeout;
        let mut partial = PartialAnswer::default();
        let exchange = tokio::time::timeout(timeout, self.exchange(job, &mut partial)).await;
        let (outcome, error) = match exchange {
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

/// The outcome of an answer, and why it is none of the good ones.
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

fn is_stream(response: &Response) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE);
    let content_type = content_type.map(|kind| kind.as_bytes().to_ascii_lowercase());
    response.status() == StatusCode::OK
        && content_type.is_some_and(|kind| kind.starts_with(b"text/event-stream"))
}

/// Reads pieces until `take` says that these were enough.
async fn read_pieces(
    response: &mut Response,
    mut take: impl FnMut(&[u8]) -> bool,
) -> Result<(), Unread> {
    let mut read: u64 = 0;
    while let Some(piece) = response.chunk().await.map_err(|error| Unread {
        outcome: if error.is_timeout() {
            Outcome::Timeout
        } else {
            Outcome::Transport
        },
        error: root_cause(&error),
    })? {
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
    mut response: Response,
    has_orchestrator: bool,
    expect: &Expectation,
) -> Result<Judged, Unread> {
    let headers = response.headers();
    let text = |name: HeaderName| headers.get(name)?.to_str().ok().map(str::to_owned);
    let content_type = text(CONTENT_TYPE);
    let has_nosniff =
        text(X_CONTENT_TYPE_OPTIONS).is_some_and(|kind| kind.eq_ignore_ascii_case("nosniff"));
    let has_retry_after = headers.contains_key(RETRY_AFTER);
    let status = response.status().as_u16();
    let kept_bytes = match status {
        200 if expect.is_empty() => 1,
        // One byte more tells that it is too long.
        200 => MAX_EXPECTED_BYTES + 1,
        _ => KEPT_BYTES,
    };
    let mut start: Vec<u8> = Vec::new();
    read_pieces(&mut response, |piece| {
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
    mut response: Response,
    partial: &mut PartialAnswer,
) -> Result<Judged, Unread> {
    let mut state = StreamState::GoesOn;
    read_pieces(&mut response, |piece| {
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

fn failure(error: &reqwest::Error) -> Unread {
    let outcome = if error.is_connect() {
        Outcome::Connect
    } else if error.is_timeout() {
        Outcome::Timeout
    } else {
        Outcome::Transport
    };
    Unread {
        outcome,
        error: root_cause(error),
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
