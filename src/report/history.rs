//! The records of a file, read once: jobs as sums, uptimes and rates as the timelines that they are.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use rusqlite::Connection;

use crate::units::{JobsPerMinute, Percent};

/// The longest latency that is told apart from longer ones.
const HOUR_MICROS: u64 = 3_600_000_000;

/// All runs of a file.
#[derive(Debug, Default)]
pub struct History {
    /// How many runs there are.
    pub runs: u64,
    /// Records that a slow disk made them drop.
    pub records_dropped: u64,
    /// By agent's name.
    pub agents: BTreeMap<String, AgentHistory>,
}

/// What was recorded of one agent.
#[derive(Debug, Default)]
pub struct AgentHistory {
    /// By capability.
    pub jobs: BTreeMap<String, Jobs>,
    /// In the order of the runs.
    pub runs: Vec<Timeline>,
}

/// Jobs of one kind.
#[derive(Debug)]
pub struct Jobs {
    /// How many ended how.
    pub outcomes: BTreeMap<String, u64>,
    /// Their latencies in microseconds.
    pub latencies: Histogram<u64>,
}

impl Default for Jobs {
    fn default() -> Self {
        Self {
            outcomes: BTreeMap::new(),
            latencies: Histogram::new_with_bounds(1, HOUR_MICROS, 3)
                .expect("these bounds are valid"),
        }
    }
}

/// One agent in one run. Instants are microseconds since 1970.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Timeline {
    /// What full uptime would have earned.
    pub base_rate: JobsPerMinute,
    /// From when on each rate held.
    pub rates: Vec<(i64, JobsPerMinute)>,
    /// From when on each uptime was known, or none was.
    pub uptimes: Vec<(i64, Option<Percent>)>,
    /// When the run ended; of one that was killed, its last record.
    pub end: i64,
}

impl History {
    /// Reads everything.
    ///
    /// # Errors
    /// When the file cannot be read, or holds a value that was never recorded.
    pub fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let mut history = Self::default();
        let agents = names(connection, "SELECT agent, agent_id FROM agents")?;
        let capabilities = names(connection, "SELECT capability, name FROM capabilities")?;
        let name = |names: &BTreeMap<i64, String>, key: i64| {
            names.get(&key).cloned().unwrap_or_else(|| key.to_string())
        };

        // Summed up by number: a name would be looked up for each of millions.
        let mut jobs: BTreeMap<(i64, i64), Jobs> = BTreeMap::new();
        let mut statement =
            connection.prepare("SELECT agent, capability, outcome, latency_us FROM jobs")?;
        let mut rows = statement.query(())?;
        while let Some(row) = rows.next()? {
            let jobs = jobs.entry((row.get(0)?, row.get(1)?)).or_default();
            let outcome = row.get_ref(2)?.as_str()?;
            match jobs.outcomes.get_mut(outcome) {
                Some(count) => *count += 1,
                None => drop(jobs.outcomes.insert(outcome.to_owned(), 1)),
            }
            let latency: i64 = row.get(3)?;
            jobs.latencies
                .saturating_record(latency.max(1).unsigned_abs());
        }
        for ((agent, capability), jobs) in jobs {
            let agent = history.agents.entry(name(&agents, agent)).or_default();
            agent.jobs.insert(name(&capabilities, capability), jobs);
        }

        let mut statement = connection.prepare(
            "SELECT run, records_dropped, COALESCE(ended_at, MAX(started_at, \
             COALESCE((SELECT MAX(sent_at) FROM jobs WHERE jobs.run = runs.run), 0), \
             COALESCE((SELECT MAX(at) FROM polls WHERE polls.run = runs.run), 0), \
             COALESCE((SELECT MAX(at) FROM rates WHERE rates.run = runs.run), 0))) \
             FROM runs ORDER BY run",
        )?;
        let mut rows = statement.query(())?;
        while let Some(row) = rows.next()? {
            let run: i64 = row.get(0)?;
            history.runs += 1;
            history.records_dropped += row.get::<_, i64>(1)?.unsigned_abs();
            let end = row.get(2)?;
            for (agent, mut timeline) in timelines(connection, run)? {
                timeline.end = end;
                let agent = history.agents.entry(name(&agents, agent)).or_default();
                agent.runs.push(timeline);
            }
        }
        Ok(history)
    }
}

fn names(connection: &Connection, query: &str) -> rusqlite::Result<BTreeMap<i64, String>> {
    let mut statement = connection.prepare(query)?;
    let names = statement.query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?;
    names.collect()
}

fn timelines(connection: &Connection, run: i64) -> rusqlite::Result<BTreeMap<i64, Timeline>> {
    let mut timelines: BTreeMap<i64, Timeline> = BTreeMap::new();
    let mut statement = connection
        .prepare("SELECT agent, at, rate, base_rate FROM rates WHERE run = ?1 ORDER BY rowid")?;
    let mut rows = statement.query([run])?;
    while let Some(row) = rows.next()? {
        let timeline = timelines.entry(row.get(0)?).or_default();
        timeline.base_rate = JobsPerMinute::new(row.get(3)?);
        let rate = JobsPerMinute::new(row.get(2)?);
        timeline.rates.push((row.get(1)?, rate));
    }
    let mut statement = connection.prepare(
        "SELECT agent, at, state, uptime_percent FROM polls WHERE run = ?1 ORDER BY rowid",
    )?;
    let mut rows = statement.query([run])?;
    while let Some(row) = rows.next()? {
        let timeline = timelines.entry(row.get(0)?).or_default();
        let fresh = row.get_ref(2)?.as_str()? == "fresh";
        let uptime: Option<f64> = row.get(3)?;
        let uptime = uptime.filter(|_| fresh).and_then(|u| Percent::new(u).ok());
        timeline.uptimes.push((row.get(1)?, uptime));
    }
    Ok(timelines)
}
