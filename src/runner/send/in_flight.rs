//! The limit on jobs in flight over all agents.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::runner::roster::AgentIndex;

/// A semaphore with a reserve: half of the permits are reserved for the agents, evenly, the other half goes to
/// any agent. So an agent whose jobs hang cannot take the permits of all others.
#[derive(Debug)]
pub(crate) struct InFlightLimit(Mutex<Usage>);

#[derive(Debug)]
struct Usage {
    all: usize,
    held: Vec<usize>,
    /// Permits that are reserved for each agent.
    reserved: usize,
    in_flight: usize,
    /// Permits that agents hold beyond their reserve.
    beyond: usize,
}

impl Usage {
    fn count_beyond(&mut self) {
        let beyond = self
            .held
            .iter()
            .map(|held| held.saturating_sub(self.reserved));
        self.beyond = beyond.sum();
    }
}

/// One job in flight; released on drop.
#[derive(Debug)]
pub(crate) struct Permit {
    limit: Arc<InFlightLimit>,
    agent: usize,
}

impl InFlightLimit {
    /// A limit of `all` jobs, for no agent yet.
    #[must_use]
    pub(crate) fn new(all: usize) -> Self {
        Self(Mutex::new(Usage {
            all,
            held: Vec::new(),
            reserved: 0,
            in_flight: 0,
            beyond: 0,
        }))
    }

    /// Adds agents up to this index. A single agent may use the whole limit.
    pub(crate) fn add_agent(&self, AgentIndex(agent): AgentIndex) {
        let mut usage = self.0.lock();
        if agent >= usage.held.len() {
            usage.held.resize(agent + 1, 0);
        }
        usage.reserved = match usage.held.len() {
            1 => 0,
            agents => usage.all / (2 * agents),
        };
        usage.count_beyond();
    }

    /// A permit for one job of this agent; `None` if there is none just now.
    pub(crate) fn try_acquire(self: &Arc<Self>, AgentIndex(agent): AgentIndex) -> Option<Permit> {
        let mut usage = self.0.lock();
        if usage.held[agent] >= usage.reserved {
            let common = usage.all - usage.reserved * usage.held.len();
            if usage.beyond >= common {
                return None;
            }
            usage.beyond += 1;
        }
        usage.held[agent] += 1;
        usage.in_flight += 1;
        drop(usage);
        let limit = Arc::clone(self);
        Some(Permit { limit, agent })
    }

    /// Jobs in flight, over all agents.
    #[must_use]
    pub(crate) fn in_flight(&self) -> usize {
        self.0.lock().in_flight
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut usage = self.limit.0.lock();
        if usage.held[self.agent] > usage.reserved {
            usage.beyond -= 1;
        }
        usage.held[self.agent] -= 1;
        usage.in_flight -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limit(all: usize, agents: usize) -> Arc<InFlightLimit> {
        let limit = Arc::new(InFlightLimit::new(all));
        for agent in 0..agents {
            limit.add_agent(AgentIndex(agent));
        }
        limit
    }

    fn acquire_all(limit: &Arc<InFlightLimit>, agent: usize) -> Vec<Permit> {
        std::iter::from_fn(|| limit.try_acquire(AgentIndex(agent))).collect()
    }

    #[test]
    fn one_agent_has_them_all() {
        let limit = limit(7, 1);
        let usage = acquire_all(&limit, 0);
        assert_eq!((usage.len(), limit.in_flight()), (7, 7));
        drop(usage);
        assert_eq!(limit.in_flight(), 0);
    }

    #[test]
    fn an_agent_that_hangs_leaves_places_for_the_others() {
        let limit = limit(100, 5);
        // Half of them, and the fifth of the other half that is reserved for it.
        let hanging = acquire_all(&limit, 0);
        assert_eq!(hanging.len(), 60);
        let others = [1, 2, 3, 4].map(|agent| acquire_all(&limit, agent));
        assert_eq!(others.each_ref().map(Vec::len), [10; 4]);
        assert_eq!(limit.in_flight(), 100);
    }

    proptest! {
        #[test]
        fn never_more_than_there_are_and_always_what_is_kept(
            all in 1_usize..60, agents in 1_usize..8,
            steps in prop::collection::vec((0_usize..8, any::<bool>()), 0..200),
        ) {
            let limit = limit(all, 1);
            let mut held: Vec<Vec<Permit>> = (0..agents).map(|_| Vec::new()).collect();
            // The others come while jobs are in flight.
            for _ in 0..all / 2 {
                held[0].extend(limit.try_acquire(AgentIndex(0)));
            }
            limit.add_agent(AgentIndex(agents - 1));
            let reserved = if agents == 1 { 0 } else { all / (2 * agents) };
            for (agent, takes) in steps {
                let agent = agent % agents;
                if !takes {
                    held[agent].pop();
                    continue;
                }
                let has = held[agent].len();
                match limit.try_acquire(AgentIndex(agent)) {
                    Some(permit) => held[agent].push(permit),
                    None => prop_assert!(has >= reserved),
                }
                let sum: usize = held.iter().map(Vec::len).sum();
                prop_assert_eq!(sum, limit.in_flight());
                prop_assert!(sum <= all);
            }
        }
    }
}
