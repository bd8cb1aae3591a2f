//! `--record`: keeps what happens in a file, from a thread of its own, so that a slow disk, or a file that goes away,
//! neither drops nor delays a job.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::database::{AgentTerms, RunDescription, RunFile, RunFileError};
use super::event::{
    ClaimChecked, DropReason, Event, JobDone, JobSent, RateChanged, RunnerDiscovered, UptimePolled,
};
use super::run_clock::RunClock;
use super::worker::Worker;
use crate::runner::events::event::RateReason;
use crate::runner::roster::AgentIndex;
use crate::units::JobsPerMinute;

/// Records that wait for the disk at most; more are dropped and counted.
const MAX_WAITING: usize = 50_000;
/// The time between two commits; what came since the last one is lost by `kill -9`.
const COMMIT_INTERVAL: Duration = Duration::from_millis(250);
/// How often the slots are written, and that the run goes on.
const SLOTS_INTERVAL: Duration = Duration::from_secs(1);
/// The pause before a file that failed is tried again, and how long that goes on at the end.
const RETRY: Duration = Duration::from_millis(500);
const LAST_TRIES: Duration = Duration::from_secs(5);

/// A queue of records and the thread that writes them.
#[derive(Debug)]
pub(crate) struct RunRecorder {
    shared: Arc<RecorderShared>,
    thread: Worker,
}

#[derive(Debug)]
struct RecorderShared {
    clock: RunClock,
    queue: Mutex<RecordQueue>,
    closing: Condvar,
}

#[derive(Debug, Default)]
struct RecordQueue {
    /// Agents that joined. However much waits: what comes later refers to them.
    agents: Vec<AgentTerms>,
    records: Vec<Record>,
    slots: Vec<AgentSlots>,
    dropped: u64,
    closed: bool,
}

/// An agent's slots since the run began.
#[derive(Debug, Clone, Copy)]
pub(super) struct AgentSlots {
    pub agent: AgentIndex,
    pub base: JobsPerMinute,
    pub rate: JobsPerMinute,
    pub reason: RateReason,
    pub sent: u64,
    pub withheld: u64,
    pub dropped: [u64; DropReason::ALL.len()],
    /// Whether they differ from those that were recorded last.
    is_new: bool,
}

impl AgentSlots {
    fn new(agent: AgentIndex) -> Self {
        Self {
            agent,
            base: JobsPerMinute::ZERO,
            rate: JobsPerMinute::ZERO,
            reason: RateReason::Unknown,
            sent: 0,
            withheld: 0,
            dropped: [0; DropReason::ALL.len()],
            is_new: false,
        }
    }

    /// All that were accounted for.
    pub(super) fn asked(&self) -> u64 {
        self.sent + self.withheld + self.dropped.iter().sum::<u64>()
    }
}

#[derive(Debug)]
pub(super) enum Record {
    Sent(JobSent),
    Job(Box<JobDone>),
    Poll(UptimePolled),
    Rate(RateChanged),
    Claim(Box<ClaimChecked>),
    Discovery(Box<RunnerDiscovered>),
    /// With the microseconds since 1970.
    Slots(AgentSlots, i64),
    Stopping(i64),
}

impl RecordQueue {
    fn push(&mut self, record: Record) {
        if self.records.len() < MAX_WAITING {
            self.records.push(record);
        } else {
            self.dropped += 1;
        }
    }

    fn slots(&mut self, agent: AgentIndex) -> &mut AgentSlots {
        while self.slots.len() <= agent.0 {
            self.slots
                .push(AgentSlots::new(AgentIndex(self.slots.len())));
        }
        let slots = &mut self.slots[agent.0];
        slots.is_new = true;
        slots
    }

    /// What came before a change of a rate is a row of its own.
    fn rate_changed(&mut self, changed: &RateChanged) {
        let at = changed.ts.timestamp_micros();
        let before = *self.slots(changed.agent);
        self.push(Record::Slots(before, at));
        let slots = self.slots(changed.agent);
        (slots.base, slots.rate, slots.reason) = (changed.base, changed.to, changed.reason);
    }

    fn push_new_slots(&mut self, at: i64) {
        for agent in 0..self.slots.len() {
            let slots = &mut self.slots[agent];
            if std::mem::take(&mut slots.is_new) {
                let slots = *slots;
                self.push(Record::Slots(slots, at));
            }
        }
    }
}

impl RunRecorder {
    /// Adds a run to `file`, as soon as that can be used.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(
        file: PathBuf,
        run: RunDescription,
        clock: RunClock,
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(RecorderShared {
            clock,
            queue: Mutex::default(),
            closing: Condvar::new(),
        });
        let thread = Worker::start("records", {
            let shared = Arc::clone(&shared);
            move || shared.write_all(RunFile::new(file, run, clock))
        })?;
        Ok(Self { shared, thread })
    }

    /// Takes in what happened; what there is no room for is counted.
    pub(crate) fn record(&self, event: &Event) {
        let mut queue = self.shared.queue.lock();
        // The thread is not woken: it looks for itself, which costs nothing a job.
        let record = match event {
            Event::Delayed(agent, _) => {
                queue.slots(*agent).withheld += 1;
                return;
            }
            Event::Dropped(agent, _, reason) => {
                queue.slots(*agent).dropped[*reason as usize] += 1;
                return;
            }
            Event::Sent(sent) => {
                queue.slots(sent.agent).sent += 1;
                Record::Sent(*sent)
            }
            Event::Job(job) => Record::Job(Box::new(job.clone())),
            Event::Uptime(polled) => Record::Poll(polled.clone()),
            Event::Claim(claim) => Record::Claim(Box::new(claim.clone())),
            Event::Discovery(discovered) if discovered.is_new => {
                Record::Discovery(Box::new(discovered.clone()))
            }
            Event::RateChanged(changed) | Event::BaseChanged(changed) => {
                queue.rate_changed(changed);
                Record::Rate(changed.clone())
            }
            Event::Stopping { ts } => Record::Stopping(ts.timestamp_micros()),
            Event::Started { .. }
            | Event::AgentJoined(_)
            | Event::AgentLeft { .. }
            | Event::Alias(_)
            | Event::Discovery(_)
            | Event::Pause(_) => return,
        };
        queue.push(record);
    }

    /// Takes in the agent that has the next index of the roster.
    pub(crate) fn add_agent(&self, terms: AgentTerms) {
        self.shared.queue.lock().agents.push(terms);
    }

    /// Writes what still waits, and returns how many records are in no file.
    ///
    /// # Errors
    /// When the thread failed.
    pub(crate) async fn close(&self) -> io::Result<u64> {
        self.shared.queue.lock().closed = true;
        self.shared.closing.notify_one();
        self.thread.ended().await?;
        Ok(self.shared.queue.lock().dropped)
    }
}

impl RecorderShared {
    fn write_all(&self, mut file: RunFile) {
        let mut closed_at = None;
        let mut is_failing = false;
        let mut slots_at = Instant::now();
        let mut batch = Vec::new();
        loop {
            let (closed, dropped) = {
                let mut queue = self.queue.lock();
                self.closing
                    .wait_while_for(&mut queue, |queue| !queue.closed, COMMIT_INTERVAL);
                if queue.closed || slots_at.elapsed() >= SLOTS_INTERVAL {
                    slots_at = Instant::now();
                    queue.push_new_slots(self.clock.now().timestamp_micros());
                }
                file.add_agents(queue.agents.drain(..));
                // While the disk takes nothing they wait, and are dropped there, within bounds.
                if batch.is_empty() {
                    std::mem::swap(&mut batch, &mut queue.records);
                }
                (queue.closed, queue.dropped)
            };
            if closed {
                closed_at.get_or_insert_with(Instant::now);
            }
            match file.write(&batch, dropped, closed) {
                Ok(()) => {
                    batch.clear();
                    if std::mem::take(&mut is_failing) {
                        tracing::info!("--record: jobs are recorded again");
                    }
                    let queue = self.queue.lock();
                    if closed && queue.records.is_empty() {
                        return;
                    }
                }
                Err(error) => {
                    if let RunFileError::Gone { records_lost, .. } = &error {
                        self.queue.lock().dropped += records_lost;
                        tracing::error!("{error}: a new file is begun there");
                        continue;
                    }
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::error!(
                            "{error}: jobs go on, and at most {MAX_WAITING} records wait until it can be written"
                        );
                    }
                    if closed_at.is_some_and(|at| at.elapsed() > LAST_TRIES) {
                        let mut queue = self.queue.lock();
                        queue.dropped += (batch.len() + queue.records.len()) as u64;
                        return;
                    }
                    std::thread::sleep(RETRY);
                }
            }
        }
    }
}
