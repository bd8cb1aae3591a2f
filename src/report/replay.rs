//! Replays recorded uptimes under another policy (`--what-if`).

use std::time::{Duration, Instant};

use super::timeline::{Micros, RateInterval, RateStep, Slots, Timeline};
use crate::runner::events::event::RateReason;
use crate::runner::rate::policy::{Policy, Recovery};
use crate::units::{JobsPerMinute, Percent, Share};

/// The rates that `policy` gives for the recorded uptimes, from the first known one on, with the slots
/// that were accounted for; while no uptime is known, nothing is sent, as it was.
#[must_use]
pub(crate) fn replayed(timeline: &Timeline, policy: &Policy) -> Vec<RateInterval> {
    let shares = shares(timeline, policy);
    let (Some(&(begin, _)), Some(&first)) = (shares.first(), timeline.rates.first()) else {
        return Vec::new();
    };
    let bases = bases(timeline, begin, first.base);
    let mut changes: Vec<Micros> = shares.iter().map(|&(at, _)| at).collect();
    changes.extend(bases.iter().map(|&(at, _)| at));
    changes.sort_unstable();
    changes.dedup();
    let ends = changes.iter().skip(1).copied().chain([timeline.end]);
    let held = changes.iter().zip(ends).map(|(&from, until)| {
        let share = shares[shares.partition_point(|&(at, _)| at <= from) - 1].1;
        let base = bases[bases.partition_point(|&(at, _)| at <= from) - 1].1;
        let rate = share.map_or(JobsPerMinute::ZERO, |share| policy.rate_of(base, share));
        let reason = RateReason::Uptime;
        RateInterval {
            from,
            until: until.max(from),
            step: RateStep {
                at: from,
                rate,
                base,
                reason,
            },
        }
    });
    held.collect()
}

/// The slots at each known uptime, ordered by time.
pub(crate) fn slots_by_uptime(timeline: &Timeline) -> impl Iterator<Item = (Percent, Slots)> + '_ {
    let first = timeline.rates.first().map(|step| step.base);
    let bases = bases(timeline, Micros::MIN, first.unwrap_or_default());
    timeline.known().map(move |known| {
        let begin = bases.partition_point(|&(at, _)| at <= known.from) - 1;
        let mut slots = Slots::default();
        for (n, &(at, base)) in bases.iter().enumerate().skip(begin) {
            if at >= known.until {
                break;
            }
            let until = bases.get(n + 1).map_or(Micros::MAX, |&(next, _)| next);
            slots = slots + Slots::of(base, until.min(known.until) - at.max(known.from));
        }
        (known.uptime, slots)
    })
}

/// From when on which slots were accounted for; from `begin` on, the first ones.
fn bases(timeline: &Timeline, begin: Micros, first: JobsPerMinute) -> Vec<(Micros, JobsPerMinute)> {
    let later = timeline.rates.iter().map(|step| (step.at, step.base));
    [(begin, first)]
        .into_iter()
        .chain(later.filter(|&(at, _)| at > begin))
        .collect()
}

/// From when on the policy gives which share, from the first known uptime on.
fn shares(timeline: &Timeline, policy: &Policy) -> Vec<(Micros, Option<Share>)> {
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
    let mut shares = Vec::new();
    for (n, &(at, uptime)) in uptimes.iter().enumerate() {
        let until = uptimes.get(n + 1).map_or(timeline.end, |&(next, _)| next);
        let Some(uptime) = uptime else {
            shares.push((at, None));
            continue;
        };
        let earned = policy.share(uptime);
        shares.push((at, Some(recovery.allow(earned, instant(at)))));
        // A share may rise between two looks.
        while let Some(rises_at) = recovery.rises_at().filter(|&rises| rises < instant(until)) {
            let after = i64::try_from((rises_at - origin).as_micros()).unwrap_or(i64::MAX);
            shares.push((
                begin.saturating_add(after),
                Some(recovery.allow(earned, rises_at)),
            ));
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: i64 = 1_000_000;

    fn timeline(uptimes: &[(i64, f64)], end: i64) -> Timeline {
        let first = uptimes.first().map(|&(at, _)| RateStep {
            at: at * SECOND,
            rate: JobsPerMinute::ZERO,
            base: JobsPerMinute::new(60),
            reason: RateReason::Uptime,
        });
        Timeline {
            is_old: false,
            listings: Vec::new(),
            policy: Policy::default(),
            rates: first.into_iter().collect(),
            uptimes: uptimes
                .iter()
                .map(|&(at, uptime)| (at * SECOND, Percent::new(uptime).ok()))
                .collect(),
            end: end * SECOND,
        }
    }

    fn seconds(held: &[RateInterval]) -> Vec<(u32, i64)> {
        let held = held.iter();
        held.map(|held| (held.step.rate.get(), held.micros() / SECOND))
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
    }

    #[test]
    fn a_base_rate_that_changes_is_the_one_that_was() {
        let mut line = timeline(&[(0, 99.5), (20, 96.0)], 40);
        line.rates.push(RateStep {
            at: 10 * SECOND,
            base: JobsPerMinute::new(120),
            ..line.rates[0]
        });
        assert_eq!(
            seconds(&replayed(&line, &Policy::default())),
            [(60, 10), (120, 10), (60, 20)]
        );
    }

    #[test]
    fn what_was_never_known_makes_no_slots() {
        assert_eq!(
            replayed(&timeline(&[(0, -1.0)], 60), &Policy::default()),
            []
        );
        assert_eq!(replayed(&timeline(&[], 60), &Policy::default()), []);
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
                    expected += i64::from(policy.rate_of(line.rates[0].base, share).get());
                }
            }
            prop_assert_eq!(got, expected);
        }
    }
}
