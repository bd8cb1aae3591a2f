//! The small languages that script the mock: agents, uptime over time, latency, shares of failures.

use std::str::FromStr;
use std::time::Duration;

use fastrand::Rng;

use super::recorded_answers::{RecordedIndex, RecordedSet};
use crate::units::{Percent, Span};
use crate::wire::agent::AgentId;

/// Uptimes from given times on: `99.5@0s,96.2@30s`.
#[derive(Debug, Clone, PartialEq)]
pub struct UptimeScript(Vec<(Duration, Percent)>);

impl UptimeScript {
    /// A script of uptimes by the time from which they hold; before the first, the first holds.
    #[must_use]
    pub fn new(mut steps: Vec<(Duration, Percent)>) -> Self {
        steps.sort_by_key(|(from, _)| *from);
        Self(steps)
    }

    /// The uptime after this time.
    #[must_use]
    pub fn at(&self, elapsed: Duration) -> Percent {
        let begun = self.0.partition_point(|(from, _)| *from <= elapsed);
        self.0
            .get(begun.saturating_sub(1))
            .map_or(Percent::FULL, |(_, percent)| *percent)
    }
}

impl FromStr for UptimeScript {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let step = |step: &str| {
            let (percent, from) = step.split_once('@').unwrap_or((step, "0"));
            let percent = percent.trim().trim_end_matches('%').parse().ok();
            Some((span_or_zero(from)?, Percent::new(percent?).ok()?))
        };
        text.split(',')
            .map(|text| step(text).ok_or_else(|| format!("'{text}': expected UPTIME@TIME with an uptime from 0 to 100, such as 99.5@0s,96.2@30s")))
            .collect::<Result<_, _>>()
            .map(Self::new)
    }
}

/// An agent, with or without an uptime of its own: `agent-001=99.5@0s,85@30s`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ScriptedAgent {
    pub id: String,
    /// Instead of the common one.
    pub uptime: Option<UptimeScript>,
}

impl FromStr for ScriptedAgent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (id, uptime) = match text.rsplit_once('=') {
            None => (text, None),
            Some((id, script)) => (id, Some(script.parse()?)),
        };
        let AgentId(id) = id.parse().map_err(|error| format!("'{id}': {error}"))?;
        Ok(Self { id, uptime })
    }
}

/// A latency and how far it spreads: `45ms±10`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    middle: Duration,
    spread: Duration,
}

impl Latency {
    /// Draws a latency, uniformly distributed around the middle.
    pub fn draw(self, rng: &mut Rng) -> Duration {
        (self.middle + self.spread.mul_f64(2.0 * rng.f64())).saturating_sub(self.spread)
    }
}

impl FromStr for Latency {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (middle, spread) = text
            .split_once('±')
            .or_else(|| text.split_once("+-"))
            .map_or((text, None), |(middle, spread)| (middle, Some(spread)));
        let unit = middle
            .trim()
            .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let spread = match spread {
            None => Some(Duration::ZERO),
            // In the unit of the middle unless it has its own.
            Some(spread) => {
                span_or_zero(&format!("{}{unit}", spread.trim())).or_else(|| span_or_zero(spread))
            }
        };
        match (span_or_zero(middle), spread) {
            (Some(middle), Some(spread)) => Ok(Self { middle, spread }),
            _ => Err("expected a length of time with or without a spread, such as 45ms or 45ms±10"),
        }
    }
}

fn span_or_zero(text: &str) -> Option<Duration> {
    let is_zero = text.trim().trim_end_matches(char::is_alphabetic).parse() == Ok(0.0);
    if is_zero {
        Some(Duration::ZERO)
    } else {
        text.parse::<Span>().ok().map(Span::get)
    }
}

/// A way to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// An HTTP status.
    Status(u16),
    /// 200 without a body and an orchestrator.
    Empty,
    /// No orchestrator offers the capability.
    NoSupply,
    /// The balance does not cover the job.
    Unpaid,
    /// No answer, ever.
    Hang,
    /// The connection ends before the answer is complete.
    Reset,
    /// The worker is gone: this job gets an empty 200, and no later one finds an orchestrator.
    WorkerGone,
    /// As a real gateway or proxy answered.
    Recorded(RecordedIndex),
}

impl FromStr for Failure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let status = || text.parse().ok().filter(|s| (300..600).contains(s));
        match text {
            "empty" => Ok(Self::Empty),
            "no-supply" => Ok(Self::NoSupply),
            "unpaid" => Ok(Self::Unpaid),
            "hang" => Ok(Self::Hang),
            "reset" => Ok(Self::Reset),
            "worker-gone" => Ok(Self::WorkerGone),
            other => match (RecordedIndex::named(RecordedSet::Gateway, other), status()) {
                (Some(recorded), _) => Ok(Self::Recorded(recorded)),
                (None, Some(status)) => Ok(Self::Status(status)),
                (None, None) => {
                    let recorded: Vec<&str> = RecordedIndex::names(RecordedSet::Gateway).collect();
                    Err(format!(
                        "a status from 300 to 599, empty, no-supply, unpaid, hang, reset, worker-gone, or a recorded answer: {}",
                        recorded.join(", ")
                    ))
                }
            },
        }
    }
}

/// The share of jobs that fail in one way: `500:2%`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FailureShare<F = Failure> {
    pub failure: F,
    /// The share of all jobs.
    pub share: Percent,
}

impl<F: Copy> FailureShare<F> {
    /// Draws a failure with the probabilities of `shares`; usually none.
    pub fn draw(shares: &[Self], rng: &mut Rng) -> Option<F> {
        let mut point = rng.f64() * 100.0;
        shares.iter().find_map(|each| {
            point -= each.share.get();
            (point < 0.0).then_some(each.failure)
        })
    }
}

impl<F: FromStr<Err = String>> FromStr for FailureShare<F> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, share) = text.split_once(':').unwrap_or((text, ""));
        let share = share.trim();
        let share = share.strip_suffix('%').unwrap_or(share).trim();
        let share = share
            .parse()
            .ok()
            .and_then(|share| Percent::new(share).ok());
        let expected = "expected KIND:SHARE%, such as 500:2%";
        let failure = kind
            .trim()
            .parse()
            .map_err(|kinds| format!("{expected}: {kinds}"))?;
        match share {
            Some(share) => Ok(Self { failure, share }),
            None => Err(format!("{expected}: a share from 0 to 100 %")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_uptime_script_is_read_and_followed() {
        let script: UptimeScript = "96.2@30s, 99.5@0s,0%@1m".parse().unwrap();
        for (seconds, percent) in [
            (0, 99.5),
            (29, 99.5),
            (30, 96.2),
            (59, 96.2),
            (60, 0.0),
            (999, 0.0),
        ] {
            assert_eq!(
                script.at(Duration::from_secs(seconds)).get(),
                percent,
                "at {seconds}"
            );
        }
        assert_eq!(
            "95".parse::<UptimeScript>()
                .unwrap()
                .at(Duration::ZERO)
                .get(),
            95.0
        );
        for bad in ["", "101@0s", "x@0s", "99@", "99@soon", "99@1s,"] {
            assert!(bad.parse::<UptimeScript>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_agent_is_read_with_its_uptime() {
        let agent = |text: &str| text.parse::<ScriptedAgent>();
        let plain = agent("agent-001").unwrap();
        assert_eq!((&*plain.id, plain.uptime), ("agent-001", None));
        let scripted = agent("a=b=99.5@0s,85@30s").unwrap();
        assert_eq!(scripted.id, "a=b");
        assert_eq!(scripted.uptime, "99.5@0s,85@30s".parse().ok());
        for bad in ["", "=99", "a=", "a=101"] {
            assert!(agent(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_latency_is_read_with_its_spread() {
        let ms = Duration::from_millis;
        for (text, middle, spread) in [
            ("45ms±10", 45, 10),
            ("45ms±10ms", 45, 10),
            ("45ms+-5", 45, 5),
            ("0", 0, 0),
            ("0ms", 0, 0),
            ("1s±100ms", 1000, 100),
            ("0.5", 500, 0),
            ("2±1", 2000, 1000),
            ("45ms±0", 45, 0),
        ] {
            let expected = Latency {
                middle: ms(middle),
                spread: ms(spread),
            };
            assert_eq!(text.parse::<Latency>(), Ok(expected), "{text}");
        }
        for bad in ["", "fast", "45ms±", "±10", "-5"] {
            assert!(bad.parse::<Latency>().is_err(), "{bad}");
        }
    }

    #[test]
    fn failures_come_in_their_shares() {
        let shares: Vec<FailureShare> = ["500:20%", "empty:5", "reset:0%"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut counts = [0; 4];
        for _ in 0..10_000 {
            counts[match FailureShare::draw(&shares, &mut rng) {
                Some(Failure::Status(500)) => 0,
                Some(Failure::Empty) => 1,
                None => 2,
                Some(_) => 3,
            }] += 1;
        }
        assert!(
            (1800..2200).contains(&counts[0]) && (400..600).contains(&counts[1]),
            "{counts:?}"
        );
        assert_eq!(counts[3], 0);
        for bad in ["", "500", "200:5%", "500:101%", "slow:5%", "500:x"] {
            assert!(bad.parse::<FailureShare>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,30}") {
            let _ = text.parse::<UptimeScript>();
            let _ = text.parse::<Latency>();
            let _ = text.parse::<FailureShare>();
        }
    }
}
