//! An agent's answers (`.github/docs/protocol.md` section 2).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use icu_normalizer::ComposingNormalizerBorrowed;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::text::{foreign, is_printable};
use crate::units::Percent;

/// The answer to a ping: the uptime of a window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UptimeReport {
    pub agent_id: String,
    /// Time during which the GPU was seen healthy, over the window.
    pub uptime_percent: Percent,
    /// The window's length.
    pub window_seconds: f64,
    /// When the window begins.
    pub since: DateTime<Utc>,
    /// When it ends.
    pub timestamp: DateTime<Utc>,
    /// Whether the window begins with the agent's first start.
    pub first_ping: bool,
    /// Whether enough GPUs are healthy now.
    pub gpu_available: bool,
    /// How many are healthy now.
    pub gpu_count: usize,
    /// Checks in the window.
    pub checks_total: u64,
    /// Of these, those that found enough GPUs healthy.
    pub checks_available: u64,
    /// Another for each start of the agent.
    pub boot_id: Uuid,
    /// Since that start.
    pub running_seconds: f64,
    /// How many GPUs must be healthy.
    pub required_gpus: usize,
    /// Of the GPUs that the last check found.
    pub gpu_uuids: Vec<String>,
    /// What looks at them: `nvml` or `simulated`.
    pub source: String,
    pub driver_version: Option<String>,
    pub agent_version: String,
}

/// An agent id as an option names it. One that only releases up to 0.1.0 took is still taken, so that an agent that is
/// registered by it keeps its jobs; [`is_agent_id`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentId(pub(crate) String);

impl FromStr for AgentId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = text.trim();
        if is_agent_id(id) || was_agent_id(id) {
            Ok(Self(id.to_owned()))
        } else {
            Err("expected an agent's ID: up to 256 bytes of printable characters, not . or ..")
        }
    }
}

/// Whether this is a valid agent id. Ids occur in URL paths and on lines, and two that look the same must be the same: up to
/// 256 bytes in Unicode's NFC, of printable characters, with plain spaces only inside.
#[must_use]
pub fn is_agent_id(text: &str) -> bool {
    was_agent_id(text)
        && text.trim_matches(' ') == text
        && text.chars().all(|c| c == ' ' || is_printable(c))
        && ComposingNormalizerBorrowed::new_nfc().is_normalized(text)
}

/// What releases up to 0.1.0 took for an agent id.
fn was_agent_id(text: &str) -> bool {
    let length = 1..=256;
    length.contains(&text.len()) && text != "." && text != ".." && !text.contains(char::is_control)
}

/// The longest answer to a ping that is read.
pub const MAX_REPORT_BYTES: usize = 64 << 10;

/// What a ping system takes from the answer to a ping, which may come from another kind of agent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reported {
    /// The uptime of the window; agents may leave it out at their first ping.
    pub uptime_percent: Option<Percent>,
    /// The window's length.
    pub window_seconds: Option<f64>,
    /// Whether a GPU is there.
    pub gpu_available: Option<bool>,
    /// Its GPUs, as far as it names them.
    pub gpu_uuids: Vec<String>,
    /// What looks at them: `nvml` or `simulated`.
    pub source: Option<String>,
    pub agent_version: Option<String>,
}

/// The most GPUs that are taken from an answer, and the longest of its texts.
const MAX_GPUS: usize = 256;
const MAX_TEXT_CHARS: usize = 120;
/// How much of a text of an answer is shown in an error.
const MAX_SHOWN_CHARS: usize = 200;

/// Why the answer to a ping is invalid.
#[derive(Debug, thiserror::Error)]
pub enum InvalidReport {
    /// Not JSON, or not of the expected form.
    #[error("not a valid answer: {}", foreign(&.0.to_string(), MAX_SHOWN_CHARS))]
    Form(#[from] serde_json::Error),
    /// The answer of another agent.
    #[error("answered as agent '{}'", foreign(.0, MAX_SHOWN_CHARS))]
    OtherAgent(String),
    /// A window that is not a valid length of time.
    #[error("window_seconds is {0}: expected a number from 0 to a hundred years")]
    Window(f64),
    /// Neither an uptime nor whether a GPU is there.
    #[error("neither uptime_percent nor gpu_available in the answer")]
    Empty,
}

/// Reads an agent's answer to a ping: fields may be missing, but what would make a wrong record is
/// refused.
///
/// # Errors
/// Not such an answer, another agent's, or one with an invalid percentage or window.
pub fn read_report(body: &[u8], agent_id: &str) -> Result<Reported, InvalidReport> {
    #[derive(Deserialize)]
    struct ReportForm {
        agent_id: Option<String>,
        #[serde(alias = "uptime_percentage")]
        uptime_percent: Option<Percent>,
        window_seconds: Option<f64>,
        gpu_available: Option<bool>,
        #[serde(default)]
        gpu_uuids: Value,
        #[serde(default)]
        source: Value,
        #[serde(default)]
        agent_version: Value,
    }
    const HUNDRED_YEARS: f64 = 100.0 * 365.0 * 86400.0;

    let form: ReportForm = serde_json::from_slice(body)?;
    if let Some(other) = form.agent_id.filter(|got| got != agent_id) {
        return Err(InvalidReport::OtherAgent(other));
    }
    if let Some(wrong) = form
        .window_seconds
        .filter(|w| !(0.0..=HUNDRED_YEARS).contains(w))
    {
        return Err(InvalidReport::Window(wrong));
    }
    if form.uptime_percent.is_none() && form.gpu_available.is_none() {
        return Err(InvalidReport::Empty);
    }
    Ok(Reported {
        uptime_percent: form.uptime_percent,
        window_seconds: form.window_seconds,
        gpu_available: form.gpu_available,
        gpu_uuids: match &form.gpu_uuids {
            Value::Array(uuids) => uuids.iter().filter_map(short_text).take(MAX_GPUS).collect(),
            _ => Vec::new(),
        },
        source: short_text(&form.source),
        agent_version: short_text(&form.agent_version),
    })
}

/// A text that is only shown and compared: what is none, or not one line, is ignored.
fn short_text(value: &Value) -> Option<String> {
    let text = value.as_str()?;
    let fits = !text.is_empty() && text.chars().count() <= MAX_TEXT_CHARS;
    (fits && text.chars().all(|c| c == ' ' || is_printable(c))).then(|| text.to_owned())
}

/// The state of all GPUs at the last check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuStatus {
    /// `available`, or the reason why not.
    pub status: String,
    /// When they were checked.
    pub timestamp: DateTime<Utc>,
    /// How many are healthy.
    pub gpu_count: usize,
    pub devices: BTreeMap<u32, GpuDevice>,
}

/// One GPU; what it or its driver does not report is `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuDevice {
    pub device_id: u32,
    /// Whether it is healthy, or why not.
    pub health: GpuHealth,
    /// Since when its health is this.
    #[serde(default)]
    pub since: Option<DateTime<Utc>>,
    /// Its permanent identifier.
    pub uuid: Option<String>,
    pub name: Option<String>,
    pub memory: Option<GpuMemory>,
    /// Its CUDA compute capability.
    pub compute_capability: Option<ComputeCapability>,
    /// Its utilization.
    pub utilization: Option<Utilization>,
    /// Its temperature.
    pub temperature_celsius: Option<u32>,
    /// Why it runs slower than it could, which is never down.
    #[serde(default)]
    pub throttle_reasons: Option<Vec<String>>,
    /// Errors of its memory since the driver was loaded, which are never down by themselves.
    #[serde(default)]
    pub uncorrected_ecc_errors: Option<u64>,
}

/// Whether a GPU is healthy. In JSON this is the text of [`fmt::Display`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum GpuHealth {
    /// Nothing is wrong with it.
    Ok,
    /// The driver reports it as lost.
    Lost,
    /// The driver does not know it.
    #[default]
    NotFound,
    /// The driver does not answer for it.
    Timeout,
    /// It reported a critical Xid error (NVIDIA's Xid catalogue).
    Xid(u64),
    /// Any other reason, in the driver's words.
    Other(String),
}

impl fmt::Display for GpuHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::Lost => f.write_str("lost"),
            Self::NotFound => f.write_str("not found"),
            Self::Timeout => f.write_str("timeout"),
            Self::Xid(xid) => write!(f, "xid {xid}"),
            Self::Other(reason) => f.write_str(reason),
        }
    }
}

impl From<String> for GpuHealth {
    fn from(text: String) -> Self {
        match text.as_str() {
            "ok" => Self::Ok,
            "lost" => Self::Lost,
            "not found" => Self::NotFound,
            "timeout" => Self::Timeout,
            other => match other.strip_prefix("xid ").map(str::parse) {
                Some(Ok(xid)) => Self::Xid(xid),
                _ => Self::Other(text),
            },
        }
    }
}

impl From<GpuHealth> for String {
    fn from(health: GpuHealth) -> Self {
        health.to_string()
    }
}

/// A GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GpuMemory {
    pub total_bytes: u64,
    /// Not in use.
    pub free_bytes: u64,
    pub used_bytes: u64,
    /// The share of the installed memory that is in use.
    pub usage_percentage: f64,
}

/// A version of the instruction set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeCapability {
    pub major: i32,
    /// The step in it.
    pub minor: i32,
    /// Both, with a dot.
    pub version: String,
}

/// How busy a GPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Utilization {
    pub gpu_percent: u32,
    /// Its memory's bus.
    pub memory_percent: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    #[test]
    fn ids_are_printable_and_written_in_one_way() {
        for good in ["agent-001", "a b", "ä", "漢字", "a/b", "é", "🚀", "<img>"] {
            assert!(is_agent_id(good), "{good}");
        }
        let long = "x".repeat(257);
        for bad in [
            "",
            ".",
            "..",
            " a",
            "a ",
            "a\u{a0}b",
            "a\u{200b}",
            "\u{202e}a",
            "\u{feff}a",
            "a\nb",
            "\u{e000}",
            "a\u{2028}b",
            "\u{ad}",
            "e\u{301}",
            "\u{378}",
            &long,
        ] {
            assert!(!is_agent_id(bad), "{}", bad.escape_unicode());
        }
        // What was taken before still is, by options.
        assert!("e\u{301}".parse::<AgentId>().is_ok());
        assert!("a\0".parse::<AgentId>().is_err());
    }

    #[test]
    fn our_own_and_others_answers_are_read() {
        let ours = UptimeReport {
            agent_id: "a".to_owned(),
            uptime_percent: Percent::new(97.5).unwrap(),
            window_seconds: 900.25,
            since: DateTime::UNIX_EPOCH,
            timestamp: DateTime::UNIX_EPOCH,
            first_ping: false,
            gpu_available: true,
            gpu_count: 1,
            checks_total: 180,
            checks_available: 175,
            boot_id: Uuid::nil(),
            running_seconds: 12.5,
            required_gpus: 1,
            gpu_uuids: vec!["GPU-1".to_owned()],
            source: "nvml".to_owned(),
            driver_version: Some("550.00".to_owned()),
            agent_version: "0.2.0".to_owned(),
        };
        let read = read_report(&serde_json::to_vec(&ours).unwrap(), "a").unwrap();
        assert_eq!(
            read,
            Reported {
                uptime_percent: Percent::new(97.5).ok(),
                window_seconds: Some(900.25),
                gpu_available: Some(true),
                gpu_uuids: vec!["GPU-1".to_owned()],
                source: Some("nvml".to_owned()),
                agent_version: Some("0.2.0".to_owned()),
            }
        );
        let odd = br#"{"uptime_percent": 97.5, "gpu_uuids": ["a\u001b", 5, "GPU-2"], "source": 7}"#;
        let read = read_report(odd, "a").unwrap();
        assert_eq!(
            (read.gpu_uuids, read.source),
            (vec!["GPU-2".to_owned()], None)
        );
        let other = br#"{"uptime_percentage": 97.5, "more": [1]}"#;
        let read = read_report(other, "a").unwrap();
        assert_eq!(read.uptime_percent, Percent::new(97.5).ok());
        assert_eq!((read.window_seconds, read.gpu_available), (None, None));
    }

    #[test]
    fn what_would_make_a_wrong_record_is_refused() {
        for bad in [
            "",
            "<html>",
            "[]",
            "null",
            "{}",
            r#"{"uptime_percent": NaN}"#,
            r#"{"uptime_percent": 1e400}"#,
            r#"{"uptime_percent": 100.1}"#,
            r#"{"uptime_percent": -1, "gpu_available": true}"#,
            r#"{"uptime_percent": "99"}"#,
            r#"{"uptime_percent": 99, "window_seconds": -1}"#,
            r#"{"uptime_percent": 99, "window_seconds": 1e300}"#,
            r#"{"uptime_percent": 99, "agent_id": "b"}"#,
            r#"{"uptime_percent": 99, "agent_id": 5}"#,
            r#"{"uptime_percent": 99"#,
        ] {
            assert!(read_report(bad.as_bytes(), "a").is_err(), "{bad}");
        }
    }

    #[test]
    fn gpu_health_is_text_in_json() {
        for (health, text) in [
            (GpuHealth::Ok, "ok"),
            (GpuHealth::Lost, "lost"),
            (GpuHealth::NotFound, "not found"),
            (GpuHealth::Timeout, "timeout"),
            (GpuHealth::Xid(79), "xid 79"),
            (GpuHealth::Other("xid many".to_owned()), "xid many"),
        ] {
            let json = serde_json::to_value(&health).unwrap();
            assert_eq!(json, text);
            assert_eq!(serde_json::from_value::<GpuHealth>(json).unwrap(), health);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_report(&body, "a");
        }

        #[test]
        fn nearly_right_answers_are_read_or_refused(body in mutated(&[
            r#"{"agent_id":"a","uptime_percent":99.97,"window_seconds":900.5,"since":"2026-01-01T00:00:00Z","timestamp":"2026-01-01T00:15:00Z","first_ping":false,"gpu_available":true,"gpu_count":1,"checks_total":180,"checks_available":179}"#,
            r#"{"uptime_percentage": 0}"#,
        ])) {
            if let Ok(read) = read_report(&body, "a") {
                prop_assert!(read.window_seconds.is_none_or(|w| w >= 0.0 && w.is_finite()));
            }
        }
    }
}
