//! When an agent is pinged next: poor uptime makes pings rarer, good uptime brings them back
//! (`.github/docs/protocol.md` section 1.2).

use std::time::Duration;

use crate::units::Percent;

/// How much earlier or later than its interval a ping may come, so that agents that were registered
/// together do not stay in step.
const SPREAD: f64 = 0.05;

/// The rules for the ping intervals of all agents.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IntervalRules {
    /// The interval of an agent without poor pings.
    pub base: Duration,
    /// An uptime of at least this is good.
    pub threshold: Percent,
    /// How much longer each poor ping makes the interval; at least 1.
    pub multiplier: f64,
    /// The longest interval.
    pub max: Duration,
    /// The number of good pings in a row that make up for all poor ones.
    pub recovery_pings: u32,
}

/// The defaults of `.github/docs/operations.md`.
impl Default for IntervalRules {
    fn default() -> Self {
        Self {
            base: Duration::from_mins(15),
            threshold: Percent::whole(99),
            multiplier: 2.0,
            max: Duration::from_hours(24),
            recovery_pings: 3,
        }
    }
}

/// An agent's recent good and poor pings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Streak {
    /// Poor pings that have not been made up for.
    pub consecutive_poor: u32,
    /// Good pings since the last poor one.
    pub good_in_a_row: u32,
}

impl IntervalRules {
    /// The streak after a further ping with this uptime; `None` where there was no answer.
    #[must_use]
    pub fn next_streak(&self, before: Streak, uptime: Option<Percent>) -> Streak {
        if !uptime.is_some_and(|uptime| uptime >= self.threshold) {
            return Streak {
                consecutive_poor: before.consecutive_poor.saturating_add(1),
                good_in_a_row: 0,
            };
        }
        let good_in_a_row = before.good_in_a_row.saturating_add(1);
        Streak {
            consecutive_poor: if good_in_a_row >= self.recovery_pings {
                0
            } else {
                before.consecutive_poor.saturating_sub(1)
            },
            good_in_a_row,
        }
    }

    /// The time from an agent's last ping to its next, before jitter.
    #[must_use]
    pub fn interval(&self, streak: Streak) -> Duration {
        let poor = i32::try_from(streak.consecutive_poor).unwrap_or(i32::MAX);
        let seconds = self.base.as_secs_f64() * self.multiplier.powi(poor);
        // What is too long for a duration is over the maximum as well.
        Duration::try_from_secs_f64(seconds).map_or(self.max, |interval| interval.min(self.max))
    }
}

/// `interval`, up to 5 % shorter or longer; `random` is from 0 to 1.
#[must_use]
pub(crate) fn spread(interval: Duration, random: f64) -> Duration {
    interval.mul_f64(1.0 + SPREAD * (2.0 * random.clamp(0.0, 1.0) - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Minutes between pings after each of these; -1 stands for no answer.
    fn minutes(rules: &IntervalRules, uptimes: &[f64]) -> Vec<u64> {
        let mut streak = Streak::default();
        let after = uptimes.iter().map(|&uptime| {
            streak = rules.next_streak(streak, Percent::new(uptime).ok());
            rules.interval(streak).as_secs() / 60
        });
        after.collect()
    }

    #[test]
    fn poor_pings_escalate_up_to_the_maximum() {
        assert_eq!(
            minutes(
                &IntervalRules::default(),
                &[98.9, 0.0, -1.0, 50.0, 98.0, 98.0, 98.0, 98.0, 98.0]
            ),
            [30, 60, 120, 240, 480, 960, 1440, 1440, 1440]
        );
    }

    #[test]
    fn good_pings_step_down_and_some_in_a_row_recover_at_once() {
        let poor_first = [90.0; 5];
        let then_good = [99.0, 100.0, 99.5];
        assert_eq!(
            minutes(
                &IntervalRules::default(),
                &[poor_first.as_slice(), &then_good].concat()
            )[5..],
            [240, 120, 15]
        );
        // A poor one in between begins again.
        assert_eq!(
            minutes(
                &IntervalRules::default(),
                &[
                    90.0, 90.0, 90.0, 90.0, 99.0, 99.0, 98.0, 99.0, 99.0, 99.0, 99.0
                ]
            )[4..],
            [120, 60, 120, 60, 30, 15, 15]
        );
    }

    #[test]
    fn the_threshold_itself_is_good() {
        assert_eq!(
            minutes(&IntervalRules::default(), &[99.0, 98.999_999]),
            [15, 30]
        );
    }

    proptest! {
        #[test]
        fn no_interval_is_below_the_base_or_over_the_maximum(
            multiplier in 1.0..1e6_f64,
            consecutive_poor in any::<u32>(),
            random in any::<f64>(),
        ) {
            let rules = IntervalRules { multiplier, ..IntervalRules::default() };
            let interval = rules.interval(Streak { consecutive_poor, good_in_a_row: 0 });
            prop_assert!(interval >= rules.base && interval <= rules.max);
            if !random.is_nan() {
                let spread = spread(interval, random);
                prop_assert!(spread >= interval.mul_f64(0.949) && spread <= interval.mul_f64(1.051));
            }
        }

        #[test]
        fn enough_good_pings_always_recover(
            uptimes in prop::collection::vec(-1.0..100.0_f64, 0..50),
        ) {
            let rules = IntervalRules::default();
            let all = [uptimes.as_slice(), &[100.0; 3]].concat();
            let minutes = minutes(&rules, &all);
            prop_assert_eq!(minutes.last(), Some(&15));
        }

        #[test]
        fn a_poor_ping_never_makes_the_interval_shorter_nor_a_good_one_longer(
            consecutive_poor in 0_u32..40, good_in_a_row in 0_u32..5, good in any::<bool>(),
        ) {
            let rules = IntervalRules::default();
            let before = Streak { consecutive_poor, good_in_a_row };
            let uptime = Percent::new(if good { 99.5 } else { 12.0 }).ok();
            let after = rules.interval(rules.next_streak(before, uptime));
            if good {
                prop_assert!(after <= rules.interval(before));
            } else {
                prop_assert!(after >= rules.interval(before));
            }
        }
    }
}
