//! The records of a file, read once: jobs as sums, uptimes and rates as the timelines that they are.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use rusqlite::{Connection, Row};

use super::balance::OrchestratorBalances;
use super::drops::drops;
use super::period::Period;
use super::tally::{JobRecord, RunTerms, Tally};
use super::timeline::{Micros, RateStep, Timeline, UptimeIntegral};
use crate::runner::events::event::RateReason;
use crate::runner::rate::policy::Policy;
use crate::text::foreign;
use crate::units::{JobsPerMinute, Percent};
use crate::wire::charge::{ChargedPer, Price, Work};
use crate::wire::outcome::Outcome;

/// All runs of a file.
#[derive(Debug, Default)]
pub struct RecordedRuns {
    /// How many runs there are.
    pub runs: u64,
    /// Records that a slow disk made them drop.
    pub records_dropped: u64,
    /// From when until when something is known.
    pub from: Micros,
    pub until: Micros,
    /// The last run's policy.
    pub policy: Policy,
    /// By agent's name.
    pub agents: BTreeMap<String, AgentHistory>,
}

/// What was recorded of one agent.
#[derive(Debug, Default)]
pub struct AgentHistory {
    /// In the order of the runs.
    pub runs: Vec<Timeline>,
    pub jobs: Tally,
}

/// How much is shown of a value that cannot be read.
const MAX_SHOWN_CHARS: usize = 64;

/// Why records cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file or the disk.
    #[error("{0}")]
    Database(#[from] rusqlite::Error),
    /// A value that is never recorded.
    #[error("{column} '{}': expected one that --record writes", foreign(.value, MAX_SHOWN_CHARS))]
    Unknown {
        column: &'static str,
        /// What stands there.
        value: String,
    },
}

/// How a file is read.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOptions {
    pub period: Period,
    /// Into how many parts of time jobs are summed up, for pictures, and of how many agents: those with
    /// the worst uptime.
    pub pictures: Option<(usize, usize)>,
}

/// A run, as it stands in the file.
struct RunRow {
    started_at: Micros,
    end: Micros,
    policy: Policy,
    is_old: bool,
}

impl RecordedRuns {
    /// Reads everything.
    ///
    /// # Errors
    /// When the file cannot be read, or holds a value that was never recorded.
    pub fn read(connection: &Connection, reading: ReadOptions) -> Result<Self, HistoryError> {
        let mut history = Self::default();
        let names = names(connection, "SELECT agent, agent_id FROM agents")?;
        let runs = history.read_runs(connection, reading.period)?;
        let mut agents = BTreeMap::new();
        for ((_, agent), timeline) in timelines(connection, &runs)? {
            let history: &mut AgentHistory = agents.entry(agent).or_default();
            let Period { from, until } = reading.period;
            history.runs.push(timeline.clipped(from, until));
        }
        let (slices, pictured) = reading.pictures.unwrap_or_default();
        let (from, until) = (history.from, history.until);
        let worst = worst(&agents, from, until);
        for (place, agent) in worst.into_iter().enumerate() {
            if let Some(history) = agents.get_mut(&agent) {
                let slices = if place < pictured { slices } else { 0 };
                history.jobs = Tally::new(drops(&history.runs), (slices, from, until));
            }
        }
        read_jobs(connection, reading.period, &mut agents)?;
        let of_name = agents.into_iter().map(|(agent, history)| {
            let name = names.get(&agent).cloned();
            (name.unwrap_or_else(|| agent.to_string()), history)
        });
        history.agents = of_name.collect();
        Ok(history)
    }

    fn read_runs(
        &mut self,
        connection: &Connection,
        period: Period,
    ) -> Result<BTreeMap<i64, RunRow>, HistoryError> {
        let last = |table: &str, column: &str| -> rusqlite::Result<BTreeMap<i64, Micros>> {
            let query = format!("SELECT run, MAX({column}) FROM {table} GROUP BY run");
            let mut statement = connection.prepare(&query)?;
            let rows = statement.query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        };
        let mut runs = BTreeMap::new();
        let mut killed = None;
        let mut statement = connection
            .prepare("SELECT run, started_at, COALESCE(ended_at, alive_at), policy, records_dropped, run_id IS NULL FROM runs")?;
        let mut rows = statement.query(())?;
        while let Some(row) = rows.next()? {
            let run: i64 = row.get(0)?;
            let started_at = row.get(1)?;
            let ended_at: Option<Micros> = row.get(2)?;
            let end = match (ended_at, &killed) {
                (Some(end), _) => end,
                (None, Some(lasts)) => last_record(lasts, run, started_at),
                (None, None) => {
                    let lasts = [
                        last("jobs", "sent_at")?,
                        last("polls", "at")?,
                        last("rates", "at")?,
                    ];
                    let end = last_record(&lasts, run, started_at);
                    killed = Some(lasts);
                    end
                }
            };
            if started_at >= period.until || end < period.from {
                continue;
            }
            self.runs += 1;
            self.records_dropped += row.get::<_, i64>(4)?.unsigned_abs();
            let policy: String = row.get(3)?;
            let policy: Policy = policy.parse().map_err(|_| HistoryError::Unknown {
                column: "runs.policy",
                value: policy,
            })?;
            self.policy = policy.clone();
            let run_of = RunRow {
                started_at,
                end,
                policy,
                is_old: row.get(5)?,
            };
            runs.insert(run, run_of);
        }
        let begins = runs.values().map(|run| run.started_at);
        self.from = begins.min().unwrap_or(0).max(period.from);
        let ends = runs.values().map(|run| run.end);
        self.until = ends.max().unwrap_or(0).min(period.until);
        Ok(runs)
    }
}

/// The agents that were followed, those with the worst uptime first.
fn worst(agents: &BTreeMap<i64, AgentHistory>, from: Micros, until: Micros) -> Vec<i64> {
    let uptime = |history: &AgentHistory| {
        let mean = UptimeIntegral::of(&history.runs).mean(from, until);
        mean.map_or(101.0, Percent::get)
    };
    let mut uptimes: Vec<(f64, i64)> = agents
        .iter()
        .map(|(&agent, h)| (uptime(h), agent))
        .collect();
    uptimes.sort_by(|a, b| a.0.total_cmp(&b.0));
    uptimes.into_iter().map(|(_, agent)| agent).collect()
}

fn last_record(lasts: &[BTreeMap<i64, Micros>; 3], run: i64, started_at: Micros) -> Micros {
    let of_run = lasts.iter().filter_map(|last| last.get(&run));
    of_run.copied().fold(started_at, Micros::max)
}

fn names(connection: &Connection, query: &str) -> rusqlite::Result<BTreeMap<i64, String>> {
    let mut statement = connection.prepare(query)?;
    let names = statement.query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?;
    names.collect()
}

/// The timelines of each agent in each run, by the numbers of both.
fn timelines(
    connection: &Connection,
    runs: &BTreeMap<i64, RunRow>,
) -> Result<BTreeMap<(i64, i64), Timeline>, HistoryError> {
    let mut timelines: BTreeMap<(i64, i64), Timeline> = BTreeMap::new();
    let mut timeline_of = |run: i64, agent: i64, add: &mut dyn FnMut(&mut Timeline)| {
        let Some(known) = runs.get(&run) else { return };
        add(timelines.entry((run, agent)).or_insert_with(|| Timeline {
            end: known.end,
            policy: known.policy.clone(),
            is_old: known.is_old,
            ..Timeline::default()
        }));
    };
    let mut statement = connection
        .prepare("SELECT run, agent, at, rate, base_rate, reason FROM rates ORDER BY rowid")?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let reason = row.get_ref(5)?.as_str().map_err(rusqlite::Error::from)?;
        let step = RateStep {
            at: row.get(2)?,
            rate: JobsPerMinute::new(row.get(3)?),
            base: JobsPerMinute::new(row.get(4)?),
            reason: RateReason::named(reason).ok_or_else(|| HistoryError::Unknown {
                column: "rates.reason",
                value: reason.to_owned(),
            })?,
        };
        timeline_of(row.get(0)?, row.get(1)?, &mut |timeline| {
            timeline.rates.push(step);
        });
    }
    let mut statement = connection
        .prepare("SELECT run, agent, at, state, uptime_percent FROM polls ORDER BY rowid")?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let fresh = row.get_ref(3)?.as_str().map_err(rusqlite::Error::from)? == "fresh";
        let uptime: Option<f64> = row.get(4)?;
        let uptime = uptime.filter(|_| fresh).and_then(|u| Percent::new(u).ok());
        let at = row.get(2)?;
        timeline_of(row.get(0)?, row.get(1)?, &mut |timeline| {
            // What says the same as before is no step.
            if timeline
                .uptimes
                .last()
                .is_none_or(|&(_, last)| last != uptime)
            {
                timeline.uptimes.push((at, uptime));
            }
        });
    }
    let mut statement =
        connection.prepare("SELECT run, agent, at, listing FROM discoveries ORDER BY rowid")?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let listing = row.get_ref(3)?.as_str().map_err(rusqlite::Error::from)?;
        let listed = match listing {
            "unknown" => None,
            other => Some(other != "not listed"),
        };
        let at = row.get(2)?;
        timeline_of(row.get(0)?, row.get(1)?, &mut |timeline| {
            timeline.listings.push((at, listed));
        });
    }
    Ok(timelines)
}

/// The terms on which each agent was followed in each run, by the numbers of both.
fn terms(connection: &Connection) -> Result<HashMap<(i64, i64), RunTerms>, HistoryError> {
    let mut all = HashMap::new();
    let mut statement = connection
        .prepare("SELECT run, agent, price_wei, orchestrators, price_per FROM run_agents")?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let price: Option<String> = row.get(2)?;
        let price = price.map(|price| {
            price.parse().map_err(|_| HistoryError::Unknown {
                column: "run_agents.price_wei",
                value: price,
            })
        });
        let orchestrators: Option<String> = row.get(3)?;
        let per = price_per(row.get::<_, Option<String>>(4)?.as_deref());
        let price = price.transpose()?.map(|unit| Price { unit, per });
        all.insert(
            (row.get(0)?, row.get(1)?),
            RunTerms::new(price, orchestrators.is_some()),
        );
    }
    let mut statement = connection
        .prepare("SELECT run, agent, at FROM discoveries WHERE listing IN ('listed', 'full')")?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let terms: &mut RunTerms = all.entry((row.get(0)?, row.get(1)?)).or_default();
        terms.listed(row.get(2)?);
    }
    Ok(all)
}

/// What a recorded price is for. Before there were live runners, all were for a second.
#[must_use]
pub(super) fn price_per(recorded: Option<&str>) -> ChargedPer {
    let per = recorded.and_then(ChargedPer::named);
    per.unwrap_or(ChargedPer::Second)
}

fn read_jobs(
    connection: &Connection,
    period: Period,
    agents: &mut BTreeMap<i64, AgentHistory>,
) -> Result<(), HistoryError> {
    let capabilities = names(connection, "SELECT capability, name FROM capabilities")?;
    let mut terms = terms(connection)?;
    // Each run's by itself: what happened to a balance between two runs is not known.
    let mut balances: HashMap<i64, OrchestratorBalances> = HashMap::new();
    // In the order in which they were answered.
    let mut statement = connection.prepare(
        "SELECT run, sent_at, agent, capability, outcome, latency_us, \
         COALESCE(worked_us, MAX(latency_us - send_lag_us, 0)), uptime_percent, orchestrator, balance_wei, \
         COALESCE(is_stream, outcome = 'unpaid' AND status = 200), COALESCE(timeout_seconds, 4294967295) \
         FROM jobs ORDER BY rowid",
    )?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let sent_at: Micros = row.get(1)?;
        if !period.holds(sent_at) {
            continue;
        }
        let (run, agent, capability): (i64, i64, i64) = (row.get(0)?, row.get(2)?, row.get(3)?);
        let job = job(row, sent_at)?;
        let tally = &mut agents.entry(agent).or_default().jobs;
        let name = || {
            let name = capabilities.get(&capability).cloned();
            name.unwrap_or_else(|| capability.to_string())
        };
        tally.job(
            &job,
            (capability, &name),
            terms.entry((run, agent)).or_default(),
            balances.entry(run).or_default(),
        );
    }
    Ok(())
}

fn job<'a>(row: &'a Row<'_>, sent_at: Micros) -> Result<JobRecord<'a>, HistoryError> {
    let text = |index: usize| -> rusqlite::Result<Option<&'a str>> {
        Ok(row.get_ref(index)?.as_str_or_null()?)
    };
    let outcome = text(4)?.unwrap_or_default();
    let span = |index: usize| -> rusqlite::Result<Duration> {
        Ok(Duration::from_micros(
            row.get::<_, i64>(index)?.unsigned_abs(),
        ))
    };
    Ok(JobRecord {
        sent_at,
        work: Work {
            outcome: Outcome::named(outcome).ok_or_else(|| HistoryError::Unknown {
                column: "jobs.outcome",
                value: outcome.to_owned(),
            })?,
            is_stream: row.get(10)?,
            time: span(6)?,
            timeout_seconds: row.get(11)?,
        },
        latency: span(5)?,
        uptime: row.get(7)?,
        orchestrator: text(8)?,
        balance_wei: text(9)?,
    })
}
