//! Suggests the tiers that would have been worth most.
//!
//! Uptimes are known by tenths of a percent: how many slots there were at each, and of the jobs that
//! were sent how many succeeded. From both follows the worth of any tiers: each job that
//! succeeds adds a stated value, and each job costs the mean cost. How often jobs succeed is estimated between every
//! two neighbours of the search space; where few jobs or none were sent, they are taken to succeed as
//! often as the uptime says, which weighs as much as two jobs.

use serde::Serialize;

use super::tally::{Tally, tenth};
use super::timeline::Timeline;
use crate::money::Wei;
use crate::runner::rate::policy::Policy;
use crate::units::Percent;

/// The thresholds that are tried, in tenths of a percent.
const THRESHOLDS: [u16; 20] = [
    500, 600, 700, 800, 850, 900, 910, 920, 930, 940, 950, 960, 970, 980, 985, 990, 993, 995, 997,
    999,
];
/// The shares that the three tiers earn, in percent.
const SHARES: [u8; 3] = [100, 50, 10];
/// The weight of the uptime as a prior, in jobs.
const PRIOR_JOBS: f64 = 2.0;
/// The normal distribution's quantile of 95 %: intervals hold the truth in 90 of 100 cases.
const Z: f64 = 1.644_853_627;
/// All tenths of a percent, 100 % included.
const TENTHS: usize = 1001;

/// The tiers that would have been worth most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suggestion {
    /// The stated value of a good job.
    pub value_per_good_job_wei: Wei,
    /// The mean cost of a job; `None` if no cost is known, which counts as 0.
    pub cost_per_job_wei: Option<Wei>,
    /// The thresholds that were tried.
    pub thresholds_percent: Vec<f64>,
    /// The shares that the tiers earn.
    pub shares_percent: Vec<u8>,
    /// The number of policies that were compared, including the last run's.
    pub policies_compared: usize,
    /// The last run's policy.
    pub recorded: PolicyValue,
    /// The policy that would have been worth most.
    pub best: PolicyValue,
    /// How much more that is worth than the recorded one.
    pub gain_wei: Wei,
    /// The lower bound of the 90 % interval.
    pub gain_low_wei: Wei,
    /// The upper bound of the 90 % interval.
    pub gain_high_wei: Wei,
}

/// The worth of a policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PolicyValue {
    pub policy: String,
    /// Jobs that it would have sent, if shares held at once.
    pub jobs: f64,
    /// Of these, expected successes.
    pub good_jobs: f64,
}

/// Slots and success at each uptime.
#[derive(Debug)]
struct Observations {
    /// By tenth of a percent.
    slots: Vec<f64>,
    /// By cell: estimated success and its variance.
    success: Vec<(f64, f64)>,
}

/// The cell between two neighbouring thresholds in which a tenth lies.
fn cell(tenth: usize) -> usize {
    THRESHOLDS.partition_point(|&threshold| usize::from(threshold) <= tenth)
}

impl Observations {
    fn of<'a>(agents: impl Iterator<Item = (&'a [Timeline], &'a Tally)>) -> Self {
        let mut slots = vec![0.0; TENTHS];
        let mut jobs = vec![(0.0, 0.0); THRESHOLDS.len() + 1];
        for (runs, tally) in agents {
            for (uptime, of_uptime) in runs.iter().flat_map(super::replay::slots_by_uptime) {
                slots[usize::from(tenth(uptime.get()))] += of_uptime.count();
            }
            for (&tenth, &(all, good)) in &tally.by_uptime {
                let of_cell = &mut jobs[cell(tenth.into())];
                #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 jobs")]
                let (all, good) = (all as f64, good as f64);
                of_cell.0 += all;
                of_cell.1 += good;
            }
        }
        let success = jobs.iter().enumerate().map(|(cell, (all, good))| {
            let begin = cell.checked_sub(1).map_or(0, |before| THRESHOLDS[before]);
            let end = THRESHOLDS.get(cell).copied().unwrap_or(1000);
            // The middle of the cell is what its uptimes say.
            let prior = f64::from(begin + end) / 2000.0;
            let (all, good) = (all + PRIOR_JOBS, good + PRIOR_JOBS * prior);
            let mean = good / all;
            (mean, mean * (1.0 - mean) / (all + 1.0))
        });
        Self {
            success: success.collect(),
            slots,
        }
    }

    /// The jobs that a policy sends in each cell.
    fn jobs(&self, policy: &Policy) -> Vec<f64> {
        let mut jobs = vec![0.0; self.success.len()];
        for (tenth, slots) in self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slots)| **slots > 0.0)
        {
            #[expect(clippy::cast_precision_loss, reason = "at most 1000")]
            let uptime = Percent::new(tenth as f64 / 10.0).unwrap_or(Percent::FULL);
            jobs[cell(tenth)] += slots * policy.share(uptime).get();
        }
        jobs
    }

    fn worth(&self, policy: &Policy) -> PolicyValue {
        let jobs = self.jobs(policy);
        let good = jobs
            .iter()
            .zip(&self.success)
            .map(|(jobs, (mean, _))| jobs * mean);
        PolicyValue {
            policy: policy.to_string(),
            good_jobs: good.sum(),
            jobs: jobs.iter().sum(),
        }
    }

    /// The standard deviation of the difference in good jobs between two policies.
    fn deviation(&self, policy: &Policy, other: &Policy) -> f64 {
        let pairs = self.jobs(policy).into_iter().zip(self.jobs(other));
        let variances = pairs
            .zip(&self.success)
            .map(|((jobs, others), (_, variance))| (jobs - others).powi(2) * variance);
        variances.sum::<f64>().sqrt()
    }
}

/// The tiers that would have been worth most, among all of the search space and the recorded policy,
/// where a good job is worth `value` and any job costs `cost`.
#[must_use]
pub(crate) fn suggest<'a>(
    agents: impl Iterator<Item = (&'a [Timeline], &'a Tally)>,
    recorded: &Policy,
    value: &Wei,
    cost: Option<Wei>,
) -> Suggestion {
    let past = Observations::of(agents);
    let worth = |policy: &Policy| {
        let worth = past.worth(policy);
        let cost = cost.as_ref().map(|cost| amount(cost, worth.jobs));
        (
            amount(value, worth.good_jobs) - &cost.unwrap_or_default(),
            worth,
        )
    };
    let (recorded_wei, recorded_worth) = worth(recorded);
    let mut best = (
        recorded_wei.clone(),
        recorded_worth.clone(),
        recorded.clone(),
    );
    let mut compared = 1;
    for policy in candidates() {
        compared += 1;
        let (wei, worth) = worth(&policy);
        if wei > best.0 {
            best = (wei, worth, policy);
        }
    }
    let (best_wei, best_worth, best) = best;
    let gain = best_wei - &recorded_wei;
    let spread = amount(value, Z * past.deviation(&best, recorded));
    let rounded = |worth: PolicyValue| PolicyValue {
        jobs: super::timeline::tenths(worth.jobs),
        good_jobs: super::timeline::tenths(worth.good_jobs),
        ..worth
    };
    Suggestion {
        value_per_good_job_wei: value.clone(),
        cost_per_job_wei: cost,
        thresholds_percent: THRESHOLDS.iter().map(|&t| f64::from(t) / 10.0).collect(),
        shares_percent: SHARES.into(),
        policies_compared: compared,
        recorded: rounded(recorded_worth),
        best: rounded(best_worth),
        gain_low_wei: gain.clone() - &spread,
        gain_high_wei: gain.clone() + spread,
        gain_wei: gain,
    }
}

/// All three tiers with falling thresholds.
fn candidates() -> impl Iterator<Item = Policy> {
    let percent = |tenths: u16| Percent::new(f64::from(tenths) / 10.0).unwrap_or(Percent::FULL);
    let all = 0..THRESHOLDS.len();
    let triples = all.flat_map(|low| {
        let above = low + 1..THRESHOLDS.len();
        above.flat_map(move |middle| {
            (middle + 1..THRESHOLDS.len()).map(move |top| [top, middle, low])
        })
    });
    triples.map(move |triple| {
        let tiers = triple.into_iter().zip(SHARES);
        Policy::of_tiers(tiers.map(|(n, share)| (percent(THRESHOLDS[n]), Percent::whole(share))))
    })
}

/// The amount for this many jobs, to a thousandth of a job; the amount of one job is exact.
fn amount(of_one: &Wei, jobs: f64) -> Wei {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "far fewer jobs than an i128 holds thousandths"
    )]
    let thousandths = (jobs * 1000.0).round() as i128;
    of_one.part(thousandths, 1000)
}

#[cfg(test)]
mod tests {
    use super::super::timeline::RateStep;
    use super::*;
    use crate::runner::events::event::RateReason;
    use crate::units::JobsPerMinute;

    fn wei(amount: i64) -> Wei {
        amount.to_string().parse().unwrap()
    }

    /// A thousand minutes at each uptime, at 60/min, with these jobs, and good ones.
    fn past(uptimes: &[(f64, u64, u64)]) -> (Vec<Timeline>, Tally) {
        let minutes = 1000 * 60_000_000;
        let mut tally = Tally::default();
        let mut timeline = Timeline {
            rates: vec![RateStep {
                at: 0,
                rate: JobsPerMinute::new(60),
                base: JobsPerMinute::new(60),
                reason: RateReason::Uptime,
            }],
            ..Timeline::default()
        };
        for &(uptime, jobs, good) in uptimes {
            let percent = Percent::new(uptime).ok();
            timeline.uptimes.push((timeline.end, percent));
            timeline.end += minutes;
            tally.by_uptime.insert(tenth(uptime), (jobs, good));
        }
        (vec![timeline], tally)
    }

    fn suggested(uptimes: &[(f64, u64, u64)], value: i64, cost: i64) -> Suggestion {
        let (runs, tally) = past(uptimes);
        let agents = [(&runs[..], &tally)];
        suggest(
            agents.into_iter(),
            &Policy::default(),
            &wei(value),
            Some(wei(cost)),
        )
    }

    #[test]
    fn jobs_are_sent_where_they_are_worth_their_cost() {
        // At 92.5 % nine of ten are good, at 85.5 % one of ten: worth 90 and 10 where each costs 50.
        let got = suggested(
            &[
                (99.9, 60_000, 59_900),
                (92.5, 6000, 5400),
                (85.5, 6000, 600),
            ],
            100,
            50,
        );
        let best: Policy = got.best.policy.parse().unwrap();
        let share = |uptime: f64| best.share(Percent::new(uptime).unwrap()).get();
        assert_eq!((share(99.9), share(92.5), share(85.5)), (1.0, 1.0, 0.0));
        assert_eq!((got.best.jobs, got.policies_compared), (120_000.0, 1141));
        // The recorded one sends a tenth at 92.5 %: 54000 jobs more, of which 90 % are good.
        assert_eq!(got.recorded.jobs, 66_000.0);
        let gain: f64 = got.gain_wei.to_string().parse().unwrap();
        assert!((gain - 54_000.0 * 40.0).abs() < 54_000.0 * 0.1, "{gain}");
        assert!(got.gain_low_wei < got.gain_wei && got.gain_wei < got.gain_high_wei);
        assert!(!got.gain_low_wei.is_negative());
    }

    #[test]
    fn where_nothing_is_gained_the_recorded_policy_stays() {
        let got = suggested(&[(99.9, 60_000, 60_000)], 100, 50);
        assert_eq!(got.best.policy, Policy::default().to_string());
        assert_eq!((got.gain_wei, got.gain_high_wei), (wei(0), wei(0)));
    }

    #[test]
    fn where_no_job_was_sent_the_gain_is_uncertain() {
        let got = suggested(&[(86.0, 0, 0)], 100, 80);
        // 87.5 % of them are taken to be good, which is little more than a guess.
        assert_eq!(got.best.jobs, 60_000.0);
        assert!(got.gain_low_wei.is_negative());
    }

    #[test]
    fn the_best_is_the_best_of_all() {
        let uptimes = [
            (99.5, 900, 890),
            (97.2, 800, 500),
            (94.1, 700, 650),
            (91.0, 90, 20),
            (70.0, 5, 5),
        ];
        let got = suggested(&uptimes, 100, 60);
        let (runs, tally) = past(&uptimes);
        let past = Observations::of([(&runs[..], &tally)].into_iter());
        let brute = candidates().map(|policy| {
            uptimes
                .iter()
                .map(|&(uptime, ..)| {
                    let share = policy.share(Percent::new(uptime).unwrap()).get();
                    let (mean, _) = past.success[cell(tenth(uptime).into())];
                    60_000.0 * share * (100.0 * mean - 60.0)
                })
                .sum::<f64>()
        });
        let best = brute.fold(f64::MIN, f64::max);
        let got = 100.0 * got.best.good_jobs - 60.0 * got.best.jobs;
        assert!((got - best).abs() < 20.0, "{got} {best}");
    }
}
