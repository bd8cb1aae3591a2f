//! Uptime to job rate: SEED.md's tiers.

use crate::units::{JobsPerMinute, Percent};

/// Least uptime in percent and the share of the base rate in percent that it earns, best first.
/// Below the last one nothing is sent.
pub const TIERS: [(f64, u8); 3] = [(99.0, 100), (95.0, 50), (90.0, 10)];

/// The rate that an uptime earns, in whole jobs per minute, rounded down.
#[must_use]
pub fn job_rate(base: JobsPerMinute, uptime: Percent) -> JobsPerMinute {
    TIERS
        .iter()
        .find(|(least, _)| uptime.get() >= *least)
        .map_or(JobsPerMinute::ZERO, |&(_, share)| base.share(share))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tier_begins_at_its_own_threshold() {
        for (uptime, base, rate) in [
            (100.0, 60, 60),
            (99.0, 60, 60),
            (98.999_999, 60, 30),
            (95.0, 61, 30),
            (94.999_999, 60, 6),
            (90.0, 60, 6),
            (90.0, 19, 1),
            (90.0, 9, 0),
            (89.999_999, 60, 0),
            (0.0, 6_000_000, 0),
            (99.0, 6_000_000, 6_000_000),
        ] {
            assert_eq!(
                job_rate(JobsPerMinute::new(base), Percent::new(uptime).unwrap()).get(),
                rate,
                "{uptime} % of {base}"
            );
        }
    }
}
