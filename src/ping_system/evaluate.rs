//! Evaluates an agent's answer: the ping to store, and the agent's new streak and interval.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::interval::{IntervalRules, Streak, spread};
use super::store::whole_micros;
use super::store::{AgentRecord, PingRecord};
use super::stretch::{self, MeasuredStretch};
use crate::units::{milliseconds, saturating_add, saturating_sub};
use crate::wire::agent::Reported;
use crate::wire::coverage::{self, first_ping_uptime};
use crate::wire::ping_system::served::{Ping, Status};

/// One attempt to ping an agent: its answer, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub struct PingAttempt {
    /// When the ping began.
    pub at: DateTime<Utc>,
    /// How long it took.
    pub took: Duration,
    /// How much time it is about.
    pub measured: MeasuredStretch,
    pub answer: Result<Reported, String>,
}

/// How pings are evaluated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PingPolicy {
    /// How they change the interval.
    pub interval: IntervalRules,
    /// Whether an agent's first ping only asks whether a GPU exists.
    pub first_ping_grace: bool,
}

/// The defaults of `.github/docs/operations.md`.
impl Default for PingPolicy {
    fn default() -> Self {
        Self {
            interval: IntervalRules::default(),
            first_ping_grace: true,
        }
    }
}

impl PingPolicy {
    /// The ping to be stored for an attempt; `random`, from 0 to 1, spreads the time of the next ping.
    #[must_use]
    pub fn evaluate(&self, known: &AgentRecord, attempt: PingAttempt, random: f64) -> PingRecord {
        let graced = self.first_ping_grace && known.agent.total_pings == 0;
        let ping = ping(known, attempt, graced);
        let streak = match (graced, ping.success) {
            (true, _) => Streak::default(),
            // What failed since the last answer is superseded, and changes nothing.
            (false, true) => self
                .interval
                .next_streak(known.answered_streak, ping.uptime_percent),
            (false, false) => self.interval.next_streak(known.streak, None),
        };
        let interval = self.interval.interval(streak);
        let mut agent = known.agent.clone();
        agent.status = if ping.success {
            Status::Active
        } else {
            Status::Unreachable
        };
        agent.last_ping_at = Some(ping.timestamp);
        agent.next_ping_at = whole_micros(saturating_add(ping.timestamp, spread(interval, random)));
        agent.total_pings += 1;
        agent.consecutive_poor_uptime = streak.consecutive_poor;
        agent.ping_interval_minutes = interval.as_secs_f64() / 60.0;
        agent.last_uptime_percent = ping.uptime_percent;
        let (last_answered_at, answered_streak) = if ping.success {
            (Some(ping.timestamp), streak)
        } else {
            (known.last_answered_at, known.answered_streak)
        };
        let was_failing = known.agent.status == Status::Unreachable;
        PingRecord {
            covered_seconds: ping.covers_from.and(ping.window_seconds).unwrap_or(0.0),
            supersedes_after: known
                .last_answered_at
                .filter(|_| ping.success && was_failing),
            ping,
            after: AgentRecord {
                key: known.key,
                agent,
                streak,
                last_answered_at,
                answered_streak,
            },
        }
    }
}

/// The ping by itself. An answered one covers the time since the last answered one, a failed one that since the last
/// stored one; the first one asks only whether a GPU is there (`.github/docs/protocol.md` section 1.1).
fn ping(known: &AgentRecord, attempt: PingAttempt, first_ping: bool) -> Ping {
    let mut ping = Ping {
        timestamp: attempt.at,
        success: false,
        uptime_percent: None,
        window_seconds: None,
        gpu_available: None,
        first_ping,
        response_time_ms: None,
        error: None,
        covers_from: None,
        superseded: false,
    };
    // From when on it speaks, and for how many seconds.
    let stretch = |begin: Option<DateTime<Utc>>, measured| {
        let length = stretch::length(begin?, attempt.at, measured);
        let covers_from = whole_micros(saturating_sub(attempt.at, length));
        Some((covers_from, to_a_millionth(length.as_secs_f64())))
    };
    let reported = attempt.answer.and_then(|reported| {
        let uptime = if first_ping {
            Some(first_ping_uptime(
                reported.gpu_available,
                reported.uptime_percent,
            ))
        } else {
            reported.uptime_percent
        };
        let uptime = uptime.ok_or("no uptime_percent in the answer")?;
        Ok((reported, uptime))
    });
    match reported {
        Ok((reported, uptime)) => {
            ping.success = true;
            ping.gpu_available = reported.gpu_available;
            ping.response_time_ms = Some(milliseconds(attempt.took));
            let begin = known.unanswered_since().filter(|_| !first_ping);
            let stretch = stretch(begin, attempt.measured.since_unanswered(known));
            ping.covers_from = stretch.map(|(from, _)| from);
            let elapsed = stretch.map(|(_, seconds)| seconds);
            ping.window_seconds = elapsed.or(reported.window_seconds.map(to_a_millionth));
            let uptime = elapsed.map_or(uptime, |elapsed| {
                coverage::uptime_of_stretch(uptime, reported.window_seconds, elapsed)
            });
            ping.uptime_percent = Some(uptime.to_a_billionth());
        }
        Err(error) => {
            ping.error = Some(error);
            let stretch = stretch(known.agent.last_ping_at, attempt.measured.since_stored);
            ping.covers_from = stretch.map(|(from, _)| from);
            ping.window_seconds = stretch.map(|(_, seconds)| seconds);
        }
    }
    ping
}

/// Rounded as it is stored, so that the event of a ping and its history agree.
fn to_a_millionth(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::super::testing::{known, utc};
    use super::*;
    use crate::units::Percent;

    fn answered(at: &str, uptime: f64, gpu: bool) -> PingAttempt {
        PingAttempt {
            at: utc(at),
            took: Duration::from_millis(12),
            measured: MeasuredStretch::default(),
            answer: Ok(Reported {
                uptime_percent: Percent::new(uptime).ok(),
                window_seconds: Some(600.0),
                gpu_available: Some(gpu),
            }),
        }
    }

    fn lost(at: &str) -> PingAttempt {
        PingAttempt {
            at: utc(at),
            took: Duration::from_secs(10),
            measured: MeasuredStretch::default(),
            answer: Err("no answer in 10s".to_owned()),
        }
    }

    #[test]
    fn a_first_ping_asks_only_whether_a_gpu_is_there() {
        for (gpu, uptime) in [(true, Percent::FULL), (false, Percent::ZERO)] {
            let new = PingPolicy::default().evaluate(
                &known("a"),
                answered("2026-01-01T00:00:00Z", 12.0, gpu),
                0.5,
            );
            assert!(new.ping.first_ping && new.ping.success);
            assert_eq!(new.ping.uptime_percent, Some(uptime));
            assert_eq!(new.ping.gpu_available, Some(gpu));
            assert_eq!(new.covered_seconds, 0.0);
            assert_eq!(new.after.streak, Streak::default());
            assert_eq!(new.after.agent.next_ping_at, utc("2026-01-01T00:15:00Z"));
            assert_eq!(new.after.agent.total_pings, 1);
        }
    }

    #[test]
    fn without_grace_the_first_ping_is_like_any_other() {
        let rules = PingPolicy {
            first_ping_grace: false,
            ..PingPolicy::default()
        };
        let new = rules.evaluate(
            &known("a"),
            answered("2026-01-01T00:00:00Z", 12.0, true),
            0.5,
        );
        assert!(!new.ping.first_ping);
        assert_eq!(new.ping.uptime_percent, Percent::new(12.0).ok());
        assert_eq!(new.after.agent.ping_interval_minutes, 30.0);
        // There is nothing before it that it could cover the time since.
        assert_eq!(new.covered_seconds, 0.0);
    }

    #[test]
    fn no_answer_is_a_poor_ping_that_covers_the_time_since_the_one_before() {
        let first = PingPolicy::default().evaluate(
            &known("a"),
            answered("2026-01-01T00:00:00Z", 99.0, true),
            0.5,
        );
        let second =
            PingPolicy::default().evaluate(&first.after, lost("2026-01-01T00:15:00Z"), 0.5);
        assert!(!second.ping.success && !second.ping.first_ping);
        assert_eq!(second.ping.error.as_deref(), Some("no answer in 10s"));
        assert_eq!(second.covered_seconds, 900.0);
        let agent = &second.after.agent;
        assert_eq!(agent.status, Status::Unreachable);
        assert_eq!(agent.last_uptime_percent, None);
        assert_eq!(agent.consecutive_poor_uptime, 1);
        assert_eq!(agent.next_ping_at, utc("2026-01-01T00:45:00Z"));

        // The next answer covers the time since the last one: the failed ping is superseded, and changes nothing.
        let mut whole = answered("2026-01-01T00:45:00Z", 99.5, true);
        whole.answer.as_mut().unwrap().window_seconds = Some(2699.0);
        let third = PingPolicy::default().evaluate(&second.after, whole, 0.0);
        assert_eq!(third.after.agent.status, Status::Active);
        assert_eq!(third.covered_seconds, 2700.0);
        assert_eq!(third.ping.uptime_percent, Percent::new(99.5).ok());
        assert_eq!(third.ping.covers_from, Some(first.ping.timestamp));
        assert_eq!(third.supersedes_after, Some(first.ping.timestamp));
        assert_eq!(third.after.agent.consecutive_poor_uptime, 0);
        assert_eq!(third.after.streak.good_in_a_row, 1);
        assert_eq!(third.after.agent.next_ping_at, utc("2026-01-01T00:59:15Z"));

        // What it leaves out is down.
        let part = answered("2026-01-01T00:45:00Z", 99.0, true);
        let third = PingPolicy::default().evaluate(&second.after, part, 0.0);
        assert_eq!(third.covered_seconds, 2700.0);
        assert_eq!(third.ping.uptime_percent, Percent::new(22.0).ok());
        assert_eq!(third.after.agent.consecutive_poor_uptime, 1);
    }

    #[test]
    fn an_answer_without_uptime_is_none_after_the_first_ping() {
        let mut bare = answered("2026-01-01T00:00:00Z", 99.0, true);
        bare.answer.as_mut().unwrap().uptime_percent = None;
        let first = PingPolicy::default().evaluate(&known("a"), bare.clone(), 0.5);
        assert!(first.ping.success);
        bare.at = utc("2026-01-01T00:15:00Z");
        let second = PingPolicy::default().evaluate(&first.after, bare, 0.5);
        assert!(!second.ping.success);
        assert_eq!(
            second.ping.error.as_deref(),
            Some("no uptime_percent in the answer")
        );
    }

    #[test]
    fn a_clock_that_jumped_back_makes_no_negative_time() {
        let first = PingPolicy::default().evaluate(
            &known("a"),
            answered("2026-01-01T01:00:00Z", 99.0, true),
            0.5,
        );
        let second =
            PingPolicy::default().evaluate(&first.after, lost("2026-01-01T00:00:00Z"), 0.5);
        assert_eq!(second.covered_seconds, 0.0);
        // Measured by a clock that was not set, it is as long as it was.
        let measured = MeasuredStretch {
            since_answered: Some(Duration::from_secs(900)),
            since_stored: Some(Duration::from_secs(900)),
        };
        for at in ["2026-01-01T00:00:00Z", "2026-01-01T09:00:00Z"] {
            for attempt in [lost(at), answered(at, 99.0, true)] {
                let attempt = PingAttempt {
                    measured,
                    ..attempt
                };
                let new = PingPolicy::default().evaluate(&first.after, attempt, 0.5);
                assert_eq!(new.covered_seconds, 900.0);
                let from = new.ping.timestamp - chrono::TimeDelta::seconds(900);
                assert_eq!(new.ping.covers_from, Some(from));
            }
        }
    }
}
