//! `--record`: keeps every job, poll and change of rate in a file, from a thread of its own, so that a
//! slow disk neither drops nor delays a job.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use chrono::Utc;
use parking_lot::{Condvar, Mutex};
use rusqlite::{Connection, Transaction, named_params, params};

use super::event::{Event, JobDone, RateChanged, UptimePolled};
use super::worker::Worker;
use crate::money::WeiPerSecond;
use crate::records;
use crate::runner::roster::{AgentIndex, CapabilityIndex};

/// Records that wait for the disk at most; more are dropped and counted.
const MAX_WAITING: usize = 50_000;
/// The time between two commits; what came since the last one is lost by `kill -9`.
const COMMIT_INTERVAL: Duration = Duration::from_millis(250);
/// The pause before a commit that failed is tried again, and how long that goes on at the end.
const RETRY: Duration = Duration::from_millis(500);
const LAST_TRIES: Duration = Duration::from_secs(5);

const INSERT_JOB: &str = "
    INSERT INTO jobs (run, sent_at, agent, capability, job_id, outcome, status, latency_us, \
        send_lag_us, rate, uptime_percent, orchestrator, balance_wei, error)
    VALUES (:run, :sent_at, :agent, :capability, :job_id, :outcome, :status, :latency_us, \
        :send_lag_us, :rate, :uptime_percent, :orchestrator, :balance_wei, :error)";
const INSERT_POLL: &str = "
    INSERT INTO polls (run, at, agent, state, uptime_percent, pings)
    VALUES (:run, :at, :agent, :state, :uptime_percent, :pings)";
const INSERT_RATE: &str = "
    INSERT INTO rates (run, at, agent, rate_before, rate, base_rate, uptime_percent, reason)
    VALUES (:run, :at, :agent, :rate_before, :rate, :base_rate, :uptime_percent, :reason)";

/// What a run is known by in the file.
#[derive(Debug, Clone)]
pub(crate) struct RunDescription {
    /// The agents of the roster, in its order.
    pub agents: Vec<AgentTerms>,
    /// The capabilities' names, in the order of the roster.
    pub capabilities: Vec<Arc<str>>,
    /// How rates follow from uptimes.
    pub policy: String,
}

/// On which terms an agent is followed.
#[derive(Debug, Clone)]
pub(crate) struct AgentTerms {
    pub id: Arc<str>,
    /// What a second of its compute costs, where that is known.
    pub price: Option<WeiPerSecond>,
    /// Who can do its jobs and does nobody else's.
    pub own_orchestrators: Option<Vec<String>>,
}

/// A queue of records and the thread that writes them.
#[derive(Debug)]
pub(crate) struct RunRecorder {
    shared: Arc<RecorderShared>,
    thread: Worker,
}

#[derive(Debug, Default)]
struct RecorderShared {
    queue: Mutex<RecordQueue>,
    closing: Condvar,
}

#[derive(Debug, Default)]
struct RecordQueue {
    records: Vec<Record>,
    dropped: u64,
    closed: bool,
}

#[derive(Debug)]
enum Record {
    /// The next agent.
    Agent(AgentTerms),
    Job(Box<JobDone>),
    Poll(UptimePolled),
    Rate(RateChanged),
}

impl RunRecorder {
    /// Adds a run to `file`.
    ///
    /// # Errors
    /// When the file cannot be used, or no thread can be started.
    pub(crate) fn start(file: &Path, run: &RunDescription) -> anyhow::Result<Self> {
        let writer = RunWriter::begin(file, run)
            .with_context(|| format!("--record {}: cannot be used", file.display()))?;
        let shared = Arc::new(RecorderShared::default());
        let thread = Worker::start("records", {
            let shared = Arc::clone(&shared);
            move || shared.write_all(writer)
        })?;
        Ok(Self { shared, thread })
    }

    /// Takes in the agent that has the next place of the roster.
    pub(crate) fn add_agent(&self, terms: AgentTerms) {
        // However much waits: what comes later refers to it.
        self.shared.queue.lock().records.push(Record::Agent(terms));
    }

    /// Takes in what happened; what there is no room for is counted.
    pub(crate) fn record(&self, event: &Event) {
        let record = match event {
            Event::Job(job) => Record::Job(Box::new(job.clone())),
            Event::Uptime(polled) => Record::Poll(polled.clone()),
            Event::RateChanged(changed) | Event::BaseChanged(changed) => {
                Record::Rate(changed.clone())
            }
            // A claim can be checked again from the jobs.
            Event::Started { .. }
            | Event::AgentJoined(_)
            | Event::AgentLeft { .. }
            | Event::Claim(_)
            | Event::Alias(_)
            | Event::Sent
            | Event::Delayed(..)
            | Event::Dropped(..) => return,
        };
        // The thread is not woken: it looks for itself, which costs nothing a job.
        let mut queue = self.shared.queue.lock();
        if queue.records.len() < MAX_WAITING {
            queue.records.push(record);
        } else {
            queue.dropped += 1;
        }
    }

    /// Writes what still waits, and tells how many records are not in the file.
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
    fn write_all(&self, mut writer: RunWriter) {
        let mut closed_at = None;
        let mut failing = false;
        let mut batch = Vec::new();
        loop {
            let (closed, dropped) = {
                let mut queue = self.queue.lock();
                self.closing
                    .wait_while_for(&mut queue, |queue| !queue.closed, COMMIT_INTERVAL);
                // While the disk takes nothing they wait, and are dropped there, within bounds.
                if batch.is_empty() {
                    std::mem::swap(&mut batch, &mut queue.records);
                }
                (queue.closed, queue.dropped)
            };
            if closed {
                closed_at.get_or_insert_with(Instant::now);
            }
            match writer.write(&batch, dropped, closed) {
                Ok(()) => {
                    batch.clear();
                    failing = false;
                    if closed && self.queue.lock().records.is_empty() {
                        return;
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!("--record: jobs go on, but are not recorded: {error}");
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

/// Writes the records of one run.
struct RunWriter {
    connection: Connection,
    run: i64,
    /// By index: the row of each agent.
    agents: Vec<i64>,
    capabilities: Vec<i64>,
}

impl RunWriter {
    fn begin(file: &Path, run: &RunDescription) -> Result<Self, records::RecordsError> {
        let mut connection = records::open_to_write(file)?;
        let transaction = connection.transaction()?;
        transaction.execute(
            "INSERT INTO runs (started_at, version, policy) VALUES (?1, ?2, ?3)",
            params![
                Utc::now().timestamp_micros(),
                env!("CARGO_PKG_VERSION"),
                run.policy
            ],
        )?;
        let number = transaction.last_insert_rowid();
        let agents = run
            .agents
            .iter()
            .map(|terms| agent_row(&transaction, number, terms))
            .collect::<Result<_, _>>()?;
        let capabilities = run
            .capabilities
            .iter()
            .map(|name| {
                let add = "INSERT OR IGNORE INTO capabilities (name) VALUES (?1)";
                let find = "SELECT capability FROM capabilities WHERE name = ?1";
                row_of(&transaction, add, find, name)
            })
            .collect::<Result<_, _>>()?;
        transaction.commit()?;
        Ok(Self {
            connection,
            run: number,
            agents,
            capabilities,
        })
    }

    /// Stores a batch in one transaction.
    fn write(&mut self, batch: &[Record], dropped: u64, closed: bool) -> rusqlite::Result<()> {
        if batch.is_empty() && !closed {
            return Ok(());
        }
        let transaction = self.connection.transaction()?;
        // Not kept before the commit: a batch that fails is tried again.
        let mut agents = self.agents.clone();
        insert_all(
            &transaction,
            self.run,
            batch,
            &mut agents,
            &self.capabilities,
        )?;
        transaction.execute(
            "UPDATE runs SET records_dropped = ?1, ended_at = ?2 WHERE run = ?3",
            params![
                i64::try_from(dropped).unwrap_or(i64::MAX),
                closed.then(|| Utc::now().timestamp_micros()),
                self.run
            ],
        )?;
        transaction.commit()?;
        self.agents = agents;
        Ok(())
    }
}

/// Inserts the records of a batch; the rows of agents that join are added to `agents`.
fn insert_all(
    transaction: &Transaction<'_>,
    run: i64,
    batch: &[Record],
    agents: &mut Vec<i64>,
    capabilities: &[i64],
) -> rusqlite::Result<()> {
    let mut jobs = transaction.prepare(INSERT_JOB)?;
    let mut polls = transaction.prepare(INSERT_POLL)?;
    let mut rates = transaction.prepare(INSERT_RATE)?;
    let capability = |CapabilityIndex(index): CapabilityIndex| capabilities[index];
    for record in batch {
        let agent = |AgentIndex(index): AgentIndex| agents[index];
        match record {
            Record::Agent(terms) => {
                agents.push(agent_row(transaction, run, terms)?);
                continue;
            }
            Record::Job(job) => jobs.execute(named_params! {
                ":run": run,
                ":sent_at": job.ts.timestamp_micros(),
                ":agent": agent(job.agent),
                ":capability": capability(job.capability),
                ":job_id": job.job_id.as_bytes(),
                ":outcome": job.answer.outcome.name(),
                ":status": job.answer.status,
                ":latency_us": micros(job.latency),
                ":send_lag_us": micros(job.send_lag),
                ":rate": job.rate.get(),
                ":uptime_percent": job.uptime.get(),
                ":orchestrator": job.answer.orchestrator,
                ":balance_wei": job.answer.balance_wei,
                ":error": job.answer.error,
            })?,
            Record::Poll(polled) => polls.execute(named_params! {
                ":run": run,
                ":at": polled.ts.timestamp_micros(),
                ":agent": agent(polled.agent),
                ":state": polled.state.name(),
                ":uptime_percent": polled.uptime.map(f64::from),
                ":pings": i64::try_from(polled.pings).unwrap_or(i64::MAX),
            })?,
            Record::Rate(changed) => rates.execute(named_params! {
                ":run": run,
                ":at": changed.ts.timestamp_micros(),
                ":agent": agent(changed.agent),
                ":rate_before": changed.from.get(),
                ":rate": changed.to.get(),
                ":base_rate": changed.base.get(),
                ":uptime_percent": changed.uptime.map(f64::from),
                ":reason": changed.reason.name(),
            })?,
        };
    }
    Ok(())
}

/// The number of an agent, who takes part in a run.
fn agent_row(connection: &Connection, run: i64, terms: &AgentTerms) -> rusqlite::Result<i64> {
    let add = "INSERT OR IGNORE INTO agents (agent_id) VALUES (?1)";
    let find = "SELECT agent FROM agents WHERE agent_id = ?1";
    let agent = row_of(connection, add, find, &terms.id)?;
    let price = terms.price.as_ref().map(ToString::to_string);
    connection.execute(
        "INSERT OR REPLACE INTO run_agents (run, agent, price_wei, orchestrators)
         VALUES (:run, :agent, :price_wei, :orchestrators)",
        named_params! {
            ":run": run,
            ":agent": agent,
            ":price_wei": price,
            ":orchestrators": terms.own_orchestrators.as_ref().map(|own| own.join("\n")),
        },
    )?;
    Ok(agent)
}

/// The number of a name, which is added where it is new.
fn row_of(connection: &Connection, add: &str, find: &str, name: &str) -> rusqlite::Result<i64> {
    connection.execute(add, [name])?;
    connection.query_row(find, [name], |row| row.get(0))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
