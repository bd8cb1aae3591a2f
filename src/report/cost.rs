//! What an agent's jobs cost, and what they gave for it.

use serde::Serialize;

use super::tally::Tally;
use super::timeline::Slots;
use crate::money::Wei;
use crate::wire::charge::ChargedPer;

/// The normal distribution's quantile of 97.5 %: intervals hold the truth in 95 of 100 cases.
const Z: f64 = 1.959_963_985;

/// Where it is known from what was spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CostSource {
    /// From the price of each second begun.
    Price,
    /// From the balances that answers told.
    Balance,
}

/// What an agent's jobs cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// From what it is known.
    pub source: CostSource,
    /// All of it.
    pub spent_wei: Wei,
    /// The jobs for which it was spent.
    pub jobs: u64,
    /// Their seconds that were charged, where there is a price of seconds.
    pub seconds_charged: Option<u64>,
    /// Those that were charged, where there is a price of jobs.
    pub jobs_charged: Option<u64>,
    /// For each job that succeeded, rounded up.
    pub per_good_job_wei: Option<Wei>,
    /// What the slots would have cost that punishment withheld, if as much as those jobs.
    pub not_spent_wei: Wei,
    /// How many jobs succeeded for an ETH.
    pub good_jobs_per_eth: Option<Interval>,
    /// What came in between, where balances were told.
    pub top_ups: u64,
    /// How much of it is known: what a balance rose by.
    pub topped_up_wei: Wei,
    /// How often a node forgot the balance.
    pub books_forgotten: u64,
}

/// An estimate and the bounds between which the truth lies in 95 of 100 cases.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// As it was.
    pub estimate: f64,
    /// The lower bound.
    pub low: f64,
    /// The upper bound.
    pub high: f64,
}

/// What the jobs cost, from the price where there is one, or else from balances; `None` where neither
/// is known. `punished` are the slots that punishment withheld.
#[must_use]
pub(crate) fn cost(jobs: &Tally, punished: Slots) -> Option<Cost> {
    let by_price = !jobs.charged.is_empty();
    let (spent, of_jobs) = if by_price {
        let amounts = jobs.charged.iter().map(super::tally::Charged::amount);
        (
            amounts.sum(),
            jobs.charged.iter().map(|charged| charged.jobs).sum(),
        )
    } else {
        (jobs.balance.spent.clone(), jobs.balance.jobs)
    };
    if of_jobs == 0 {
        return None;
    }
    let (numerator, denominator) = punished.fraction();
    let (all, good) = (jobs.all(), jobs.good());
    Some(Cost {
        source: if by_price {
            CostSource::Price
        } else {
            CostSource::Balance
        },
        jobs: of_jobs,
        seconds_charged: units(jobs, ChargedPer::Second),
        jobs_charged: units(jobs, ChargedPer::Job),
        per_good_job_wei: spent.for_each_of(good),
        not_spent_wei: spent.part(numerator, denominator * u128::from(of_jobs)),
        good_jobs_per_eth: per_eth(good, all, &spent),
        top_ups: jobs.balance.top_ups,
        topped_up_wei: jobs.balance.topped_up.clone(),
        books_forgotten: jobs.balance.forgotten,
        spent_wei: spent,
    })
}

/// How many units were charged at prices for such units, if there are any.
fn units(jobs: &Tally, per: ChargedPer) -> Option<u64> {
    let charged = jobs.charged.iter().filter(|c| c.price.per == per);
    charged.map(|c| c.units).reduce(u64::saturating_add)
}

/// How many good jobs an ETH gave: the share of good ones lies within Wilson's interval, so that of few
/// jobs little can be said.
fn per_eth(good: u64, all: u64, spent: &Wei) -> Option<Interval> {
    let eth = spent.approximate_eth();
    if eth <= 0.0 || all == 0 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 jobs")]
    let (good, all) = (good as f64, all as f64);
    let share = wilson(good, all);
    let jobs = |share: f64| share * all / eth;
    Some(Interval {
        estimate: jobs(share.estimate),
        low: jobs(share.low),
        high: jobs(share.high),
    })
}

/// Wilson's interval for a share of which `good` of `all` were seen, `all` over 0.
#[must_use]
pub(crate) fn wilson(good: f64, all: f64) -> Interval {
    let share = good / all;
    let z2 = Z * Z;
    let centre = (share + z2 / (2.0 * all)) / (1.0 + z2 / all);
    let spread =
        Z / (1.0 + z2 / all) * (share * (1.0 - share) / all + z2 / (4.0 * all * all)).sqrt();
    Interval {
        estimate: share,
        low: (centre - spread).max(0.0),
        high: (centre + spread).min(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::balance::BalanceSums;
    use super::super::tally::{Charged, JobRecord, RunTerms};
    use super::*;
    use crate::units::JobsPerMinute;
    use crate::wire::charge::{Price, Work};
    use crate::wire::outcome::Outcome;
    use proptest::prelude::*;
    use std::time::Duration;

    fn wei(amount: u64) -> Wei {
        amount.to_string().parse().unwrap()
    }

    fn tally(jobs: &[(u64, bool)], price: Option<u64>) -> Tally {
        let mut tally = Tally::default();
        let price = price.map(Price::per_second);
        let mut terms = RunTerms::new(price, false);
        for &(millis, good) in jobs {
            let job = JobRecord {
                sent_at: 0,
                work: Work {
                    outcome: if good {
                        Outcome::Success
                    } else {
                        Outcome::Timeout
                    },
                    is_stream: false,
                    time: Duration::from_millis(millis),
                    timeout_seconds: 60,
                },
                latency: Duration::from_millis(millis + 3),
                uptime: 99.0,
                orchestrator: None,
                balance_wei: None,
            };
            let name = || "gpu-check".to_owned();
            tally.job(
                &job,
                (1, &name),
                &mut terms,
                &mut super::super::balance::OrchestratorBalances::default(),
            );
        }
        tally
    }

    #[test]
    fn each_begun_second_is_paid_for_failures_too() {
        // 1 + 1 + 2 + 3 seconds.
        let jobs = tally(
            &[(1, true), (1000, true), (1001, false), (2500, true)],
            Some(100),
        );
        // Two slots at a mean of 175 wei a job.
        let punished = Slots::of(JobsPerMinute::new(60), 2_000_000);
        let cost = cost(&jobs, punished).unwrap();
        assert_eq!(
            (cost.source, cost.seconds_charged),
            (CostSource::Price, Some(7))
        );
        assert_eq!((cost.spent_wei, cost.jobs), (wei(700), 4));
        assert_eq!(cost.per_good_job_wei, Some(wei(234)));
        assert_eq!(cost.not_spent_wei, wei(350));
    }

    #[test]
    fn without_a_price_balances_tell() {
        let mut jobs = tally(&[(1, true), (1, false)], None);
        assert_eq!(cost(&jobs, Slots::default()), None);
        jobs.balance = BalanceSums {
            forgotten: 0,
            spent: wei(30),
            jobs: 1,
            top_ups: 1,
            topped_up: wei(5),
        };
        let cost = cost(&jobs, Slots::of(JobsPerMinute::new(60), 1_500_000)).unwrap();
        assert_eq!(
            (cost.source, cost.seconds_charged),
            (CostSource::Balance, None)
        );
        assert_eq!((cost.spent_wei, cost.not_spent_wei), (wei(30), wei(45)));
    }

    #[test]
    fn few_jobs_rank_low() {
        let [few, many] = [(5, 5), (960, 1000)].map(|(good, all)| {
            per_eth(good, all, &wei(all).times(1_000_000_000_000_000_000)).unwrap()
        });
        assert!(
            few.estimate > many.estimate && few.low < many.low,
            "{few:?} {many:?}"
        );
        // Wilson's own example: 5 of 5 say at least 56.6 %.
        assert!((few.low - 0.5655).abs() < 0.001);
        assert_eq!(per_eth(1, 1, &wei(0)), None);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_brute_force(
            jobs in prop::collection::vec((0_u64..5000, any::<bool>()), 1..50), price in 0_u64..1_000_000,
            punished in 0_i64..100_000_000,
        ) {
            let tally = tally(&jobs, Some(price));
            let seconds: u64 = jobs.iter().map(|(millis, _)| millis.div_ceil(1000).max(1)).sum();
            let good = jobs.iter().filter(|(_, good)| *good).count() as u64;
            let got = cost(&tally, Slots::of(JobsPerMinute::new(60), punished)).unwrap();
            let spent = seconds * price;
            prop_assert_eq!(&got.spent_wei, &wei(spent));
            prop_assert_eq!(got.per_good_job_wei, (good > 0).then(|| wei(spent.div_ceil(good))));
            let not_spent = u128::from(spent) * u128::from(punished.unsigned_abs()) / 1_000_000 / jobs.len() as u128;
            prop_assert_eq!(got.not_spent_wei, wei(not_spent as u64));
            let jobs_charged = jobs.len() as u64;
            let charged = Charged { price: Price::per_second(price), jobs: jobs_charged, seconds, units: seconds };
            prop_assert_eq!(tally.charged, vec![charged]);
            let share = wilson(good as f64, jobs.len() as f64);
            prop_assert!(share.low <= share.estimate + 1e-12 && share.estimate <= share.high + 1e-12);
        }
    }
}
