//! Whether a `no_supply` is evidence against the agent that the job was tied to (`.github/docs/money.md`).
//!
//! A gateway says that there is no supply where the orchestrator is gone, and where it has no place free. The second is
//! nobody's fault. So a refusal counts against the agent only if fewer jobs were in flight at that orchestrator than it has
//! ever done successfully at once. Jobs that were refused themselves hold no place, which is known only when they end: a
//! refusal is judged once the jobs that were sent before it have ended.
//!
//! On the wire a job seems to take longer than it holds its place, and its successor may get the place before its answer
//! arrives. So jobs are known to have been done at once only while each was in the first quarter of its time.

use std::collections::VecDeque;
use std::time::Instant;

use crate::wire::outcome::Outcome;

/// The part of a successful job's time in which it surely held its place, as a divisor.
const SURE_PART: u32 = 4;
/// Jobs sent so shortly after a refused one may have taken the place before it.
const RACING_SENDS: u64 = 16;
/// The jobs that are remembered. If one of them is still in flight when it is forgotten, it counts as holding a place.
const MAX_REMEMBERED: usize = 4096;

/// A job's number, in the order of sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SentJob(u64);

/// The jobs that an agent had in flight at one orchestrator.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    /// The oldest job that is remembered.
    first: u64,
    remembered: VecDeque<Remembered>,
    in_flight: u32,
    /// Jobs in flight that are not remembered any more.
    forgotten: u32,
    /// What the next job's `corrections` begin with.
    next_corrections: Corrections,
    /// The sum of the corrections of all jobs before `first`.
    corrections: Corrections,
    /// The most jobs that are known to have succeeded at once.
    succeeded_at_once: u32,
    /// Refusals that wait for jobs in flight, in the order of sending.
    waiting: VecDeque<Waiting>,
}

/// The moment at which a job was sent.
#[derive(Debug)]
struct Remembered {
    sent_at: Instant,
    has_ended: bool,
    /// The jobs in flight just after it was sent, itself included.
    in_flight: u32,
    /// What to add to those of the job before.
    corrections: Corrections,
    /// Set once it was refused: the last job that was sent before that.
    refused_before: Option<u64>,
}

/// How many of the jobs in flight at a moment do not count, as turned out later: the change from one job to the next.
#[derive(Debug, Clone, Copy, Default)]
struct Corrections {
    /// They held no place.
    refused: i64,
    /// They did not surely hold one and succeed.
    unsure: i64,
}

impl Corrections {
    fn add(&mut self, other: Self, sign: i64) {
        self.refused += sign * other.refused;
        self.unsure += sign * other.unsure;
    }
}

#[derive(Debug)]
struct Waiting {
    /// The last job whose moment is looked at.
    until: u64,
    /// The most jobs that held a place, in the moments looked at so far.
    held: i64,
}

impl Refusals {
    /// Takes in that a job is sent; no job was sent later than `now`.
    pub(crate) fn sent(&mut self, now: Instant) -> SentJob {
        let number = self.first + self.remembered.len() as u64;
        self.in_flight += 1;
        self.remembered.push_back(Remembered {
            sent_at: now,
            has_ended: false,
            in_flight: self.in_flight,
            corrections: std::mem::take(&mut self.next_corrections),
            refused_before: None,
        });
        SentJob(number)
    }

    /// Takes in how a job ended, and returns how many refusals turn out to be evidence against the agent.
    pub(crate) fn ended(
        &mut self,
        SentJob(number): SentJob,
        outcome: Outcome,
        now: Instant,
    ) -> u64 {
        let refused = outcome == Outcome::NoSupply;
        let corrections = Corrections {
            refused: i64::from(refused),
            unsure: 1,
        };
        self.in_flight -= 1;
        let last = self.first + self.remembered.len() as u64 - 1;
        if let Some(index) = number.checked_sub(self.first) {
            let index = usize::try_from(index).expect("at most as many as are remembered");
            let job = &mut self.remembered[index];
            job.has_ended = true;
            job.refused_before = refused.then_some(last);
            let from = if outcome == Outcome::Success {
                let time = now.saturating_duration_since(job.sent_at);
                let sure_until = job.sent_at + time / SURE_PART;
                self.remembered
                    .partition_point(|job| job.sent_at <= sure_until)
            } else {
                index
            };
            self.correct(from, corrections);
        } else {
            self.forgotten -= 1;
            self.corrections.add(corrections, 1);
            self.next_corrections.add(corrections, -1);
        }
        self.look_at_ended()
    }

    /// Corrects the moments from a remembered one to the last one, at which a job was in flight.
    fn correct(&mut self, from: usize, corrections: Corrections) {
        if let Some(first) = self.remembered.get_mut(from) {
            first.corrections.add(corrections, 1);
            self.next_corrections.add(corrections, -1);
        }
    }

    /// Looks at the moments of which all is known.
    fn look_at_ended(&mut self) -> u64 {
        let mut against = 0;
        while let Some(oldest) = self.remembered.front() {
            let is_full = self.remembered.len() > MAX_REMEMBERED;
            if !oldest.has_ended && !is_full {
                break;
            }
            if let Some(oldest) = self.remembered.pop_front() {
                against += self.look_at(&oldest);
            }
        }
        if self.remembered.is_empty() {
            // No refusal can be contradicted by a later job any more.
            against += self.judge_waiting(u64::MAX);
        }
        against
    }

    fn look_at(&mut self, moment: &Remembered) -> u64 {
        let number = self.first;
        self.first += 1;
        self.forgotten += u32::from(!moment.has_ended);
        self.corrections.add(moment.corrections, 1);
        let in_flight = i64::from(moment.in_flight);
        let succeeded = in_flight - self.corrections.unsure - i64::from(self.forgotten);
        self.succeeded_at_once = self
            .succeeded_at_once
            .max(u32::try_from(succeeded).unwrap_or(0));
        if let Some(last) = moment.refused_before {
            let until = last.min(number + RACING_SENDS);
            self.waiting.push_back(Waiting { until, held: 0 });
        }
        let held = in_flight - self.corrections.refused;
        for refusal in &mut self.waiting {
            refusal.held = refusal.held.max(held);
        }
        self.judge_waiting(number)
    }

    /// Judges the refusals that no job after `number` can concern.
    fn judge_waiting(&mut self, number: u64) -> u64 {
        let had = self.succeeded_at_once.into();
        let mut against = 0;
        self.waiting.retain(|refusal| {
            let is_open = refusal.until > number;
            against += u64::from(!is_open && refusal.held < had);
            is_open
        });
        against
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    /// A job that has ended, at times in milliseconds.
    struct Ended {
        job: u64,
        sent_at: u64,
        ended_at: u64,
        /// The last job that was sent before its end.
        last: u64,
        outcome: Outcome,
    }

    /// The refusals that are evidence, by the definition; `sent_at` are the times of all jobs.
    fn by_definition(sent_at: &[u64], ended: &[Ended]) -> u64 {
        let in_flight = |at: u64| ended.iter().filter(move |e| e.job <= at && at <= e.last);
        let held = |at| {
            in_flight(at)
                .filter(|e| e.outcome != Outcome::NoSupply)
                .count()
        };
        let is_sure = |e: &&Ended, at: u64| {
            let passed = sent_at[usize::try_from(at).unwrap()] - e.sent_at;
            e.outcome == Outcome::Success && 4 * passed <= e.ended_at - e.sent_at
        };
        let succeeded = |at| in_flight(at).filter(|e| is_sure(e, at)).count();
        let refusals = ended.iter().filter(|e| e.outcome == Outcome::NoSupply);
        let against = refusals.filter(|e| {
            let until = e.last.min(e.job + RACING_SENDS);
            let most_held = (e.job..=until).map(held).max().unwrap();
            let ever = (0..=until).map(succeeded).max().unwrap();
            most_held < ever
        });
        against.count() as u64
    }

    fn at(milliseconds: u64) -> Instant {
        static BEGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *BEGIN.get_or_init(Instant::now) + Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_worker_that_is_gone_is_told_from_one_without_a_free_place() {
        let mut refusals = Refusals::default();
        // Two at once succeed; a third finds no place.
        let [first, second, third] = [0, 1, 2].map(|ms| refusals.sent(at(ms)));
        assert_eq!(refusals.ended(third, Outcome::NoSupply, at(3)), 0);
        assert_eq!(refusals.ended(first, Outcome::Success, at(100)), 0);
        // The answer to the second is on its way while its successor has its place.
        let fourth = refusals.sent(at(101));
        assert_eq!(refusals.ended(second, Outcome::Success, at(102)), 0);
        assert_eq!(refusals.ended(fourth, Outcome::Success, at(200)), 0);
        assert_eq!(refusals.succeeded_at_once, 2);
        // Nothing is in flight: it is gone.
        let fifth = refusals.sent(at(300));
        assert_eq!(refusals.ended(fifth, Outcome::NoSupply, at(301)), 1);
        // Many slow refusals hold no place.
        let slow: Vec<SentJob> = (0..50).map(|ms| refusals.sent(at(400 + ms))).collect();
        let refused = slow.into_iter();
        let against = refused.map(|job| refusals.ended(job, Outcome::NoSupply, at(1000)));
        assert_eq!(against.sum::<u64>(), 50);
        assert!(refusals.waiting.is_empty() && refusals.remembered.is_empty());
    }

    #[test]
    fn an_orchestrator_that_never_did_a_job_is_not_accused() {
        let mut refusals = Refusals::default();
        for ms in 0..100 {
            let job = refusals.sent(at(ms));
            assert_eq!(refusals.ended(job, Outcome::NoSupply, at(ms)), 0);
        }
    }

    #[test]
    fn a_job_that_never_ends_does_not_fill_the_memory() {
        let mut refusals = Refusals::default();
        let done = refusals.sent(at(0));
        refusals.ended(done, Outcome::Success, at(9));
        let hanging = refusals.sent(at(10));
        let mut against = 0;
        for ms in 0..10 * MAX_REMEMBERED as u64 {
            let job = refusals.sent(at(11 + ms));
            against += refusals.ended(job, Outcome::NoSupply, at(11 + ms));
        }
        assert!(refusals.remembered.len() <= MAX_REMEMBERED + 1);
        assert!(refusals.waiting.len() <= RACING_SENDS as usize);
        // It holds the one place that there is known to be.
        assert_eq!(against, 0);
        refusals.ended(hanging, Outcome::Timeout, at(1_000_000));
        let job = refusals.sent(at(1_000_001));
        assert_eq!(refusals.ended(job, Outcome::NoSupply, at(1_000_002)), 1);
        assert_eq!(refusals.succeeded_at_once, 1);
    }

    proptest! {
        #[test]
        fn each_refusal_is_judged_by_the_definition(
            steps in prop::collection::vec((0..3_u8, 0..1000_usize, 0..3_u8, 0..10_u64), 1..200),
        ) {
            let mut refusals = Refusals::default();
            let mut in_flight: Vec<SentJob> = Vec::new();
            let (mut sent_at, mut ended) = (Vec::new(), Vec::new());
            let (mut now, mut against) = (0, 0);
            let mut end = |refusals: &mut Refusals, job: SentJob, outcome, now, sent_at: &[u64]| {
                ended.push(Ended {
                    job: job.0,
                    sent_at: sent_at[usize::try_from(job.0).unwrap()],
                    ended_at: now,
                    last: sent_at.len() as u64 - 1,
                    outcome,
                });
                refusals.ended(job, outcome, at(now))
            };
            for (step, which, kind, passed) in steps {
                now += passed;
                if step == 0 || in_flight.is_empty() {
                    in_flight.push(refusals.sent(at(now)));
                    sent_at.push(now);
                } else if step == 1 || in_flight.len() > 8 {
                    let job = in_flight.swap_remove(which % in_flight.len());
                    let outcome = [Outcome::NoSupply, Outcome::Success, Outcome::Timeout][usize::from(kind)];
                    against += end(&mut refusals, job, outcome, now, &sent_at);
                }
            }
            for job in in_flight.drain(..) {
                against += end(&mut refusals, job, Outcome::Success, now, &sent_at);
            }
            prop_assert_eq!(refusals.in_flight, 0);
            prop_assert!(refusals.waiting.is_empty());
            prop_assert_eq!(against, by_definition(&sent_at, &ended));
        }
    }
}
