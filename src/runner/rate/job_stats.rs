//! Statistics of an agent's recent jobs, in bounded memory.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::allocation::Performance;
use super::claims::Witness;
use super::pause::{Pause, PauseChange};
use super::refusals::{Refusals, SentJob};
use crate::runner::events::event::{Evidence, JobAnswer};
use crate::wire::outcome::Outcome;

/// Jobs from which the performance is computed.
const RECENT_JOBS: usize = 128;
/// With fewer jobs the performance is not known.
const MIN_JOBS: usize = 10;
/// The resolution with which the window of evidence moves.
const PARTS: u32 = 60;

/// One agent's statistics.
#[derive(Debug)]
pub(crate) struct JobStats {
    window: Duration,
    pause: Option<Mutex<Pause>>,
    jobs: Mutex<RecentJobs>,
}

/// A job in flight, as its agent's statistics know it.
#[derive(Debug)]
pub(crate) struct JobInFlight {
    /// Its orchestrator's index, where the agent is tied.
    orchestrator: Option<(usize, SentJob)>,
}

#[derive(Debug, Default)]
struct RecentJobs {
    recent: VecDeque<(bool, Duration)>,
    /// By orchestrator that does only this agent's jobs: what becomes of them is evidence about it. Empty if it is not tied.
    refusals: Vec<Refusals>,
    witness: Witness,
    /// Since when each part of the window counts, oldest first.
    evidence: VecDeque<(Instant, Evidence)>,
}

impl JobStats {
    /// Of an agent that is tied to this number of orchestrators, 0 if it is not tied; evidence counts for `window`.
    #[must_use]
    pub(crate) fn new(orchestrators: usize, window: Duration) -> Self {
        let jobs = RecentJobs {
            refusals: (0..orchestrators).map(|_| Refusals::default()).collect(),
            ..RecentJobs::default()
        };
        Self {
            window,
            pause: None,
            jobs: Mutex::new(jobs),
        }
    }

    /// With `--pause-after`.
    #[must_use]
    pub(crate) fn pausing_after(self, jobs: Option<u64>) -> Self {
        let pause = jobs.map(|jobs| Mutex::new(Pause::new(jobs)));
        Self { pause, ..self }
    }

    /// Whether a job's end begins or ends the pause of the agent's jobs. `to` are the indices of its orchestrator and
    /// capability.
    pub(crate) fn pause_change(&self, outcome: Outcome, to: (usize, usize)) -> Option<PauseChange> {
        self.pause.as_ref()?.lock().ended(outcome, to)
    }

    /// Takes in that a job is sent, to the agent's orchestrator of this index if it has some.
    pub(crate) fn sent(&self, orchestrator: Option<usize>, now: Instant) -> JobInFlight {
        let mut jobs = self.jobs.lock();
        let orchestrator = orchestrator.and_then(|index| {
            let refusals = jobs.refusals.get_mut(index)?;
            Some((index, refusals.sent(now)))
        });
        JobInFlight { orchestrator }
    }

    /// Takes in what became of a job.
    pub(crate) fn ended(
        &self,
        job: &JobInFlight,
        answer: &JobAnswer,
        latency: Duration,
        now: Instant,
    ) {
        let mut jobs = self.jobs.lock();
        if jobs.recent.len() == RECENT_JOBS {
            jobs.recent.pop_front();
        }
        let success = answer.outcome == Outcome::Success;
        jobs.recent.push_back((success, latency));
        let Some((index, sent)) = job.orchestrator else {
            return;
        };
        let refused = jobs.refusals[index].ended(sent, answer.outcome, now);
        let says = jobs.witness.says(answer.outcome);
        let new = Evidence {
            jobs: refused + u64::from(says.is_some()),
            good: u64::from(says == Some(true)),
        };
        if new.jobs == 0 {
            return;
        }
        let part = self.window / PARTS;
        if jobs
            .evidence
            .back()
            .is_none_or(|&(since, _)| now.saturating_duration_since(since) >= part)
        {
            jobs.evidence.push_back((now, Evidence::default()));
        }
        if let Some((_, evidence)) = jobs.evidence.back_mut() {
            evidence.jobs += new.jobs;
            evidence.good += new.good;
        }
        self.forget(&mut jobs, now);
    }

    /// The orchestrator lists the agent's live runner.
    pub(crate) fn runner_listed(&self) {
        self.jobs.lock().witness.runner_listed();
    }

    /// What its jobs in the window say.
    #[must_use]
    pub(crate) fn evidence(&self, now: Instant) -> Evidence {
        let mut jobs = self.jobs.lock();
        self.forget(&mut jobs, now);
        let parts = jobs.evidence.iter();
        parts.fold(Evidence::default(), |sum, (_, part)| Evidence {
            jobs: sum.jobs + part.jobs,
            good: sum.good + part.good,
        })
    }

    /// How well it has done its last jobs; `None` where too few of them succeeded.
    #[must_use]
    pub(crate) fn performance(&self) -> Option<Performance> {
        let jobs = self.jobs.lock();
        let mut latencies: Vec<Duration> = jobs
            .recent
            .iter()
            .filter(|(success, _)| *success)
            .map(|&(_, latency)| latency)
            .collect();
        if jobs.recent.len() < MIN_JOBS {
            return None;
        }
        latencies.sort_unstable();
        let median = latencies.get(latencies.len() / 2);
        #[expect(clippy::cast_precision_loss, reason = "at most as many as are kept")]
        let success = latencies.len() as f64 / jobs.recent.len() as f64;
        Some(Performance {
            success,
            // Without a success it does not matter.
            median_latency_seconds: median.map_or(1.0, |median| median.as_secs_f64().max(1e-6)),
        })
    }

    fn forget(&self, jobs: &mut RecentJobs, now: Instant) {
        let too_old = |since: Instant| now.saturating_duration_since(since) >= self.window;
        while jobs
            .evidence
            .front()
            .is_some_and(|&(since, _)| too_old(since))
        {
            jobs.evidence.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(stats: &JobStats, outcome: Outcome, latency: Duration, now: Instant) {
        let answer = JobAnswer::failure(outcome, String::new());
        stats.ended(&stats.sent(Some(0), now), &answer, latency, now);
    }

    #[test]
    fn evidence_leaves_with_the_window() {
        let record = JobStats::new(1, Duration::from_mins(1));
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        for second in 0..10 {
            done(
                &record,
                Outcome::Timeout,
                Duration::from_secs(1),
                at(second),
            );
            done(
                &record,
                Outcome::NoSupply,
                Duration::from_secs(1),
                at(second),
            );
        }
        done(&record, Outcome::Success, Duration::from_secs(1), at(50));
        let evidence = |seconds| record.evidence(at(seconds));
        assert_eq!(evidence(50), Evidence { jobs: 11, good: 1 });
        assert_eq!(evidence(64), Evidence { jobs: 6, good: 1 });
        assert_eq!(evidence(109), Evidence { jobs: 1, good: 1 });
        assert_eq!(evidence(110), Evidence::default());
    }

    #[test]
    fn without_orchestrators_of_its_own_nothing_is_evidence() {
        let record = JobStats::new(0, Duration::from_mins(1));
        let now = Instant::now();
        done(&record, Outcome::Success, Duration::from_secs(1), now);
        assert_eq!(record.evidence(now), Evidence::default());
    }

    #[test]
    fn performance_is_that_of_the_last_jobs() {
        let record = JobStats::new(0, Duration::from_mins(1));
        let job = |outcome, millis| {
            done(
                &record,
                outcome,
                Duration::from_millis(millis),
                Instant::now(),
            );
        };
        for _ in 0..9 {
            job(Outcome::Success, 500);
        }
        assert_eq!(record.performance(), None);
        for n in 0..128 {
            let outcome = if n % 4 == 0 {
                Outcome::Timeout
            } else {
                Outcome::Success
            };
            job(outcome, 100 + n);
        }
        let performance = record.performance().unwrap();
        assert_eq!(performance.success, 0.75);
        assert!((0.1..0.23).contains(&performance.median_latency_seconds));
        for _ in 0..128 {
            job(Outcome::HttpError, 1);
        }
        assert_eq!(record.performance().unwrap().success, 0.0);
    }
}
