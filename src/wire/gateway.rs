//! What a Livepeer BYOC gateway is sent and what its answers mean (`.github/docs/protocol.md` section 3).

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use serde::Serialize;
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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

impl JobHeader<'_> {
    /// The header's value.
    #[must_use]
    pub fn encode(&self) -> String {
        let json = serde_json::to_vec(self)
            .expect("a struct of text and numbers can always be written as JSON");
        STANDARD.encode(json)
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
}
