//! When the GPU was up, down or unobserved, and from that the uptime of any window.
//!
//! Times are durations since the agent's first start, so that a jump of the wall clock can neither
//! create nor destroy uptime. A state holds from the check that found it until the next check, unless
//! that comes too late: then the time is unobserved, and unobserved time counts as down.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::Percent;

/// What is younger is not compacted.
const KEPT_WHOLE: Duration = Duration::from_hours(24);
/// How many times the transitions to be kept are too many in that time.
const FLAPPING: usize = 20;
/// No history is longer, nor has more checks.
const LONGEST: Duration = Duration::from_hours(200 * 366 * 24);
const MOST_CHECKS: u64 = 1 << 50;

/// The state of the GPUs over a segment of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuState {
    /// Enough GPUs were seen healthy.
    Up,
    /// They were seen not to be.
    Down,
    Unwatched,
}

/// The history of one agent's GPUs. Its form in JSON is what a checkpoint keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    #[serde(rename = "folded")]
    compacted: Compacted,
    #[serde(rename = "spans")]
    segments: VecDeque<Segment>,
    /// What the last check found; holds until the next.
    seen: Option<GpuState>,
    /// When that was: nothing is known after it.
    watched_until: Duration,
}

/// Everything before the first segment, of which only the sum is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Compacted {
    until: Duration,
    up: Duration,
    checks: u64,
    available: u64,
}

/// A period of one state, from the end of the previous one. A day of steady uptime is one segment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Segment {
    until: Duration,
    state: GpuState,
    checks: u64,
}

/// The uptime of a window.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Window {
    pub length: Duration,
    /// The part in which the GPUs were healthy.
    pub up: Duration,
    /// Checks in it.
    pub checks_total: u64,
    /// Of these, those that found the GPUs healthy.
    pub checks_available: u64,
}

impl Window {
    /// The share that was up; 0 for a window of no length.
    #[must_use]
    pub fn uptime(&self) -> Percent {
        if self.length.is_zero() {
            return Percent::ZERO;
        }
        let share = self.up.as_secs_f64() / self.length.as_secs_f64() * 100.0;
        Percent::new(share.min(100.0)).unwrap_or(Percent::ZERO)
    }
}

/// A ledger that contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the history's times are not in order, or its counts are beyond belief")]
pub struct OutOfOrder;

impl Default for Ledger {
    fn default() -> Self {
        Self {
            compacted: Compacted::default(),
            segments: VecDeque::new(),
            seen: None,
            watched_until: Duration::ZERO,
        }
    }
}

impl Ledger {
    /// Until when something is known.
    #[must_use]
    pub fn watched_until(&self) -> Duration {
        self.watched_until
    }

    #[cfg(test)]
    fn transitions(&self) -> usize {
        self.segments.len()
    }

    /// What the last check saw.
    #[must_use]
    pub fn seen(&self) -> Option<GpuState> {
        self.seen
    }

    /// A check at `at` saw `state`. After more than `longest_gap` since the last one, the time
    /// between was unwatched. Keeps at most `max_transitions` segments, the oldest are folded into a
    /// sum. Returns whether the state is another than before.
    pub fn observe(
        &mut self,
        at: Duration,
        state: GpuState,
        longest_gap: Duration,
        max_transitions: usize,
    ) -> bool {
        let at = at.max(self.watched_until);
        let between = self.state_until(at, longest_gap);
        self.extend(at, between, u64::from(self.seen.is_some()));
        self.watched_until = at;
        let changed = self.seen != Some(state);
        self.seen = Some(state);
        while self.segments.len() > max_transitions.max(1) && self.may_compact(at, max_transitions)
        {
            self.compact_oldest();
        }
        changed
    }

    /// A day is kept as it was, unless the driver flaps beyond reason: of what is compacted only the mean is known.
    fn may_compact(&self, now: Duration, max_transitions: usize) -> bool {
        let oldest = self.segments.front().map_or(now, |oldest| oldest.until);
        now.saturating_sub(oldest) > KEPT_WHOLE
            || self.segments.len() > max_transitions.saturating_mul(FLAPPING)
    }

    /// The machine was suspended for the last `suspended` until `at`, which is unwatched time however short. What the
    /// last check saw holds before and after it.
    pub fn suspend(&mut self, suspended: Duration, at: Duration, longest_gap: Duration) {
        let at = at.max(self.watched_until);
        let awake_until = at.saturating_sub(suspended).max(self.watched_until);
        let between = self.state_until(at, longest_gap);
        self.extend(awake_until, between, 0);
        self.watched_until = awake_until;
        self.extend(at, GpuState::Unwatched, 0);
        self.watched_until = at;
    }

    /// Checks that the stretch which still goes on has seen.
    #[must_use]
    pub fn checks_so_far(&self) -> u64 {
        match self.segments.back() {
            Some(last) if self.seen == Some(last.state) => last.checks,
            _ => 0,
        }
    }

    /// What the last check saw held until `at`, which `checks` confirmed.
    pub fn continue_until(&mut self, at: Duration, checks: u64) {
        let (Some(state), true) = (self.seen, at > self.watched_until) else {
            return;
        };
        let more = checks.saturating_sub(self.checks_so_far());
        self.extend(at, state, more);
        self.watched_until = at;
    }

    /// The agent was not running until `at`: all since the last check is unwatched, what it saw
    /// holds no more.
    pub fn resume(&mut self, at: Duration) {
        let at = at.max(self.watched_until);
        self.extend(at, GpuState::Unwatched, 0);
        self.watched_until = at;
        self.seen = None;
    }

    /// The window of this length that ends at `to`. Time before the agent's first start is
    /// unwatched.
    #[must_use]
    pub fn window(&self, length: Duration, to: Duration, longest_gap: Duration) -> Window {
        let from = to.saturating_sub(length);
        let mut window = Window {
            length,
            ..Window::default()
        };
        window.add_compacted(self.compacted, from, to);
        let mut begin = self.compacted.until;
        for segment in &self.segments {
            window.add(segment.state, begin, *segment, from, to);
            begin = segment.until;
        }
        // What the last check saw holds until now, unless the next one is overdue.
        let open = Segment {
            until: to,
            state: GpuState::Unwatched,
            checks: 1,
        };
        if self.seen.is_some() {
            window.add(self.state_until(to, longest_gap), begin, open, from, to);
        }
        window
    }

    /// Checks the times and counts, which may be anything in a checkpoint of unknown origin.
    ///
    /// # Errors
    /// When times are not in order, or beyond what any agent lives through.
    pub fn check_order(&self) -> Result<(), OutOfOrder> {
        let ends = self.segments.iter().map(|segment| segment.until);
        let all: Vec<Duration> = std::iter::once(self.compacted.until).chain(ends).collect();
        let in_order = all.is_sorted()
            && self.compacted.up <= self.compacted.until
            && all.last() == Some(&self.watched_until)
            && self.watched_until <= LONGEST
            && self.compacted.available <= self.compacted.checks
            && self.compacted.checks <= MOST_CHECKS
            && self
                .segments
                .iter()
                .all(|segment| segment.checks <= MOST_CHECKS);
        in_order.then_some(()).ok_or(OutOfOrder)
    }

    fn state_until(&self, to: Duration, longest_gap: Duration) -> GpuState {
        match self.seen {
            Some(state) if to.saturating_sub(self.watched_until) <= longest_gap => state,
            _ => GpuState::Unwatched,
        }
    }

    fn extend(&mut self, until: Duration, state: GpuState, checks: u64) {
        match self.segments.back_mut() {
            Some(last) if last.state == state => {
                last.until = until;
                last.checks += checks;
            }
            _ if until > self.watched_until || checks > 0 => {
                self.segments.push_back(Segment {
                    until,
                    state,
                    checks,
                });
            }
            _ => {}
        }
    }

    fn compact_oldest(&mut self) {
        let Some(oldest) = self.segments.pop_front() else {
            return;
        };
        if oldest.state == GpuState::Up {
            self.compacted.up += oldest.until.saturating_sub(self.compacted.until);
            self.compacted.available += oldest.checks;
        }
        self.compacted.checks += oldest.checks;
        self.compacted.until = oldest.until;
    }
}

impl Window {
    /// Adds the part of a segment, which began at `begin`, that lies between `from` and `to`.
    fn add(
        &mut self,
        state: GpuState,
        begin: Duration,
        segment: Segment,
        from: Duration,
        to: Duration,
    ) {
        let part = segment.until.min(to).saturating_sub(begin.max(from));
        let checks = share_of(segment.checks, part, segment.until.saturating_sub(begin));
        self.checks_total += checks;
        if state == GpuState::Up {
            self.up += part;
            self.checks_available += checks;
        }
    }

    /// Of what is folded only the sum is known: its uptime counts as evenly spread.
    fn add_compacted(&mut self, folded: Compacted, from: Duration, to: Duration) {
        let part = folded.until.min(to).saturating_sub(from);
        if !part.is_zero() {
            let share = part.as_secs_f64() / folded.until.as_secs_f64();
            self.up += folded.up.mul_f64(share).min(part);
            self.checks_total += share_of(folded.checks, part, folded.until);
            self.checks_available += share_of(folded.available, part, folded.until);
        }
    }
}

/// The share of a count that falls to a part of its time, rounded.
fn share_of(count: u64, part: Duration, whole: Duration) -> u64 {
    let (part, whole) = (part.as_nanos(), whole.as_nanos());
    if whole == 0 {
        return count;
    }
    let share = (u128::from(count) * part + whole / 2) / whole;
    u64::try_from(share).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GAP: Duration = Duration::from_secs(10);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn percent(ledger: &Ledger, length: u64, to: u64) -> f64 {
        ledger.window(s(length), s(to), GAP).uptime().get()
    }

    /// Checks every five seconds, `script` being (state, checks).
    fn checked(script: &[(GpuState, u64)], max_transitions: usize) -> (Ledger, u64) {
        let mut ledger = Ledger::default();
        let mut at = 0;
        for &(state, checks) in script {
            for _ in 0..checks {
                ledger.observe(s(at), state, GAP, max_transitions);
                at += 5;
            }
        }
        (ledger, at)
    }

    #[test]
    fn a_state_holds_until_the_next_check_says_otherwise() {
        let (ledger, end) = checked(
            &[
                (GpuState::Up, 10),
                (GpuState::Down, 2),
                (GpuState::Up, 10),
                (GpuState::Down, 2),
            ],
            100,
        );
        assert_eq!(end, 120);
        let window = ledger.window(s(120), s(120), GAP);
        assert_eq!(window.up, s(100));
        assert_eq!((window.checks_total, window.checks_available), (24, 20));
        assert_eq!(percent(&ledger, 50, 50), 100.0);
        assert_eq!(percent(&ledger, 10, 60), 0.0);
        assert_eq!(percent(&ledger, 20, 60), 50.0);
    }

    #[test]
    fn a_day_of_steady_uptime_is_one_span() {
        let (ledger, end) = checked(&[(GpuState::Up, 17_280)], 100);
        assert_eq!((ledger.transitions(), end), (1, 86_400));
        assert_eq!(percent(&ledger, 86_400, 86_400), 100.0);
    }

    #[test]
    fn a_gap_between_checks_is_unwatched_and_counts_as_down() {
        let mut ledger = Ledger::default();
        ledger.observe(s(0), GpuState::Up, GAP, 100);
        ledger.observe(s(10), GpuState::Up, GAP, 100);
        ledger.observe(s(21), GpuState::Up, GAP, 100);
        ledger.observe(s(25), GpuState::Up, GAP, 100);
        assert_eq!(ledger.window(s(25), s(25), GAP).up, s(14));
        assert_eq!(ledger.window(s(30), s(30), GAP).up, s(19));
        assert_eq!(
            ledger.window(s(36), s(36), GAP).up,
            s(14),
            "the next check is overdue"
        );
    }

    #[test]
    fn time_when_the_agent_did_not_run_is_unwatched() {
        let (mut ledger, _) = checked(&[(GpuState::Up, 11)], 100);
        ledger.resume(s(100));
        assert_eq!(percent(&ledger, 100, 100), 50.0);
        ledger.observe(s(100), GpuState::Up, GAP, 100);
        ledger.observe(s(110), GpuState::Up, GAP, 100);
        assert_eq!(ledger.window(s(110), s(110), GAP).up, s(60));
    }

    #[test]
    fn time_before_the_first_start_is_unwatched() {
        let (ledger, _) = checked(&[(GpuState::Up, 11)], 100);
        assert_eq!(percent(&ledger, 200, 50), 25.0);
    }

    #[test]
    fn a_window_of_no_length_has_no_uptime() {
        assert_eq!(percent(&Ledger::default(), 0, 0), 0.0);
        assert_eq!(percent(&Ledger::default(), 10, 10), 0.0);
    }

    #[test]
    fn a_clock_that_runs_back_changes_nothing() {
        let (mut ledger, _) = checked(&[(GpuState::Up, 11)], 100);
        ledger.observe(s(20), GpuState::Down, GAP, 100);
        assert_eq!(ledger.window(s(50), s(50), GAP).up, s(50));
        assert_eq!(ledger.check_order(), Ok(()));
    }

    #[test]
    fn a_ledger_out_of_order_is_told() {
        let (mut ledger, _) = checked(&[(GpuState::Up, 3), (GpuState::Down, 3)], 100);
        ledger.segments[0].until = s(1000);
        assert_eq!(ledger.check_order(), Err(OutOfOrder));
    }

    prop_compose! {
        fn any_ledger()(
            checks in prop::collection::vec((1..20_000_u64, any::<bool>(), prop::bool::weighted(0.05)), 1..120),
            max_transitions in 1..200_usize,
        ) -> (Ledger, Duration, Duration) {
            let mut ledger = Ledger::default();
            let mut at = Duration::ZERO;
            let mut up = Duration::ZERO;
            let mut last = None;
            for (milliseconds, is_up, restart) in checks {
                let step = Duration::from_millis(milliseconds);
                at += step;
                if restart {
                    ledger.resume(at);
                    last = None;
                }
                if last == Some(GpuState::Up) && step <= GAP {
                    up += step;
                }
                let state = if is_up { GpuState::Up } else { GpuState::Down };
                ledger.observe(at, state, GAP, max_transitions);
                last = Some(state);
            }
            (ledger, at, up)
        }
    }

    proptest! {
        /// Cut a history into windows anywhere: their up-times add up to the whole's.
        #[test]
        fn windows_add_up_to_the_whole(
            (ledger, end, up) in any_ledger(), cuts in prop::collection::vec(0.0..1.0_f64, 0..20),
        ) {
            let whole = ledger.window(end, end, GAP);
            prop_assert!(whole.up.abs_diff(up) < Duration::from_micros(1));
            let mut cuts: Vec<Duration> = cuts.into_iter().map(|cut| end.mul_f64(cut)).collect();
            cuts.extend([Duration::ZERO, end]);
            cuts.sort_unstable();
            let mut sum = Duration::ZERO;
            for pair in cuts.windows(2) {
                let window = ledger.window(pair[1] - pair[0], pair[1], GAP);
                prop_assert!(window.up <= window.length + Duration::from_micros(1));
                prop_assert!(window.checks_available <= window.checks_total);
                sum += window.up;
            }
            prop_assert!(sum.abs_diff(whole.up) < Duration::from_micros(1), "{sum:?} {whole:?}");
        }

        /// What is written can be read again, is in order, and says the same.
        #[test]
        fn a_checkpoint_keeps_everything((ledger, _, _) in any_ledger()) {
            let json = serde_json::to_vec(&ledger).unwrap();
            let read: Ledger = serde_json::from_slice(&json).unwrap();
            prop_assert_eq!(read.check_order(), Ok(()));
            prop_assert_eq!(read, ledger);
        }

        #[test]
        fn history_is_bounded((ledger, _, _) in any_ledger(), max in 1..10_usize) {
            let mut bounded = ledger;
            let at = bounded.watched_until();
            bounded.observe(at, GpuState::Up, GAP, max);
            prop_assert!(bounded.transitions() <= max * FLAPPING);
            // What is older than a day is not kept as it was.
            bounded.observe(at + KEPT_WHOLE * 2, GpuState::Up, GAP, max);
            prop_assert!(bounded.transitions() <= max.max(2));
        }
    }
}
