//! The cost of jobs, derived from the balances in gateways' answers.
//!
//! Each answer carries the wei that are left with its orchestrator for its capability (`Livepeer-Balance`): a book. A
//! decrease since the previous answer was spent; an increase is a top-up, not negative spending. Answers of overlapping
//! jobs may arrive in another order than that of their payments, so a balance that is higher than the lowest one counts as
//! topped up only where its job was sent after the answer with the lowest; otherwise it is an older balance that arrived
//! late. So the spending is never overstated. A node that restarts, or that had no job for ten minutes, forgets the book:
//! a fall far beyond what the jobs behind it can have cost is no spending either.

use std::collections::HashMap;

use super::timeline::Micros;
use crate::money::Wei;

/// How many times the largest fall for each second a fall must exceed to be none.
const FORGOTTEN: u64 = 10;

/// The latest known balances of a run, by orchestrator and capability.
#[derive(Debug, Default)]
pub struct OrchestratorBalances(HashMap<(String, i64), Book>);

#[derive(Debug, Default)]
struct Book {
    /// The lowest balance, and when it was told.
    lowest: Option<(Wei, Micros)>,
    /// The seconds of the jobs that ended since then.
    seconds: u64,
    /// The largest fall for each second so far, as a fall and its seconds.
    largest: Option<(Wei, u64)>,
}

/// What a job's answer tells of a book.
#[derive(Debug, Clone, Copy)]
pub struct ToldBalance<'a> {
    pub orchestrator: &'a str,
    pub capability: i64,
    pub balance: Option<&'a Wei>,
    /// The seconds for which the job is charged.
    pub seconds: u64,
    /// The most that it can have cost, if there is a price.
    pub most: Option<&'a Wei>,
    pub sent_at: Micros,
    pub answered_at: Micros,
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
    /// An older balance that arrived late, or none.
    Late,
    /// The node forgot the book.
    Forgotten,
}

impl OrchestratorBalances {
    /// Applies a job's answer; answers must come in the order of their arrival.
    pub fn told(&mut self, told: ToldBalance<'_>) -> Change {
        let key = (told.orchestrator.to_owned(), told.capability);
        self.0.entry(key).or_default().told(told)
    }
}

impl Book {
    fn told(&mut self, told: ToldBalance<'_>) -> Change {
        self.seconds += told.seconds;
        let Some(balance) = told.balance else {
            return Change::Late;
        };
        let now = (balance.clone(), told.answered_at);
        let Some((lowest, told_at)) = &self.lowest else {
            self.lowest = Some(now);
            self.seconds = 0;
            return Change::First;
        };
        let change = if balance <= lowest {
            let fall = lowest.clone() - balance;
            if self.is_forgotten(&fall, told.most) {
                Change::Forgotten
            } else {
                self.remember(&fall);
                Change::Spent(fall)
            }
        } else if told.sent_at >= *told_at {
            Change::ToppedUp(balance.clone() - lowest)
        } else {
            return Change::Late;
        };
        self.lowest = Some(now);
        self.seconds = 0;
        change
    }

    fn is_forgotten(&self, fall: &Wei, most: Option<&Wei>) -> bool {
        let Some((largest, seconds)) = &self.largest else {
            return false;
        };
        // fall / self.seconds > 10 * largest / seconds, without a division.
        let is_far_more =
            fall.times(*seconds) > largest.times(self.seconds.max(1)).times(FORGOTTEN);
        is_far_more && most.is_none_or(|most| fall > most)
    }

    fn remember(&mut self, fall: &Wei) {
        let seconds = self.seconds.max(1);
        let is_larger = self
            .largest
            .as_ref()
            .is_none_or(|(largest, of_seconds)| fall.times(*of_seconds) > largest.times(seconds));
        if is_larger && !fall.is_zero() {
            self.largest = Some((fall.clone(), seconds));
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
    /// How often a node forgot the book.
    pub forgotten: u64,
}

impl BalanceSums {
    /// Adds the change of a balance.
    pub fn add(&mut self, change: &Change) {
        match change {
            Change::First | Change::Late => {}
            Change::Forgotten => self.forgotten += 1,
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

    fn told<'a>(
        orchestrator: &'a str,
        balance: &'a Wei,
        sent_at: Micros,
        answered_at: Micros,
    ) -> ToldBalance<'a> {
        ToldBalance {
            orchestrator,
            capability: 1,
            balance: Some(balance),
            seconds: 1,
            most: None,
            sent_at,
            answered_at,
        }
    }

    /// Of jobs as (balance, sent at, answered at).
    fn sums(jobs: &[(i64, i64, i64)]) -> (String, u64, u64, String) {
        let (mut balances, mut sums) = (OrchestratorBalances::default(), BalanceSums::default());
        for &(balance, sent_at, answered_at) in jobs {
            let most = wei(1_000_000);
            sums.add(&balances.told(ToldBalance {
                most: Some(&most),
                ..told("https://o", &wei(balance), sent_at, answered_at)
            }));
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
        let mut tell = |orchestrator, balance, at| {
            balances.told(told(orchestrator, &wei(balance), at, at + 1))
        };
        assert_eq!(tell("a", 5, 0), Change::First);
        assert_eq!(tell("b", 9, 2), Change::First);
        assert_eq!(tell("a", 3, 4), Change::Spent(wei(2)));
    }

    #[test]
    fn a_book_that_was_forgotten_is_not_spent() {
        let mut balances = OrchestratorBalances::default();
        let most = wei(100);
        let mut tell = |balance, at| {
            balances.told(ToldBalance {
                most: Some(&most),
                ..told("a", &wei(balance), at, at + 1)
            })
        };
        assert_eq!(tell(1000, 0), Change::First);
        assert_eq!(tell(995, 2), Change::Spent(wei(5)));
        // Much more than before, but a job may cost as much.
        assert_eq!(tell(900, 4), Change::Spent(wei(95)));
        assert_eq!(tell(0, 6), Change::Spent(wei(900)));
        assert_eq!(tell(-20_000, 8), Change::Forgotten);
        assert_eq!(tell(-20_010, 10), Change::Spent(wei(10)));
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
