//! The effect of punishment: uptime and success in the hours after each drop of the rate, compared with
//! the hour before it.

use serde::Serialize;

use super::drops::{DropWindows, HOUR, HOURS_AFTER};
use super::timeline::{Micros, Timeline, UptimeIntegral, seconds, utc};
use crate::units::Percent;

#[derive(Default)]
struct HourSum {
    jobs: u64,
    good: u64,
    weighted: f64,
    micros: i64,
}

impl HourSum {
    fn around(&self) -> HourAround {
        let mean = self.weighted / seconds(self.micros);
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 jobs")]
        let success = self.good as f64 / self.jobs as f64 * 100.0;
        // Without jobs there is no percentage.
        let percent = |number: f64| {
            let rounded = Percent::new(number.clamp(0.0, 100.0));
            rounded.map(Percent::to_a_billionth).ok()
        };
        HourAround {
            uptime_percent: percent(mean),
            jobs: self.jobs,
            success_rate_percent: percent(success),
        }
    }
}

/// The effect of punishment.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effect {
    /// How often the rate dropped because of the uptime.
    pub drops: usize,
    /// The hours around all drops together.
    #[serde(flatten)]
    pub together: Around,
    /// The hours around each drop.
    pub each: Vec<RateDrop>,
}

impl Effect {
    /// Evaluates the hours around the drops, with the uptimes that were known then.
    #[must_use]
    pub fn of(around: &DropWindows, runs: &[Timeline]) -> Self {
        let (jobs, uptime) = (around.sums(), UptimeIntegral::of(runs));
        let hour = |drops: &[Micros], hour: i64| {
            let mut sum = HourSum::default();
            for &drop in drops {
                let (from, until) = (drop + hour * HOUR, drop + (hour + 1) * HOUR);
                let at = |when: Micros| jobs[around.bounds.partition_point(|&bound| bound < when)];
                let ((jobs_before, good_before), (jobs, good)) = (at(from), at(until));
                sum.jobs += jobs - jobs_before;
                sum.good += good - good_before;
                let (weighted, micros) = uptime.between(from, until);
                sum.weighted += weighted;
                sum.micros += micros;
            }
            sum.around()
        };
        let hours = |drops: &[Micros]| Around {
            hour_before: hour(drops, -1),
            hours_after: (0..HOURS_AFTER).map(|after| hour(drops, after)).collect(),
        };
        Self {
            drops: around.drops.len(),
            together: hours(&around.drops),
            each: around
                .drops
                .iter()
                .map(|&drop| (utc(drop), hours(&[drop])))
                .map(|(at, around)| RateDrop { at, around })
                .collect(),
        }
    }
}

/// One drop of the rate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RateDrop {
    /// The time of the drop, in UTC.
    pub at: String,
    /// The hours around the drop.
    #[serde(flatten)]
    pub around: Around,
}

/// The hours around a drop of the rate, or around several.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Around {
    /// The hour before.
    pub hour_before: HourAround,
    /// The first, second and third hour after.
    pub hours_after: Vec<HourAround>,
}

/// An hour before or after a drop.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HourAround {
    /// The mean uptime, over the time in which one was known.
    pub uptime_percent: Option<Percent>,
    pub jobs: u64,
    /// Of these, the share that succeeded.
    pub success_rate_percent: Option<Percent>,
}

#[cfg(test)]
mod tests {
    use super::super::drops::drops;
    use super::super::timeline::RateStep;
    use super::*;
    use crate::runner::events::event::RateReason;
    use crate::runner::rate::policy::Policy;
    use crate::units::JobsPerMinute;
    use proptest::prelude::*;

    fn timeline(steps: &[(i64, u32, f64)], end: i64) -> Timeline {
        Timeline {
            is_old: false,
            listings: Vec::new(),
            rates: steps
                .iter()
                .map(|&(at, rate, _)| RateStep {
                    at: at * 1_000_000,
                    rate: JobsPerMinute::new(rate),
                    base: JobsPerMinute::new(60),
                    reason: RateReason::Uptime,
                })
                .collect(),
            uptimes: steps
                .iter()
                .map(|&(at, _, uptime)| (at * 1_000_000, Percent::new(uptime).ok()))
                .collect(),
            end: end * 1_000_000,
            policy: Policy::default(),
        }
    }

    #[test]
    fn the_hours_around_a_drop_are_compared() {
        let runs = [timeline(
            &[(0, 60, 100.0), (1800, 0, 80.0), (3600, 60, 99.0)],
            7200,
        )];
        let mut around = DropWindows::new(drops(&runs));
        for (minute, good) in [(0, true), (10, false), (61, true), (62, true), (100, false)] {
            around.job(minute * 60_000_000, good);
        }
        let effect = Effect::of(&around, &runs);
        let hour = |hour: &HourAround| {
            let percent = |p: Option<Percent>| p.map(Percent::get);
            (
                percent(hour.uptime_percent),
                hour.jobs,
                percent(hour.success_rate_percent),
            )
        };
        assert_eq!(effect.drops, 1);
        assert_eq!(effect.each[0].at, "1970-01-01T00:30:00.000Z");
        assert_eq!(effect.each[0].around, effect.together);
        assert_eq!(
            hour(&effect.together.hour_before),
            (Some(100.0), 2, Some(50.0))
        );
        // Half an hour at 80 %, half an hour at 99 %.
        assert_eq!(
            hour(&effect.together.hours_after[0]),
            (Some(89.5), 2, Some(100.0))
        );
        // Only half of it was followed.
        assert_eq!(
            hour(&effect.together.hours_after[1]),
            (Some(99.0), 1, Some(0.0))
        );
        assert_eq!(hour(&effect.together.hours_after[2]), (None, 0, None));
    }

    proptest! {
        #[test]
        fn sums_are_those_of_brute_force(
            steps in prop::collection::vec((1_i64..3000, 0_u32..=60, -5.0..100.0_f64), 1..30),
            jobs in prop::collection::vec((0_i64..60_000, any::<bool>()), 0..80),
        ) {
            let mut at = 0;
            let mut absolute = Vec::new();
            for (later, rate, uptime) in steps {
                absolute.push((at, rate, uptime));
                at += later;
            }
            let runs = [timeline(&absolute, at)];
            let dropped = drops(&runs);
            let mut around = DropWindows::new(dropped.clone());
            for &(sent, good) in &jobs {
                around.job(sent * 1_000_000, good);
            }
            let effect = Effect::of(&around, &runs);
            let hours = [(-1, &effect.together.hour_before)].into_iter().chain((0..).zip(&effect.together.hours_after));
            for (hour, got) in hours {
                let (mut count, mut weighted, mut known) = (0, 0.0, 0.0);
                for drop in &dropped {
                    let from = drop / 1_000_000 + hour * 3600;
                    count += jobs.iter().filter(|(sent, _)| (from..from + 3600).contains(sent)).count() as u64;
                    for second in from.max(0)..(from + 3600).min(at) {
                        let (_, _, uptime) = absolute.iter().rev().find(|step| step.0 <= second).unwrap();
                        if *uptime >= 0.0 {
                            weighted += uptime;
                            known += 1.0;
                        }
                    }
                }
                prop_assert_eq!(got.jobs, count);
                match got.uptime_percent {
                    Some(uptime) => prop_assert!((uptime.get() - weighted / known).abs() < 1e-6),
                    None => prop_assert!(known == 0.0),
                }
            }
        }
    }
}
