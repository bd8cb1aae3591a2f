//! Whether a `no_supply` is evidence against the agent that the job was tied to (`.github/docs/money.md`).
//!
//! A gateway says that there is no supply where the orchestrator is gone, and where it has no place free. The second is
//! nobody's fault. So a refusal counts against the agent only if fewer jobs were in flight at that orchestrator than it has
//! ever done successfully at once. Jobs that were refused themselves hold no place, which is known only when they end: a
//! refusal is judged once the jobs that were sent before it have ended.

use std::collections::VecDeque;

use crate::wire::outcome::Outcome;

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
    /// The most jobs that ever succeeded at once.
    succeeded_at_once: u32,
    /// Refusals that wait for jobs in flight, in the order of sending.
    waiting: VecDeque<Waiting>,
}

/// The moment at which a job was sent.
#[derive(Debug)]
struct Remembered {
    has_ended: bool,
    /// The jobs in flight just after it was sent, itself included.
    in_flight: u32,
    /// What to add to those of the job before.
    corrections: Corrections,
    /// Set once it was refused: the last job that was sent before that.
    refused_before: Option<u64>,
}

/// How many of the jobs in flight at a moment ended in some way later: counted from one job to the next.
#[derive(Debug, Clone, Copy, Default)]
struct Corrections {
    refused: i64,
    unsuccessful: i64,
}

impl Corrections {
    fn add(&mut self, other: Self, sign: i64) {
        self.refused += sign * other.refused;
        self.unsuccessful += sign * other.unsuccessful;
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
    pub(crate) fn sent(&mut self) -> SentJob {
        let number = self.first + self.remembered.len() as u64;
        self.in_flight += 1;
        self.remembered.push_back(Remembered {
            has_ended: false,
            in_flight: self.in_flight,
            corrections: std::mem::take(&mut self.next_corrections),
            refused_before: None,
        });
        SentJob(number)
    }

    /// Takes in how a job ended, and returns how many refusals turn out to be evidence against the agent.
    pub(crate) fn ended(&mut self, SentJob(number): SentJob, outcome: Outcome) -> u64 {
        let refused = outcome == Outcome::NoSupply;
        let corrections = Corrections {
            refused: i64::from(refused),
            unsuccessful: i64::from(outcome != Outcome::Success),
        };
        self.in_flight -= 1;
        // It was in flight at the sending of each job from its own to the last one.
        self.next_corrections.add(corrections, -1);
        let last = self.first + self.remembered.len() as u64 - 1;
        if let Some(index) = number.checked_sub(self.first) {
            let index = usize::try_from(index).expect("at most as many as are remembered");
            let job = &mut self.remembered[index];
            job.has_ended = true;
            job.corrections.add(corrections, 1);
            job.refused_before = refused.then_some(last);
        } else {
            self.forgotten -= 1;
            self.corrections.add(corrections, 1);
        }
        self.look_at_ended()
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
        let succeeded = in_flight - self.corrections.unsuccessful - i64::from(self.forgotten);
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

    /// Jobs by their number, each with the jobs that were sent before its end, in the order of their ends.
    type Ended = Vec<(u64, u64, Outcome)>;

    /// The refusals that are evidence, by the definition.
    fn by_definition(jobs: u64, ended: &Ended) -> u64 {
        let in_flight = |at: u64, counts: &dyn Fn(Outcome) -> bool| {
            let in_flight = ended
                .iter()
                .filter(|&&(number, last, outcome)| number <= at && at <= last && counts(outcome));
            in_flight.count()
        };
        let held = |at| in_flight(at, &|outcome| outcome != Outcome::NoSupply);
        let succeeded = |at| in_flight(at, &|outcome| outcome == Outcome::Success);
        let refusals = ended
            .iter()
            .filter(|(_, _, outcome)| *outcome == Outcome::NoSupply);
        let against = refusals.filter(|&&(number, last, _)| {
            let until = last.min(number + RACING_SENDS).min(jobs - 1);
            let most_held = (number..=until).map(held).max().unwrap();
            let ever = (0..=until).map(succeeded).max().unwrap();
            most_held < ever
        });
        against.count() as u64
    }

    #[test]
    fn a_worker_that_is_gone_is_told_from_one_without_a_free_place() {
        let mut refusals = Refusals::default();
        // Two at once succeed; a third finds no place.
        let [first, second, third] = [(); 3].map(|()| refusals.sent());
        assert_eq!(refusals.ended(third, Outcome::NoSupply), 0);
        assert_eq!(refusals.ended(first, Outcome::Success), 0);
        assert_eq!(refusals.ended(second, Outcome::Success), 0);
        // Nothing is in flight: it is gone.
        let fourth = refusals.sent();
        assert_eq!(refusals.ended(fourth, Outcome::NoSupply), 1);
        // Many slow refusals hold no place.
        let slow: Vec<SentJob> = (0..50).map(|_| refusals.sent()).collect();
        let against = slow
            .into_iter()
            .map(|job| refusals.ended(job, Outcome::NoSupply));
        assert_eq!(against.sum::<u64>(), 50);
        assert!(refusals.waiting.is_empty() && refusals.remembered.is_empty());
    }

    #[test]
    fn an_orchestrator_that_never_did_a_job_is_not_accused() {
        let mut refusals = Refusals::default();
        for _ in 0..100 {
            let job = refusals.sent();
            assert_eq!(refusals.ended(job, Outcome::NoSupply), 0);
        }
    }

    #[test]
    fn a_job_that_never_ends_does_not_fill_the_memory() {
        let mut refusals = Refusals::default();
        let done = refusals.sent();
        refusals.ended(done, Outcome::Success);
        let hanging = refusals.sent();
        let mut against = 0;
        for _ in 0..10 * MAX_REMEMBERED {
            let job = refusals.sent();
            against += refusals.ended(job, Outcome::NoSupply);
        }
        assert!(refusals.remembered.len() <= MAX_REMEMBERED + 1);
        assert!(refusals.waiting.len() <= RACING_SENDS as usize);
        // It holds the one place that there is known to be.
        assert_eq!(against, 0);
        refusals.ended(hanging, Outcome::Timeout);
        let job = refusals.sent();
        assert_eq!(refusals.ended(job, Outcome::NoSupply), 1);
        assert_eq!(refusals.succeeded_at_once, 1);
    }

    proptest! {
        #[test]
        fn each_refusal_is_judged_by_the_definition(
            steps in prop::collection::vec((0..3_u8, 0..1000_usize, 0..3_u8), 1..200),
        ) {
            let mut refusals = Refusals::default();
            let mut in_flight: Vec<SentJob> = Vec::new();
            let mut ended = Vec::new();
            let (mut jobs, mut against) = (0, 0);
            let mut end = |refusals: &mut Refusals, job: SentJob, outcome, jobs| {
                ended.push((job.0, jobs - 1, outcome));
                refusals.ended(job, outcome)
            };
            for (step, which, kind) in steps {
                if step == 0 || in_flight.is_empty() {
                    in_flight.push(refusals.sent());
                    jobs += 1;
                } else if step == 1 || in_flight.len() > 8 {
                    let job = in_flight.swap_remove(which % in_flight.len());
                    let outcome = [Outcome::NoSupply, Outcome::Success, Outcome::Timeout][usize::from(kind)];
                    against += end(&mut refusals, job, outcome, jobs);
                }
            }
            for job in in_flight.drain(..) {
                against += end(&mut refusals, job, Outcome::Success, jobs);
            }
            prop_assert_eq!(refusals.in_flight, 0);
            prop_assert!(refusals.waiting.is_empty());
            prop_assert_eq!(against, by_definition(jobs, &ended));
        }
    }
}
