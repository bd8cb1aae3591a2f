//! How a job ended, and what follows from that (`.github/docs/protocol.md` section 3.2). Seen at go-livepeer 0.9.1, with and
//! without a proxy in front.

use serde::Serialize;

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Status 200 with a body or an orchestrator's name; of a stream, up to its end.
    Success,
    /// Status 200, but an event of the stream is an error of the worker.
    WorkerError,
    /// Status 200, but not what the capability requires of an answer.
    Unexpected,
    /// Status 200, no body, no orchestrator: every orchestrator failed, or the gateway could not pay them
    /// (go-livepeer, byoc/job_gateway.go: its loop ends without writing).
    NoOrchestrator,
    /// Any other status that comes from the gateway: most are the worker's own.
    HttpError,
    /// The orchestrator of a live runner could not reach its worker, or lost it.
    WorkerGone,
    /// No complete answer in time.
    Timeout,
    /// The connection was lost before the answer was complete.
    Transport,
    /// The money for a live runner that is paid by time ran out during the job.
    CutOff,
    /// A proxy spoke in the gateway's place, or the address is wrong.
    BadGateway,
    /// No orchestrator offers the capability.
    NoSupply,
    /// The orchestrator lists no such live runner, or none that is healthy.
    Unavailable,
    /// All places of the live runner are in use.
    NoPlace,
    /// The gateway's balance does not cover the job, or the orchestrator of a live runner is not paid.
    Unpaid,
    /// The gateway could not parse the job: a fault of the runner or its configuration.
    Rejected,
    /// A server asks to wait.
    Throttled,
    /// No connection.
    Connect,
    /// Abandoned by the runner at the second signal.
    CutShort,
    /// In records of releases up to 0.1.0: done by another orchestrator than the agent's.
    Misrouted,
}

/// What a job says of an agent whose orchestrators nobody else uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Testimony {
    For,
    Against,
    Nothing,
}

impl Outcome {
    /// All outcomes, in the order of their declaration.
    pub const ALL: [Self; 19] = [
        Self::Success,
        Self::WorkerError,
        Self::Unexpected,
        Self::NoOrchestrator,
        Self::HttpError,
        Self::WorkerGone,
        Self::Timeout,
        Self::Transport,
        Self::CutOff,
        Self::BadGateway,
        Self::NoSupply,
        Self::Unavailable,
        Self::NoPlace,
        Self::Unpaid,
        Self::Rejected,
        Self::Throttled,
        Self::Connect,
        Self::CutShort,
        Self::Misrouted,
    ];

    /// The name that JSON, metrics and text use, whether such a job is charged, and what it says of its agent.
    const fn properties(self) -> (&'static str, bool, Testimony) {
        use Testimony::{Against, For, Nothing};
        match self {
            Self::Success => ("success", true, For),
            Self::WorkerError => ("worker_error", true, Against),
            Self::Unexpected => ("unexpected", true, Against),
            Self::NoOrchestrator => ("no_orchestrator", true, Against),
            Self::HttpError => ("http_error", true, Against),
            Self::WorkerGone => ("worker_gone", true, Against),
            Self::Timeout => ("timeout", true, Against),
            Self::Transport => ("transport", true, Against),
            Self::CutOff => ("cut_off", true, Nothing),
            Self::BadGateway => ("bad_gateway", false, Nothing),
            Self::NoSupply => ("no_supply", false, Nothing),
            Self::Unavailable => ("unavailable", false, Against),
            Self::NoPlace => ("no_place", false, Nothing),
            Self::Unpaid => ("unpaid", false, Nothing),
            Self::Rejected => ("rejected", false, Nothing),
            Self::Throttled => ("throttled", false, Nothing),
            Self::Connect => ("connect", false, Nothing),
            Self::CutShort => ("cut_short", true, Nothing),
            Self::Misrouted => ("misrouted", true, Nothing),
        }
    }

    /// The name that JSON, metrics and text use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.properties().0
    }

    /// Whether somebody is paid for a job that ended so: also for a stream until the balance was used up.
    #[must_use]
    pub fn is_charged(self, is_stream: bool) -> bool {
        self.properties().1 || (self == Self::Unpaid && is_stream)
    }

    /// What such a job says of its agent. `Unavailable` says it only of a live runner that was there before.
    #[must_use]
    pub const fn testimony(self) -> Testimony {
        self.properties().2
    }

    /// Whether the orchestrator of a live runner answers so only if it knows the runner.
    #[must_use]
    pub const fn shows_runner(self) -> bool {
        matches!(
            self,
            Self::Success
                | Self::WorkerError
                | Self::Unexpected
                | Self::WorkerGone
                | Self::CutOff
                | Self::NoPlace
        )
    }

    /// The outcome of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.name() == name)
    }
}

/// The head of a whole answer that is no event stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnswerHead<'a> {
    pub status: u16,
    pub content_type: Option<&'a str>,
    /// Whether there is `X-Content-Type-Options: nosniff`.
    pub has_nosniff: bool,
    pub has_retry_after: bool,
    /// Whether an orchestrator is named.
    pub has_orchestrator: bool,
}

/// All that a node says where it has no such path. A worker's own 404 gains a second newline.
const NO_SUCH_PATH: &[u8] = b"404 page not found\n";
const NO_SUPPLY: &[u8] = b"No orchestrators found for capability ";
const UNPAID: &[u8] = b"Insufficient balance for request";
const REJECTED: [&[u8]; 3] = [
    b"Unable to parse job request, err=",
    b"Unable to unmarshal job request err=",
    b"Unable to unmarshal job parameters err=",
];

/// The outcome of a whole answer that is no event stream. `body` is the whole body, or enough of its beginning to hold an
/// error's text.
#[must_use]
pub fn of_answer(head: AnswerHead<'_>, body: &[u8]) -> Outcome {
    let status = head.status;
    if status == 200 {
        return if body.is_empty() && !head.has_orchestrator {
            Outcome::NoOrchestrator
        } else {
            Outcome::Success
        };
    }
    if matches!(status, 429 | 503) && head.has_retry_after {
        return Outcome::Throttled;
    }
    // The gateway never passes these on, and sets both headers on all others.
    let is_a_proxys = matches!(status, 401 | 407 | 501..=599);
    let is_plain = head
        .content_type
        .is_some_and(|kind| kind.trim().to_ascii_lowercase().starts_with("text/plain"));
    if is_a_proxys || !is_plain || !head.has_nosniff {
        return Outcome::BadGateway;
    }
    match status {
        404 if body == NO_SUCH_PATH => Outcome::BadGateway,
        400 if body.starts_with(NO_SUPPLY) => Outcome::NoSupply,
        400 if body.starts_with(UNPAID) => Outcome::Unpaid,
        400 if REJECTED.iter().any(|text| body.starts_with(text)) => Outcome::Rejected,
        _ => Outcome::HttpError,
    }
}

/// Whether a node answered that it has no such path: a wrong prefix, port or address.
#[must_use]
pub fn is_wrong_path(status: u16, body: &[u8]) -> bool {
    status == 404 && body == NO_SUCH_PATH
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateways(status: u16) -> AnswerHead<'static> {
        AnswerHead {
            status,
            content_type: Some("text/plain; charset=utf-8"),
            has_nosniff: true,
            ..AnswerHead::default()
        }
    }

    fn proxys(status: u16) -> AnswerHead<'static> {
        AnswerHead {
            status,
            ..AnswerHead::default()
        }
    }

    #[test]
    fn outcomes_are_listed_by_their_own_index_and_named_as_serde_does() {
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
            assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.name());
            assert_eq!(Outcome::named(outcome.name()), Some(outcome));
            // What nobody was paid for says nothing of an agent, but that its runner is gone.
            let says_nothing = outcome.testimony() == Testimony::Nothing;
            assert!(outcome.is_charged(false) || says_nothing || outcome == Outcome::Unavailable);
        }
    }

    /// The table that operators read is the one that the program follows.
    #[test]
    fn the_documented_table_is_that_of_the_code() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/.github/docs/protocol.md");
        let text = std::fs::read_to_string(file).unwrap();
        let sections = ["\n### 3.2 ", "\n### 3.3 "].map(|heading| {
            let (_, section) = text.split_once(heading).unwrap();
            let end = section.split_once("\n### ").or(section.split_once("\n## "));
            end.map_or(section, |(section, _)| section)
        });
        let lines = sections.into_iter().flat_map(str::lines);
        let mut seen = std::collections::BTreeSet::new();
        for row in lines.filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
            let [name, .., charged, says] = &cells[..] else {
                panic!("{row}")
            };
            let outcome = Outcome::named(name.trim_matches(['`', ' '])).unwrap();
            assert_eq!(outcome.is_charged(false), *charged == "yes", "{row}");
            // A refusal is judged by more than itself.
            let says = if outcome == Outcome::NoSupply {
                "nothing"
            } else {
                says
            };
            let testimony = match says.trim() {
                "for it" => Testimony::For,
                "against it" | "against it, once it was seen" => Testimony::Against,
                "nothing" => Testimony::Nothing,
                other => panic!("{other}"),
            };
            assert_eq!(outcome.testimony(), testimony, "{row}");
            seen.insert(outcome);
        }
        assert_eq!(seen.len(), Outcome::ALL.len());
    }

    #[test]
    fn an_answer_has_the_meaning_that_the_contract_gives_it() {
        use Outcome::{BadGateway, HttpError, NoOrchestrator, NoSupply, Rejected, Success, Unpaid};
        let named = AnswerHead {
            has_orchestrator: true,
            ..proxys(200)
        };
        for (head, body, outcome) in [
            (proxys(200), "{}", Success),
            (named, "", Success),
            (proxys(200), "", NoOrchestrator),
            (gateways(201), "{}", HttpError),
            (proxys(204), "", BadGateway),
            (proxys(301), "", BadGateway),
            (
                gateways(400),
                "No orchestrators found for capability x\n",
                NoSupply,
            ),
            (
                gateways(400),
                "no orchestrators found for capability x\n",
                HttpError,
            ),
            (gateways(400), "No orchestrators found", HttpError),
            (
                proxys(400),
                "No orchestrators found for capability x\n",
                BadGateway,
            ),
            (gateways(400), "Insufficient balance for request\n", Unpaid),
            (gateways(400), "insufficient balance of credits", HttpError),
            (
                gateways(400),
                "Unable to parse job request, err=x",
                Rejected,
            ),
            (gateways(400), "Unable to parse the image", HttpError),
            (
                gateways(400),
                "Unable to unmarshal job parameters err=x",
                Rejected,
            ),
            (gateways(401), "no", BadGateway),
            (gateways(404), "404 page not found\n", BadGateway),
            (gateways(404), "404 page not found\n\n", HttpError),
            (gateways(429), "slow down", HttpError),
            (
                gateways(500),
                "No orchestrators found for capability x",
                HttpError,
            ),
            (gateways(502), "", BadGateway),
            (proxys(500), "", BadGateway),
        ] {
            assert_eq!(of_answer(head, body.as_bytes()), outcome, "{head:?} {body}");
        }
        for status in [429, 503] {
            let head = AnswerHead {
                has_retry_after: true,
                ..gateways(status)
            };
            assert_eq!(of_answer(head, b""), Outcome::Throttled);
        }
    }
}
