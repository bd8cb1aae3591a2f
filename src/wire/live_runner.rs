//! What the orchestrator of a live runner is sent and what its answers mean (`.github/docs/protocol.md` section 3.3). Seen at
//! go-livepeer 0.9.1; the wording of the node stack that follows it was only read, so the status decides first.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;
use url::Url;

use super::outcome::{AnswerHead, Outcome};
use crate::text::foreign;

/// The request header with the job's id.
pub const JOB_ID_HEADER: &str = "x-job-id";
/// The path of an orchestrator's list of runners.
pub const DISCOVERY_PATH: &str = "discovery";
/// The only mode of a runner that takes jobs.
const SINGLE_SHOT: &str = "single-shot";
/// The most runners of a list that are looked at.
const MAX_RUNNERS: usize = 10_000;
/// How much of its texts is told.
const MAX_TEXT_CHARS: usize = 32;

/// An orchestrator's own words, by the status that they come with: of go-livepeer as text, and of what follows it as JSON.
const OWN_WORDS: [(u16, &str, Outcome); 6] = [
    (404, "runner not found", Outcome::Unavailable),
    (404, "runner unavailable", Outcome::Unavailable),
    (503, "no capacity available for runner", Outcome::NoPlace),
    (409, "runner at capacity", Outcome::NoPlace),
    (400, "runner is not single-shot", Outcome::BadGateway),
    (404, "404 page not found", Outcome::BadGateway),
];
const MONEY_RAN_OUT: &str = "context canceled";
const DESTINATION_UNAVAILABLE: &str = "runner destination unavailable";
const NEEDS_TLS: &[u8] = b"Client sent an HTTP request to an HTTPS server.";
/// What follows names the fault, and is not fixed.
const INVALID_TICKET: &str = "invalid ticket ";
const NO_PAYER: &str = "invalid live runner payment";

/// The outcome of a whole answer that is no event stream. `body` is the whole body, or enough of its beginning to hold an
/// orchestrator's text. All that is not the orchestrator's own is the worker's, or that of a proxy before the orchestrator,
/// which is on the agent's side.
#[must_use]
pub fn of_answer(head: AnswerHead<'_>, body: &[u8]) -> Outcome {
    let status = head.status;
    if status == 200 {
        return Outcome::Success;
    }
    if matches!(status, 429 | 503) && head.has_retry_after {
        return Outcome::Throttled;
    }
    if needs_tls(status, body) {
        return Outcome::BadGateway;
    }
    let said = OwnWords::of(head, body);
    let known = OWN_WORDS
        .into_iter()
        .find(|&(of, text, _)| of == status && said.is(text));
    match (status, said) {
        _ if known.is_some() => known.map_or(Outcome::HttpError, |(.., outcome)| outcome),
        (502, OwnWords::Line(MONEY_RAN_OUT)) => Outcome::CutOff,
        (502, OwnWords::Line(_)) => Outcome::WorkerGone,
        (502, OwnWords::Json(_)) if said.is(DESTINATION_UNAVAILABLE) => Outcome::WorkerGone,
        (400, OwnWords::Line(line)) if line.starts_with(INVALID_TICKET) => Outcome::Unpaid,
        (402, _) if asks_for_payment(body) => Outcome::Unpaid,
        _ => Outcome::HttpError,
    }
}

/// Whether a server that speaks TLS was asked in clear text.
#[must_use]
pub fn needs_tls(status: u16, body: &[u8]) -> bool {
    status == 400 && body.starts_with(NEEDS_TLS)
}

/// A text in the form that only orchestrators, and workers that imitate them, use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OwnWords<'a> {
    /// The one line of a `text/plain` with `nosniff`.
    Line(&'a str),
    /// JSON, `{"error": text}`, to be parsed.
    Json(&'a [u8]),
    Other,
}

impl<'a> OwnWords<'a> {
    fn of(head: AnswerHead<'_>, body: &'a [u8]) -> Self {
        let is_kind = |kind: &str| {
            let content_type = head.content_type.unwrap_or_default().trim_start();
            let start = content_type.get(..kind.len());
            start.is_some_and(|start| start.eq_ignore_ascii_case(kind))
        };
        if is_kind("application/json") {
            return Self::Json(body);
        }
        let line = std::str::from_utf8(body)
            .ok()
            .and_then(|text| text.strip_suffix('\n'));
        match line {
            Some(line) if is_kind("text/plain") && head.has_nosniff && !line.contains('\n') => {
                Self::Line(line)
            }
            _ => Self::Other,
        }
    }

    fn is(self, text: &str) -> bool {
        match self {
            Self::Line(line) => line == text,
            Self::Json(body) => serde_json::from_slice::<Value>(body)
                .is_ok_and(|body| body["error"].as_str() == Some(text)),
            Self::Other => false,
        }
    }
}

/// Whether a 402 is the orchestrator's: a challenge, or its refusal to make one for a request that names no payer.
fn asks_for_payment(body: &[u8]) -> bool {
    serde_json::from_slice::<Value>(body).is_ok_and(|body| {
        let refusal = body["error"]["message"].as_str();
        body["payment_params"].is_string() || refusal.is_some_and(|text| text.starts_with(NO_PAYER))
    })
}

/// What an orchestrator's list says of one runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedRunner {
    pub url: String,
    /// Whether it takes jobs that stand alone.
    pub is_single_shot: bool,
    /// How many jobs it does at once, and does now.
    pub capacity: Option<u64>,
    pub in_use: Option<u64>,
    pub price: Option<ListedPrice>,
}

/// What an orchestrator asks for a runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedPrice {
    /// A number of `currency`, as it is written.
    pub price: String,
    pub currency: String,
    /// `fixed` for each job, or `seconds`.
    pub unit: String,
}

impl ListedPrice {
    /// The unit of a runner that charges by time, which no single job can be paid for.
    const METERED: &'static str = "seconds";

    /// The price, if it is in wei.
    #[must_use]
    pub fn wei(&self) -> Option<&str> {
        (self.currency == "wei").then_some(self.price.as_str())
    }

    #[must_use]
    pub fn is_metered(&self) -> bool {
        self.unit == Self::METERED
    }
}

impl fmt::Display for ListedPrice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per = match self.unit.as_str() {
            "fixed" => "job",
            Self::METERED => "second",
            other => other,
        };
        write!(f, "{} {} per {per}", self.price, self.currency)
    }
}

impl ListedRunner {
    /// Whether each of its places is in use.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!((self.in_use, self.capacity), (Some(in_use), Some(capacity)) if in_use >= capacity)
    }
}

/// Reads an orchestrator's list of runners. Entries that name no address are left out.
///
/// # Errors
/// When it is no list.
pub fn listed_runners(body: &[u8]) -> Result<Vec<ListedRunner>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Orchestrator {
        #[serde(default)]
        runners: Option<Vec<Value>>,
    }
    let orchestrators: Vec<Orchestrator> = serde_json::from_slice(body)?;
    let runners = orchestrators.into_iter().filter_map(|each| each.runners);
    let runners = runners.flatten().filter_map(|runner| listed(&runner));
    Ok(runners.take(MAX_RUNNERS).collect())
}

fn listed(runner: &Value) -> Option<ListedRunner> {
    let price = &runner["price_info"];
    let text = |value: &Value| foreign(value.as_str().unwrap_or_default(), MAX_TEXT_CHARS);
    Some(ListedRunner {
        url: runner["url"].as_str()?.to_owned(),
        is_single_shot: runner["mode"] == SINGLE_SHOT,
        capacity: runner["capacity"].as_u64(),
        in_use: runner["capacity_used"].as_u64(),
        price: price["price"].as_number().map(|amount| ListedPrice {
            price: amount.to_string(),
            currency: text(&price["currency"]),
            unit: text(&price["unit"]),
        }),
    })
}

/// The address of the orchestrator at which a runner is reached: what stands before `/apps/`.
#[must_use]
pub fn orchestrator_of(runner: &Url) -> Url {
    let mut orchestrator = runner.clone();
    let path = runner.path();
    let before = path.find("/apps/").map_or("", |at| &path[..at]);
    orchestrator.set_path(before);
    orchestrator.set_query(None);
    orchestrator
}

/// The part of a runner's address by which its orchestrator's list knows it. The orchestrator may know itself by another
/// name than the one at which it is reached.
#[must_use]
pub fn listed_path(runner: &str) -> &str {
    let at = runner.find("/apps/").unwrap_or(0);
    runner[at..].trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn own(status: u16) -> AnswerHead<'static> {
        AnswerHead {
            status,
            content_type: Some("text/plain; charset=utf-8"),
            has_nosniff: true,
            ..AnswerHead::default()
        }
    }

    fn json(status: u16) -> AnswerHead<'static> {
        AnswerHead {
            status,
            content_type: Some("application/json"),
            ..AnswerHead::default()
        }
    }

    #[test]
    fn an_answer_has_the_meaning_that_the_protocol_gives_it() {
        use Outcome::{
            BadGateway, CutOff, HttpError, NoPlace, Success, Throttled, Unavailable, Unpaid,
            WorkerGone,
        };
        let waiting = |head| AnswerHead {
            has_retry_after: true,
            ..head
        };
        for (head, body, outcome) in [
            (json(200), "", Success),
            (own(404), "runner not found\n", Unavailable),
            (own(404), "Runner not found\n", HttpError),
            (own(404), "runner not found", HttpError),
            (own(404), "runner not found\n\n", HttpError),
            (own(404), "404 page not found\n", BadGateway),
            (own(404), "404 page not found\n\n", HttpError),
            (json(404), "404 page not found\n", HttpError),
            (
                json(404),
                "{\"error\": \"runner unavailable\"}",
                Unavailable,
            ),
            (json(404), "{\"error\": \"runner unavailable", HttpError),
            (own(503), "no capacity available for runner\n", NoPlace),
            (json(503), "{\"error\":\"model is loading\"}", HttpError),
            (json(409), "{\"error\": \"runner at capacity\"}", NoPlace),
            (json(404), "{\"error\": \"runner at capacity\"}", HttpError),
            (own(502), "EOF\n", WorkerGone),
            (own(502), "two\nlines\n", HttpError),
            (own(502), "context canceled\n", CutOff),
            (
                json(502),
                "{\"error\": \"runner destination unavailable\"}",
                WorkerGone,
            ),
            (json(502), "{\"error\": \"upstream\"}", HttpError),
            (own(400), "invalid ticket senderNonce: x\n", Unpaid),
            (own(400), "invalid tickets\n", HttpError),
            (json(402), "{\"payment_params\": \"CgEx\"}", Unpaid),
            (json(402), "{\"error\":\"pay me\"}", HttpError),
            (json(301), "", HttpError),
            (own(480), "no\n", HttpError),
            (waiting(json(429)), "", Throttled),
            (
                waiting(own(503)),
                "no capacity available for runner\n",
                Throttled,
            ),
            (waiting(json(502)), "", HttpError),
        ] {
            assert_eq!(of_answer(head, body.as_bytes()), outcome, "{head:?} {body}");
        }
    }

    #[test]
    fn runners_are_known_by_the_path_behind_their_orchestrators_name() {
        let url = |text: &str| Url::parse(text).unwrap();
        for (runner, orchestrator) in [
            ("https://orch:8935/apps/agent-001/app", "https://orch:8935/"),
            ("https://proxy/one/apps/agent-001/app/", "https://proxy/one"),
        ] {
            assert_eq!(orchestrator_of(&url(runner)).as_str(), orchestrator);
            assert_eq!(listed_path(runner), "/apps/agent-001/app");
        }
    }

    #[test]
    fn a_list_is_read_as_far_as_it_makes_sense() {
        let runners = listed_runners(
            br#"[{"address": "x"}, {"runners": null}, {"runners": [7, {"mode": "single-shot"},
            {"url": "u", "mode": "persistent", "capacity": 2, "capacity_used": 2, "price_info": {"price": 7, "unit": "seconds"}},
            {"url": "v", "mode": "single-shot", "capacity": "many"}]}]"#,
        );
        let [metered, other] = &runners.unwrap()[..] else {
            panic!("two have an address")
        };
        assert!(metered.is_full() && !metered.is_single_shot);
        assert!(metered.price.as_ref().is_some_and(ListedPrice::is_metered));
        assert!(other.is_single_shot && !other.is_full() && other.price.is_none());
        assert!(listed_runners(b"{}").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(status in 100_u16..600, body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = listed_runners(&body);
            for head in [own(status), json(status)] {
                let _ = of_answer(head, &body);
            }
        }

        #[test]
        fn nearly_right_lists_are_read_or_refused(body in mutated(&[
            r#"[{"address":"https://o:1","runners":[{"url":"https://o:1/apps/a/app","mode":"single-shot","capacity":2,"capacity_used":1,"price_info":{"price":7,"currency":"wei","unit":"fixed"}}]}]"#,
        ])) {
            let listed = listed_runners(&body).unwrap_or_default();
            prop_assert!(listed.iter().all(|runner| runner.url.len() <= body.len()));
        }
    }
}
