//! One agent in one run: its rates and uptimes over time, and what follows from them.

use std::collections::BTreeMap;
use std::iter::Sum;
use std::ops::{Add, Sub};

use chrono::{DateTime, SecondsFormat};

use crate::runner::events::event::RateReason;
use crate::runner::rate::policy::Policy;
use crate::units::{JobsPerMinute, Percent};

/// Microseconds since 1970.
pub(crate) type Micros = i64;

/// An instant as RFC 3339 in UTC, to the millisecond.
#[must_use]
pub(crate) fn utc(at: Micros) -> String {
    let time = DateTime::from_timestamp_micros(at);
    time.map_or_else(
        || at.to_string(),
        |time| time.to_rfc3339_opts(SecondsFormat::Millis, true),
    )
}

/// A minute's microseconds: so many of them at one job per minute make a slot.
const MINUTE: i128 = 60_000_000;

/// Slots, exactly: the sum of rates times how long they held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slots(i128);

impl Slots {
    /// Those of a rate that held for so long; of a time that runs backwards, none.
    #[must_use]
    pub fn of(rate: JobsPerMinute, micros: i64) -> Self {
        Self(i128::from(rate.get()) * i128::from(micros.max(0)))
    }

    /// How many whole ones.
    #[must_use]
    pub fn whole(self) -> u64 {
        u64::try_from(self.0 / MINUTE).unwrap_or(0)
    }

    /// How many, to a tenth.
    #[must_use]
    pub fn rounded(self) -> f64 {
        tenths(self.count())
    }

    #[must_use]
    pub fn count(self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "far finer than a slot")]
        let slots = self.0 as f64 / MINUTE as f64;
        slots
    }

    /// How many, as numerator and denominator.
    #[must_use]
    pub fn fraction(self) -> (i128, u128) {
        (self.0, 60_000_000)
    }
}

/// Rounds to a tenth.
#[must_use]
pub(crate) fn tenths(number: f64) -> f64 {
    // Adding 0 makes a negative zero positive.
    (number * 10.0).round() / 10.0 + 0.0
}

impl Add for Slots {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Sub for Slots {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Sum for Slots {
    fn sum<I: Iterator<Item = Self>>(slots: I) -> Self {
        slots.fold(Self::default(), Add::add)
    }
}

/// From when on a rate held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateStep {
    /// When it took hold.
    pub at: Micros,
    /// The jobs that were sent.
    pub rate: JobsPerMinute,
    /// The slots that were accounted for.
    pub base: JobsPerMinute,
    /// Why it was not all of them.
    pub reason: RateReason,
}

/// A time in which a rate held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateInterval {
    pub from: Micros,
    pub until: Micros,
    pub step: RateStep,
}

impl RateInterval {
    /// For how long.
    #[must_use]
    pub fn micros(&self) -> i64 {
        (self.until - self.from).max(0)
    }

    /// The slots of the base rate.
    #[must_use]
    pub fn slots(&self) -> Slots {
        Slots::of(self.step.base, self.micros())
    }

    /// Those of them that were withheld.
    #[must_use]
    pub fn withheld(&self) -> Slots {
        self.slots() - Slots::of(self.step.rate.min(self.step.base), self.micros())
    }
}

/// A time in which an uptime was known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UptimeInterval {
    pub from: Micros,
    pub until: Micros,
    pub uptime: Percent,
}

/// One agent in one run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Timeline {
    /// From when on each rate held.
    pub rates: Vec<RateStep>,
    /// From when on each uptime was known, or none was.
    pub uptimes: Vec<(Micros, Option<Percent>)>,
    /// From when on the orchestrator listed the agent's live runner, or did not, or did not answer.
    pub listings: Vec<(Micros, Option<bool>)>,
    /// When the run ended; of one that was killed, its last record.
    pub end: Micros,
    /// How the rates followed from the uptimes.
    pub policy: Policy,
    /// Whether 0.1.0 recorded it, without slots and pings.
    pub is_old: bool,
}

impl Timeline {
    /// Its part from `from` until `until`.
    #[must_use]
    pub fn clipped(mut self, from: Micros, until: Micros) -> Self {
        self.end = self.end.min(until);
        // What held when the period began holds from then on.
        let begun = self.rates.partition_point(|step| step.at <= from);
        self.rates.drain(..begun.saturating_sub(1));
        self.rates.retain(|step| step.at < until);
        for step in &mut self.rates {
            step.at = step.at.max(from);
        }
        clip(&mut self.uptimes, from, until);
        clip(&mut self.listings, from, until);
        if self.end <= from {
            self.rates.clear();
            self.uptimes.clear();
            self.listings.clear();
        }
        self
    }

    /// The rates, each with its time, from the first known uptime on.
    pub fn held(&self) -> impl Iterator<Item = RateInterval> + '_ {
        let ends = self.rates.iter().skip(1).map(|step| step.at);
        let pairs = self.rates.iter().zip(ends.chain([self.end]));
        pairs.map(|(&step, until)| RateInterval {
            from: step.at,
            until: until.max(step.at),
            step,
        })
    }

    /// The uptimes, each with its time; where none was known there is a gap.
    pub fn known(&self) -> impl Iterator<Item = UptimeInterval> + '_ {
        let ends = self.uptimes.iter().skip(1).map(|&(at, _)| at);
        let pairs = self.uptimes.iter().zip(ends.chain([self.end]));
        pairs.filter_map(|(&(from, uptime), until)| {
            Some(UptimeInterval {
                from,
                until: until.max(from),
                uptime: uptime?,
            })
        })
    }

    /// The slots that were withheld, by reason.
    #[must_use]
    pub fn withheld(&self) -> BTreeMap<&'static str, Slots> {
        let mut sums: BTreeMap<&'static str, Slots> = BTreeMap::new();
        for held in self
            .held()
            .filter(|held| held.withheld() > Slots::default())
        {
            let sum = sums.entry(cause(held.step.reason)).or_default();
            *sum = *sum + held.withheld();
        }
        sums
    }
}

/// Leaves the steps of a period, and what held when it began.
fn clip<T>(steps: &mut Vec<(Micros, T)>, from: Micros, until: Micros) {
    let begun = steps.partition_point(|&(at, _)| at <= from);
    steps.drain(..begun.saturating_sub(1));
    steps.retain(|&(at, _)| at < until);
    for (at, _) in steps {
        *at = (*at).max(from);
    }
}

/// The integral of the uptime over time.
#[derive(Debug)]
pub(crate) struct UptimeIntegral {
    /// From when on each part counts, with its percent, and both sums before it.
    parts: Vec<(Micros, f64, f64, i64)>,
}

impl UptimeIntegral {
    /// Of runs in their order.
    #[must_use]
    pub(crate) fn of(runs: &[Timeline]) -> Self {
        let (mut weighted, mut micros) = (0.0, 0);
        let mut parts = Vec::new();
        for known in runs.iter().flat_map(Timeline::known) {
            parts.push((known.from, known.uptime.get(), weighted, micros));
            weighted += known.uptime.get() * seconds(known.until - known.from);
            micros += known.until - known.from;
            // What follows, if nothing does at once, is not known.
            parts.push((known.until, f64::NAN, weighted, micros));
        }
        parts.sort_by_key(|part| part.0);
        Self { parts }
    }

    /// Percent times seconds, and the microseconds, before an instant.
    fn before(&self, when: Micros) -> (f64, i64) {
        let after = self.parts.partition_point(|part| part.0 <= when);
        let Some(&(from, percent, weighted, micros)) =
            after.checked_sub(1).and_then(|n| self.parts.get(n))
        else {
            return (0.0, 0);
        };
        if percent.is_nan() {
            (weighted, micros)
        } else {
            (
                weighted + percent * seconds(when - from),
                micros + (when - from),
            )
        }
    }

    /// Percent times seconds between two instants, and the microseconds in which an uptime was known.
    #[must_use]
    pub(crate) fn between(&self, from: Micros, until: Micros) -> (f64, i64) {
        let (before, after) = (self.before(from), self.before(until));
        (after.0 - before.0, after.1 - before.1)
    }

    /// The mean between two instants, over the time in which one was known.
    #[must_use]
    pub(crate) fn mean(&self, from: Micros, until: Micros) -> Option<Percent> {
        let (weighted, micros) = self.between(from, until);
        if micros <= 0 {
            return None;
        }
        let mean = (weighted / seconds(micros)).clamp(0.0, 100.0);
        Percent::new(mean).map(Percent::to_a_billionth).ok()
    }
}

/// As a number of seconds.
#[must_use]
pub(crate) fn seconds(micros: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 285 years")]
    let seconds = micros as f64 / 1e6;
    seconds
}

/// Why slots are withheld: another part of a total rate withholds none, the uptime still does.
#[must_use]
pub(crate) fn cause(reason: RateReason) -> &'static str {
    match reason {
        RateReason::Allotment => RateReason::Uptime.name(),
        reason => reason.name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(at: Micros, rate: u32, base: u32, reason: RateReason) -> RateStep {
        RateStep {
            at,
            rate: JobsPerMinute::new(rate),
            base: JobsPerMinute::new(base),
            reason,
        }
    }

    const MINUTE: Micros = 60_000_000;

    fn timeline() -> Timeline {
        Timeline {
            is_old: false,
            listings: Vec::new(),
            rates: vec![
                step(0, 60, 60, RateReason::Uptime),
                step(MINUTE, 30, 60, RateReason::Uptime),
                step(3 * MINUTE, 0, 60, RateReason::Stale),
                step(4 * MINUTE, 20, 40, RateReason::Allotment),
            ],
            uptimes: vec![
                (0, Some(Percent::whole(99))),
                (MINUTE, Some(Percent::whole(96))),
                (3 * MINUTE, None),
                (4 * MINUTE, Some(Percent::whole(95))),
            ],
            end: 5 * MINUTE,
            policy: Policy::default(),
        }
    }

    fn sums(timeline: &Timeline) -> (f64, Vec<(&'static str, f64)>) {
        let withheld = timeline.withheld();
        (
            timeline
                .held()
                .map(|held| held.slots())
                .sum::<Slots>()
                .count(),
            withheld
                .iter()
                .map(|(why, slots)| (*why, slots.count()))
                .collect(),
        )
    }

    #[test]
    fn slots_are_withheld_for_their_reason() {
        // 4 × 60 + 40; 2 × 30 + 20 for the uptime, 60 while it was stale.
        assert_eq!(
            sums(&timeline()),
            (280.0, vec![("stale", 60.0), ("uptime", 80.0)])
        );
        assert_eq!(timeline().known().count(), 3);
    }

    #[test]
    fn a_period_is_cut_out() {
        let cut = timeline().clipped(MINUTE / 2, 2 * MINUTE);
        assert_eq!(cut.rates[0].at, MINUTE / 2);
        assert_eq!(sums(&cut), (90.0, vec![("uptime", 30.0)]));
        let known: Vec<_> = cut
            .known()
            .map(|k| (k.from, k.until, k.uptime.get()))
            .collect();
        assert_eq!(
            known,
            [(MINUTE / 2, MINUTE, 99.0), (MINUTE, 2 * MINUTE, 96.0)]
        );
        for (from, until) in [(5 * MINUTE, 9 * MINUTE), (-9 * MINUTE, 0)] {
            assert_eq!(sums(&timeline().clipped(from, until)), (0.0, vec![]));
        }
        assert_eq!(timeline().clipped(-1, 9 * MINUTE), timeline());
    }
}
