//! How much time lies between two pings of an agent, measured by a clock that cannot be set.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;

use super::store::AgentRecord;
use crate::clock::SuspendClock;

/// Agents that are remembered; those beyond are measured by the wall clock.
const MAX_AGENTS: usize = 1_000_000;
/// Up to this much the wall clock may be adjusted without being disbelieved.
const WALL_CLOCK_SLACK: Duration = Duration::from_secs(1);

/// Remembers when, by the steady clock, this process pinged each agent.
#[derive(Debug)]
pub(crate) struct StretchClock {
    clock: SuspendClock,
    agents: Mutex<HashMap<i64, LastPings>>,
}

/// The pings that this process stored last, by both clocks.
#[derive(Debug, Clone, Copy)]
struct LastPings {
    stored: Moment,
    answered: Option<Moment>,
}

#[derive(Debug, Clone, Copy)]
struct Moment {
    wall: DateTime<Utc>,
    steady: Duration,
}

/// The time since an agent's last pings; `None` if another process stored them, or an earlier one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MeasuredStretch {
    pub since_answered: Option<Duration>,
    pub since_stored: Option<Duration>,
}

impl MeasuredStretch {
    /// The time since [`AgentRecord::unanswered_since`].
    #[must_use]
    pub(crate) fn since_unanswered(self, known: &AgentRecord) -> Option<Duration> {
        match known.last_answered_at {
            Some(_) => self.since_answered,
            None => self.since_stored,
        }
    }
}

impl StretchClock {
    pub(crate) fn start() -> Self {
        Self {
            clock: SuspendClock::start(),
            agents: Mutex::default(),
        }
    }

    /// The steady time now.
    pub(crate) fn now(&self) -> Duration {
        self.clock.elapsed().total
    }

    /// The time until `now` since the pings that `known` tells of.
    pub(crate) fn measure(&self, known: &AgentRecord, now: Duration) -> MeasuredStretch {
        let Some(last) = self.agents.lock().get(&known.key).copied() else {
            return MeasuredStretch::default();
        };
        let since = |moment: Option<Moment>, wall: Option<DateTime<Utc>>| {
            let moment = moment.filter(|moment| Some(moment.wall) == wall)?;
            Some(now.saturating_sub(moment.steady))
        };
        MeasuredStretch {
            since_answered: since(last.answered, known.last_answered_at),
            since_stored: since(Some(last.stored), known.agent.last_ping_at),
        }
    }

    /// A ping that began at `steady` was stored, and left the agent like this.
    pub(crate) fn remember(&self, after: &AgentRecord, steady: Duration) {
        let Some(wall) = after.agent.last_ping_at else {
            return;
        };
        let moment = Moment { wall, steady };
        let mut agents = self.agents.lock();
        if agents.len() >= MAX_AGENTS && !agents.contains_key(&after.key) {
            return;
        }
        let before = agents.get(&after.key).and_then(|last| last.answered);
        let is_answered = after.last_answered_at == Some(wall);
        let answered = if is_answered { Some(moment) } else { before };
        let stored = moment;
        agents.insert(after.key, LastPings { stored, answered });
    }

    /// The agent was removed.
    pub(crate) fn forget(&self, agent_key: i64) {
        self.agents.lock().remove(&agent_key);
    }
}

/// The length of the stretch from `begin` to `end`, by the wall clock unless that was set since.
#[must_use]
pub(crate) fn length(
    begin: DateTime<Utc>,
    end: DateTime<Utc>,
    measured: Option<Duration>,
) -> Duration {
    let by_wall = (end - begin).to_std();
    match (measured, by_wall) {
        (Some(measured), Ok(by_wall)) if measured.abs_diff(by_wall) <= WALL_CLOCK_SLACK => by_wall,
        (Some(measured), _) => measured,
        (None, by_wall) => by_wall.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{known, utc};
    use super::*;
    use chrono::TimeDelta;

    #[test]
    fn a_stretch_is_as_long_as_the_steady_clock_says() {
        let begin = utc("2026-01-01T00:00:00Z");
        let seconds = Duration::from_secs;
        for (wall_seconds, measured, expected) in [
            (900, None, seconds(900)),
            (-900, None, seconds(0)),
            (900, Some(seconds(900)), seconds(900)),
            // Adjusted a little, set forward, set back.
            (901, Some(seconds(900)), seconds(901)),
            (4500, Some(seconds(900)), seconds(900)),
            (-2700, Some(seconds(900)), seconds(900)),
        ] {
            let end = begin + TimeDelta::seconds(wall_seconds);
            assert_eq!(length(begin, end, measured), expected, "{wall_seconds}");
        }
    }

    #[test]
    fn only_pings_of_this_process_are_measured() {
        let clock = StretchClock::start();
        let seconds = Duration::from_secs;
        let mut agent = known("a");
        let measure = |agent: &AgentRecord| {
            let measured = clock.measure(agent, seconds(100));
            (measured.since_answered, measured.since_stored)
        };
        assert_eq!(measure(&agent), (None, None));
        agent.agent.last_ping_at = Some(utc("2026-01-01T00:00:00Z"));
        agent.last_answered_at = agent.agent.last_ping_at;
        clock.remember(&agent, seconds(10));
        assert_eq!(measure(&agent), (Some(seconds(90)), Some(seconds(90))));
        // A failed one.
        agent.agent.last_ping_at = Some(utc("2026-01-01T00:01:00Z"));
        clock.remember(&agent, seconds(70));
        assert_eq!(measure(&agent), (Some(seconds(90)), Some(seconds(30))));
        // One that another ping system stored.
        agent.agent.last_ping_at = Some(utc("2026-01-01T00:02:00Z"));
        assert_eq!(measure(&agent), (Some(seconds(90)), None));
        clock.forget(agent.key);
        assert_eq!(measure(&agent), (None, None));
    }
}
