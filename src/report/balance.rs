//! The cost of jobs, derived from the balances in gateways' answers.
//!
//! Each answer carries the wei that are left with its orchestrator (`Livepeer-Balance`). A decrease since the
//! previous answer was spent; an increase is a top-up, not negative spending.
//! Answers of overlapping jobs may arrive in another order than that of their payments, so a
//! balance that is higher than the lowest one counts as topped up only where its job was sent after the
//! answer with the lowest; otherwise it is an older balance that arrived late. So the spending is never
//! overstated.

use std::collections::HashMap;

use super::timeline::Micros;
use crate::money::Wei;

/// The latest known balances with all orchestrators in a run.
#[derive(Debug, Default)]
pub struct OrchestratorBalances(HashMap<String, Lowest>);

#[derive(Debug)]
struct Lowest {
    balance: Wei,
    told_at: Micros,
}

/// What a balance reveals about its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The first balance: there is nothing to compare it with.
    First,
    /// This much was spent since the previous balance.
    Spent(Wei),
    /// This much was added since the previous balance; what was spent is unknown.
    ToppedUp(Wei),
    /// An older balance that arrived late.
    Late,
}

impl OrchestratorBalances {
    /// Applies the balance of a job's answer; answers must come in the order of their arrival.
    pub fn told(
        &mut self,
        orchestrator: &str,
        balance: Wei,
        sent_at: Micros,
        answered_at: Micros,
    ) -> Change {
        let now = Lowest {
            balance,
            told_at: answered_at,
        };
        let Some(lowest) = self.0.get_mut(orchestrator) else {
            self.0.insert(orchestrator.to_owned(), now);
            return Change::First;
        };
        if now.balance <= lowest.balance {
            let before = std::mem::replace(lowest, now);
            Change::Spent(before.balance - &lowest.balance)
        } else if sent_at >= lowest.told_at {
            let before = std::mem::replace(lowest, now);
            Change::ToppedUp(lowest.balance.clone() - &before.balance)
        } else {
            Change::Late
        }
    }
}

/// The cost of an agent's jobs by balances.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BalanceSums {
    /// The wei that were spent.
    pub spent: Wei,
    /// The number of jobs whose spending is known.
    pub jobs: u64,
    /// The number of top-ups.
    pub top_ups: u64,
    pub topped_up: Wei,
}

impl BalanceSums {
    /// Adds the change of a balance.
    pub fn add(&mut self, change: &Change) {
        match change {
            Change::First | Change::Late => {}
            Change::Spent(amount) => {
                self.spent += amount;
                self.jobs += 1;
            }
            Change::ToppedUp(amount) => {
                self.topped_up += amount;
                self.top_ups += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn wei(amount: i64) -> Wei {
        amount.to_string().parse().unwrap()
    }

    /// Of jobs as (balance, sent at, answered at).
    fn sums(jobs: &[(i64, i64, i64)]) -> (String, u64, u64, String) {
        let (mut balances, mut sums) = (OrchestratorBalances::default(), BalanceSums::default());
        for &(balance, sent_at, answered_at) in jobs {
            sums.add(&balances.told("https://o", wei(balance), sent_at, answered_at));
        }
        (
            sums.spent.to_string(),
            sums.jobs,
            sums.top_ups,
            sums.topped_up.to_string(),
        )
    }

    #[test]
    fn top_ups_are_no_negative_spend() {
        let jobs = [
            (100, 0, 1),
            (90, 2, 3),
            (-5, 4, 5),
            (995, 6, 7),
            (985, 8, 9),
            (985, 10, 11),
        ];
        assert_eq!(sums(&jobs), ("115".into(), 4, 1, "1000".into()));
        assert_eq!(sums(&[(100, 0, 1)]), ("0".into(), 0, 0, "0".into()));
    }

    #[test]
    fn an_answer_that_was_overtaken_is_no_top_up() {
        // Paid in the order of their balances, answered in another one.
        let jobs = [(100, 0, 10), (97, 5, 20), (98, 4, 21), (96, 15, 22)];
        assert_eq!(sums(&jobs), ("4".into(), 2, 0, "0".into()));
    }

    #[test]
    fn orchestrators_keep_balances_of_their_own() {
        let mut balances = OrchestratorBalances::default();
        assert_eq!(balances.told("a", wei(5), 0, 1), Change::First);
        assert_eq!(balances.told("b", wei(9), 2, 3), Change::First);
        assert_eq!(balances.told("a", wei(3), 4, 5), Change::Spent(wei(2)));
    }

    proptest! {
        /// However answers are shuffled within what overlaps, all that was spent is counted, once.
        #[test]
        fn without_top_ups_the_spend_is_the_fall_of_the_balance(
            costs in prop::collection::vec(0_i64..100, 1..60), delays in prop::collection::vec(1_i64..8, 60),
        ) {
            let mut balance = 1000;
            let mut jobs: Vec<(i64, i64, i64)> = Vec::new();
            for (sent_at, (cost, delay)) in (0..).zip(costs.iter().zip(&delays)) {
                balance -= cost;
                jobs.push((balance, sent_at, sent_at + delay));
            }
            jobs.sort_by_key(|job| job.2);
            let lowest = jobs.iter().map(|job| job.0).min().unwrap();
            let (spent, _, top_ups, _) = sums(&jobs);
            prop_assert_eq!(spent, (jobs[0].0 - lowest).to_string());
            prop_assert_eq!(top_ups, 0);
        }
    }
}
