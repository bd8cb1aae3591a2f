//! Sends one agent's jobs on their way when they are due, and never waits for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chrono::Utc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::alarm::Alarm;
use super::capability::{Chooser, JobForm};
use super::event::{AgentIndex, Event, JobDone, RateChanged};
use super::gateway::{Job, SendJob};
use super::monitor::Verdict;
use super::pacer::{Due, Pacer};
use super::recorder::Recorder;
use super::template::PlaceholderValues;
use crate::units::{JobsPerMinute, Percent};

/// Slots closer than this leave together: above 2000 jobs a second, waking for each would cost
/// more than it is worth, and leave the other tasks too little time.
const SHORTEST_SLEEP: Duration = Duration::from_micros(500);
/// What is withheld is accounted for at least this often.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// What the submitters of all agents share.
#[derive(Debug)]
pub struct Shared<G> {
    /// Where jobs go.
    pub gateway: G,
    /// By capability: the longest wait for a job's answer.
    pub timeouts: Vec<Duration>,
    /// The bound on jobs in flight.
    pub places: Arc<Semaphore>,
    /// How many jobs may still be sent.
    pub budget: JobBudget,
    /// Is told what happens.
    pub recorder: Arc<Recorder>,
    /// All jobs under way.
    pub jobs: TaskTracker,
    /// No new job after this.
    pub stop: CancellationToken,
}

/// How many jobs may still be sent.
#[derive(Debug)]
pub struct JobBudget(Option<AtomicU64>);

impl JobBudget {
    /// At most `jobs`, or any number.
    #[must_use]
    pub fn new(jobs: Option<u64>) -> Self {
        Self(jobs.map(AtomicU64::new))
    }

    /// Takes one, and tells how many are left after it; `None` where there is none to take.
    fn take(&self) -> Option<u64> {
        let Some(left) = &self.0 else {
            return Some(u64::MAX);
        };
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        taken.ok().map(|before| before - 1)
    }
}

/// One agent's submitter.
#[derive(Debug)]
pub struct Submitter<G> {
    /// For whom.
    pub agent: AgentIndex,
    /// That agent's name.
    pub agent_id: Arc<str>,
    /// By capability: what jobs look like.
    pub forms: Vec<JobForm>,
    /// Who may do the jobs; empty for anybody.
    pub orchestrators: Arc<[String]>,
    /// The rate at full uptime.
    pub base_rate: JobsPerMinute,
    /// Which job is next.
    pub chooser: Chooser,
    /// Wakes it.
    pub alarm: Alarm,
    /// What is shared with other agents.
    pub shared: Arc<Shared<G>>,
}

impl<G: SendJob> Submitter<G> {
    /// Sends jobs at the rate that stands on `verdicts` until `stop`.
    pub async fn run(mut self, mut verdicts: watch::Receiver<Option<Verdict>>) {
        let stop = self.shared.stop.clone();
        let mut pacer = Pacer::new(self.base_rate);
        let mut verdict = None;
        let mut awake_at = Instant::now();
        loop {
            let next = pacer
                .next_due()
                .map_or(awake_at + LONGEST_SLEEP, Instant::from_std);
            let next = next.clamp(awake_at + SHORTEST_SLEEP, awake_at + LONGEST_SLEEP);
            let stopping = tokio::select! {
                () = stop.cancelled() => true,
                // Its sender lives as long as this: an error can only mean the run's end.
                changed = verdicts.changed() => changed.is_err(),
                () = self.alarm.until(next) => false,
            };
            let now = Instant::now();
            awake_at = now;
            // Before what is due is sent: a rate that fell must take hold first.
            let new = *verdicts.borrow_and_update();
            if new == verdict || stopping {
                let due = pacer.advance(now.into_std());
                self.account_for(&due, verdict);
            } else if let Some(new) = new {
                let due = pacer.change_rate(now.into_std(), new.rate());
                self.account_for(&due, verdict);
                self.tell_change(verdict, new);
                verdict = Some(new);
            }
            if stopping || stop.is_cancelled() {
                return;
            }
        }
    }

    fn tell_change(&self, old: Option<Verdict>, new: Verdict) {
        let from = old.map_or(JobsPerMinute::ZERO, Verdict::rate);
        if old.is_none() || from != new.rate() {
            self.shared
                .recorder
                .record(&Event::RateChanged(RateChanged {
                    ts: Utc::now(),
                    agent: self.agent,
                    from,
                    to: new.rate(),
                    uptime: new.uptime(),
                    reason: new.reason(),
                }));
        }
    }

    /// Sends or counts every slot of `due`. Those that were due before a stop still leave.
    fn account_for(&mut self, due: &Due, verdict: Option<Verdict>) {
        for _ in 0..due.withheld {
            let capability = self.chooser.next_unsent();
            self.shared
                .recorder
                .record(&Event::Delayed(self.agent, capability));
        }
        for _ in 0..due.overdue {
            self.drop_slot();
        }
        let Some(Verdict::Earns { uptime, rate }) = verdict else {
            return;
        };
        for slot in due.slots() {
            let Ok(place) = Arc::clone(&self.shared.places).try_acquire_owned() else {
                self.drop_slot();
                continue;
            };
            let Some(left) = self.shared.budget.take() else {
                return;
            };
            self.send(slot.into(), rate, uptime, place);
            if left == 0 {
                self.shared.stop.cancel();
                return;
            }
        }
    }

    fn drop_slot(&mut self) {
        let capability = self.chooser.next_unsent();
        self.shared
            .recorder
            .record(&Event::Dropped(self.agent, capability));
    }

    /// Sends a job on its way. Its place is given back once its answer is recorded and its line
    /// has room.
    fn send(
        &mut self,
        slot: Instant,
        rate: JobsPerMinute,
        uptime: Percent,
        place: OwnedSemaphorePermit,
    ) {
        let shared = Arc::clone(&self.shared);
        let agent = self.agent;
        let (index, seed) = self.chooser.next_sent();
        let form = &self.forms[index.0];
        let job_id = Uuid::new_v4();
        let body = form.body(&PlaceholderValues {
            agent_id: &self.agent_id,
            job_id,
            seed,
            timestamp: unix_seconds(Utc::now()),
        });
        let job = Job {
            id: job_id,
            capability: index,
            header: form.header(job_id),
            body,
            timeout: shared.timeouts[index.0],
            orchestrators: Arc::clone(&self.orchestrators),
        };
        shared.recorder.record(&Event::Sent(agent, index));
        let jobs = shared.jobs.clone();
        jobs.spawn(async move {
            let send_lag = slot.elapsed();
            let ts = Utc::now();
            let answer = shared.gateway.send(job).await;
            shared.recorder.record(&Event::Job(JobDone {
                ts,
                agent,
                job_id,
                capability: index,
                latency: slot.elapsed(),
                send_lag,
                rate,
                uptime,
                answer,
            }));
            shared.recorder.room().await;
            drop(place);
        });
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact to the microsecond for centuries"
)]
fn unix_seconds(ts: chrono::DateTime<Utc>) -> f64 {
    ts.timestamp_micros() as f64 / 1e6
}
