//! What a Livepeer BYOC gateway is sent and what its answers mean (`.github/docs/protocol.md` section 3).

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use serde::{Deserialize, Serialize};
use url::Url;
use uuid::Uuid;

/// The request header that carries a job.
pub const JOB_HEADER: &str = "livepeer";
/// The answer's header that names who did the job.
pub const ORCHESTRATOR_HEADER: &str = "x-orchestrator-url";
/// The answer's header with the wei left with that orchestrator.
pub const BALANCE_HEADER: &str = "livepeer-balance";
/// The answer's header with whatever the orchestrator adds.
pub const METADATA_HEADER: &str = "x-metadata";

/// The job as the `Livepeer` header carries it: base64 of this as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobHeader<'a> {
    /// The only key by which a job is found in both nodes' logs.
    pub id: Uuid,
    /// A JSON object as text: `{"run": …}`.
    pub request: Cow<'a, str>,
    /// A JSON object as text, which may limit the orchestrators.
    pub parameters: Cow<'a, str>,
    /// What an orchestrator must offer.
    pub capability: Cow<'a, str>,
    /// The longest that the job may run, never 0.
    pub timeout_seconds: u32,
}

/// Why a gateway refuses a job header, in the gateway's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJobHeader {
    /// Not base64 with padding.
    #[error("Unable to decode job request: {0}")]
    Base64(String),
    /// Not JSON of the agreed form.
    #[error("Unable to unmarshal job request: {0}")]
    Json(String),
    /// A field that holds a JSON object as text does not.
    #[error("Unable to parse {0}: expected a JSON object as a string")]
    NotAnObject(&'static str),
    /// `timeout_seconds` is 0.
    #[error("no timeout_seconds set in job request")]
    NoTimeout,
}

impl JobHeader<'_> {
    /// The header's value.
    #[must_use]
    pub fn encode(&self) -> String {
        let json = serde_json::to_vec(self)
            .expect("a struct of text and numbers can always be written as JSON");
        STANDARD.encode(json)
    }

    /// Reads a header's value as strictly as a gateway would.
    ///
    /// # Errors
    /// What deviates from `.github/docs/protocol.md` section 3.1.
    pub fn decode(value: &[u8]) -> Result<JobHeader<'static>, InvalidJobHeader> {
        let json = STANDARD
            .decode(value)
            .map_err(|error| InvalidJobHeader::Base64(error.to_string()))?;
        let header: JobHeader<'static> = serde_json::from_slice(&json)
            .map_err(|error| InvalidJobHeader::Json(error.to_string()))?;
        for (name, text) in [
            ("request", &header.request),
            ("parameters", &header.parameters),
        ] {
            if serde_json::from_str::<serde_json::Map<_, _>>(text).is_err() {
                return Err(InvalidJobHeader::NotAnObject(name));
            }
        }
        if header.timeout_seconds == 0 {
            return Err(InvalidJobHeader::NoTimeout);
        }
        Ok(header)
    }
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Status 200 with a body or an orchestrator's name.
    Success,
    /// Status 200, no body, no orchestrator: every orchestrator failed (go-livepeer,
    /// byoc/job_gateway.go: its loop ends without writing).
    NoOrchestrator,
    /// No orchestrator offers the capability.
    NoSupply,
    /// The gateway's balance does not cover the job.
    Unpaid,
    /// The gateway could not parse the job: a fault of the runner or its configuration.
    Rejected,
    /// Done, but by an orchestrator that does not belong to the agent.
    Misrouted,
    /// Any other status.
    HttpError,
    /// No complete answer in time.
    Timeout,
    Connect,
    /// The connection was lost before the answer was complete.
    Transport,
}

impl Outcome {
    /// All outcomes, in the order of their declaration.
    pub const ALL: [Self; 10] = [
        Self::Success,
        Self::NoOrchestrator,
        Self::NoSupply,
        Self::Unpaid,
        Self::Rejected,
        Self::Misrouted,
        Self::HttpError,
        Self::Timeout,
        Self::Connect,
        Self::Transport,
    ];

    /// The name that JSON, metrics and text use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::NoOrchestrator => "no_orchestrator",
            Self::NoSupply => "no_supply",
            Self::Unpaid => "unpaid",
            Self::Rejected => "rejected",
            Self::Misrouted => "misrouted",
            Self::HttpError => "http_error",
            Self::Timeout => "timeout",
            Self::Connect => "connect",
            Self::Transport => "transport",
        }
    }

    /// The outcome of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.name() == name)
    }

    /// Classifies a complete answer. `body_start` is enough of the body to hold an error's text.
    #[must_use]
    pub fn of_answer(status: u16, body_start: &[u8], orchestrator: Option<&str>) -> Self {
        match status {
            200 if body_start.is_empty() && orchestrator.is_none() => Self::NoOrchestrator,
            200 => Self::Success,
            400 => Self::of_bad_request(&String::from_utf8_lossy(body_start).to_ascii_lowercase()),
            _ => Self::HttpError,
        }
    }

    fn of_bad_request(text: &str) -> Self {
        let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
        if says(&["no orchestrators found"]) {
            Self::NoSupply
        } else if says(&["insufficient balance"]) {
            Self::Unpaid
        } else if says(&[
            "unable to parse",
            "unable to unmarshal",
            "no timeout_seconds",
        ]) {
            Self::Rejected
        } else {
            Self::HttpError
        }
    }
}

/// Normalizes an orchestrator's address so that equal addresses compare equal: `HTTPS://Orch:443` is
/// `https://orch/`.
#[must_use]
pub fn same_orchestrator_form(address: &str) -> String {
    Url::parse(address).map_or_else(
        |_| address.to_owned(),
        |url| url.as_str().trim_end_matches('/').to_owned(),
    )
}

/// The wei of a `Livepeer-Balance` header, kept as text since they exceed 64 bits; `None` where it
/// is empty or no whole number.
#[must_use]
pub fn balance_wei(header: &str) -> Option<&str> {
    let header = header.trim();
    let digits = header.strip_prefix('-').unwrap_or(header);
    let fits = (1..=78).contains(&digits.len());
    (fits && digits.bytes().all(|byte| byte.is_ascii_digit())).then_some(header)
}

/// Finds the end mark of an event stream, even if it is split across two pieces of the body.
#[derive(Debug, Default)]
pub struct DoneMark {
    matched: usize,
}

impl DoneMark {
    const MARK: &'static [u8] = b"[DONE]";

    /// Reads the next piece; true once the mark has been seen.
    pub fn seen_in(&mut self, piece: &[u8]) -> bool {
        for &byte in piece {
            if self.matched == Self::MARK.len() {
                break;
            }
            // The mark's first byte occurs in it only once, so a mismatch starts over.
            self.matched = if byte == Self::MARK[self.matched] {
                self.matched + 1
            } else {
                usize::from(byte == Self::MARK[0])
            };
        }
        self.matched == Self::MARK.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn header() -> JobHeader<'static> {
        JobHeader {
            id: Uuid::from_u128(7),
            request: r#"{"run":"agent-net"}"#.into(),
            parameters: "{}".into(),
            capability: "agent-net".into(),
            timeout_seconds: 30,
        }
    }

    #[test]
    fn a_job_header_is_padded_base64_of_json_with_json_inside() {
        let json = STANDARD.decode(header().encode()).unwrap();
        assert_eq!(
            String::from_utf8(json).unwrap(),
            r#"{"id":"00000000-0000-0000-0000-000000000007","request":"{\"run\":\"agent-net\"}","parameters":"{}","capability":"agent-net","timeout_seconds":30}"#
        );
        assert_eq!(
            JobHeader::decode(header().encode().as_bytes()),
            Ok(header())
        );
    }

    #[test]
    fn a_wrong_job_header_is_refused_in_the_words_of_a_gateway() {
        let with = |change: fn(&mut JobHeader)| {
            let mut wrong = header();
            change(&mut wrong);
            JobHeader::decode(wrong.encode().as_bytes())
                .unwrap_err()
                .to_string()
        };
        assert!(with(|h| h.timeout_seconds = 0).contains("no timeout_seconds"));
        assert!(with(|h| h.request = "run".into()).contains("Unable to parse request"));
        assert!(with(|h| h.parameters = "[]".into()).contains("Unable to parse parameters"));
        let unpadded = header().encode().trim_end_matches('=').to_owned();
        for wrong in [
            unpadded.as_str(),
            "%%%",
            "",
            &STANDARD.encode("{}"),
            &STANDARD.encode("[]"),
        ] {
            assert!(JobHeader::decode(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_answer_has_the_meaning_that_the_contract_gives_it() {
        for (status, body, orchestrator, outcome) in [
            (200, "{}", None, Outcome::Success),
            (200, "", Some("https://orch-1:8935"), Outcome::Success),
            (200, "", None, Outcome::NoOrchestrator),
            (201, "{}", None, Outcome::HttpError),
            (204, "", None, Outcome::HttpError),
            (301, "", None, Outcome::HttpError),
            (
                400,
                "No orchestrators found for capability x",
                None,
                Outcome::NoSupply,
            ),
            (
                400,
                r#"{"detail":"Insufficient balance for job"}"#,
                None,
                Outcome::Unpaid,
            ),
            (400, "Unable to parse job request", None, Outcome::Rejected),
            (
                400,
                "Unable to unmarshal job parameters",
                None,
                Outcome::Rejected,
            ),
            (400, "no timeout_seconds set", None, Outcome::Rejected),
            (400, "bad", None, Outcome::HttpError),
            (500, "No orchestrators found", None, Outcome::HttpError),
        ] {
            assert_eq!(
                Outcome::of_answer(status, body.as_bytes(), orchestrator),
                outcome,
                "{status} {body}"
            );
        }
    }

    #[test]
    fn outcomes_are_listed_by_their_own_index_and_named_as_serde_does() {
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
            assert_eq!(serde_json::to_value(outcome).unwrap(), outcome.name());
        }
    }

    #[test]
    fn equal_orchestrators_compare_equal() {
        for same in ["https://orch:443/", "HTTPS://ORCH", "https://orch"] {
            assert_eq!(same_orchestrator_form(same), "https://orch", "{same}");
        }
        assert_ne!(same_orchestrator_form("https://orch:8935"), "https://orch");
    }

    #[test]
    fn a_balance_is_a_whole_number_of_wei() {
        for good in [
            "0",
            "-5",
            " 115792089237316195423570985008687907853269984665640564039457584007913129639935 ",
        ] {
            assert_eq!(balance_wei(good), Some(good.trim()));
        }
        for bad in ["", "-", "1.5", "1e18", "0x10", "+1"] {
            assert_eq!(balance_wei(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused(value in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = JobHeader::decode(&value);
        }

        #[test]
        fn nearly_right_headers_are_read_or_refused(json in mutated(&[
            r#"{"id":"4f33dcc5-f472-4147-97f4-5909909de4f0","request":"{\"run\": \"agent-net\"}","parameters":"{}","capability":"agent-net","timeout_seconds":30}"#,
        ])) {
            let _ = JobHeader::decode(STANDARD.encode(json).as_bytes());
        }

        #[test]
        fn the_end_mark_is_found_however_the_body_is_cut(
            text in "[\\[DONE\\]x]{0,24}", cuts in prop::collection::vec(0..24_usize, 0..6),
        ) {
            let mut mark = DoneMark::default();
            let mut seen = false;
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| cut <= text.len()).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            for pair in cuts.windows(2) {
                seen = mark.seen_in(&text.as_bytes()[pair[0]..pair[1]]);
            }
            prop_assert_eq!(seen, text.contains("[DONE]"));
        }
    }
}
