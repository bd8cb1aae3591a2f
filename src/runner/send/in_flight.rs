//! The bound on jobs in flight over all agents, and what part of it nobody can take from an agent.

use std::sync::Arc;

use crate::runner::roster::AgentIndex;
use parking_lot::Mutex;

/// Places for jobs in flight. Half of them are kept for the agents, evenly; the other half is taken by
/// whoever needs it. So an agent whose jobs hang cannot take the places of all the others.
#[derive(Debug)]
pub struct Places(Mutex<Taken>);

#[derive(Debug)]
struct Taken {
    all: usize,
    /// By agent.
    held: Vec<usize>,
    /// How many of the places are kept for each agent.
    kept: usize,
    in_flight: usize,
    /// Those that agents hold beyond what is kept for them.
    beyond: usize,
}

impl Taken {
    fn count_beyond(&mut self) {
        let beyond = self.held.iter().map(|held| held.saturating_sub(self.kept));
        self.beyond = beyond.sum();
    }
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    agent: usize,
}

impl Places {
    /// So many places, for no agent yet.
    #[must_use]
    pub fn new(all: usize) -> Self {
        Self(Mutex::new(Taken {
            all,
            held: Vec::new(),
            kept: 0,
            in_flight: 0,
            beyond: 0,
        }))
    }

    /// Makes room for agents up to this one. A single agent may use all places.
    pub fn admit(&self, AgentIndex(agent): AgentIndex) {
        let mut taken = self.0.lock();
        if agent >= taken.held.len() {
            taken.held.resize(agent + 1, 0);
        }
        taken.kept = match taken.held.len() {
            1 => 0,
            agents => taken.all / (2 * agents),
        };
        taken.count_beyond();
    }

    /// A place for one of an agent's jobs, where there is one.
    pub fn take(self: &Arc<Self>, AgentIndex(agent): AgentIndex) -> Option<Place> {
        let mut taken = self.0.lock();
        if taken.held[agent] >= taken.kept {
            let common = taken.all - taken.kept * taken.held.len();
            if taken.beyond >= common {
                return None;
            }
            taken.beyond += 1;
        }
        taken.held[agent] += 1;
        taken.in_flight += 1;
        drop(taken);
        let places = Arc::clone(self);
        Some(Place { places, agent })
    }

    /// Jobs in flight, over all agents.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.lock().in_flight
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock();
        if taken.held[self.agent] > taken.kept {
            taken.beyond -= 1;
        }
        taken.held[self.agent] -= 1;
        taken.in_flight -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn places(all: usize, agents: usize) -> Arc<Places> {
        let places = Arc::new(Places::new(all));
        for agent in 0..agents {
            places.admit(AgentIndex(agent));
        }
        places
    }

    fn take_all(places: &Arc<Places>, agent: usize) -> Vec<Place> {
        std::iter::from_fn(|| places.take(AgentIndex(agent))).collect()
    }

    #[test]
    fn one_agent_has_them_all() {
        let places = places(7, 1);
        let taken = take_all(&places, 0);
        assert_eq!((taken.len(), places.in_flight()), (7, 7));
        drop(taken);
        assert_eq!(places.in_flight(), 0);
    }

    #[test]
    fn an_agent_that_hangs_leaves_places_for_the_others() {
        let places = places(100, 5);
        // Half of them, and the fifth of the other half that is kept for it.
        let hanging = take_all(&places, 0);
        assert_eq!(hanging.len(), 60);
        let others = [1, 2, 3, 4].map(|agent| take_all(&places, agent));
        assert_eq!(others.each_ref().map(Vec::len), [10; 4]);
        assert_eq!(places.in_flight(), 100);
    }

    proptest! {
        #[test]
        fn never_more_than_there_are_and_always_what_is_kept(
            all in 1_usize..60, agents in 1_usize..8,
            steps in prop::collection::vec((0_usize..8, any::<bool>()), 0..200),
        ) {
            let places = places(all, 1);
            let mut held: Vec<Vec<Place>> = (0..agents).map(|_| Vec::new()).collect();
            // The others come while jobs are in flight.
            for _ in 0..all / 2 {
                held[0].extend(places.take(AgentIndex(0)));
            }
            places.admit(AgentIndex(agents - 1));
            let kept = if agents == 1 { 0 } else { all / (2 * agents) };
            for (agent, takes) in steps {
                let agent = agent % agents;
                if !takes {
                    held[agent].pop();
                    continue;
                }
                let has = held[agent].len();
                match places.take(AgentIndex(agent)) {
                    Some(place) => held[agent].push(place),
                    None => prop_assert!(has >= kept),
                }
                let sum: usize = held.iter().map(Vec::len).sum();
                prop_assert_eq!(sum, places.in_flight());
                prop_assert!(sum <= all);
            }
        }
    }
}
