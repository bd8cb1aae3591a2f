//! Rates over time: how many jobs they make, and which rates another policy would have given.

use std::time::{Duration, Instant};

use super::history::Timeline;
use crate::runner::policy::{Policy, Recovery};
use crate::units::JobsPerMinute;

/// A rate and for how many microseconds it held.
pub type Stretch = (JobsPerMinute, i64);

/// The slots of a row of stretches.
#[must_use]
pub fn slots(stretches: &[Stretch]) -> f64 {
    let job_micros = stretches
        .iter()
        .map(|&(rate, micros)| i128::from(rate.get()) * i128::from(micros));
    #[expect(clippy::cast_precision_loss, reason = "far finer than a job")]
    let job_micros = job_micros.sum::<i128>() as f64;
    job_micros / 60e6
}

/// The rates that held, from the first known uptime to the end.
#[must_use]
pub fn held(timeline: &Timeline) -> Vec<Stretch> {
    stretches(&timeline.rates, timeline.end)
}

/// The rates that `policy` gives for the recorded uptimes, from the first known one on; while none is
/// known, none is sent, as it was.
#[must_use]
pub fn replayed(timeline: &Timeline, policy: &Policy) -> Vec<Stretch> {
    let known = timeline
        .uptimes
        .iter()
        .position(|(_, uptime)| uptime.is_some());
    let uptimes = &timeline.uptimes[known.unwrap_or(timeline.uptimes.len())..];
    let Some(&(begin, _)) = uptimes.first() else {
        return Vec::new();
    };
    let mut recovery = Recovery::new(policy);
    // Only differences matter.
    let origin = Instant::now();
    let instant = |at: i64| origin + Duration::from_micros(u64::try_from(at - begin).unwrap_or(0));
    let mut rates = Vec::new();
    for (n, &(at, uptime)) in uptimes.iter().enumerate() {
        let until = uptimes.get(n + 1).map_or(timeline.end, |&(next, _)| next);
        let Some(uptime) = uptime else {
            rates.push((at, JobsPerMinute::ZERO));
            continue;
        };
        let earned = policy.share(uptime);
        let rate = |share| policy.rate_of(timeline.base_rate, share);
        rates.push((at, rate(recovery.allow(earned, instant(at)))));
        // A rate may rise between two looks.
        while let Some(rises_at) = recovery.rises_at().filter(|&rises| rises < instant(until)) {
            let after = i64::try_from((rises_at - origin).as_micros()).unwrap_or(i64::MAX);
            rates.push((
                begin.saturating_add(after),
                rate(recovery.allow(earned, rises_at)),
            ));
        }
    }
    stretches(&rates, timeline.end)
}

fn stretches(rates: &[(i64, JobsPerMinute)], end: i64) -> Vec<Stretch> {
    let ends = rates.iter().skip(1).map(|&(at, _)| at).chain([end]);
    let pairs = rates.iter().zip(ends);
    pairs
        .map(|(&(at, rate), end)| (rate, (end - at).max(0)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Percent;
    use proptest::prelude::*;

    const SECOND: i64 = 1_000_000;

    fn timeline(uptimes: &[(i64, f64)], end: i64) -> Timeline {
        Timeline {
            base_rate: JobsPerMinute::new(60),
            rates: Vec::new(),
            uptimes: uptimes
                .iter()
                .map(|&(at, uptime)| (at * SECOND, Percent::new(uptime).ok()))
                .collect(),
            end: end * SECOND,
        }
    }

    fn seconds(stretches: &[Stretch]) -> Vec<(u32, i64)> {
        let stretches = stretches.iter();
        stretches
            .map(|&(rate, micros)| (rate.get(), micros / SECOND))
            .collect()
    }

    #[test]
    fn recorded_uptimes_are_judged_anew() {
        // -1: nothing is known.
        let line = timeline(
            &[(0, -1.0), (10, 99.5), (20, 96.0), (30, -1.0), (40, 99.0)],
            60,
        );
        let replay = |policy: &str| seconds(&replayed(&line, &policy.parse().unwrap()));
        assert_eq!(
            replay("tiers:99=100,95=50,90=10"),
            [(60, 10), (30, 10), (0, 10), (60, 20)]
        );
        assert_eq!(
            replay("tiers:99.2=100,90=10"),
            [(60, 10), (6, 10), (0, 10), (6, 20)]
        );
        // At 40 s it earns more than at 20 s, and does so for long enough at 55 s.
        assert_eq!(
            replay("tiers:99=100,95=50,90=10 recover_after=15s"),
            [(60, 10), (30, 10), (0, 10), (30, 15), (60, 5)]
        );
        assert!((slots(&replayed(&line, &Policy::default())) - 35.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_never_known_makes_no_slots() {
        assert_eq!(
            replayed(&timeline(&[(0, -1.0)], 60), &Policy::default()),
            []
        );
        assert_eq!(replayed(&timeline(&[], 60), &Policy::default()), []);
        assert_eq!(slots(&[]), 0.0);
    }

    proptest! {
        #[test]
        fn a_replay_is_what_a_look_at_each_second_gives(
            steps in prop::collection::vec((1_i64..20, -5.0..100.0_f64), 1..20),
            last in 1_i64..20,
            recover in 0_u64..30,
        ) {
            let mut at = 0;
            let mut uptimes = Vec::new();
            for (later, uptime) in steps {
                uptimes.push((at, uptime));
                at += later;
            }
            let line = timeline(&uptimes, at + last);
            let policy: Policy = match recover {
                0 => Policy::default(),
                seconds => format!("tiers:99=100,95=50,90=10 recover_after={seconds}s").parse().unwrap(),
            };
            let got: i64 = seconds(&replayed(&line, &policy))
                .iter()
                .map(|&(rate, seconds)| i64::from(rate) * seconds)
                .sum();

            let mut recovery = Recovery::new(&policy);
            let origin = Instant::now();
            let mut expected = 0;
            for second in 0..at + last {
                let known = uptimes.iter().rev().find(|&&(from, _)| from <= second).unwrap().1;
                if let Ok(uptime) = Percent::new(known) {
                    let now = origin + Duration::from_secs(second.unsigned_abs());
                    let share = recovery.allow(policy.share(uptime), now);
                    expected += i64::from(policy.rate_of(line.base_rate, share).get());
                }
            }
            prop_assert_eq!(got, expected);
        }
    }
}
