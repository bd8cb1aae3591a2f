//! The registration of an agent, and its limits.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::text::{foreign, is_printable};
use crate::wire::agent::is_agent_id;

/// The longest registration that is read.
pub(super) const MAX_BODY_BYTES: usize = 64 << 10;
const MAX_CAPABILITIES: usize = 64;
const MAX_CAPABILITY_BYTES: usize = 128;
/// The longest metadata as JSON; every list of agents contains it.
const MAX_METADATA_BYTES: usize = 4 << 10;
/// Names that are reserved in the paths of the API.
const RESERVED: [&str; 2] = ["register", "due-for-ping"];

/// A registration as it is sent.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegisterRequest {
    /// The agent's name.
    pub agent_id: String,
    /// The agent's own URL, not yet checked.
    pub agent_url: String,
    /// Its capabilities; those that are known stay if they are not told.
    pub capabilities: Option<Vec<String>>,
    /// Free metadata, as for the capabilities.
    pub metadata: Option<Map<String, Value>>,
}

/// Why a registration is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidRegistration {
    /// Not JSON, or not of the expected form.
    #[error(
        "expected {{\"agent_id\": …, \"agent_url\": …, \"capabilities\": […], \"metadata\": {{…}}}}: {}",
        foreign(&.0.to_string(), 200)
    )]
    RegisterRequest(#[from] serde_json::Error),
    /// An invalid agent id.
    #[error(
        "agent_id: expected up to 256 bytes of printable characters in Unicode's NFC, with plain spaces only inside, and not . or .. or register or due-for-ping"
    )]
    Id,
    /// Too many or too long ones.
    #[error(
        "capabilities: expected up to {MAX_CAPABILITIES} names of up to {MAX_CAPABILITY_BYTES} bytes of printable characters"
    )]
    Capabilities,
    #[error("metadata: expected up to {MAX_METADATA_BYTES} bytes of JSON")]
    Metadata,
}

/// Reads a registration and checks all but the address.
///
/// # Errors
/// Why it is refused.
pub(super) fn read(body: &[u8]) -> Result<RegisterRequest, InvalidRegistration> {
    let form: RegisterRequest = serde_json::from_slice(body)?;
    if !is_agent_id(&form.agent_id) || RESERVED.contains(&form.agent_id.as_str()) {
        return Err(InvalidRegistration::Id);
    }
    let capability = |name: &String| {
        !name.is_empty()
            && name.len() <= MAX_CAPABILITY_BYTES
            && name.chars().all(|c| c == ' ' || is_printable(c))
    };
    let capabilities = form.capabilities.as_deref().unwrap_or_default();
    if capabilities.len() > MAX_CAPABILITIES || !capabilities.iter().all(capability) {
        return Err(InvalidRegistration::Capabilities);
    }
    if serde_json::to_string(&form.metadata)?.len() > MAX_METADATA_BYTES {
        return Err(InvalidRegistration::Metadata);
    }
    Ok(form)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn names_of_all_kinds_are_read_as_they_are() {
        for id in [
            "agent-001",
            "<img src=x onerror=alert(1)>",
            "a/b",
            "it's \"quoted\"",
            "ä ö",
        ] {
            let body = json!({"agent_id": id, "agent_url": "http://x"}).to_string();
            let form = read(body.as_bytes()).unwrap();
            assert_eq!(form.agent_id, id);
            assert!(form.capabilities.is_none() && form.metadata.is_none());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let with = |field: &str, value: Value| {
            let mut body = json!({"agent_id": "a", "agent_url": "http://x"});
            body[field] = value;
            body.to_string()
        };
        for bad in [
            String::new(),
            "{".to_owned(),
            "[]".to_owned(),
            r#"{"agent_id": "a"}"#.to_owned(),
            with("agent_id", json!("")),
            with("agent_id", json!(5)),
            with("agent_id", json!("..")),
            with("agent_id", json!("due-for-ping")),
            with("more", json!(1)),
            with("agent_id", json!("two\nlines")),
            with("agent_id", json!("nul\0")),
            with("agent_id", json!("x".repeat(257))),
            with("capabilities", json!("gpu")),
            with("capabilities", json!([""])),
            with("capabilities", json!(["x".repeat(200)])),
            with("capabilities", json!(vec!["x"; 65])),
            with("metadata", json!([])),
            with("metadata", json!({"x": "y".repeat(5000)})),
            "[".repeat(10_000),
        ] {
            let shown: String = bad.chars().take(80).collect();
            assert!(read(bad.as_bytes()).is_err(), "{shown}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&body);
        }

        #[test]
        fn nearly_right_ones_are_read_or_refused(body in mutated(&[
            r#"{"agent_id":"agent-001","agent_url":"http://127.0.0.1:8001","capabilities":["gpu-check"],"metadata":{"region":"eu","n":[1,2.5,null]}}"#,
        ])) {
            if let Ok(form) = read(&body) {
                prop_assert!(is_agent_id(&form.agent_id));
            }
        }
    }
}
