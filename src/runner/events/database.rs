//! A run's part of a file of records: what is written for each record.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, Transaction, named_params, params};
use serde_json::Value;
use uuid::Uuid;

use super::event::{DropReason, JobDone, JobSent, RateChanged, UptimePolled};
use super::recorder::{AgentSlots, Record};
use super::run_clock::RunClock;
use crate::records::{self, RecordsError};
use crate::runner::events::event::{ClaimChecked, PolledPings, RunnerDiscovered};
use crate::runner::roster::{AgentIndex, CapabilityIndex};
use crate::wire::charge::Price;
use crate::wire::live_runner::ListedRunner;

/// How often it is written that the run goes on, if there is nothing else to write.
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

const INSERT_RUN: &str = "
    INSERT INTO runs (run_id, started_at, version, policy, uptime_window_us, stale_after_us, ping_urls, gateway_urls, \
        terms)
    VALUES (:run_id, :started_at, :version, :policy, :uptime_window_us, :stale_after_us, :ping_urls, \
        :gateway_urls, :terms)";
const UPDATE_RUN: &str = "
    UPDATE runs SET records_dropped = :records_dropped, alive_at = :now, ended_at = :ended_at WHERE run = :run";
const INSERT_IN_FLIGHT: &str = "
    INSERT INTO jobs_in_flight (job_id, run, sent_at, agent, capability)
    VALUES (:job_id, :run, :sent_at, :agent, :capability)";
const INSERT_JOB: &str = "
    INSERT INTO jobs (run, sent_at, agent, capability, job_id, outcome, status, is_stream, worked_us, \
        timeout_seconds, latency_us, send_lag_us, rate, uptime_percent, sent_to, orchestrator, balance_wei, error)
    VALUES (:run, :sent_at, :agent, :capability, :job_id, :outcome, :status, :is_stream, :worked_us, \
        :timeout_seconds, :latency_us, :send_lag_us, :rate, :uptime_percent, :sent_to, :orchestrator, :balance_wei, \
        :error)";
const INSERT_POLL: &str = "
    INSERT INTO polls (run, at, agent, state, uptime_percent, pings, ping_time)
    VALUES (:run, :at, :agent, :state, :uptime_percent, :pings, :ping_time)";
const INSERT_PING: &str = "
    INSERT OR REPLACE INTO pings (agent, timestamp, covers_from, success, is_void, first_ping, gpu_available, \
        uptime_percent, window_seconds)
    VALUES (:agent, :timestamp, :covers_from, :success, :is_void, :first_ping, :gpu_available, :uptime_percent, \
        :window_seconds)";
const INSERT_RATE: &str = "
    INSERT INTO rates (run, at, agent, rate_before, rate, base_rate, uptime_percent, reason)
    VALUES (:run, :at, :agent, :rate_before, :rate, :base_rate, :uptime_percent, :reason)";
const INSERT_SLOTS: &str = "
    INSERT INTO slots (run, agent, at, base_rate, rate, reason, asked, withheld, dropped_in_flight, dropped_late, \
        dropped_budget)
    VALUES (:run, :agent, :at, :base_rate, :rate, :reason, :asked, :withheld, :dropped_in_flight, :dropped_late, \
        :dropped_budget)";
const INSERT_CLAIM: &str = "
    INSERT INTO claims (run, at, agent, contradicted, uptime_percent, claimed_tier_percent, jobs, successful, chance)
    VALUES (:run, :at, :agent, :contradicted, :uptime_percent, :claimed_tier_percent, :jobs, :successful, :chance)";

const INSERT_DISCOVERY: &str = "
    INSERT INTO discoveries (run, at, agent, listing, capacity, in_use, price, currency, unit)
    VALUES (:run, :at, :agent, :listing, :capacity, :in_use, :price, :currency, :unit)";

/// What a run is known by in the file.
#[derive(Debug, Clone)]
pub(crate) struct RunDescription {
    pub id: Uuid,
    /// The agents of the roster, in its order.
    pub agents: Vec<AgentTerms>,
    /// The capabilities' names, in the order of the roster.
    pub capabilities: Vec<Arc<str>>,
    /// How rates follow from uptimes.
    pub policy: String,
    pub uptime_window: Duration,
    pub stale_after: Duration,
    pub ping_urls: Vec<String>,
    pub gateway_urls: Vec<String>,
    /// Rates, limits and budgets.
    pub terms: Value,
    /// How long the records of earlier runs are kept.
    pub keep: Duration,
}

/// On which terms an agent is followed.
#[derive(Debug, Clone)]
pub(crate) struct AgentTerms {
    pub id: Arc<str>,
    /// What its jobs cost, where that is known.
    pub price: Option<Price>,
    /// Who can do its jobs and does nobody else's.
    pub own_orchestrators: Option<Vec<String>>,
}

/// Why records could not be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunFileError {
    #[error("--record {path}: {error}")]
    Unusable { path: String, error: RecordsError },
    #[error("--record {path}: the file was {how}, and {records_lost} records with it")]
    Gone {
        path: String,
        how: &'static str,
        /// Records of this run that are in no file any more.
        records_lost: u64,
    },
}

/// The file of a run, which may go away and come back.
#[derive(Debug)]
pub(super) struct RunFile {
    path: PathBuf,
    run: RunDescription,
    clock: RunClock,
    open: Option<OpenFile>,
    stopped_at: Option<i64>,
}

#[derive(Debug)]
struct OpenFile {
    writer: RunWriter,
    /// Held after the connection: closing it before would end SQLite's own locks.
    identity: File,
    records: u64,
    alive_at: Instant,
}

impl RunFile {
    pub(super) fn new(path: PathBuf, run: RunDescription, clock: RunClock) -> Self {
        Self {
            path,
            run,
            clock,
            open: None,
            stopped_at: None,
        }
    }

    /// Takes in agents that joined; what is written later refers to them.
    pub(super) fn add_agents(&mut self, agents: impl Iterator<Item = AgentTerms>) {
        self.run.agents.extend(agents);
    }

    /// Stores a batch in one transaction, or nothing of it.
    pub(super) fn write(
        &mut self,
        batch: &[Record],
        dropped: u64,
        closed: bool,
    ) -> Result<(), RunFileError> {
        let stopped = batch.iter().find_map(|record| match record {
            Record::Stopping(at) => Some(*at),
            _ => None,
        });
        self.stopped_at = self.stopped_at.or(stopped);
        let path = || self.path.display().to_string();
        let unusable = |error: RecordsError| RunFileError::Unusable {
            path: path(),
            error,
        };
        if let Some(how) = self.open.as_ref().and_then(|open| open.gone(&self.path)) {
            let records = self.open.take().map_or(0, OpenFile::abandon);
            let records_lost = if how == "deleted" { records } else { 0 };
            return Err(RunFileError::Gone {
                path: path(),
                how,
                records_lost,
            });
        }
        if self.open.is_none() {
            let open = OpenFile::open(&self.path, &self.run, self.clock);
            self.open = Some(open.map_err(unusable)?);
        }
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        if batch.is_empty() && !closed && open.alive_at.elapsed() < ALIVE_INTERVAL {
            return Ok(());
        }
        open.alive_at = Instant::now();
        let state = RunState {
            dropped,
            stopped_at: self.stopped_at,
            now: self.clock.now().timestamp_micros(),
            closed,
        };
        let written = open.writer.write(batch, &self.run.agents, &state);
        if let Err(error) = written {
            return Err(unusable(error.into()));
        }
        open.records += batch.len() as u64;
        Ok(())
    }
}

impl OpenFile {
    fn open(
        path: &std::path::Path,
        run: &RunDescription,
        clock: RunClock,
    ) -> Result<Self, RecordsError> {
        let writer = RunWriter::begin(records::open_to_write(path)?, run, clock)?;
        let identity = File::open(path).map_err(RecordsError::Io)?;
        // Tells readers that the run goes on. It says nothing to SQLite, whose locks are of another kind.
        let _ = identity.try_lock_shared();
        Ok(Self {
            writer,
            identity,
            records: 0,
            alive_at: Instant::now(),
        })
    }

    /// Leaves a file that has another name now, with all its records in it, and returns how many these are.
    fn abandon(self) -> u64 {
        // SQLite does not do so by itself at the end if the file was moved; and a log that is left behind under the old name
        // would be taken for that of the new file.
        let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
        if let Err(error) = self.writer.connection.execute_batch(checkpoint) {
            tracing::debug!("the file that went away lacks its last records: {error}");
        }
        self.records
    }

    /// How the file went away, if its name now means another file or none.
    fn gone(&self, path: &std::path::Path) -> Option<&'static str> {
        let own = self.identity.metadata().ok()?;
        let now = std::fs::metadata(path);
        let is_same = |now: std::fs::Metadata| (now.dev(), now.ino()) == (own.dev(), own.ino());
        if now.is_ok_and(is_same) {
            return None;
        }
        Some(if own.nlink() == 0 { "deleted" } else { "moved" })
    }
}

/// What the row of the run says.
struct RunState {
    dropped: u64,
    stopped_at: Option<i64>,
    now: i64,
    closed: bool,
}

/// Writes the records of one run.
#[derive(Debug)]
struct RunWriter {
    connection: Connection,
    run: i64,
    /// By index: the row of each agent.
    agents: Vec<i64>,
    capabilities: Vec<i64>,
    /// The jobs that are recorded as in flight.
    in_flight: HashSet<Uuid>,
}

impl RunWriter {
    fn begin(
        mut connection: Connection,
        run: &RunDescription,
        clock: RunClock,
    ) -> rusqlite::Result<Self> {
        let transaction = connection.transaction()?;
        records::forget_runs_before(&transaction, clock.started_at() - run.keep)?;
        transaction.execute(
            INSERT_RUN,
            named_params! {
                ":run_id": run.id.as_bytes(),
                ":started_at": clock.started_at().timestamp_micros(),
                ":version": env!("CARGO_PKG_VERSION"),
                ":policy": run.policy,
                ":uptime_window_us": micros(run.uptime_window),
                ":stale_after_us": micros(run.stale_after),
                ":ping_urls": run.ping_urls.join("\n"),
                ":gateway_urls": run.gateway_urls.join("\n"),
                ":terms": run.terms.to_string(),
            },
        )?;
        let number = transaction.last_insert_rowid();
        let capabilities = run.capabilities.iter().map(|name| {
            let add = "INSERT OR IGNORE INTO capabilities (name) VALUES (?1)";
            let find = "SELECT capability FROM capabilities WHERE name = ?1";
            row_of(&transaction, add, find, name)
        });
        let capabilities = capabilities.collect::<Result<_, _>>()?;
        transaction.commit()?;
        Ok(Self {
            connection,
            run: number,
            agents: Vec::new(),
            capabilities,
            in_flight: HashSet::new(),
        })
    }

    fn write(
        &mut self,
        batch: &[Record],
        terms: &[AgentTerms],
        state: &RunState,
    ) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction()?;
        // Kept only after the commit: a batch that fails is tried again.
        let mut agents = self.agents.clone();
        for terms in &terms[agents.len()..] {
            agents.push(agent_row(&transaction, self.run, terms)?);
        }
        let rows = Rows {
            run: self.run,
            agents: &agents,
            capabilities: &self.capabilities,
        };
        let changes = insert_all(&transaction, &rows, batch, &self.in_flight)?;
        transaction.execute(
            UPDATE_RUN,
            named_params! {
                ":run": self.run,
                ":records_dropped": i64::try_from(state.dropped).unwrap_or(i64::MAX),
                ":now": state.now,
                ":ended_at": state.closed.then_some(state.now),
            },
        )?;
        if let Some(stopped_at) = state.stopped_at {
            let update = "UPDATE runs SET stopped_at = ?1 WHERE run = ?2 AND stopped_at IS NULL";
            transaction.execute(update, params![stopped_at, self.run])?;
        }
        transaction.commit()?;
        self.agents = agents;
        for job in &changes.ended {
            self.in_flight.remove(job);
        }
        self.in_flight.extend(changes.sent);
        Ok(())
    }
}

/// What stands for agents and capabilities in the file.
struct Rows<'a> {
    run: i64,
    agents: &'a [i64],
    capabilities: &'a [i64],
}

impl Rows<'_> {
    fn agent(&self, AgentIndex(index): AgentIndex) -> i64 {
        self.agents[index]
    }

    fn capability(&self, CapabilityIndex(index): CapabilityIndex) -> i64 {
        self.capabilities[index]
    }
}

/// The jobs that a batch adds to those in flight, and takes from them.
#[derive(Default)]
struct InFlightChanges {
    sent: HashSet<Uuid>,
    ended: Vec<Uuid>,
}

fn insert_all(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    batch: &[Record],
    in_flight: &HashSet<Uuid>,
) -> rusqlite::Result<InFlightChanges> {
    let mut changes = InFlightChanges::default();
    let mut sent: Vec<&JobSent> = Vec::new();
    for record in batch {
        match record {
            Record::Sent(job) => {
                changes.sent.insert(job.job_id);
                sent.push(job);
            }
            Record::Job(job) => {
                insert_job(transaction, rows, job)?;
                // Most jobs end within the batch in which they were sent.
                if !changes.sent.remove(&job.job_id) && in_flight.contains(&job.job_id) {
                    let delete = "DELETE FROM jobs_in_flight WHERE job_id = ?1";
                    let mut delete = transaction.prepare_cached(delete)?;
                    delete.execute([job.job_id.as_bytes()])?;
                    changes.ended.push(job.job_id);
                }
            }
            Record::Poll(polled) => insert_poll(transaction, rows, polled)?,
            Record::Rate(rate) => insert_rate(transaction, rows, rate)?,
            Record::Slots(slots, at) => insert_slots(transaction, rows, slots, *at)?,
            Record::Claim(claim) => insert_claim(transaction, rows, claim)?,
            Record::Discovery(discovered) => insert_discovery(transaction, rows, discovered)?,
            Record::Stopping(_) => {}
        }
    }
    let mut insert = transaction.prepare_cached(INSERT_IN_FLIGHT)?;
    for job in sent
        .into_iter()
        .filter(|job| changes.sent.contains(&job.job_id))
    {
        insert.execute(named_params! {
            ":job_id": job.job_id.as_bytes(),
            ":run": rows.run,
            ":sent_at": job.ts.timestamp_micros(),
            ":agent": rows.agent(job.agent),
            ":capability": rows.capability(job.capability),
        })?;
    }
    Ok(changes)
}

fn insert_job(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    job: &JobDone,
) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare_cached(INSERT_JOB)?;
    insert.execute(named_params! {
        ":run": rows.run,
        ":sent_at": job.ts.timestamp_micros(),
        ":agent": rows.agent(job.agent),
        ":capability": rows.capability(job.capability),
        ":job_id": job.job_id.as_bytes(),
        ":outcome": job.answer.outcome.name(),
        ":status": job.answer.status,
        ":is_stream": job.answer.is_stream,
        ":worked_us": micros(job.work.time),
        ":timeout_seconds": job.work.timeout_seconds,
        ":latency_us": micros(job.latency),
        ":send_lag_us": micros(job.send_lag),
        ":rate": job.rate.get(),
        ":uptime_percent": job.uptime.get(),
        ":sent_to": job.sent_to,
        ":orchestrator": job.answer.orchestrator,
        ":balance_wei": job.answer.balance_wei,
        ":error": job.answer.error,
    })?;
    Ok(())
}

fn insert_poll(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    polled: &UptimePolled,
) -> rusqlite::Result<()> {
    let agent = rows.agent(polled.agent);
    let told = polled.told.as_deref();
    let mut insert = transaction.prepare_cached(INSERT_POLL)?;
    insert.execute(named_params! {
        ":run": rows.run,
        ":at": polled.ts.timestamp_micros(),
        ":agent": agent,
        ":state": polled.state.name(),
        ":uptime_percent": polled.uptime.map(f64::from),
        ":pings": i64::try_from(polled.pings).unwrap_or(i64::MAX),
        ":ping_time": told.map(|told| told.ping_time.timestamp_micros()),
    })?;
    let mut insert = transaction.prepare_cached(INSERT_PING)?;
    for ping in told
        .map(|PolledPings { pings, .. }| pings)
        .into_iter()
        .flatten()
    {
        insert.execute(named_params! {
            ":agent": agent,
            ":timestamp": ping.timestamp.timestamp_micros(),
            ":covers_from": ping.covers_from.map(|from| from.timestamp_micros()),
            ":success": ping.success,
            ":is_void": ping.is_void,
            ":first_ping": ping.first_ping,
            ":gpu_available": ping.gpu_available,
            ":uptime_percent": ping.uptime_percent.map(f64::from),
            ":window_seconds": ping.window_seconds,
        })?;
    }
    Ok(())
}

fn insert_rate(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    changed: &RateChanged,
) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare_cached(INSERT_RATE)?;
    insert.execute(named_params! {
        ":run": rows.run,
        ":at": changed.ts.timestamp_micros(),
        ":agent": rows.agent(changed.agent),
        ":rate_before": changed.from.get(),
        ":rate": changed.to.get(),
        ":base_rate": changed.base.get(),
        ":uptime_percent": changed.uptime.map(f64::from),
        ":reason": changed.reason.name(),
    })?;
    Ok(())
}

fn insert_slots(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    slots: &AgentSlots,
    at: i64,
) -> rusqlite::Result<()> {
    let dropped = |reason: DropReason| slots.dropped[reason as usize].cast_signed();
    let mut insert = transaction.prepare_cached(INSERT_SLOTS)?;
    insert.execute(named_params! {
        ":run": rows.run,
        ":agent": rows.agent(slots.agent),
        ":at": at,
        ":base_rate": slots.base.get(),
        ":rate": slots.rate.get(),
        ":reason": slots.reason.name(),
        ":asked": slots.asked().cast_signed(),
        ":withheld": slots.withheld.cast_signed(),
        ":dropped_in_flight": dropped(DropReason::InFlight),
        ":dropped_late": dropped(DropReason::Late),
        ":dropped_budget": dropped(DropReason::Budget),
    })?;
    Ok(())
}

fn insert_claim(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    claim: &ClaimChecked,
) -> rusqlite::Result<()> {
    let found = claim.contradiction;
    let mut insert = transaction.prepare_cached(INSERT_CLAIM)?;
    insert.execute(named_params! {
        ":run": rows.run,
        ":at": claim.ts.timestamp_micros(),
        ":agent": rows.agent(claim.agent),
        ":contradicted": found.is_some(),
        ":uptime_percent": claim.uptime.get(),
        ":claimed_tier_percent": found.map(|found| found.claimed_tier.get()),
        ":jobs": found.map(|found| found.evidence.jobs.cast_signed()),
        ":successful": found.map(|found| found.evidence.good.cast_signed()),
        ":chance": found.map(|found| found.chance),
    })?;
    Ok(())
}

fn insert_discovery(
    transaction: &Transaction<'_>,
    rows: &Rows<'_>,
    discovered: &RunnerDiscovered,
) -> rusqlite::Result<()> {
    let runner = discovered.listing.runner();
    let price = runner.and_then(|runner| runner.price.as_ref());
    let count = |of: fn(&ListedRunner) -> Option<u64>| Some(of(runner?)?.cast_signed());
    let mut insert = transaction.prepare_cached(INSERT_DISCOVERY)?;
    insert.execute(named_params! {
        ":run": rows.run,
        ":at": discovered.ts.timestamp_micros(),
        ":agent": rows.agent(discovered.agent),
        ":listing": discovered.listing.name(),
        ":capacity": count(|runner| runner.capacity),
        ":in_use": count(|runner| runner.in_use),
        ":price": price.map(|price| &price.price),
        ":currency": price.map(|price| &price.currency),
        ":unit": price.map(|price| &price.unit),
    })?;
    Ok(())
}

/// The number of an agent, who takes part in a run.
fn agent_row(connection: &Connection, run: i64, terms: &AgentTerms) -> rusqlite::Result<i64> {
    let add = "INSERT OR IGNORE INTO agents (agent_id) VALUES (?1)";
    let find = "SELECT agent FROM agents WHERE agent_id = ?1";
    let agent = row_of(connection, add, find, &terms.id)?;
    let price = terms.price.as_ref();
    connection.execute(
        "INSERT OR REPLACE INTO run_agents (run, agent, price_wei, price_per, orchestrators)
         VALUES (:run, :agent, :price_wei, :price_per, :orchestrators)",
        named_params! {
            ":run": run,
            ":agent": agent,
            ":price_wei": price.map(|price| price.unit.to_string()),
            ":price_per": price.map(|price| price.per.name()),
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
