//! Evaluates an attempt to ping an agent: the ping to store, and the agent's new streak and interval.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::interval::{IntervalRules, Streak, spread};
use super::store::whole_micros;
use super::store::{AgentRecord, Failures, PingRecord};
use super::stretch::{self, BootInstant, MeasuredStretch, PingMarks};
use super::warnings;
use crate::units::{Percent, milliseconds, saturating_add, saturating_sub};
use crate::wire::agent::Reported;
use crate::wire::coverage::{self, first_ping_uptime};
use crate::wire::ping_system::HistoryPing;
use crate::wire::ping_system::served::{Ping, Status};

/// One attempt to ping an agent, and its result.
#[derive(Debug, Clone, PartialEq)]
pub struct PingAttempt {
    /// When the ping began.
    pub at: DateTime<Utc>,
    /// The same by the boot clock.
    pub began: BootInstant,
    /// How long it took.
    pub took: Duration,
    /// How far the agent's clock is ahead; `None` if it did not tell.
    pub clock_offset_seconds: Option<f64>,
    /// GPUs that it reports, each with another agent that does.
    pub also_reported: Vec<(String, String)>,
    pub outcome: PingOutcome,
}

/// The result of an attempt, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub enum PingOutcome {
    Answered(Reported),
    /// The agent gave no valid answer.
    Failed(String),
    /// The ping system could not see whether the agent would have answered.
    Unobserved(String),
}

/// The longest pause before an agent that could not be observed is pinged again; later, when somebody has to set
/// something right first, it grows.
const UNOBSERVED_RETRY: Duration = Duration::from_secs(5);
const QUICK_RETRIES: u32 = 150;
const LATER_UNOBSERVED_RETRY: Duration = Duration::from_mins(1);

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
        let (at, began) = (attempt.at, attempt.began);
        let also_reported = attempt.also_reported.clone();
        let identity = match &attempt.outcome {
            PingOutcome::Answered(reported) => Some(reported.clone()),
            PingOutcome::Failed(_) | PingOutcome::Unobserved(_) => None,
        };
        let clock_offset_seconds = attempt
            .clock_offset_seconds
            .or(known.agent.clock_offset_seconds);
        if let PingOutcome::Unobserved(reason) = attempt.outcome {
            return self.unobserved(known, at, reason, random);
        }
        let graced = self.first_ping_grace && known.agent.last_ping_at.is_none();
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
        agent.status = status(&ping);
        agent.last_ping_at = Some(ping.timestamp);
        agent.next_ping_at = whole_micros(saturating_add(ping.timestamp, spread(interval, random)));
        agent.total_pings += 1;
        agent.consecutive_poor_uptime = streak.consecutive_poor;
        agent.ping_interval_minutes = interval.as_secs_f64() / 60.0;
        agent.last_uptime_percent = ping.uptime_percent;
        agent.last_error.clone_from(&ping.error);
        agent.clock_offset_seconds = clock_offset_seconds;
        if let Some(reported) = identity {
            agent.gpu_uuids = reported.gpu_uuids;
            agent.source = reported.source;
            agent.agent_version = reported.agent_version;
            agent.warnings =
                warnings::of_agent(&agent.agent_id, clock_offset_seconds, &also_reported);
        }
        let (last_answered_at, answered_streak) = if ping.success {
            (Some(ping.timestamp), streak)
        } else {
            (known.last_answered_at, known.answered_streak)
        };
        let was_failing = known.agent.status == Status::Unreachable;
        let marks = PingMarks::after(known.marks.as_ref(), at, began, ping.success);
        let failures = (!ping.success).then(|| {
            let known_failures = known.failures.filter(|_| was_failing);
            known_failures.map_or(
                Failures {
                    from: at,
                    after_seq: known.agent.total_pings,
                },
                |failures| Failures {
                    from: failures.from.min(at),
                    ..failures
                },
            )
        });
        PingRecord {
            covered_seconds: coverage::seconds_of(&HistoryPing::from(&ping)),
            supersedes: known
                .last_answered_at
                .filter(|_| ping.success && was_failing)
                .map(|answered_at| known.failures.unwrap_or(Failures::since(answered_at))),
            ping,
            after: AgentRecord {
                key: known.key,
                agent,
                streak,
                last_answered_at,
                answered_streak,
                marks: Some(marks),
                failures,
                unobserved_in_a_row: 0,
            },
        }
    }

    /// A ping that says nothing: the agent is as before, and pinged again soon.
    fn unobserved(
        &self,
        known: &AgentRecord,
        at: DateTime<Utc>,
        reason: String,
        random: f64,
    ) -> PingRecord {
        let mut after = known.clone();
        let agent = &mut after.agent;
        agent.status = match agent.status {
            Status::Unreachable => Status::Unreachable,
            Status::Unknown => Status::Unknown,
            Status::Active | Status::NoGpu | Status::Unobserved => Status::Unobserved,
        };
        after.unobserved_in_a_row = after.unobserved_in_a_row.saturating_add(1);
        let pause = if after.unobserved_in_a_row <= QUICK_RETRIES {
            UNOBSERVED_RETRY
        } else {
            LATER_UNOBSERVED_RETRY
        };
        let pause = self.interval.base.min(pause);
        agent.next_ping_at = whole_micros(saturating_add(at, spread(pause, random)));
        agent.total_pings += 1;
        agent.last_error = Some(reason.clone());
        PingRecord {
            ping: Ping {
                observed: false,
                window_seconds: Some(0.0),
                error: Some(reason),
                ..unanswered(at, false)
            },
            covered_seconds: 0.0,
            supersedes: None,
            after,
        }
    }

    /// The agent at `now`, once its failed pings since `since` say nothing. `latest` are its newest pings, oldest first.
    #[must_use]
    pub fn without_failures(
        &self,
        known: &AgentRecord,
        latest: &[Ping],
        since: DateTime<Utc>,
        now: DateTime<Utc>,
        reason: &str,
    ) -> AgentRecord {
        let is_void = |ping: &Ping| {
            ping.observed && !ping.success && !ping.superseded && ping.timestamp >= since
        };
        let voided = latest.iter().filter(|ping| is_void(ping)).count();
        let last = latest
            .iter()
            .rev()
            .find(|ping| ping.observed && !ping.superseded && !is_void(ping));
        let mut after = known.clone();
        after.streak = match last {
            None => Streak::default(),
            Some(last) if last.success => known.answered_streak,
            Some(_) => {
                let voided = u32::try_from(voided).unwrap_or(u32::MAX);
                Streak {
                    consecutive_poor: known.streak.consecutive_poor.saturating_sub(voided),
                    good_in_a_row: 0,
                }
            }
        };
        if last.is_none_or(|last| last.success) {
            after.failures = None;
        }
        let agent = &mut after.agent;
        agent.status = match last {
            None => Status::Unknown,
            Some(last) if last.success => Status::Unobserved,
            Some(_) => Status::Unreachable,
        };
        agent.last_ping_at = last.map(|last| last.timestamp);
        agent.last_uptime_percent = last.and_then(|last| last.uptime_percent);
        agent.last_error = Some(reason.to_owned());
        agent.consecutive_poor_uptime = after.streak.consecutive_poor;
        let interval = self.interval.interval(after.streak);
        agent.ping_interval_minutes = interval.as_secs_f64() / 60.0;
        agent.next_ping_at = now;
        after
    }
}

fn status(ping: &Ping) -> Status {
    if !ping.success {
        return Status::Unreachable;
    }
    let has_gpus = if ping.first_ping {
        ping.uptime_percent != Some(Percent::ZERO)
    } else {
        ping.gpu_available != Some(false)
    };
    if has_gpus {
        Status::Active
    } else {
        Status::NoGpu
    }
}

/// A ping without an answer.
fn unanswered(at: DateTime<Utc>, first_ping: bool) -> Ping {
    Ping {
        timestamp: at,
        covers_from: None,
        success: false,
        observed: true,
        superseded: false,
        uptime_percent: None,
        window_seconds: None,
        gpu_available: None,
        first_ping,
        response_time_ms: None,
        error: None,
    }
}

/// The ping by itself. An answered one covers the time since the last answered one, a failed one that since the last
/// stored one; the first one asks only whether a GPU is there (`.github/docs/protocol.md` section 1.1).
fn ping(known: &AgentRecord, attempt: PingAttempt, first_ping: bool) -> Ping {
    let mut ping = unanswered(attempt.at, first_ping);
    let measured = MeasuredStretch::until(known, attempt.began);
    // From when on it speaks, and for how many seconds.
    let stretch = |begin: Option<DateTime<Utc>>, measured| {
        let length = stretch::length(begin?, attempt.at, measured);
        let covers_from = whole_micros(saturating_sub(attempt.at, length));
        Some((covers_from, to_a_millionth(length.as_secs_f64())))
    };
    let answer = match attempt.outcome {
        PingOutcome::Answered(reported) => Ok(reported),
        PingOutcome::Failed(error) | PingOutcome::Unobserved(error) => Err(error),
    };
    let reported = answer.and_then(|reported| {
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
            let stretch = stretch(begin, measured.since_unanswered(known));
            ping.covers_from = stretch.map(|(from, _)| from);
            let elapsed = stretch.map(|(_, seconds)| seconds);
            ping.window_seconds = Some(elapsed.unwrap_or(0.0));
            let uptime = elapsed.map_or(uptime, |elapsed| {
                coverage::uptime_of_stretch(uptime, reported.window_seconds, elapsed)
            });
            ping.uptime_percent = Some(uptime.to_a_billionth());
        }
        Err(error) => {
            ping.error = Some(error);
            let stretch = stretch(known.agent.last_ping_at, measured.since_stored);
            ping.covers_from = stretch.map(|(from, _)| from);
            ping.window_seconds = Some(stretch.map_or(0.0, |(_, seconds)| seconds));
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
    use uuid::Uuid;

    /// A boot clock that starts at the beginning of the year.
    fn began(at: DateTime<Utc>) -> BootInstant {
        let since_boot = at - utc("2026-01-01T00:00:00Z");
        BootInstant {
            boot_id: Uuid::nil(),
            since_boot: since_boot.to_std().unwrap(),
        }
    }

    fn attempt(at: &str, outcome: PingOutcome) -> PingAttempt {
        PingAttempt {
            at: utc(at),
            began: began(utc(at)),
            took: Duration::from_millis(12),
            clock_offset_seconds: None,
            also_reported: Vec::new(),
            outcome,
        }
    }

    fn answer(uptime: Option<f64>, window_seconds: f64, gpu: bool) -> PingOutcome {
        PingOutcome::Answered(Reported {
            uptime_percent: uptime.map(|uptime| Percent::new(uptime).unwrap()),
            window_seconds: Some(window_seconds),
            gpu_available: Some(gpu),
            ..Reported::default()
        })
    }

    fn answered(at: &str, uptime: f64, gpu: bool) -> PingAttempt {
        attempt(at, answer(Some(uptime), 600.0, gpu))
    }

    fn lost(at: &str) -> PingAttempt {
        attempt(at, PingOutcome::Failed("no answer in 10s".to_owned()))
    }

    fn unseen(at: &str) -> PingAttempt {
        attempt(at, PingOutcome::Unobserved("not seen".to_owned()))
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
        let whole = attempt("2026-01-01T00:45:00Z", answer(Some(99.5), 2699.0, true));
        let third = PingPolicy::default().evaluate(&second.after, whole, 0.0);
        assert_eq!(third.after.agent.status, Status::Active);
        assert_eq!(third.covered_seconds, 2700.0);
        assert_eq!(third.ping.uptime_percent, Percent::new(99.5).ok());
        assert_eq!(third.ping.covers_from, Some(first.ping.timestamp));
        let failures = Failures {
            from: second.ping.timestamp,
            after_seq: 1,
        };
        assert_eq!(third.supersedes, Some(failures));
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
        let bare = |at| attempt(at, answer(None, 600.0, true));
        let first = PingPolicy::default().evaluate(&known("a"), bare("2026-01-01T00:00:00Z"), 0.5);
        assert!(first.ping.success);
        let bare = bare("2026-01-01T00:15:00Z");
        let second = PingPolicy::default().evaluate(&first.after, bare, 0.5);
        assert!(!second.ping.success);
        assert_eq!(
            second.ping.error.as_deref(),
            Some("no uptime_percent in the answer")
        );
    }

    #[test]
    fn a_stretch_is_as_long_as_it_was_whatever_the_wall_clock_was_set_to() {
        let policy = PingPolicy::default();
        let start = answered("2026-01-01T01:00:00Z", 99.0, true);
        let first = policy.evaluate(&known("a"), start.clone(), 0.5);
        let later = BootInstant {
            since_boot: start.began.since_boot + Duration::from_secs(900),
            ..start.began
        };
        for at in ["2026-01-01T00:00:00Z", "2026-01-01T09:00:00Z"] {
            for attempt in [lost(at), answered(at, 99.0, true)] {
                let attempt = PingAttempt {
                    began: later,
                    ..attempt
                };
                let new = policy.evaluate(&first.after, attempt, 0.5);
                assert_eq!(new.covered_seconds, 900.0);
                let from = new.ping.timestamp - chrono::TimeDelta::seconds(900);
                assert_eq!(new.ping.covers_from, Some(from));
            }
        }
        // After another boot there is only the wall clock, by which no negative time passes.
        let elsewhere = PingAttempt {
            began: BootInstant {
                boot_id: Uuid::max(),
                since_boot: Duration::ZERO,
            },
            ..lost("2026-01-01T00:00:00Z")
        };
        let new = policy.evaluate(&first.after, elsewhere, 0.5);
        assert_eq!(new.covered_seconds, 0.0);
    }

    #[test]
    fn what_was_not_seen_changes_nothing_but_is_asked_again_soon() {
        let policy = PingPolicy::default();
        let first = policy.evaluate(
            &known("a"),
            answered("2026-01-01T00:00:00Z", 99.0, true),
            0.5,
        );
        let second = policy.evaluate(
            &first.after,
            answered("2026-01-01T00:15:00Z", 99.0, true),
            0.5,
        );
        let unseen_once = policy.evaluate(&second.after, unseen("2026-01-01T00:30:00Z"), 0.5);
        let ping = &unseen_once.ping;
        assert!(!ping.observed && !ping.success);
        assert_eq!((ping.window_seconds, ping.covers_from), (Some(0.0), None));
        assert_eq!(unseen_once.covered_seconds, 0.0);
        let agent = &unseen_once.after.agent;
        assert_eq!(agent.status, Status::Unobserved);
        assert_eq!(agent.last_ping_at, second.after.agent.last_ping_at);
        assert_eq!(agent.next_ping_at, utc("2026-01-01T00:30:05Z"));
        assert_eq!(agent.total_pings, 3);
        assert_eq!(agent.last_error.as_deref(), Some("not seen"));
        assert_eq!(unseen_once.after.streak, second.after.streak);
        // The next answer covers the time as if nothing had been.
        let whole = attempt("2026-01-01T00:45:00Z", answer(Some(99.0), 1800.0, true));
        let third = policy.evaluate(&unseen_once.after, whole, 0.5);
        assert_eq!(third.covered_seconds, 1800.0);
        assert_eq!(third.after.agent.status, Status::Active);

        // Of an agent that has never been seen, the first ping is still to come.
        let never = policy.evaluate(&known("a"), unseen("2026-01-01T00:00:00Z"), 0.5);
        assert_eq!(never.after.agent.status, Status::Unknown);
        let first = policy.evaluate(
            &never.after,
            answered("2026-01-01T00:00:05Z", 12.0, true),
            0.5,
        );
        assert!(first.ping.first_ping);
        assert_eq!(first.covered_seconds, 0.0);
        // One that failed before has still failed.
        let failed = policy.evaluate(&second.after, lost("2026-01-01T00:30:00Z"), 0.5);
        let unseen = policy.evaluate(&failed.after, unseen("2026-01-01T01:00:00Z"), 0.5);
        assert_eq!(unseen.after.agent.status, Status::Unreachable);
    }

    #[test]
    fn failures_that_turn_out_to_be_our_own_change_nothing() {
        let policy = PingPolicy::default();
        let mut record = policy.evaluate(
            &known("a"),
            answered("2026-01-01T00:00:00Z", 99.0, true),
            0.5,
        );
        let mut pings = vec![record.ping.clone()];
        let mut add = |attempt| {
            record = policy.evaluate(&record.after, attempt, 0.5);
            pings.push(record.ping.clone());
            (record.after.clone(), pings.clone())
        };
        add(answered("2026-01-01T00:10:00Z", 99.0, true));
        let (failing, one_failed) = add(lost("2026-01-01T00:20:00Z"));
        let now = utc("2026-01-01T00:21:00Z");
        let without = |known, pings: &[Ping], since| {
            let after = policy.without_failures(known, pings, utc(since), now, "our own network");
            let agent = after.agent;
            (
                agent.status,
                agent.last_ping_at,
                after.streak.consecutive_poor,
            )
        };
        let answered_at = Some(utc("2026-01-01T00:10:00Z"));
        assert_eq!(failing.agent.consecutive_poor_uptime, 1);
        assert_eq!(
            without(&failing, &one_failed, "2026-01-01T00:20:00Z"),
            (Status::Unobserved, answered_at, 0)
        );
        // One that had failed before has still failed.
        let (failing, two_failed) = add(lost("2026-01-01T00:20:30Z"));
        assert_eq!(
            without(&failing, &two_failed, "2026-01-01T00:20:30Z"),
            (Status::Unreachable, Some(utc("2026-01-01T00:20:00Z")), 1)
        );
        // Of the very first ping nothing remains.
        let failed = policy.evaluate(&known("a"), lost("2026-01-01T00:00:00Z"), 0.5);
        assert_eq!(
            without(&failed.after, &[failed.ping], "2026-01-01T00:00:00Z"),
            (Status::Unknown, None, 0)
        );
    }

    #[test]
    fn an_agent_without_its_gpus_is_not_active() {
        let policy = PingPolicy::default();
        let first = policy.evaluate(
            &known("a"),
            answered("2026-01-01T00:00:00Z", 99.0, false),
            0.5,
        );
        assert_eq!(first.after.agent.status, Status::NoGpu);
        let second = policy.evaluate(
            &first.after,
            answered("2026-01-01T00:15:00Z", 99.0, true),
            0.5,
        );
        assert_eq!(second.after.agent.status, Status::Active);
        let third = policy.evaluate(
            &second.after,
            answered("2026-01-01T00:30:00Z", 99.0, false),
            0.5,
        );
        assert_eq!(third.after.agent.status, Status::NoGpu);
    }
}
