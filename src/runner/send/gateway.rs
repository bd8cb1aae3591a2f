//! Sends one job to the gateway and tells what came of it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Response, StatusCode, Url};

use crate::net::client::root_cause;
use crate::runner::events::event::JobAnswer;
use crate::runner::roster::CapabilityIndex;
use crate::wire::gateway::{
    BALANCE_HEADER, DoneMark, JOB_HEADER, METADATA_HEADER, ORCHESTRATOR_HEADER, Outcome,
    balance_wei, same_orchestrator_form,
};

/// The longest answer that is read to its end.
const MAX_BODY_BYTES: u64 = 256 << 20;
/// How much of an answer that is no success is kept to tell why.
const KEPT_BYTES: usize = 8 << 10;
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
    /// The longest wait for the whole answer.
    pub timeout: Duration,
    /// Who may do it, in [`same_orchestrator_form`]; empty for anybody.
    pub orchestrators: Arc<[String]>,
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
    routes: Vec<Url>,
    authorization: Option<HeaderValue>,
}

impl Gateway {
    /// A gateway that is reached by `client`, which must not follow redirects, at one address for
    /// each capability.
    #[must_use]
    pub(crate) fn new(
        client: Client,
        routes: Vec<Url>,
        authorization: Option<HeaderValue>,
    ) -> Self {
        Self {
            client,
            routes,
            authorization,
        }
    }

    async fn exchange(&self, job: Job) -> Result<JobAnswer, JobAnswer> {
        let header = HeaderValue::try_from(job.header)
            .expect("base64 has only characters that a header may have");
        let mut request = self
            .client
            .post(self.routes[job.capability.0].clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header(HeaderName::from_static(JOB_HEADER), header)
            .body(job.body);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        let response = request.send().await.map_err(|error| failure(&error))?;
        let mut answer = JobAnswer::failure(Outcome::Transport, String::new());
        answer.status = Some(response.status().as_u16());
        let kept = KeptHeaders::of(response.headers());
        answer.orchestrator = kept.orchestrator;
        answer.balance_wei = kept.balance_wei;
        answer.metadata = kept.metadata;
        match read_body(response).await {
            Ok(start) => classify(&mut answer, &start, &job.orchestrators),
            Err(Unread { outcome, error }) => {
                answer.outcome = outcome;
                answer.error = Some(error);
            }
        }
        Ok(answer)
    }
}

impl SendJob for Gateway {
    async fn send(&self, job: Job) -> JobAnswer {
        let timeout = job.timeout;
        match tokio::time::timeout(timeout, self.exchange(job)).await {
            Ok(Ok(answer) | Err(answer)) => answer,
            Err(_) => JobAnswer::failure(
                Outcome::Timeout,
                format!("no whole answer in {}s", timeout.as_secs_f64()),
            ),
        }
    }
}

struct KeptHeaders {
    orchestrator: Option<String>,
    balance_wei: Option<String>,
    metadata: Option<String>,
}

impl KeptHeaders {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name: &str| {
            let value = headers.get(name)?.to_str().ok()?.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let balance = text(BALANCE_HEADER);
        Self {
            orchestrator: text(ORCHESTRATOR_HEADER),
            balance_wei: balance.as_deref().and_then(balance_wei).map(str::to_owned),
            metadata: text(METADATA_HEADER),
        }
    }
}

/// Tells the outcome of a whole answer.
fn classify(answer: &mut JobAnswer, body_start: &[u8], orchestrators: &[String]) {
    let status = answer.status.unwrap_or_default();
    answer.outcome = Outcome::of_answer(status, body_start, answer.orchestrator.as_deref());
    answer.error = match answer.outcome {
        Outcome::Success => misrouted(answer.orchestrator.as_deref(), orchestrators),
        Outcome::NoOrchestrator => Some("empty answer: all orchestrators failed".to_owned()),
        _ => Some(said(status, body_start)),
    };
    if answer.outcome == Outcome::Success && answer.error.is_some() {
        answer.outcome = Outcome::Misrouted;
    }
}

fn misrouted(by: Option<&str>, orchestrators: &[String]) -> Option<String> {
    let by = by?;
    let elsewhere =
        !orchestrators.is_empty() && !orchestrators.contains(&same_orchestrator_form(by));
    elsewhere.then(|| format!("done by {by}, expected {}", orchestrators.join(" or ")))
}

/// An error's text for one line of a log or terminal.
fn said(status: u16, body_start: &[u8]) -> String {
    let text = String::from_utf8_lossy(body_start);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let line = words
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    if line.is_empty() {
        let reason = StatusCode::from_u16(status)
            .ok()
            .and_then(|s| s.canonical_reason());
        reason.unwrap_or("no text").to_owned()
    } else {
        line.chars().take(SHOWN_CHARS).collect()
    }
}

struct Unread {
    outcome: Outcome,
    error: String,
}

/// Reads the body to its end, or to the end mark of an event stream, and throws it away but for its
/// start: all that is needed of an error's text, one byte of a success.
async fn read_body(mut response: Response) -> Result<Vec<u8>, Unread> {
    let kept_bytes = if response.status() == StatusCode::OK {
        1
    } else {
        KEPT_BYTES
    };
    let content_type = response
        .headers()
        .get(CONTENT_TYPE)
        .map(HeaderValue::as_bytes);
    let is_stream = response.status() == StatusCode::OK
        && content_type.is_some_and(|t| t.to_ascii_lowercase().starts_with(b"text/event-stream"));
    let lost = |error: String| Unread {
        outcome: Outcome::Transport,
        error,
    };
    let mut mark = DoneMark::default();
    let mut start = Vec::new();
    let mut read: u64 = 0;
    loop {
        let piece = response.chunk().await.map_err(|error| Unread {
            outcome: if error.is_timeout() {
                Outcome::Timeout
            } else {
                Outcome::Transport
            },
            error: root_cause(&error),
        })?;
        let Some(piece) = piece else { break };
        read += piece.len() as u64;
        if read > MAX_BODY_BYTES {
            return Err(lost(format!("answer over {} MiB", MAX_BODY_BYTES >> 20)));
        }
        let wanted = kept_bytes.saturating_sub(start.len()).min(piece.len());
        start.extend_from_slice(&piece[..wanted]);
        // A gateway goes on with the next orchestrator, or with empty lines without end: dropping
        // the response closes the connection.
        if is_stream && mark.seen_in(&piece) {
            return Ok(start);
        }
    }
    if is_stream {
        return Err(lost("event stream ended before [DONE]".to_owned()));
    }
    Ok(start)
}

fn failure(error: &reqwest::Error) -> JobAnswer {
    let outcome = if error.is_connect() {
        Outcome::Connect
    } else if error.is_timeout() {
        Outcome::Timeout
    } else {
        Outcome::Transport
    };
    JobAnswer::failure(outcome, root_cause(error))
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn another_orchestrator_than_the_agents_is_misrouted() {
        let own = vec![same_orchestrator_form("https://orch-1:8935/")];
        let outcome = |by: Option<&str>, orchestrators: &[String]| {
            let mut answer = JobAnswer::failure(Outcome::Transport, String::new());
            answer.status = Some(200);
            answer.orchestrator = by.map(str::to_owned);
            classify(&mut answer, b"{", orchestrators);
            answer.outcome
        };
        assert_eq!(outcome(Some("https://orch-1:8935"), &own), Outcome::Success);
        assert_eq!(
            outcome(Some("https://orch-2:8935"), &own),
            Outcome::Misrouted
        );
        assert_eq!(outcome(Some("https://orch-2:8935"), &[]), Outcome::Success);
        assert_eq!(outcome(None, &own), Outcome::Success);
    }
}
