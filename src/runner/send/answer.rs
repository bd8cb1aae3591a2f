//! Sends a job's request and reads its answer: what is common to gateways and live runners.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header::{
    ACCEPT, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, Request, Response, StatusCode, Uri};
use chrono::{DateTime, Utc};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::capture_connection;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::net::client::cause_of;
use crate::net::job_client::{Dialled, JobClient};
use crate::runner::events::event::{JobAnswer, RetryAfter, ThrottleScope};
use crate::text::foreign;
use crate::wire::expectation::{Expectation, ExpectedBody, MAX_EXPECTED_BYTES};
use crate::wire::gateway::{BALANCE_HEADER, METADATA_HEADER, ORCHESTRATOR_HEADER, balance_wei};
use crate::wire::job_stream::{JobStream, StreamSource, StreamState};
use crate::wire::outcome::{AnswerHead, Outcome};

/// What the runner calls itself.
const USER_AGENT_VALUE: &str = concat!("uptime-runner/", env!("CARGO_PKG_VERSION"));
/// The longest answer that is read to its end.
const MAX_BODY_BYTES: u64 = 256 << 20;
/// How much of an answer's header is kept.
const MAX_HEADER_BYTES: usize = 4 << 10;
/// How much of an answer that is no success is kept to tell why.
pub(super) const KEPT_BYTES: usize = 32 << 10;
/// The longest time for which a proxy can hold back jobs.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);
/// How much of an answer's text is shown.
const SHOWN_CHARS: usize = 160;

/// A job's request: a POST of its payload, with a capability's own headers.
#[must_use]
pub(super) fn post(uri: &Uri, headers: &HeaderMap, payload: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(payload));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = uri.clone();
    let all = request.headers_mut();
    all.clone_from(headers);
    all.insert(ACCEPT, HeaderValue::from_static("*/*"));
    all.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
    all.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    request
}

/// A request for JSON.
#[must_use]
pub(super) fn get(uri: &Uri) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(Bytes::new()));
    *request.uri_mut() = uri.clone();
    let headers = request.headers_mut();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
    request
}

/// The outcome of an answer, and the reason unless it is a success.
pub(super) type Judged = (Outcome, Option<String>);

/// Why an answer was not read to its end.
pub(super) struct Unread {
    pub(super) outcome: Outcome,
    pub(super) error: String,
}

/// What an answer has said so far; it outlives an exchange that is cancelled.
#[derive(Debug, Default)]
pub(super) struct PartialAnswer {
    status: Option<u16>,
    pub(super) headers: KeptHeaders,
    retry_after: Option<Duration>,
    connect: Option<Duration>,
    is_stream: bool,
    /// Its events, if it is a stream.
    stream: JobStream,
    unpaid_since: Option<Instant>,
}

impl PartialAnswer {
    /// Of an answer that has not begun.
    #[must_use]
    pub(super) fn new(source: StreamSource) -> Self {
        Self {
            stream: JobStream::new(source),
            ..Self::default()
        }
    }

    /// Sends a request once. `connected` is notified when it has a connection.
    pub(super) async fn request(
        &mut self,
        client: &JobClient,
        mut request: Request<Full<Bytes>>,
        connected: &Notify,
    ) -> Result<Response<Incoming>, Unread> {
        let mut connection = capture_connection(&mut request);
        let has_connection = async {
            drop(connection.wait_for_connection_metadata().await);
            connected.notify_one();
        };
        let began = std::time::Instant::now();
        let mut answer = pin!(client.request(request));
        let answer = tokio::select! {
            biased;
            answer = &mut answer => answer,
            () = has_connection => answer.await,
        };
        let response = answer.map_err(|error| failure(&error))?;
        let dialled = response.extensions().get::<Dialled>();
        // One that was made for another request, and came first, is an old one.
        let own = dialled.filter(|dialled| dialled.began >= began);
        self.connect = own.map(|dialled| dialled.took);
        self.status = Some(response.status().as_u16());
        self.retry_after = retry_after(response.headers(), Utc::now());
        self.is_stream = is_stream(&response);
        Ok(response)
    }

    #[must_use]
    pub(super) fn is_stream(&self) -> bool {
        self.is_stream
    }

    /// Reads a stream to its end mark. A gateway goes on with the next orchestrator, or with empty lines without end:
    /// dropping the response closes the connection.
    pub(super) async fn read_stream(
        &mut self,
        response: Response<Incoming>,
    ) -> Result<Judged, Unread> {
        let mut state = StreamState::GoesOn;
        let mut body = response.into_body();
        read_pieces(&mut body, |piece| {
            state = self.stream.push(piece);
            if self.unpaid_since.is_none() && self.stream.is_unpaid() {
                self.unpaid_since = Some(Instant::now());
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

    /// The answer as a whole, from how the exchange ended; `None` where its time was over.
    #[must_use]
    pub(super) fn conclude(
        self,
        ended: Option<Result<Judged, Unread>>,
        timeout: Duration,
        throttle_scope: ThrottleScope,
    ) -> JobAnswer {
        let (outcome, error) = match ended {
            Some(Ok(judged)) => judged,
            Some(Err(Unread { outcome, error })) => (outcome, Some(error)),
            None => {
                let error = format!("no whole answer in {}s", timeout.as_secs_f64());
                (Outcome::Timeout, Some(error))
            }
        };
        let balance_wei = self.stream.balance_wei().map(str::to_owned);
        // Whatever follows: the first thing that went wrong is what it was.
        let failure = self.stream.failure();
        let (outcome, error) = failure.map_or((outcome, error), |(outcome, reason)| {
            (outcome, Some(shown(&reason)))
        });
        JobAnswer {
            outcome,
            status: self.status,
            orchestrator: self.headers.orchestrator,
            balance_wei: balance_wei.or(self.headers.balance_wei),
            metadata: self.headers.metadata,
            error,
            is_stream: self.is_stream,
            retry_after: self.retry_after.map(|delay| RetryAfter {
                delay,
                scope: throttle_scope,
            }),
            connect: self.connect,
            unpaid_since: self.unpaid_since,
        }
    }
}

/// Waits for the end of an exchange, at most `timeout` from when it has a connection: connecting has a time of its own.
/// Returns `None` if the time is over.
pub(super) async fn within<T>(
    timeout: Duration,
    connected: &Notify,
    exchange: impl Future<Output = T>,
) -> Option<T> {
    let mut exchange = pin!(exchange);
    tokio::select! {
        biased;
        ended = &mut exchange => Some(ended),
        () = connected.notified() => tokio::time::timeout(timeout, exchange).await.ok(),
    }
}

/// The headers of an answer that are told.
#[derive(Debug, Default)]
pub(super) struct KeptHeaders {
    pub(super) orchestrator: Option<String>,
    balance_wei: Option<String>,
    metadata: Option<String>,
}

impl KeptHeaders {
    /// Those of a gateway.
    #[must_use]
    pub(super) fn of_gateway(headers: &HeaderMap) -> Self {
        let balance = text_of(headers, BALANCE_HEADER);
        Self {
            orchestrator: text_of(headers, ORCHESTRATOR_HEADER),
            balance_wei: balance.as_deref().and_then(balance_wei).map(str::to_owned),
            ..Self::of_worker(headers)
        }
    }

    /// Those of a worker, whose word on orchestrators and balances is worth nothing.
    #[must_use]
    pub(super) fn of_worker(headers: &HeaderMap) -> Self {
        Self {
            metadata: text_of(headers, METADATA_HEADER),
            ..Self::default()
        }
    }
}

fn text_of(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?.trim();
    // Only ASCII is text here, so that it can be cut anywhere.
    let kept = value.get(..MAX_HEADER_BYTES).unwrap_or(value);
    (!kept.is_empty()).then(|| kept.to_owned())
}

/// How long a proxy asks not to be asked, at most an hour: seconds, or a time by its own clock, of which only the distance
/// from ours is known.
fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let delay = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let at = DateTime::parse_from_rfc2822(text).ok()?;
        let date = headers.get(DATE).and_then(|date| date.to_str().ok());
        let date = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok());
        let now = date.map_or(now, |date| date.to_utc());
        (at.to_utc() - now).to_std().unwrap_or_default()
    };
    Some(delay.min(MAX_RETRY_AFTER))
}

/// A whole answer that is no stream, or enough of its beginning to tell what it means.
pub(super) struct WholeAnswer {
    status: u16,
    content_type: Option<String>,
    has_nosniff: bool,
    has_retry_after: bool,
    body: Vec<u8>,
}

impl WholeAnswer {
    /// Reads the body to its end and throws it away but for its start: all that is needed of an error's text, one byte of a
    /// success of which nothing is expected.
    pub(super) async fn read(
        response: Response<Incoming>,
        expect: &Expectation,
    ) -> Result<Self, Unread> {
        let (parts, mut body) = response.into_parts();
        let headers = &parts.headers;
        let text = |name: HeaderName| headers.get(name)?.to_str().ok().map(str::to_owned);
        let has_nosniff =
            text(X_CONTENT_TYPE_OPTIONS).is_some_and(|kind| kind.eq_ignore_ascii_case("nosniff"));
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
        Ok(Self {
            status,
            content_type: text(CONTENT_TYPE),
            has_nosniff,
            has_retry_after: headers.contains_key(RETRY_AFTER),
            body: start,
        })
    }

    #[must_use]
    pub(super) fn head(&self) -> AnswerHead<'_> {
        AnswerHead {
            status: self.status,
            content_type: self.content_type.as_deref(),
            has_nosniff: self.has_nosniff,
            has_retry_after: self.has_retry_after,
            has_orchestrator: false,
        }
    }

    #[must_use]
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }

    /// What a success turns out to be, by what is expected of its body.
    #[must_use]
    pub(super) fn expected(&self, expect: &Expectation) -> Judged {
        match expect.check(ExpectedBody::cut(&self.body)) {
            Ok(()) => (Outcome::Success, None),
            Err(difference) => (Outcome::Unexpected, Some(shown(&difference))),
        }
    }

    /// What it says, or its status means, for one line.
    #[must_use]
    pub(super) fn said(&self) -> String {
        said(self.status, &self.body)
    }
}

fn shown(text: &str) -> String {
    foreign(text, SHOWN_CHARS)
}

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

pub(super) fn lost(error: String) -> Unread {
    Unread {
        outcome: Outcome::Transport,
        error,
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
    use crate::mutation::mutated;
    use proptest::prelude::*;

    #[test]
    fn a_retry_is_asked_for_in_seconds_or_at_a_time_by_the_servers_clock() {
        let now = "2026-11-24T12:00:00Z".parse().unwrap();
        let seconds = |value: &str, date: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, value.parse().unwrap());
            if let Some(date) = date {
                headers.insert(DATE, date.parse().unwrap());
            }
            retry_after(&headers, now).map(|delay| delay.as_secs())
        };
        assert_eq!(seconds("7", None), Some(7));
        assert_eq!(seconds("0", None), Some(0));
        assert_eq!(seconds("999999", None), Some(3600));
        let at = "Tue, 24 Nov 2026 12:00:30 GMT";
        assert_eq!(seconds(at, None), Some(30));
        assert_eq!(seconds(at, Some("Tue, 24 Nov 2026 12:00:10 GMT")), Some(20));
        assert_eq!(seconds("Tue, 24 Nov 2026 11:00:00 GMT", None), Some(0));
        assert_eq!(seconds("soon", None), None);
    }

    #[test]
    fn an_errors_text_fits_on_one_line() {
        assert_eq!(
            said(500, b"<html>\n\x1b[2J oops\0</html>"),
            "<html> \\u{1b}[2J oops\\u{0}</html>"
        );
        assert_eq!(said(502, b" \n"), "Bad Gateway");
        assert_eq!(said(599, b""), "no text");
        assert_eq!(said(500, &vec![b'x'; 8192]).chars().count(), SHOWN_CHARS);
    }

    proptest! {
        /// Of whatever stands in the headers only what can be used is kept, and no more of it than was said.
        #[test]
        fn any_headers_are_read(
            values in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..60),
                    prop::collection::vec(Just(b'9'), 0..6000),
                    mutated(&["-999999000000000000", "120", "Tue, 24 Nov 2026 12:00:30 GMT", "https://orch-1.example:8935"]),
                ],
                5,
            ),
        ) {
            let names = [BALANCE_HEADER, ORCHESTRATOR_HEADER, METADATA_HEADER, "retry-after", "date"];
            let mut headers = HeaderMap::new();
            for (name, value) in names.into_iter().zip(values) {
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    headers.insert(name, value);
                }
            }
            let KeptHeaders { orchestrator, balance_wei, metadata } = KeptHeaders::of_gateway(&headers);
            for text in [&orchestrator, &metadata].into_iter().flatten() {
                prop_assert!(text.len() <= MAX_HEADER_BYTES && !text.contains(|c: char| c.is_control() && c != '\t'));
            }
            let digits = balance_wei.iter().flat_map(|wei| wei.strip_prefix('-').unwrap_or(wei).bytes());
            prop_assert!(digits.clone().all(|digit| digit.is_ascii_digit()) && digits.count() <= 78);
            let now = "2026-11-24T12:00:00Z".parse().unwrap();
            prop_assert!(retry_after(&headers, now).is_none_or(|delay| delay <= MAX_RETRY_AFTER));
        }
    }
}
