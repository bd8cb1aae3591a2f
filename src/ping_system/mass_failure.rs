//! Whether many agents fail at once, which says more about the ping system's network than about them
//! (`.github/docs/protocol.md` section 1.1).

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::wire::ping_system::served::Status;

/// Pings are compared with those of so long before.
pub(crate) const PERIOD: Duration = Duration::from_mins(1);
/// So many must fail, and more than half.
pub(crate) const MIN_FAILING: u64 = 4;
/// A phase lasts no longer: after that the agents are taken at their word.
const MAX_PHASE: Duration = Duration::from_mins(10);

/// The latest pings of the agents that answered before. Instants count from any origin, and never step.
#[derive(Debug, Default)]
pub(crate) struct MassFailure {
    latest: HashMap<i64, Latest>,
    /// In the order of their instants; out of date where `latest` has another instant.
    queue: VecDeque<(Duration, i64)>,
    failing: usize,
    phase_began: Option<Duration>,
    phase_ended: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
struct Latest {
    at: Duration,
    failed: bool,
}

/// What a failure says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blame {
    Agent,
    /// The ping system's own network. `begins` where this failure shows it.
    Network {
        begins: bool,
    },
}

/// How an agent was doing before a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    Answered,
    /// Not observed since it answered.
    Unobserved,
    Failed,
}

impl Before {
    pub(crate) fn of(status: Status) -> Self {
        match status {
            Status::Active | Status::NoGpu => Self::Answered,
            Status::Unobserved => Self::Unobserved,
            Status::Unreachable | Status::Unknown => Self::Failed,
        }
    }
}

impl MassFailure {
    /// An agent was reached.
    pub(crate) fn reached(&mut self, agent_key: i64, before: Before, at: Duration) {
        self.record(agent_key, before, false, at);
        self.end_phase_if_over(at);
    }

    /// An agent was not reached by a ping that began at `began`.
    pub(crate) fn failed(
        &mut self,
        agent_key: i64,
        before: Before,
        began: Duration,
        at: Duration,
    ) -> Blame {
        self.record(agent_key, before, true, at);
        self.end_phase_if_over(at);
        if self.phase_began.is_some() {
            return Blame::Network { begins: false };
        }
        // It began while the network was down.
        if self.phase_ended.is_some_and(|ended| began <= ended) {
            return Blame::Network { begins: false };
        }
        if self.most_fail() {
            self.phase_began = Some(at);
            return Blame::Network { begins: true };
        }
        Blame::Agent
    }

    /// The network is known to work.
    pub(crate) fn clear(&mut self, at: Duration) {
        if self.phase_began.take().is_some() {
            self.phase_ended = Some(at);
        }
        self.latest.clear();
        self.queue.clear();
        self.failing = 0;
    }

    /// Whether failures are taken for the network's.
    pub(crate) fn is_active(&mut self, at: Duration) -> bool {
        self.end_phase_if_over(at);
        self.phase_began.is_some()
    }

    fn most_fail(&self) -> bool {
        self.failing as u64 >= MIN_FAILING && self.failing * 2 > self.latest.len()
    }

    fn end_phase_if_over(&mut self, at: Duration) {
        self.expire(at);
        let Some(began) = self.phase_began else {
            return;
        };
        if at.saturating_sub(began) >= MAX_PHASE {
            self.clear(at);
        } else if !self.most_fail() {
            self.phase_began = None;
            self.phase_ended = Some(at);
        }
    }

    fn record(&mut self, agent_key: i64, before: Before, failed: bool, at: Duration) {
        let counts = match before {
            Before::Answered => true,
            Before::Unobserved => self.phase_began.is_some(),
            Before::Failed => false,
        };
        if !counts && !self.latest.contains_key(&agent_key) {
            return;
        }
        let replaced = self.latest.insert(agent_key, Latest { at, failed });
        self.failing += usize::from(failed);
        self.failing -= usize::from(replaced.is_some_and(|before| before.failed));
        self.queue.push_back((at, agent_key));
    }

    fn expire(&mut self, now: Duration) {
        while let Some(&(at, agent_key)) = self.queue.front() {
            if now.saturating_sub(at) <= PERIOD {
                return;
            }
            self.queue.pop_front();
            if let Some(latest) = self.latest.get(&agent_key)
                && latest.at == at
            {
                self.failing -= usize::from(latest.failed);
                self.latest.remove(&agent_key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Blame = Blame::Network { begins: false };
    const BEGINS: Blame = Blame::Network { begins: true };

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn fail(mass: &mut MassFailure, agent_key: i64, at: u64) -> Blame {
        mass.failed(agent_key, Before::Answered, seconds(at), seconds(at))
    }

    #[test]
    fn four_and_more_than_half_must_fail() {
        let mut mass = MassFailure::default();
        for agent in 0..4 {
            mass.reached(agent, Before::Answered, seconds(0));
        }
        let blame: Vec<Blame> = (10..15).map(|agent| fail(&mut mass, agent, 10)).collect();
        assert_eq!(
            blame,
            [
                Blame::Agent,
                Blame::Agent,
                Blame::Agent,
                Blame::Agent,
                BEGINS
            ]
        );
        assert_eq!(fail(&mut mass, 15, 11), OWN);

        // Three are never enough, and agents that failed before do not count.
        let mut mass = MassFailure::default();
        for agent in 0..3 {
            assert_eq!(fail(&mut mass, agent, 0), Blame::Agent);
        }
        for agent in 3..20 {
            let blame = mass.failed(agent, Before::Failed, seconds(0), seconds(0));
            assert_eq!(blame, Blame::Agent);
        }
        // Nor are four within more than a minute.
        assert_eq!(fail(&mut mass, 20, 61), Blame::Agent);
    }

    #[test]
    fn a_phase_ends_when_most_are_reached_again() {
        let mut mass = MassFailure::default();
        for agent in 0..10 {
            fail(&mut mass, agent, 0);
        }
        assert!(mass.is_active(seconds(1)));
        for agent in 0..5 {
            mass.reached(agent, Before::Unobserved, seconds(20));
        }
        assert!(!mass.is_active(seconds(20)));
        // One that was under way when it ended.
        let blame = mass.failed(8, Before::Unobserved, seconds(19), seconds(29));
        assert_eq!(blame, OWN);
        let blame = mass.failed(8, Before::Unobserved, seconds(30), seconds(30));
        assert_eq!(blame, Blame::Agent);
    }

    #[test]
    fn a_phase_lasts_ten_minutes_at_most() {
        let mut mass = MassFailure::default();
        let mut blamed = None;
        for at in 0..1200 {
            for agent in 0..10 {
                let before = match (at, blamed) {
                    (0, _) => Before::Answered,
                    (_, None) => Before::Unobserved,
                    (_, Some(_)) => Before::Failed,
                };
                if mass.failed(agent, before, seconds(at), seconds(at)) == Blame::Agent && at > 0 {
                    blamed.get_or_insert(at);
                }
            }
        }
        assert_eq!(blamed, Some(601));
    }

    #[test]
    fn a_network_that_is_known_to_work_ends_it() {
        let mut mass = MassFailure::default();
        for agent in 0..10 {
            fail(&mut mass, agent, 0);
        }
        mass.clear(seconds(5));
        assert!(!mass.is_active(seconds(5)));
        let blame = mass.failed(1, Before::Unobserved, seconds(6), seconds(6));
        assert_eq!(blame, Blame::Agent);
    }
}
