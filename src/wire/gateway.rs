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
    }
}
