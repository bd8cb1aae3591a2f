//! The division of a total rate among agents.

use std::str::FromStr;

use crate::units::{JobsPerMinute, Percent, Share};

/// The part of an even share that an agent keeps however badly it performs: it must be able to show
/// that it is better again.
const PERFORMANCE_FLOOR: f64 = 0.1;

/// How a total rate is divided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Split {
    /// The same to each agent.
    #[default]
    Equal,
    /// In proportion to the uptime.
    Uptime,
    /// In proportion to success share × uptime ÷ median latency.
    Performance,
}

impl Split {
    /// Its name as an option's value.
    #[must_use]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Uptime => "uptime",
            Self::Performance => "performance",
        }
    }
}

impl FromStr for Split {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "equal" => Ok(Self::Equal),
            "uptime" => Ok(Self::Uptime),
            "performance" => Ok(Self::Performance),
            _ => Err("expected equal, uptime or performance"),
        }
    }
}

/// How well an agent has done its recent jobs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Performance {
    /// The share of jobs that succeeded.
    pub success: f64,
    /// The median latency of those in seconds, greater than 0.
    pub median_latency_seconds: f64,
}

impl Split {
    /// An agent's weight; `None` if too little is known of it yet.
    #[must_use]
    pub fn weight(self, uptime: Option<Percent>, performance: Option<Performance>) -> Option<f64> {
        match self {
            Self::Equal => Some(1.0),
            Self::Uptime => uptime.map(Percent::get),
            Self::Performance => {
                let (uptime, performance) = uptime.zip(performance)?;
                let weight =
                    performance.success * uptime.get() / performance.median_latency_seconds;
                Some(weight)
            }
        }
    }

    fn floor(self) -> f64 {
        match self {
            Self::Equal | Self::Uptime => 0.0,
            Self::Performance => PERFORMANCE_FLOOR,
        }
    }
}

/// Shares out all of `total` by weight, in whole jobs. Of whom nothing is known weighs as much as the
/// others do on average.
#[must_use]
pub(crate) fn base_rates(
    total: JobsPerMinute,
    split: Split,
    weights: &[Option<f64>],
) -> Vec<JobsPerMinute> {
    let known = || weights.iter().flatten();
    #[expect(clippy::cast_precision_loss, reason = "far fewer agents than 2^53")]
    let (agents, known_agents) = (weights.len() as f64, known().count() as f64);
    let known_sum: f64 = known().sum();
    let mean = if known_sum > 0.0 {
        known_sum / known_agents
    } else {
        1.0
    };
    // If all weights are 0, all are the same.
    let weight = |weight: &Option<f64>| match weight {
        Some(weight) if known_sum > 0.0 => *weight,
        _ => mean,
    };
    let sum: f64 = weights.iter().map(weight).sum();
    let floor = split.floor();
    let shares = weights
        .iter()
        .map(|w| floor / agents + (1.0 - floor) * weight(w) / sum);
    let parts = whole_parts(total.get(), &shares.collect::<Vec<_>>());
    parts.into_iter().map(JobsPerMinute::new).collect()
}

/// A whole number in parts that are whole numbers, too: those in proportion to `shares`, rounded down,
/// and one more for those that lose most by it.
fn whole_parts(whole: u32, shares: &[f64]) -> Vec<u32> {
    let sum: f64 = shares.iter().sum();
    if sum <= 0.0 {
        return vec![0; shares.len()];
    }
    let exact = |share: f64| f64::from(whole) * share / sum;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "from 0 to the whole"
    )]
    let mut parts: Vec<u32> = shares
        .iter()
        .map(|&share| (exact(share) + 1e-9).floor() as u32)
        .collect();
    let mut left = whole.saturating_sub(parts.iter().sum());
    let mut by_loss: Vec<usize> = (0..shares.len()).collect();
    let loss = |n: &usize| exact(shares[*n]).fract();
    by_loss.sort_by(|a, b| loss(b).total_cmp(&loss(a)).then(a.cmp(b)));
    for n in by_loss.into_iter().cycle().take(left as usize) {
        parts[n] += 1;
        left -= 1;
    }
    debug_assert_eq!(left, 0);
    parts
}

/// An agent's part of a total.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Allocation {
    /// The rate of its slots, some of which the policy may withhold.
    pub base: JobsPerMinute,
    /// The rate of its jobs.
    pub rate: JobsPerMinute,
}

/// Gives what each agent has lost to those that have earned a greater share than it, in proportion to
/// what they get: the slots become theirs. Where nobody is better, it stays withheld.
pub(crate) fn redistribute(allocations: &mut [Allocation], shares: &[Option<Share>]) {
    let share = |n: usize| shares[n].unwrap_or(Share::NOTHING).get();
    let mut best_first: Vec<usize> = (0..allocations.len()).collect();
    best_first.sort_by(|&a, &b| share(b).total_cmp(&share(a)));
    // Each group with the sum of the rates of all better groups.
    let mut groups: Vec<(&[usize], u64)> = Vec::new();
    let mut better = 0;
    for equals in best_first.chunk_by(|&a, &b| share(a).total_cmp(&share(b)).is_eq()) {
        groups.push((equals, better));
        let rates = equals.iter().map(|&n| u64::from(allocations[n].rate.get()));
        better += rates.sum::<u64>();
    }
    let (mut given_away, mut given_to_each_job) = (0, 0.0);
    let mut gains = vec![0.0; allocations.len()];
    for (equals, better) in groups.into_iter().rev() {
        for &n in equals {
            gains[n] = given_to_each_job;
        }
        for &n in equals.iter().filter(|_| better > 0) {
            let Allocation { base, rate } = &mut allocations[n];
            let loss = base.get().saturating_sub(rate.get());
            *base = *rate;
            given_away += loss;
            #[expect(clippy::cast_precision_loss, reason = "rates are far below 2^53")]
            let better = better as f64;
            given_to_each_job += f64::from(loss) / better;
        }
    }
    let wanted: Vec<f64> = allocations
        .iter()
        .zip(&gains)
        .map(|(allocations, gain)| f64::from(allocations.rate.get()) * gain)
        .collect();
    for (allocations, gain) in allocations.iter_mut().zip(whole_parts(given_away, &wanted)) {
        let more = |rate: JobsPerMinute| JobsPerMinute::new(rate.get() + gain);
        (allocations.base, allocations.rate) = (more(allocations.base), more(allocations.rate));
    }
}

#[cfg(test)]
mod tests {
    use super::super::policy::Policy;
    use super::*;
    use proptest::prelude::*;

    fn jobs(rate: u32) -> JobsPerMinute {
        JobsPerMinute::new(rate)
    }

    fn earned(bases: &[JobsPerMinute], shares: &[Option<Share>]) -> Vec<Allocation> {
        let pairs = bases.iter().zip(shares);
        let allocations = pairs.map(|(&base, share)| Allocation {
            base,
            rate: share.map_or(JobsPerMinute::ZERO, |share| {
                Policy::default().rate_of(base, share)
            }),
        });
        allocations.collect()
    }

    fn shared_out(total: u32, split: Split, weights: &[Option<f64>]) -> Vec<u32> {
        let rates = base_rates(jobs(total), split, weights);
        rates.into_iter().map(JobsPerMinute::get).collect()
    }

    /// Base and rate of each agent, when a total of 100 is shared out evenly and what is lost
    /// is given to others.
    fn given(shares: &[Option<f64>]) -> Vec<(u32, u32)> {
        let bases = base_rates(jobs(100), Split::Equal, &vec![Some(1.0); shares.len()]);
        let shares: Vec<_> = shares.iter().map(|share| share.map(Share::new)).collect();
        let mut allocations = earned(&bases, &shares);
        redistribute(&mut allocations, &shares);
        let pairs = allocations.iter();
        pairs.map(|a| (a.base.get(), a.rate.get())).collect()
    }

    #[test]
    fn a_total_is_shared_out_by_weight() {
        let none = None;
        for (total, split, weights, expected) in [
            (
                100,
                Split::Equal,
                &[Some(1.0), Some(1.0), Some(1.0)][..],
                &[34, 33, 33][..],
            ),
            (
                2,
                Split::Equal,
                &[Some(1.0), Some(1.0), Some(1.0)],
                &[1, 1, 0],
            ),
            (
                100,
                Split::Uptime,
                &[Some(100.0), Some(60.0), none],
                &[42, 25, 33],
            ),
            (100, Split::Uptime, &[Some(0.0), Some(0.0)], &[50, 50]),
            (100, Split::Uptime, &[none, none], &[50, 50]),
            // A tenth of the even share, whatever the weight: 3, and 81 in proportion.
            (
                90,
                Split::Performance,
                &[Some(9.0), Some(1.0), Some(0.0)],
                &[76, 11, 3],
            ),
            (60, Split::Equal, &[], &[]),
        ] {
            assert_eq!(shared_out(total, split, weights), expected, "{weights:?}");
        }
    }

    #[test]
    fn performance_is_success_times_uptime_by_latency() {
        let performance = Performance {
            success: 0.5,
            median_latency_seconds: 0.2,
        };
        let uptime = Some(Percent::whole(96));
        assert_eq!(
            Split::Performance.weight(uptime, Some(performance)),
            Some(240.0)
        );
        assert_eq!(Split::Performance.weight(uptime, None), None);
        assert_eq!(Split::Uptime.weight(uptime, None), Some(96.0));
    }

    #[test]
    fn what_is_lost_goes_to_those_that_earned_more() {
        // Nobody is better than the two: what they lose stays withheld.
        assert_eq!(given(&[Some(0.5), Some(0.5)]), [(50, 25), (50, 25)]);
        assert_eq!(given(&[Some(1.0), Some(0.5)]), [(75, 75), (25, 25)]);
        assert_eq!(given(&[Some(1.0), None]), [(100, 100), (0, 0)]);
        // The 25 of the last go to the others 25 : 25 : 12, the 13 of the third to the first two:
        // 16.6, 16.6 and 4.8.
        assert_eq!(
            given(&[Some(1.0), Some(1.0), Some(0.5), None]),
            [(42, 42), (41, 41), (17, 17), (0, 0)]
        );
        assert_eq!(given(&[None, None]), [(50, 0), (50, 0)]);
    }

    proptest! {
        #[test]
        fn nothing_of_a_total_is_lost(
            total in 0_u32..10_000_000,
            agents in prop::collection::vec((prop::option::of(0.0..1e9_f64), prop::option::of(0_u8..=4)), 1..50),
            split in prop::sample::select(vec![Split::Equal, Split::Uptime, Split::Performance]),
        ) {
            let weights: Vec<_> = agents.iter().map(|(weight, _)| *weight).collect();
            let total = jobs(total);
            let bases = base_rates(total, split, &weights);
            let sum = |rates: &mut dyn Iterator<Item = JobsPerMinute>| -> u32 { rates.map(JobsPerMinute::get).sum() };
            prop_assert_eq!(sum(&mut bases.iter().copied()), total.get());
            if split == Split::Performance {
                let least = f64::from(total.get()) / agents.len() as f64 * PERFORMANCE_FLOOR;
                prop_assert!(bases.iter().all(|base| f64::from(base.get()) >= least.floor()));
            }
            let shares: Vec<_> = agents.iter().map(|(_, share)| share.map(|s| Share::new(f64::from(s) / 4.0))).collect();
            let before = earned(&bases, &shares);
            let mut after = before.clone();
            redistribute(&mut after, &shares);
            prop_assert_eq!(sum(&mut after.iter().map(|a| a.base)), total.get());
            for (before, after) in before.iter().zip(&after) {
                prop_assert!(before.rate <= after.rate && after.rate <= after.base);
            }
            // Brute force: each loss by itself, in exact parts.
            let mut expected: Vec<f64> = before.iter().map(|a| f64::from(a.rate.get())).collect();
            for (loser, allocations) in before.iter().enumerate() {
                let share = |n: usize| shares[n].map_or(0.0, Share::get);
                let better: Vec<usize> = (0..before.len()).filter(|&n| share(n) > share(loser)).collect();
                let all: f64 = better.iter().map(|&n| f64::from(before[n].rate.get())).sum();
                for n in better.into_iter().filter(|_| all > 0.0) {
                    let loss = f64::from(allocations.base.get() - allocations.rate.get());
                    expected[n] += loss * f64::from(before[n].rate.get()) / all;
                }
            }
            for (expected, after) in expected.iter().zip(&after) {
                prop_assert!((expected - f64::from(after.rate.get())).abs() < 1.01, "{} {:?}", expected, after);
            }
        }
    }
}
