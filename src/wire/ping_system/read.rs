//! Answers of a ping system, read liberally (`.github/docs/protocol.md` section 1.4): other ping systems exist, and
//! the Python one writes times without a zone. What could corrupt a decision makes the whole answer
//! invalid.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer};
use serde_json::Value;

use super::served::Ping;
use crate::text::foreign;
use crate::units::Percent;

/// The longest answer that is read.
pub const MAX_BODY_BYTES: usize = 8 << 20;

/// What the list of agents says about one of them, as far as the runner needs it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ListedAgent {
    /// The agent's name.
    pub agent_id: String,
    /// The agent's own URL; shown and examined by `check` only.
    #[serde(default, deserialize_with = "text_or_nothing")]
    pub agent_url: Option<String>,
    /// The time of its last ping.
    #[serde(default, deserialize_with = "time_or_null")]
    pub last_ping_at: Option<DateTime<Utc>>,
    /// The number of its pings.
    #[serde(default, deserialize_with = "count_or_nothing")]
    pub total_pings: Option<u64>,
    /// How many of the latest pings were poor.
    #[serde(default, deserialize_with = "count_or_nothing")]
    pub consecutive_poor_uptime: Option<u64>,
    /// Minutes between two pings now.
    #[serde(default, deserialize_with = "length_or_null")]
    pub ping_interval_minutes: Option<f64>,
    /// The uptime that the last ping reported.
    #[serde(default, alias = "last_uptime_percentage")]
    pub last_uptime_percent: Option<Percent>,
}

/// One ping of an agent and its result.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryPing {
    /// When the agent was pinged.
    pub timestamp: DateTime<Utc>,
    /// Whether it answered.
    pub success: bool,
    /// The uptime that it reported for its window.
    pub uptime_percent: Option<Percent>,
    /// The seconds that the report covers.
    pub window_seconds: Option<f64>,
    /// Whether a GPU was there.
    pub gpu_available: Option<bool>,
    /// Whether it was the agent's first ping, which proves only that a GPU exists.
    pub first_ping: bool,
    /// From when on it speaks for the agent.
    pub covers_from: Option<DateTime<Utc>>,
    /// Whether it says nothing: an answered ping covers its time, or the ping system could not see.
    pub is_void: bool,
}

impl From<&Ping> for HistoryPing {
    fn from(ping: &Ping) -> Self {
        Self {
            timestamp: ping.timestamp,
            success: ping.success,
            uptime_percent: ping.uptime_percent,
            window_seconds: ping.window_seconds,
            gpu_available: ping.gpu_available,
            first_ping: ping.first_ping,
            covers_from: ping.covers_from,
            is_void: ping.superseded || !ping.observed,
        }
    }
}

/// How much of a text of an answer is shown in an error.
const MAX_SHOWN_CHARS: usize = 200;

/// Why an answer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAnswer {
    /// Not JSON, or not of the expected form.
    #[error("not a valid answer: {0}")]
    Form(String),
    /// An answer about another agent.
    #[error(
        "the answer is about agent '{}', expected '{expected}'",
        foreign(got, MAX_SHOWN_CHARS)
    )]
    OtherAgent {
        /// The agent that the answer is about.
        got: String,
        /// The agent that was asked about.
        expected: String,
    },
}

impl From<serde_json::Error> for InvalidAnswer {
    fn from(error: serde_json::Error) -> Self {
        Self::Form(foreign(&error.to_string(), MAX_SHOWN_CHARS))
    }
}

/// A page of a list, or the whole list where a ping system has no pages.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// What `after` is for the next page; `None` if there is none.
    pub next: Option<String>,
}

/// Reads a list of agents: `{"agents": […]}` or a bare array.
///
/// # Errors
/// Anything that is not such a list, or holds an invalid percentage or time.
pub fn read_agents(body: &[u8]) -> Result<Page<ListedAgent>, InvalidAnswer> {
    #[derive(Deserialize)]
    struct AgentListForm {
        agents: Vec<ListedAgent>,
        #[serde(default, deserialize_with = "text_or_nothing")]
        next: Option<String>,
    }
    let mut next = None;
    let items = object_or_array(body, |object: AgentListForm| {
        next = object.next;
        object.agents
    })?;
    Ok(Page { items, next })
}

/// Reads an agent.
///
/// # Errors
/// Anything that is not that agent, or holds an invalid percentage or time.
pub fn read_agent(body: &[u8], agent_id: &str) -> Result<ListedAgent, InvalidAnswer> {
    let agent: ListedAgent = serde_json::from_slice(body)?;
    if agent.agent_id == agent_id {
        return Ok(agent);
    }
    Err(InvalidAnswer::OtherAgent {
        got: agent.agent_id,
        expected: agent_id.to_owned(),
    })
}

/// Reads the history of `agent_id`, sorted oldest first: `{"pings": […]}`, `{"history": […]}` or a
/// bare array.
///
/// # Errors
/// Anything that is not such a history, that of another agent, or one with an invalid percentage, time
/// or window.
pub fn read_history(body: &[u8], agent_id: &str) -> Result<Page<HistoryPing>, InvalidAnswer> {
    #[derive(Deserialize)]
    struct HistoryForm {
        agent_id: Option<String>,
        #[serde(default, deserialize_with = "text_or_nothing")]
        next: Option<String>,
        #[serde(alias = "history")]
        pings: Vec<PingForm>,
    }
    let (mut owner, mut next) = (None, None);
    let forms = object_or_array(body, |object: HistoryForm| {
        owner = object.agent_id;
        next = object.next;
        object.pings
    })?;
    if let Some(got) = owner.filter(|got| got != agent_id) {
        return Err(InvalidAnswer::OtherAgent {
            got,
            expected: agent_id.to_owned(),
        });
    }
    let mut pings: Vec<HistoryPing> = forms.into_iter().map(HistoryPing::from).collect();
    pings.sort_by_key(|ping| ping.timestamp);
    Ok(Page { items: pings, next })
}

/// Reads a new ping of `agent_id` from an event's data, and the agent's state after it.
///
/// # Errors
/// As for a history.
pub fn read_event(
    data: &[u8],
    agent_id: &str,
) -> Result<(ListedAgent, HistoryPing), InvalidAnswer> {
    #[derive(Deserialize)]
    struct PingEventForm {
        agent: ListedAgent,
        ping: PingForm,
    }
    /// Of ping systems up to 0.1.0: the agent's fields stand beside the ping, and its last ping is this one.
    #[derive(Deserialize)]
    struct LegacyPingEventForm {
        #[serde(flatten)]
        agent: ListedAgent,
        ping: PingForm,
    }
    #[derive(Deserialize)]
    struct WhichForm {
        agent: Option<serde::de::IgnoredAny>,
    }
    let (agent, ping) = if serde_json::from_slice::<WhichForm>(data)?.agent.is_some() {
        let PingEventForm { agent, ping } = serde_json::from_slice(data)?;
        (agent, ping.into())
    } else {
        let LegacyPingEventForm { mut agent, ping } = serde_json::from_slice(data)?;
        let ping = HistoryPing::from(ping);
        agent.last_ping_at = Some(ping.timestamp);
        agent.last_uptime_percent = ping.uptime_percent;
        (agent, ping)
    };
    if agent.agent_id != agent_id {
        return Err(InvalidAnswer::OtherAgent {
            got: agent.agent_id,
            expected: agent_id.to_owned(),
        });
    }
    Ok((agent, ping))
}

/// The fields of a ping under all their known names.
#[derive(Deserialize)]
struct PingForm {
    #[serde(deserialize_with = "time")]
    timestamp: DateTime<Utc>,
    success: Option<bool>,
    uptime_percent: Option<Percent>,
    uptime_percentage: Option<Percent>,
    #[serde(default, deserialize_with = "length_or_null")]
    window_seconds: Option<f64>,
    gpu_available: Option<bool>,
    first_ping: Option<bool>,
    #[serde(default, deserialize_with = "time_or_null")]
    covers_from: Option<DateTime<Utc>>,
    superseded: Option<bool>,
    observed: Option<bool>,
}

impl From<PingForm> for HistoryPing {
    fn from(form: PingForm) -> Self {
        let uptime_percent = form.uptime_percent.or(form.uptime_percentage);
        Self {
            timestamp: form.timestamp,
            success: form.success.unwrap_or(uptime_percent.is_some()),
            uptime_percent,
            window_seconds: form.window_seconds,
            gpu_available: form.gpu_available,
            first_ping: form.first_ping.unwrap_or(false),
            covers_from: form.covers_from,
            is_void: form.superseded == Some(true) || form.observed == Some(false),
        }
    }
}

fn object_or_array<T: DeserializeOwned, O: DeserializeOwned>(
    body: &[u8],
    items: impl FnOnce(O) -> Vec<T>,
) -> Result<Vec<T>, serde_json::Error> {
    if body.trim_ascii_start().starts_with(b"[") {
        serde_json::from_slice(body)
    } else {
        serde_json::from_slice(body).map(items)
    }
}

/// A number above this is milliseconds since 1970, not seconds.
const MILLISECONDS_ABOVE: f64 = 1e11;

/// RFC 3339, the same without a zone (UTC then), or seconds since 1970, or milliseconds.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DateTime<Utc>, D::Error> {
    time_or_null(deserializer)?.ok_or_else(|| de::Error::custom("a time is missing"))
}

fn time_or_null<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<DateTime<Utc>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum TimeForm {
        Text(String),
        Seconds(f64),
    }
    let parsed = match Option::<TimeForm>::deserialize(deserializer)? {
        None => return Ok(None),
        Some(TimeForm::Text(text)) => DateTime::parse_from_rfc3339(&text)
            .map(|time| time.to_utc())
            .or_else(|_| text.parse::<NaiveDateTime>().map(|time| time.and_utc()))
            .map_err(|_| format!("'{text}'")),
        Some(TimeForm::Seconds(seconds)) => {
            let unit = if seconds > MILLISECONDS_ABOVE {
                1e3
            } else {
                1e6
            };
            // Saturates, and from_timestamp_micros refuses what lies beyond its years.
            #[expect(clippy::cast_possible_truncation)]
            let micros = (seconds * unit) as i64;
            DateTime::from_timestamp_micros(micros).ok_or_else(|| seconds.to_string())
        }
    };
    parsed.map(Some).map_err(|got| {
        de::Error::custom(format!(
            "{got} is not a time: expected RFC 3339 or seconds since 1970"
        ))
    })
}

/// A number of seconds or minutes that a decision depends on: finite and not negative.
fn length_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    match Option::<f64>::deserialize(deserializer)? {
        Some(length) if !length.is_finite() || length < 0.0 => Err(de::Error::custom(format!(
            "{length} is not a length of time: expected a finite number from 0"
        ))),
        length => Ok(length),
    }
}

/// A text that is only shown: any other type is ignored.
fn text_or_nothing<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(Some(text)),
        _ => Ok(None),
    }
}

/// A count that is only shown: any other value is ignored.
fn count_or_nothing<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Value::deserialize(deserializer)?.as_u64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn utc(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn the_list_is_read_in_all_its_forms() {
        let full = br#"{"agents":[{"agent_id":"a","agent_url":"http://x","capabilities":[],
            "metadata":{},"status":"active","last_ping_at":"2026-01-01T00:00:00Z","total_pings":8,
            "consecutive_poor_uptime":1,"ping_interval_minutes":15,"last_uptime_percent":96.25,
            "something_new":{"x":[1]}}],"count":1}"#;
        let agent = &read_agents(full).unwrap().items[0];
        assert_eq!(agent.last_uptime_percent, Percent::new(96.25).ok());
        assert_eq!(agent.last_ping_at, Some(utc("2026-01-01T00:00:00Z")));
        assert_eq!(
            (agent.total_pings, agent.consecutive_poor_uptime),
            (Some(8), Some(1))
        );

        let bare = br#" [{"agent_id":"a","last_uptime_percentage":5,"last_ping_at":1767225600.5}]"#;
        let agent = &read_agents(bare).unwrap().items[0];
        assert_eq!(agent.last_uptime_percent, Percent::new(5.0).ok());
        assert_eq!(agent.last_ping_at, Some(utc("2026-01-01T00:00:00.5Z")));
        assert_eq!(agent.ping_interval_minutes, None);
    }

    #[test]
    fn the_history_is_read_in_all_its_forms() {
        let newest = "2026-01-01T00:15:00+00:00";
        for body in [
            format!(
                r#"{{"agent_id":"a","pings":[{{"timestamp":"{newest}","success":true,"uptime_percent":99.5}}]}}"#
            ),
            format!(
                r#"{{"history":[{{"timestamp":"{newest}","success":true,"uptime_percentage":99.5}}]}}"#
            ),
            r#"[{"timestamp":1767226500,"uptime_percent":99.5,"first_ping":null}]"#.to_owned(),
            r#"[{"timestamp":"2026-01-01T00:15:00.000000","uptime_percent":99.5}]"#.to_owned(),
            r#"[{"timestamp":1767226500000,"uptime_percent":99.5}]"#.to_owned(),
        ] {
            let pings = read_history(body.as_bytes(), "a").unwrap().items;
            assert_eq!(pings[0].timestamp, utc(newest), "{body}");
            assert_eq!(pings[0].uptime_percent, Percent::new(99.5).ok());
            assert!(pings[0].success && !pings[0].first_ping);
        }
    }

    #[test]
    fn an_event_is_a_ping_and_what_it_made_of_its_agent() {
        let data =
            br#"{"agent_id":"a","status":"active","total_pings":9,"consecutive_poor_uptime":2,
            "ping_interval_minutes":60,"ping":{"timestamp":"2026-01-01T00:00:00Z","success":true,
            "uptime_percent":93.5,"window_seconds":900}}"#;
        let (agent, ping) = read_event(data, "a").unwrap();
        assert_eq!(ping.uptime_percent, Percent::new(93.5).ok());
        assert_eq!(agent.last_uptime_percent, ping.uptime_percent);
        assert_eq!(agent.last_ping_at, Some(utc("2026-01-01T00:00:00Z")));
        assert_eq!(agent.total_pings, Some(9));
        for (bad, whose) in [
            (&data[..], "b"),
            (br#"{"agent_id":"a"}"#, "a"),
            (br#"{"ping":{"timestamp":1}}"#, "a"),
            (
                br#"{"agent_id":"a","ping":{"timestamp":1,"uptime_percent":101}}"#,
                "a",
            ),
            (b"ping", "a"),
        ] {
            assert!(read_event(bad, whose).is_err());
        }
    }

    #[test]
    fn history_is_sorted_oldest_first() {
        let body = br#"[{"timestamp":30},{"timestamp":10},{"timestamp":20}]"#;
        let seconds: Vec<i64> = read_history(body, "a")
            .unwrap()
            .items
            .iter()
            .map(|p| p.timestamp.timestamp())
            .collect();
        assert_eq!(seconds, [10, 20, 30]);
    }

    #[test]
    fn a_page_tells_where_the_next_one_begins() {
        let page = read_agents(br#"{"agents":[{"agent_id":"a"}],"count":1,"next":"a"}"#).unwrap();
        assert_eq!((page.items.len(), page.next.as_deref()), (1, Some("a")));
        for last in [&br#"{"pings":[],"next":null}"#[..], b"[]"] {
            assert_eq!(read_history(last, "a").unwrap().next, None);
        }
        assert!(read_agent(br#"{"agent_id":"b"}"#, "a").is_err());
    }

    #[test]
    fn what_would_corrupt_a_decision_makes_the_answer_invalid() {
        for bad in [
            "",
            "<html>",
            "null",
            "{}",
            r#"{"agents":{}}"#,
            r#"{"agents":[{}]}"#,
            r#"{"agents":[{"agent_id":"a"}"#,
            r#"[{"agent_id":"a","last_uptime_percent":-1}]"#,
            r#"[{"agent_id":"a","last_uptime_percent":100.01}]"#,
            r#"[{"agent_id":"a","last_uptime_percent":1e400}]"#,
            r#"[{"agent_id":"a","last_uptime_percent":NaN}]"#,
            r#"[{"agent_id":"a","last_uptime_percent":"99"}]"#,
            r#"[{"agent_id":"a"},{"agent_id":"b","last_uptime_percent":101}]"#,
            r#"[{"agent_id":"a","ping_interval_minutes":-5}]"#,
            r#"[{"agent_id":"a","last_ping_at":"yesterday"}]"#,
            r#"[{"agent_id":"a","last_ping_at":1e300}]"#,
        ] {
            assert!(read_agents(bad.as_bytes()).is_err(), "{bad}");
        }
        for bad in [
            r#"{"pings":null}"#,
            r#"[{"uptime_percent":99}]"#,
            r#"[{"timestamp":10,"uptime_percent":-0.5}]"#,
            r#"[{"timestamp":10,"uptime_percent":1e400}]"#,
            r#"[{"timestamp":10,"window_seconds":-900}]"#,
            r#"{"agent_id":"b","pings":[]}"#,
        ] {
            assert!(read_history(bad.as_bytes(), "a").is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_agents(&body);
            let _ = read_history(&body, "a");
        }

        #[test]
        fn nearly_right_answers_are_read_or_refused(body in mutated(&[
            r#"{"agents":[{"agent_id":"a","agent_url":"http://x","status":"active","last_ping_at":"2026-01-01T00:00:00Z","total_pings":8,"consecutive_poor_uptime":1,"ping_interval_minutes":15,"last_uptime_percent":96.25}],"count":1}"#,
            r#"{"agent_id":"a","hours":1,"pings":[{"timestamp":1767226500.5,"success":true,"uptime_percent":99.5,"window_seconds":900,"gpu_available":true,"first_ping":false}],"count":1}"#,
            r#"{"agent_id":"a","total_pings":9,"ping":{"timestamp":"2026-01-01T00:00:00Z","success":false,"uptime_percent":null}}"#,
        ])) {
            let _ = read_agents(&body);
            let _ = read_agent(&body, "a");
            if let Ok(Page { items: pings, .. }) = read_history(&body, "a") {
                let sorted = pings.is_sorted_by_key(|ping| ping.timestamp);
                let weighable = pings.iter().all(|ping| ping.window_seconds.is_none_or(|w| w >= 0.0 && w.is_finite()));
                prop_assert!(sorted && weighable);
            }
            let _ = read_event(&body, "a");
        }

        #[test]
        fn any_number_read_as_a_percentage_is_one(number in any::<f64>()) {
            let body = format!(r#"[{{"timestamp":10,"uptime_percent":{number}}}]"#);
            if let Ok(pings) = read_history(body.as_bytes(), "a") {
                prop_assert!((0.0..=100.0).contains(&pings.items[0].uptime_percent.unwrap().get()));
            }
        }
    }
}
