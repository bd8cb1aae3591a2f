//! Statements from files of records.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use chrono::{DateTime, Utc};
use rusqlite::{Connection, Row, params};
use uuid::Uuid;

use super::jobs::JobsFile;
use super::sums::{AgentSums, ChargedJob, Interval, Job, UNKNOWN};
use super::{AgentStatement, Ended, FORMAT, Gap, Head, RunStatement, Statements, instant};
use crate::money::Wei;
use crate::report::balance::{OrchestratorBalances, ToldBalance};
use crate::report::history::price_per;
use crate::report::history::{HistoryError, ReadOptions, RecordedRuns};
use crate::report::period::Period;
use crate::report::timeline::{Micros, Slots, cause};
use crate::runner::events::event::RateReason;
use crate::units::{JobsPerMinute, Percent};
use crate::wire::charge::{Price, Work};
use crate::wire::outcome::Outcome;
use crate::wire::ping_system::HistoryPing;

/// A run that was not heard of for so long was killed.
const ALIVE: Micros = 10_000_000;
/// Slots are recorded every second: jobs that were sent so long before a row are all in it.
const SLOTS_LAG: Micros = 3_000_000;
/// More slots than a run can have; sums of a few such do not overflow.
const MAX_SLOTS: u64 = 1 << 53;
/// The reasons of dropped slots, in the order of their columns.
const DROPPED: [&str; 3] = ["in_flight", "late", "budget"];

/// A file of records, open to read.
#[derive(Debug)]
pub(crate) struct StatementFile {
    pub path: PathBuf,
    pub connection: Connection,
    /// Whether a runner has it open.
    pub is_written: bool,
}

impl StatementFile {
    /// What an error begins with.
    fn context(&self) -> String {
        format!("{}: cannot be reported", self.path.display())
    }
}

/// Which statements are wanted.
#[derive(Debug, Clone)]
pub(crate) struct StatementQuery {
    pub period: Period,
    /// All if there are none.
    pub agents: Vec<String>,
    pub now: DateTime<Utc>,
}

/// A run, in one file or several.
#[derive(Debug)]
struct Run {
    started_at: Micros,
    end: Micros,
    ended: Ended,
    statement: RunStatement,
    /// Whether it lacks what releases after 0.1.0 record.
    is_old: bool,
    /// Whether it is in more than one place: its jobs may be, too.
    is_split: bool,
}

/// An agent's slots of a run, as they were recorded last.
#[derive(Debug, Clone, Copy, Default)]
struct SlotCounts {
    at: Micros,
    asked: u64,
    withheld: u64,
    dropped: [u64; 3],
}

impl SlotCounts {
    fn sent(&self) -> u64 {
        self.asked - self.withheld - self.dropped.iter().sum::<u64>()
    }
}

/// The time whose slots are known, from one row to another.
#[derive(Debug, Clone, Copy)]
struct Window {
    from: Micros,
    last: SlotCounts,
}

type RunId = String;

/// Reads the files, which may hold parts of the same run, and writes the jobs behind the statements.
///
/// # Errors
/// When a file cannot be read or holds what was never recorded, or the jobs cannot be written.
pub(crate) fn read<W: Write>(
    files: &[StatementFile],
    query: &StatementQuery,
    jobs_file: Option<JobsFile<W>>,
) -> anyhow::Result<Statements> {
    let mut reader = Reader {
        query,
        period: query.period,
        runs: BTreeMap::new(),
        agents: BTreeMap::new(),
        windows: HashMap::new(),
        seen: HashSet::new(),
        jobs_file,
    };
    let mut numbers = Vec::new();
    for file in files {
        numbers.push(reader.read_runs(file).with_context(|| file.context())?);
    }
    reader.settle_period();
    let mut in_order: Vec<usize> = (0..files.len()).collect();
    let first_row = |file: &StatementFile| -> anyhow::Result<Option<Micros>> {
        let first = "SELECT MIN(at) FROM slots";
        let row = file.connection.query_row(first, (), |row| row.get(0));
        row.with_context(|| file.context())
    };
    let firsts: Vec<_> = files.iter().map(first_row).collect::<Result<_, _>>()?;
    in_order.sort_by_key(|&file| firsts[file]);
    let contents: Vec<FileContent<'_>> = in_order
        .into_iter()
        .map(|index| {
            let content = FileContent::read(&files[index], &numbers[index], query);
            content.with_context(|| files[index].context())
        })
        .collect::<anyhow::Result<_>>()?;
    for content in &contents {
        let read = reader
            .read_slots(content)
            .and_then(|()| reader.read_pings(content))
            .and_then(|()| reader.read_old(content));
        read.with_context(|| content.file.context())?;
    }
    for content in &contents {
        let read = reader.read_jobs(content);
        read.with_context(|| content.file.context())?;
    }
    for content in &contents {
        let read = reader.read_in_flight(content);
        read.with_context(|| content.file.context())?;
    }
    reader.finish()
}

/// What stands for runs, agents and capabilities in a file.
struct FileContent<'a> {
    file: &'a StatementFile,
    runs: &'a HashMap<i64, RunId>,
    agents: HashMap<i64, String>,
    capabilities: HashMap<i64, String>,
    prices: HashMap<(i64, i64), Price>,
}

impl<'a> FileContent<'a> {
    fn read(
        file: &'a StatementFile,
        runs: &'a HashMap<i64, RunId>,
        query: &StatementQuery,
    ) -> rusqlite::Result<Self> {
        let connection = &file.connection;
        let names = |query: &str| -> rusqlite::Result<HashMap<i64, String>> {
            let mut statement = connection.prepare(query)?;
            let rows = statement.query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        };
        let mut agents = names("SELECT agent, agent_id FROM agents")?;
        if !query.agents.is_empty() {
            agents.retain(|_, name| query.agents.contains(name));
        }
        let mut prices = HashMap::new();
        let mut statement = connection.prepare(
            "SELECT run, agent, price_wei, price_per FROM run_agents WHERE price_wei IS NOT NULL",
        )?;
        let mut rows = statement.query(())?;
        while let Some(row) = rows.next()? {
            let price: String = row.get(2)?;
            let per = price_per(row.get::<_, Option<String>>(3)?.as_deref());
            if let Ok(unit) = price.parse() {
                prices.insert((row.get(0)?, row.get(1)?), Price { unit, per });
            }
        }
        Ok(Self {
            file,
            runs,
            agents,
            capabilities: names("SELECT capability, name FROM capabilities")?,
            prices,
        })
    }

    fn connection(&self) -> &'a Connection {
        &self.file.connection
    }

    fn capability(&self, number: i64) -> Result<&str, HistoryError> {
        let name = self.capabilities.get(&number).map(String::as_str);
        name.ok_or_else(|| HistoryError::Unknown {
            column: "jobs.capability",
            value: number.to_string(),
        })
    }

    /// The agents that are wanted, as a list in SQL.
    fn agents_sql(&self) -> String {
        let agents: Vec<String> = self.agents.keys().map(ToString::to_string).collect();
        agents.join(",")
    }
}

/// A job that counts.
struct Found {
    /// When its run began and ended.
    run: (Micros, Micros),
    job_id: Uuid,
    sent_at: Micros,
}

struct Reader<'a, W: Write> {
    query: &'a StatementQuery,
    period: Period,
    runs: BTreeMap<RunId, Run>,
    agents: BTreeMap<String, AgentSums>,
    /// By run and agent.
    windows: HashMap<(RunId, String), Window>,
    /// The jobs of runs that are in several places.
    seen: HashSet<Vec<u8>>,
    jobs_file: Option<JobsFile<W>>,
}

impl<W: Write> Reader<'_, W> {
    /// Returns the id of each run by its number in the file.
    fn read_runs(&mut self, file: &StatementFile) -> anyhow::Result<HashMap<i64, RunId>> {
        let mut numbers = HashMap::new();
        let mut statement = file.connection.prepare(
            "SELECT run, run_id, started_at, ended_at, alive_at, policy, uptime_window_us, stale_after_us, ping_urls, \
             gateway_urls, version, records_dropped FROM runs ORDER BY run",
        )?;
        let mut rows = statement.query(())?;
        while let Some(row) = rows.next()? {
            let number: i64 = row.get(0)?;
            let id: Option<Vec<u8>> = row.get(1)?;
            let uuid = id.and_then(|id| Uuid::from_slice(&id).ok());
            let is_old = uuid.is_none();
            let id = uuid.map_or_else(
                || format!("{}#{number}", file.path.display()),
                |id| id.to_string(),
            );
            let run = self.run(file, row, number, &id, is_old)?;
            match self.runs.get_mut(&id) {
                Some(known) => known.join(&run),
                None => {
                    self.runs.insert(id.clone(), run);
                }
            }
            numbers.insert(number, id);
        }
        Ok(numbers)
    }

    fn run(
        &self,
        file: &StatementFile,
        row: &Row<'_>,
        number: i64,
        id: &str,
        is_old: bool,
    ) -> rusqlite::Result<Run> {
        let started_at: Micros = row.get(2)?;
        let ended_at: Option<Micros> = row.get(3)?;
        let alive_at: Option<Micros> = row.get(4)?;
        let end = match ended_at.or(alive_at) {
            Some(end) => end,
            // The last record belongs to the run.
            None => last_record(&file.connection, number)?
                .unwrap_or(started_at)
                .saturating_add(1),
        };
        let is_alive =
            |at: Micros| file.is_written && self.query.now.timestamp_micros() - at < ALIVE;
        let ended = match (ended_at, alive_at) {
            (Some(_), _) => Ended::Asked,
            (None, Some(at)) if is_alive(at) => Ended::Running,
            _ => Ended::Killed,
        };
        let lines = |text: Option<String>| -> Vec<String> {
            text.unwrap_or_default()
                .lines()
                .map(str::to_owned)
                .collect()
        };
        let span = |micros: Option<i64>| {
            micros.map(|micros| format!("{:?}", Duration::from_micros(micros.unsigned_abs())))
        };
        Ok(Run {
            started_at,
            end: end.max(started_at),
            ended,
            statement: RunStatement {
                run: id.to_owned(),
                from: String::new(),
                until: String::new(),
                ended,
                policy: row.get(5)?,
                uptime_window: span(row.get(6)?),
                stale_after: span(row.get(7)?),
                ping_urls: lines(row.get(8)?),
                gateway_urls: lines(row.get(9)?),
                version: row.get(10)?,
                records_dropped: row.get::<_, i64>(11)?.unsigned_abs(),
            },
            is_old,
            is_split: false,
        })
    }

    /// Without a period that was asked for it is that of the runs. Only runs that touch it take part.
    fn settle_period(&mut self) {
        let Period { from, until } = self.query.period;
        let first = self.runs.values().map(|run| run.started_at).min();
        let last = self.runs.values().map(|run| run.end).max();
        let now = self.query.now.timestamp_micros();
        if from == Micros::MIN {
            self.period.from = first.unwrap_or(now).min(until);
        }
        if until == Micros::MAX {
            self.period.until = last.unwrap_or(now).max(self.period.from);
        }
        let Period { from, until } = self.period;
        self.runs
            .retain(|_, run| run.started_at < until && run.end >= from);
    }

    fn read_slots(&mut self, file: &FileContent<'_>) -> anyhow::Result<()> {
        let Period { from, until } = self.period;
        let columns = "run, agent, at, base_rate, rate, reason, asked, withheld, dropped_in_flight, dropped_late, \
             dropped_budget";
        // What was counted before the period.
        let mut before = file.connection().prepare(&format!(
            "SELECT {columns} FROM slots WHERE agent = ?1 AND run = ?2 AND at <= ?3 ORDER BY at DESC LIMIT 1"
        ))?;
        for (number, id) in file.runs {
            let Some(run) = self.runs.get(id).filter(|run| run.started_at <= from) else {
                continue;
            };
            let started_at = run.started_at;
            for (agent, name) in &file.agents {
                let mut rows = before.query(params![agent, number, from])?;
                let last = match rows.next()? {
                    Some(row) => counts(row)?,
                    None => SlotCounts {
                        at: started_at,
                        ..SlotCounts::default()
                    },
                };
                let window = Window {
                    from: last.at,
                    last,
                };
                let key = (id.clone(), name.clone());
                let known = self.windows.entry(key).or_insert(window);
                if known.last.at < last.at {
                    *known = window;
                }
            }
        }
        let mut statement = file.connection().prepare(&format!(
            "SELECT {columns} FROM slots WHERE agent IN ({}) AND at > ?1 AND at <= ?2 ORDER BY agent, at",
            file.agents_sql()
        ))?;
        let mut rows = statement.query(params![from, until])?;
        while let Some(row) = rows.next()? {
            let number: i64 = row.get(0)?;
            let agent: i64 = row.get(1)?;
            let Some(id) = file
                .runs
                .get(&number)
                .filter(|id| self.runs.contains_key(*id))
            else {
                continue;
            };
            let now = counts(row)?;
            let name = &file.agents[&agent];
            let started_at = self.runs[id].started_at;
            let window = self
                .windows
                .entry((id.clone(), name.clone()))
                .or_insert_with(|| Window {
                    from: started_at,
                    last: SlotCounts {
                        at: started_at,
                        ..SlotCounts::default()
                    },
                });
            if now.at <= window.last.at && now.asked <= window.last.asked {
                continue;
            }
            let last = std::mem::replace(&mut window.last, now);
            let sums = self.agents.entry(name.clone()).or_default();
            let since = |now: u64, last: u64| now.saturating_sub(last);
            sums.missing += since(now.sent(), last.sent()).cast_signed();
            for ((reason, now), last) in DROPPED.iter().zip(now.dropped).zip(last.dropped) {
                if now > last {
                    *sums.dropped.entry((*reason).to_owned()).or_default() += now - last;
                }
            }
            let withheld = since(now.withheld, last.withheld);
            if withheld > 0 {
                let reason: String = row.get(5)?;
                let reason =
                    RateReason::named(&reason).map_or(reason, |reason| cause(reason).to_owned());
                *sums.withheld.entry(reason.clone()).or_default() += withheld;
                sums.withhold(Interval {
                    from: last.at.max(from),
                    until: now.at,
                    reason,
                    rate: JobsPerMinute::new(row.get(4)?),
                    base: JobsPerMinute::new(row.get(3)?),
                    slots: withheld,
                });
            }
        }
        Ok(())
    }

    fn read_pings(&mut self, file: &FileContent<'_>) -> anyhow::Result<()> {
        let Period { from, until } = self.period;
        // One before the period, on which the first one in it may depend, and all that may speak for its end.
        let mut statement = file.connection().prepare(
            "SELECT timestamp, covers_from, success, is_void, first_ping, gpu_available, uptime_percent, window_seconds \
             FROM pings WHERE agent = ?1 AND timestamp >= COALESCE((SELECT MAX(timestamp) FROM pings WHERE agent = ?1 \
             AND timestamp <= ?2), ?2) AND (timestamp <= ?3 OR COALESCE(covers_from < ?3, TRUE)) ORDER BY timestamp",
        )?;
        for (agent, name) in &file.agents {
            let mut rows = statement.query(params![agent, from, until])?;
            while let Some(row) = rows.next()? {
                let ping = ping(row)?;
                let sums = self.agents.entry(name.clone()).or_default();
                sums.pings.insert(ping.timestamp.timestamp_micros(), ping);
            }
        }
        Ok(())
    }

    /// Runs of 0.1.0: slots follow from the rates, the uptime from what was known at each time.
    fn read_old(&mut self, file: &FileContent<'_>) -> anyhow::Result<()> {
        let old = |id: &RunId| self.runs.get(id).is_some_and(|run| run.is_old);
        if !file.runs.values().any(old) {
            return Ok(());
        }
        let reading = ReadOptions {
            period: self.period,
            pictures: None,
        };
        let history = RecordedRuns::read(file.connection(), reading)?;
        for (name, agent) in history.agents {
            if !file.agents.values().any(|wanted| *wanted == name) {
                continue;
            }
            let sums = self.agents.entry(name).or_default();
            for timeline in agent.runs.into_iter().filter(|timeline| timeline.is_old) {
                sums.old_asked += timeline
                    .held()
                    .map(|held| held.slots())
                    .sum::<Slots>()
                    .whole();
                for (reason, slots) in timeline.withheld() {
                    *sums.withheld.entry(reason.to_owned()).or_default() += slots.whole();
                }
                for held in timeline.held().filter(|held| held.withheld().whole() > 0) {
                    sums.withhold(Interval {
                        from: held.from,
                        until: held.until,
                        reason: cause(held.step.reason).to_owned(),
                        rate: held.step.rate,
                        base: held.step.base,
                        slots: held.withheld().whole(),
                    });
                }
                sums.old_uptimes.push(timeline);
            }
        }
        Ok(())
    }

    /// The job of a row that begins with run, agent, capability, id and time, if it counts.
    fn find(&mut self, file: &FileContent<'_>, row: &Row<'_>) -> rusqlite::Result<Option<Found>> {
        let number: i64 = row.get(0)?;
        let known = file.runs.get(&number);
        let Some((id, run)) = known.and_then(|id| self.runs.get_key_value(id)) else {
            return Ok(None);
        };
        let job_id: Vec<u8> = row.get(3)?;
        if run.is_split && !self.seen.insert(job_id.clone()) {
            return Ok(None);
        }
        let agent: i64 = row.get(1)?;
        let name = &file.agents[&agent];
        let sent_at: Micros = row.get(4)?;
        let window = self.windows.get(&(id.clone(), name.clone()));
        if window.is_some_and(|window| window.from < sent_at && sent_at <= window.last.at) {
            self.agents.entry(name.clone()).or_default().missing -= 1;
        }
        let found = Found {
            run: (run.started_at, run.end),
            job_id: Uuid::from_slice(&job_id).unwrap_or_default(),
            sent_at,
        };
        Ok((sent_at >= self.period.from).then_some(found))
    }

    fn read_jobs(&mut self, file: &FileContent<'_>) -> anyhow::Result<()> {
        let Period { from, until } = self.period;
        let mut balances: HashMap<i64, OrchestratorBalances> = HashMap::new();
        // In the order of their ends, which that of the rows is; the sign keeps the index of times in use.
        let mut statement = file.connection().prepare(&format!(
            "SELECT run, agent, capability, job_id, sent_at, outcome, COALESCE(is_stream, outcome = 'unpaid' AND status = 200), \
             COALESCE(worked_us, MAX(latency_us - send_lag_us, 0)), COALESCE(timeout_seconds, 4294967295), orchestrator, \
             sent_to, balance_wei FROM jobs WHERE sent_at >= ?1 AND sent_at < ?2 AND agent IN ({}) ORDER BY +rowid",
            file.agents_sql()
        ))?;
        let mut rows = statement.query(params![from.saturating_sub(SLOTS_LAG), until])?;
        while let Some(row) = rows.next()? {
            let number: i64 = row.get(0)?;
            let Some(Found {
                run,
                job_id,
                sent_at,
            }) = self.find(file, row)?
            else {
                continue;
            };
            let agent: i64 = row.get(1)?;
            let name = &file.agents[&agent];
            let sums = self.agents.entry(name.clone()).or_default();
            let outcome: String = row.get(5)?;
            let outcome = Outcome::named(&outcome).ok_or(HistoryError::Unknown {
                column: "jobs.outcome",
                value: outcome,
            })?;
            let work = Work {
                outcome,
                is_stream: row.get(6)?,
                time: Duration::from_micros(row.get::<_, i64>(7)?.unsigned_abs()),
                timeout_seconds: row.get(8)?,
            };
            let seconds = work.charged_seconds();
            let capability: i64 = row.get(2)?;
            let price = file.prices.get(&(number, agent));
            let orchestrator: Option<String> = row.get(9)?;
            if let Some(orchestrator) = &orchestrator {
                let balance: Option<String> = row.get(11)?;
                let balance: Option<Wei> = balance.and_then(|balance| balance.parse().ok());
                let most =
                    price.map(|price| price.unit.for_units(u64::from(work.timeout_seconds) + 1));
                let worked = i64::try_from(work.time.as_micros()).unwrap_or(i64::MAX);
                let change = balances.entry(number).or_default().told(ToldBalance {
                    orchestrator,
                    capability,
                    balance: balance.as_ref(),
                    seconds,
                    most: most.as_ref(),
                    sent_at,
                    answered_at: sent_at.saturating_add(worked),
                });
                sums.balance.add(&change);
            }
            let capability = file.capability(capability)?;
            let sent_to: Option<String> = row.get(10)?;
            let job = Job {
                id: job_id,
                agent: name,
                capability,
                orchestrator: orchestrator.or(sent_to).unwrap_or_default(),
                sent_at,
                outcome: outcome.name(),
                charged: work.outcome.is_charged(work.is_stream).then(|| ChargedJob {
                    seconds,
                    units: price.map_or(0, |price| price.units(work)),
                }),
                price,
            };
            let charged_in = (run.0.max(from), run.1.min(until));
            sums.add(&job, outcome == Outcome::Success, charged_in);
            if let Some(out) = &mut self.jobs_file {
                job.write(out)?;
            }
        }
        Ok(())
    }

    fn read_in_flight(&mut self, file: &FileContent<'_>) -> anyhow::Result<()> {
        let Period { from, until } = self.period;
        let mut statement = file.connection().prepare(&format!(
            "SELECT run, agent, capability, job_id, sent_at FROM jobs_in_flight WHERE sent_at >= ?1 AND sent_at < ?2 \
             AND agent IN ({}) ORDER BY sent_at, job_id",
            file.agents_sql()
        ))?;
        let mut rows = statement.query(params![from.saturating_sub(SLOTS_LAG), until])?;
        while let Some(row) = rows.next()? {
            let number: i64 = row.get(0)?;
            let Some(Found {
                job_id, sent_at, ..
            }) = self.find(file, row)?
            else {
                continue;
            };
            let agent: i64 = row.get(1)?;
            let name = &file.agents[&agent];
            let sums = self.agents.entry(name.clone()).or_default();
            let job = Job {
                id: job_id,
                agent: name,
                capability: file.capability(row.get(2)?)?,
                orchestrator: String::new(),
                sent_at,
                outcome: UNKNOWN,
                charged: None,
                price: file.prices.get(&(number, agent)),
            };
            sums.jobs.unknown += 1;
            sums.add(&job, false, (from, until));
            if let Some(out) = &mut self.jobs_file {
                job.write(out)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<Statements> {
        let Period { from, until } = self.period;
        let mut because = Vec::new();
        for (id, run) in &self.runs {
            match run.ended {
                Ended::Asked => {}
                Ended::Killed => because.push(format!("run {id} was killed")),
                Ended::Running => because.push(format!("run {id} goes on")),
            }
            if run.statement.records_dropped > 0 {
                because.push(format!(
                    "run {id} lacks {} records",
                    run.statement.records_dropped
                ));
            }
            if run.is_old {
                because.push(format!(
                    "run {id} was recorded by {}, which kept neither slots nor pings nor jobs in flight",
                    run.statement.version
                ));
            }
        }
        let names = &self.query.agents;
        let mut agents = self.agents;
        for name in names {
            agents.entry(name.clone()).or_default();
        }
        let agents: Vec<AgentStatement> = agents
            .into_iter()
            .map(|(name, sums)| sums.statement(name, from, until))
            .collect();
        for agent in &agents {
            let unaccounted = agent.slots.unaccounted;
            if unaccounted > 1 {
                because.push(format!(
                    "{} has {unaccounted} slots of which nothing is recorded",
                    agent.agent_id
                ));
            }
        }
        let clipped = |run: Run| RunStatement {
            from: instant(run.started_at.max(from)),
            until: instant(run.end.min(until)),
            ..run.statement
        };
        let gaps = gaps(self.runs.values(), from, until);
        let jobs_sha256 = self.jobs_file.map(JobsFile::finish).transpose()?;
        Ok(Statements {
            statement: Head {
                format: FORMAT,
                from: instant(from),
                until: instant(until),
                generated_at: instant(self.query.now.timestamp_micros()),
                software: format!("uptime-runner {}", env!("CARGO_PKG_VERSION")),
                complete: because.is_empty(),
                incomplete_because: because,
                runs: self.runs.into_values().map(clipped).collect(),
                gaps,
            },
            agents,
            jobs_sha256,
        })
    }
}

/// The times of a period in which nothing ran.
fn gaps<'a>(runs: impl Iterator<Item = &'a Run>, from: Micros, until: Micros) -> Vec<Gap> {
    let mut ran: Vec<(Micros, Micros)> = runs.map(|run| (run.started_at, run.end)).collect();
    ran.sort_unstable();
    let mut gaps = Vec::new();
    let mut known_until = from;
    for (begin, end) in ran.into_iter().chain([(until, until)]) {
        if begin > known_until {
            gaps.push(Gap {
                from: instant(known_until),
                until: instant(begin.min(until)),
            });
        }
        known_until = known_until.max(end);
    }
    gaps
}

/// When the last record of a run was made that never wrote that it goes on.
fn last_record(connection: &Connection, run: i64) -> rusqlite::Result<Option<Micros>> {
    let query = "SELECT MAX(at) FROM (SELECT MAX(sent_at) AS at FROM jobs WHERE run = ?1 UNION ALL \
         SELECT MAX(at) FROM polls WHERE run = ?1 UNION ALL SELECT MAX(at) FROM rates WHERE run = ?1)";
    connection.query_row(query, [run], |row| row.get(0))
}

fn counts(row: &Row<'_>) -> Result<SlotCounts, HistoryError> {
    let count = |index: usize, column: &'static str| -> Result<u64, HistoryError> {
        let count: i64 = row.get(index)?;
        let known = u64::try_from(count).ok().filter(|&n| n <= MAX_SLOTS);
        known.ok_or_else(|| HistoryError::Unknown {
            column,
            value: count.to_string(),
        })
    };
    let counts = SlotCounts {
        at: row.get(2)?,
        asked: count(6, "slots.asked")?,
        withheld: count(7, "slots.withheld")?,
        dropped: [
            count(8, "slots.dropped_in_flight")?,
            count(9, "slots.dropped_late")?,
            count(10, "slots.dropped_budget")?,
        ],
    };
    if counts.asked < counts.withheld + counts.dropped.iter().sum::<u64>() {
        return Err(HistoryError::Unknown {
            column: "slots.asked",
            value: counts.asked.to_string(),
        });
    }
    Ok(counts)
}

fn ping(row: &Row<'_>) -> rusqlite::Result<HistoryPing> {
    let time = |micros: i64| DateTime::from_timestamp_micros(micros).unwrap_or_default();
    Ok(HistoryPing {
        timestamp: time(row.get(0)?),
        covers_from: row.get::<_, Option<i64>>(1)?.map(time),
        success: row.get(2)?,
        is_void: row.get(3)?,
        first_ping: row.get(4)?,
        gpu_available: row.get(5)?,
        uptime_percent: row
            .get::<_, Option<f64>>(6)?
            .and_then(|percent| Percent::new(percent).ok()),
        window_seconds: row.get(7)?,
    })
}

impl Run {
    /// Takes in another part of the same run.
    fn join(&mut self, other: &Self) {
        self.is_split = true;
        self.started_at = self.started_at.min(other.started_at);
        // The later part knows how it ended.
        if other.end >= self.end {
            self.ended = other.ended;
            self.statement.ended = other.ended;
        }
        self.end = self.end.max(other.end);
        let dropped = &mut self.statement.records_dropped;
        *dropped = (*dropped).max(other.statement.records_dropped);
    }
}
