//! `--pause-after`: when an agent's jobs stop because none of them does any good.

use std::collections::HashSet;

use crate::wire::outcome::Outcome;

/// How many names of orchestrators and capabilities are remembered.
const MAX_REMEMBERED: usize = 10_000;

/// An agent's jobs in a row that were never charged.
#[derive(Debug)]
pub(crate) struct Pause {
    /// The number of jobs that pauses it.
    after: u64,
    in_a_row: u64,
    is_paused: bool,
    /// Orchestrators and capabilities that were unpaid before: the gateway buys tickets only then.
    unpaid: HashSet<(usize, usize)>,
}

/// An agent's jobs begin or cease to be paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PauseChange {
    /// After this number of consecutive jobs that were never charged.
    Paused(u64),
    Resumed,
}

impl Pause {
    #[must_use]
    pub(crate) fn new(after: u64) -> Self {
        Self {
            after,
            in_a_row: 0,
            is_paused: false,
            unpaid: HashSet::new(),
        }
    }

    /// Takes in how a job ended that was sent to an orchestrator (0 if it was not tied) for a capability, by their indices.
    pub(crate) fn ended(&mut self, outcome: Outcome, to: (usize, usize)) -> Option<PauseChange> {
        match outcome {
            Outcome::Success => {
                self.in_a_row = 0;
                return std::mem::take(&mut self.is_paused).then_some(PauseChange::Resumed);
            }
            Outcome::Unpaid if self.unpaid.len() < MAX_REMEMBERED && self.unpaid.insert(to) => {
                return None;
            }
            Outcome::Connect
            | Outcome::BadGateway
            | Outcome::NoSupply
            | Outcome::Unavailable
            | Outcome::NoPlace
            | Outcome::Unpaid
            | Outcome::Rejected => self.in_a_row += 1,
            // Says nothing of whether jobs do any good.
            Outcome::Throttled | Outcome::CutShort | Outcome::Misrouted => {}
            _ => self.in_a_row = 0,
        }
        if self.in_a_row < self.after || self.is_paused {
            return None;
        }
        self.is_paused = true;
        Some(PauseChange::Paused(self.in_a_row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_that_do_no_good_pause_until_one_succeeds() {
        let mut pause = Pause::new(3);
        let mut end = |outcome| pause.ended(outcome, (0, 0));
        assert_eq!(end(Outcome::Connect), None);
        // Somebody worked.
        assert_eq!(end(Outcome::HttpError), None);
        assert_eq!(end(Outcome::Connect), None);
        assert_eq!(end(Outcome::NoSupply), None);
        assert_eq!(end(Outcome::Throttled), None);
        assert_eq!(end(Outcome::BadGateway), Some(PauseChange::Paused(3)));
        assert_eq!(end(Outcome::Rejected), None);
        assert_eq!(end(Outcome::Timeout), None);
        assert_eq!(end(Outcome::Success), Some(PauseChange::Resumed));
        assert_eq!(end(Outcome::Success), None);
    }

    #[test]
    fn the_first_unpaid_job_of_each_orchestrator_and_capability_does_not_count() {
        let mut pause = Pause::new(1);
        for to in [(0, 0), (1, 0), (0, 1)] {
            assert_eq!(pause.ended(Outcome::Unpaid, to), None);
        }
        let again = pause.ended(Outcome::Unpaid, (1, 0));
        assert_eq!(again, Some(PauseChange::Paused(1)));
    }
}
