//! When jobs are due: open-loop and evenly spaced, whatever the jobs' latency.
//!
//! ```text
//! 60/min          60 → 30/min after a third of a gap        → 0    → 60/min
//! |─────|─────|─────|──┆──────────|───────────|──────────────┆──────|─────|─────|
//! 0     1     2     3   ⅔ of the new gap remain               none   at once
//! ```
//!
//! Slot k of a constant segment is due at start + k × gap, computed from the segment's start, so
//! that errors cannot add up. What the policy withholds, the slots of the base rate that are not
//! slots of the current one, is counted beside it.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::units::{JobsPerMinute, Share};

const MINUTE_NANOS: u128 = 60_000_000_000;

/// Decides when jobs are due at a rate that changes.
#[derive(Debug)]
pub(crate) struct Pacer {
    /// The part of a gap before the first slot.
    phase: Share,
    base: JobsPerMinute,
    /// `None` at rate 0.
    segment: Option<PacedSegment>,
    withheld: WithheldSlots,
}

/// Slots at a constant rate, of which `taken` are used.
#[derive(Debug, Clone, Copy)]
struct PacedSegment {
    start: Instant,
    rate: JobsPerMinute,
    taken: u64,
}

/// The integral of (base − current) over time, from which whole slots are taken.
#[derive(Debug, Default)]
struct WithheldSlots {
    counted_until: Option<Instant>,
    /// In jobs per minute × nanoseconds, less than one slot's worth.
    rest: u128,
}

/// The slots that have become due.
#[derive(Debug)]
#[must_use = "slots that are not accounted for are lost"]
pub(crate) struct Due {
    segment: Option<PacedSegment>,
    slots: Range<u64>,
    /// Slots so late that sending them would be a burst.
    pub overdue: u64,
    /// Slots of the base rate that the policy withheld.
    pub withheld: u64,
}

impl Due {
    /// The instants of the slots to send now, oldest first.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Instant> + use<> {
        let slots = self.slots.clone();
        self.segment
            .into_iter()
            .flat_map(move |segment| slots.clone().map(move |k| segment.due(k)))
    }
}

impl Due {
    fn withhold_slots(&mut self) {
        self.withheld += self.slots.end - self.slots.start;
        self.slots.start = self.slots.end;
    }
}

impl Pacer {
    /// How many slots are taken together at most. After a stall, jobs that all leave at once would
    /// each need a connection of their own, while a few at a time take turns on the same ones. It is
    /// more than the highest rate has in half a millisecond, so it never holds up a steady run.
    pub(crate) const AT_ONCE: u64 = 64;

    /// The longest delay of the first slot.
    const MAX_PHASE: Duration = Duration::from_secs(1);

    /// Nothing is due, and nothing counted as withheld, before the first [`Self::change`]. Where there
    /// was no rate, the first slot waits for `phase` of a gap, at most of a second: pacers that begin
    /// together need not stay in step.
    #[must_use]
    pub(crate) fn new(phase: Share) -> Self {
        Self {
            phase,
            base: JobsPerMinute::ZERO,
            segment: None,
            withheld: WithheldSlots::default(),
        }
    }

    /// The current rate.
    #[must_use]
    pub(crate) fn rate(&self) -> JobsPerMinute {
        self.segment
            .map_or(JobsPerMinute::ZERO, |segment| segment.rate)
    }

    /// When the next job is due; `None` at rate 0.
    #[must_use]
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.segment.map(|segment| segment.due(segment.taken))
    }

    /// Takes what is due at `now`, at most [`Self::AT_ONCE`] slots: what more is due stays so. Late
    /// slots are due at once, but never more than one second's worth: a machine that slept must not
    /// burst.
    pub(crate) fn advance(&mut self, now: Instant) -> Due {
        self.take(now, u64::MAX, Self::AT_ONCE)
    }

    /// Takes all that is due at `now`, the end of a run, which must leave nothing behind: beyond
    /// [`Self::AT_ONCE`] slots, late ones are overdue.
    pub(crate) fn finish(&mut self, now: Instant) -> Due {
        self.take(now, Self::AT_ONCE, u64::MAX)
    }

    fn take(&mut self, now: Instant, late_at_most: u64, at_most: u64) -> Due {
        let withheld_rate = self.base.get().saturating_sub(self.rate().get());
        let withheld = self.withheld.count(withheld_rate, now);
        let Some(segment) = &mut self.segment else {
            return Due {
                segment: None,
                slots: 0..0,
                overdue: 0,
                withheld,
            };
        };
        let end = segment.due_until(now).max(segment.taken);
        let second_worth = u64::from(segment.rate.get().div_ceil(60));
        let late_at_most = second_worth.min(late_at_most);
        let begin = segment.taken.max(end.saturating_sub(late_at_most));
        let overdue = begin - segment.taken;
        let end = end.min(begin.saturating_add(at_most));
        segment.taken = end;
        Due {
            segment: Some(*segment),
            slots: begin..end,
            overdue,
            withheld,
        }
    }

    /// Takes what is due at `now`, then goes on at `rate`, with the slots of `base`: of the gap in progress the part that
    /// has passed stays passed. From 0, the first slot is due at the phase; to 0, what is due just now is
    /// withheld, for nothing is sent at rate 0.
    pub(crate) fn change(&mut self, now: Instant, base: JobsPerMinute, rate: JobsPerMinute) -> Due {
        let mut due = self.take(now, u64::MAX, u64::MAX);
        if rate == JobsPerMinute::ZERO {
            due.withhold_slots();
        }
        self.base = base;
        self.withheld.counted_until.get_or_insert(now);
        let start = match self.segment {
            _ if rate == JobsPerMinute::ZERO => None,
            None => Some(now + self.wait(rate)),
            Some(old) => {
                let remaining = old.due(old.taken).saturating_duration_since(now).as_nanos();
                let rescaled =
                    (remaining * u128::from(old.rate.get())).div_ceil(u128::from(rate.get()));
                Some(now + nanos(rescaled))
            }
        };
        self.segment = start.map(|start| PacedSegment {
            start,
            rate,
            taken: 0,
        });
        due
    }
}

impl Pacer {
    fn wait(&self, rate: JobsPerMinute) -> Duration {
        let gap = nanos(MINUTE_NANOS / u128::from(rate.get().max(1)));
        gap.min(Self::MAX_PHASE).mul_f64(self.phase.get())
    }
}

impl PacedSegment {
    /// When slot `k` is due; rounded up, so that no slot is early.
    fn due(&self, k: u64) -> Instant {
        self.start + nanos((u128::from(k) * MINUTE_NANOS).div_ceil(u128::from(self.rate.get())))
    }

    /// How many slots are due at `now`.
    fn due_until(&self, now: Instant) -> u64 {
        now.checked_duration_since(self.start).map_or(0, |passed| {
            let whole_gaps = passed.as_nanos() * u128::from(self.rate.get()) / MINUTE_NANOS;
            u64::try_from(whole_gaps).map_or(u64::MAX, |gaps| gaps + 1)
        })
    }
}

impl WithheldSlots {
    fn count(&mut self, rate: u32, now: Instant) -> u64 {
        let Some(until) = self.counted_until else {
            return 0;
        };
        self.rest += now.saturating_duration_since(until).as_nanos() * u128::from(rate);
        self.counted_until = Some(now.max(until));
        let whole = self.rest / MINUTE_NANOS;
        self.rest %= MINUTE_NANOS;
        u64::try_from(whole).unwrap_or(u64::MAX)
    }
}

fn nanos(nanos: u128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn jobs(rate: u32) -> JobsPerMinute {
        JobsPerMinute::new(rate)
    }

    /// The milliseconds after `start` at which slots were due, and the two counts.
    fn millis(due: &Due, start: Instant) -> (Vec<u128>, u64, u64) {
        let slots = due.slots().map(|slot| (slot - start).as_millis()).collect();
        (slots, due.overdue, due.withheld)
    }

    struct PacedRun {
        base: JobsPerMinute,
        pacer: Pacer,
        start: Instant,
    }

    impl PacedRun {
        fn new(base: u32) -> Self {
            Self {
                base: jobs(base),
                pacer: Pacer::new(Share::NOTHING),
                start: Instant::now(),
            }
        }

        fn change(&mut self, at_ms: u64, rate: u32) -> (Vec<u128>, u64, u64) {
            let at = self.start + Duration::from_millis(at_ms);
            millis(&self.pacer.change(at, self.base, jobs(rate)), self.start)
        }

        fn advance(&mut self, at_ms: u64) -> (Vec<u128>, u64, u64) {
            millis(
                &self
                    .pacer
                    .advance(self.start + Duration::from_millis(at_ms)),
                self.start,
            )
        }

        fn next_ms(&self) -> Option<u128> {
            self.pacer
                .next_due()
                .map(|due| (due - self.start).as_millis())
        }
    }

    #[test]
    fn nothing_is_due_or_withheld_before_the_first_rate() {
        let mut run = PacedRun::new(60);
        assert_eq!(run.advance(10_000), (vec![], 0, 0));
        assert_eq!(run.next_ms(), None);
        assert_eq!(run.change(10_000, 60), (vec![], 0, 0));
        assert_eq!(run.next_ms(), Some(10_000));
    }

    #[test]
    fn slots_are_evenly_spaced_from_the_start() {
        let mut run = PacedRun::new(60);
        let _ = run.change(0, 60);
        assert_eq!(run.advance(999), (vec![0], 0, 0));
        assert_eq!(run.advance(1000), (vec![1000], 0, 0));
        assert_eq!(run.advance(1000), (vec![], 0, 0));
        assert_eq!(run.next_ms(), Some(2000));
    }

    #[test]
    fn a_new_rate_keeps_the_part_of_the_gap_that_has_passed() {
        for (rate, next) in [(30, 1750), (120, 625), (60, 1000), (6, 7750)] {
            let mut run = PacedRun::new(120);
            let _ = run.change(0, 60);
            assert_eq!(run.change(250, rate).0, vec![0]);
            assert_eq!(run.next_ms(), Some(next), "to {rate}");
        }
    }

    #[test]
    fn several_changes_within_one_gap_keep_all_that_has_passed() {
        let mut run = PacedRun::new(60);
        let _ = run.change(0, 60);
        let _ = run.change(500, 30);
        assert_eq!(run.next_ms(), Some(1500));
        let _ = run.change(1000, 60);
        assert_eq!(run.next_ms(), Some(1250));
    }

    #[test]
    fn zero_sends_nothing_and_its_end_sends_at_once() {
        let mut run = PacedRun::new(60);
        let _ = run.change(0, 60);
        assert_eq!(run.advance(0).0, vec![0]);
        assert_eq!(run.change(1500, 0), (vec![], 0, 1));
        assert_eq!(run.next_ms(), None);
        assert_eq!(run.advance(61_500), (vec![], 0, 60));
        let _ = run.change(61_600, 60);
        assert_eq!(run.next_ms(), Some(61_600));
    }

    #[test]
    fn a_late_wake_sends_one_seconds_worth_and_drops_the_rest() {
        let mut run = PacedRun::new(600);
        let _ = run.change(0, 600);
        let (slots, overdue, _) = run.advance(10_000);
        assert_eq!(slots.len(), 10);
        assert_eq!((slots[0], slots[9], overdue), (9100, 10_000, 91));
    }

    #[test]
    fn a_phase_is_a_part_of_a_gap_but_never_over_a_second() {
        let start = Instant::now();
        for (rate, wait_ms) in [(60, 250), (600, 25), (6, 250)] {
            let mut pacer = Pacer::new(Share::new(0.25));
            let _ = pacer.change(start, jobs(60), jobs(rate));
            let due = pacer.next_due().map(|due| (due - start).as_millis());
            assert_eq!(due, Some(wait_ms), "{rate}");
            let _ = pacer.change(start + Duration::from_secs(3), jobs(60), jobs(0));
            let _ = pacer.change(start + Duration::from_secs(5), jobs(60), jobs(rate));
            let due = pacer.next_due().map(|due| (due - start).as_millis());
            assert_eq!(due, Some(5000 + wait_ms), "{rate} again");
        }
    }

    #[test]
    fn many_late_slots_are_taken_a_few_at_a_time() {
        let mut run = PacedRun::new(60_000);
        let _ = run.change(0, 60_000);
        let (slots, overdue, _) = run.advance(99);
        assert_eq!((slots.len(), overdue), (64, 0));
        assert_eq!(run.next_ms(), Some(64));
        assert_eq!(run.advance(99).0.len(), 36);
        assert_eq!(run.next_ms(), Some(100));
    }

    #[test]
    fn withheld_slots_are_the_difference_to_the_base_rate() {
        let mut run = PacedRun::new(60);
        let _ = run.change(0, 30);
        assert_eq!(run.advance(1999).2, 0);
        assert_eq!(run.advance(2000).2, 1);
        assert_eq!(run.change(62_000, 6).2, 30);
        assert_eq!(run.change(122_000, 60).2, 54);
        assert_eq!(run.advance(182_000).2, 0);
    }

    proptest! {
        /// Wakes and rate changes at any instants: no slot is early, none is forgotten, none is
        /// taken twice, and no window holds more than its rate allows.
        #[test]
        fn any_run_keeps_the_laws_of_pacing(
            base in 1..=6_000_000_u32,
            phase in 0.0..=1.0_f64,
            steps in prop::collection::vec((1..2_000_000_000_u64, prop::option::of(0..=100_u8)), 1..60),
        ) {
            let start = Instant::now();
            let mut pacer = Pacer::new(Share::new(phase));
            let mut now = start;
            let mut rate = jobs(base);
            let mut changes = 1_u64;
            let (mut taken, mut overdue, mut withheld) = (0_u64, 0, 0);
            let mut owed = 0.0_f64;
            let mut last_slot = None;
            let _ = pacer.change(now, jobs(base), rate);
            for (step_nanos, share) in steps {
                // Long runs at high rates would take long to walk through: as many slots a step.
                let step = Duration::from_nanos(step_nanos.min(200 * 60_000_000_000 / u64::from(base)));
                now += step;
                owed += step.as_secs_f64() * f64::from(rate.get()) / 60.0;
                let due = match share {
                    None => pacer.finish(now),
                    Some(share) => {
                        changes += 1;
                        let due = pacer.change(now, jobs(base), jobs(base).share(Share::new(f64::from(share) / 100.0)));
                        rate = jobs(base).share(Share::new(f64::from(share) / 100.0));
                        due
                    }
                };
                for slot in due.slots() {
                    prop_assert!(slot <= now, "early");
                    prop_assert!(last_slot.is_none_or(|last| last <= slot), "out of order");
                    last_slot = Some(slot);
                    taken += 1;
                }
                overdue += due.overdue;
                withheld += due.withheld;
                if rate == JobsPerMinute::ZERO {
                    // What was due just then is withheld, which the law below counts.
                    owed = (taken + overdue) as f64;
                }
                let slack = changes as f64;
                prop_assert!(((taken + overdue) as f64) <= owed + slack + 1e-6, "too many");
                prop_assert!(((taken + overdue) as f64) >= owed - slack - 1e-6, "forgotten");
            }
            let base_slots = (now - start).as_secs_f64() * f64::from(base) / 60.0;
            let all = (taken + overdue + withheld) as f64;
            prop_assert!((all - base_slots).abs() <= changes as f64 + 1.0, "{} of {}", all, base_slots);
        }

        /// At a constant rate the gap between any two slots is that of the rate, to a nanosecond.
        #[test]
        fn constant_slots_keep_their_distance(rate in 1..=6_000_000_u32, wakes in prop::collection::vec(1..5_u32, 1..50)) {
            let start = Instant::now();
            let mut pacer = Pacer::new(Share::NOTHING);
            let _ = pacer.change(start, jobs(rate), jobs(rate));
            let gap = 60e9 / f64::from(rate);
            let mut k = 0_u32;
            let mut now = start;
            for wake in wakes {
                now += Duration::from_secs_f64(gap * f64::from(wake) / 2e9);
                let due = pacer.advance(now);
                k += u32::try_from(due.overdue).unwrap();
                for slot in due.slots() {
                    let ideal = gap * f64::from(k);
                    prop_assert!(((slot - start).as_nanos() as f64 - ideal).abs() <= 1.0 + ideal * 1e-12);
                    k += 1;
                }
            }
        }
    }
}
