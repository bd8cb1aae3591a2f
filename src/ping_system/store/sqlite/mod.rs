//! The store in a SQLite file: for one ping system, with nothing to be installed. One thread writes, others read.

mod connection;
mod file;
mod worker;

use std::fmt;
use std::sync::Arc;

use anyhow::Context;
use async_trait::async_trait;
use chrono::{DateTime, Utc};
use rusqlite::types::ToSql;
use rusqlite::{OptionalExtension, Row, Transaction, params};
use uuid::Uuid;

use self::connection::Connection;
pub use self::file::Location;
use self::file::Owner;
use self::worker::Worker;
use super::rows::{
    AgentDetails, AgentRow, PingRow, count, instant, interval_micros, json, last_success,
};
use super::sql::{self, MICROS_PER_HOUR, PRUNED_AGENTS, PRUNED_PINGS_PER_AGENT};
use super::{
    AgentPage, AgentRecord, Claim, Claimed, Cursor, HEALTH_TIMEOUT, Lease, OPERATION_TIMEOUT,
    PingRecord, PruneCursor, Pruned, Registration, Store, StoreError, StoreHealth, Sum, Totals,
};
use crate::wire::ping_system::served::Ping;

/// Threads that read while the writer is writing.
const READERS: usize = 2;

const RELEASE: &str =
    "UPDATE agents SET lease = NULL, lease_until = NULL WHERE key = $1 AND lease = $2";

const STORE_AGENT: &str = "UPDATE agents SET next_ping_at = $1, ping_interval_us = $2, \
    total_pings = $3, consecutive_poor = $4, good_in_a_row = $5, last_ping_at = $6, \
    last_success = $7, last_uptime_percent = $8, answered_poor = $9, answered_good = $10, \
    status = $11, status_seq = $3, details = $12, lease = NULL, lease_until = NULL \
    WHERE key = $13 AND lease = $14";

const STORE_PING: &str = "INSERT INTO pings (agent_key, at, seq, success, uptime_percent, \
    window_seconds, gpu_available, first_ping, response_time_ms, error, covered_seconds, \
    covers_from, observed) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)";

/// Failed pings of an agent (key) from an instant on, stored after a number.
const TAKE_FROM_HOURS: &str = "INSERT INTO hours (agent_key, hour, up_seconds, covered_seconds) \
    SELECT agent_key, at / 3600000000, 0.0, -SUM(covered_seconds) FROM pings \
    WHERE agent_key = $1 AND at >= $2 AND seq > $3 AND success = 0 AND observed = 1 GROUP BY 1, 2 \
    ON CONFLICT (agent_key, hour) DO UPDATE SET \
    covered_seconds = hours.covered_seconds + excluded.covered_seconds";

const SUPERSEDE: &str = "UPDATE pings SET superseded = 1, window_seconds = 0.0, \
    covered_seconds = 0.0 \
    WHERE agent_key = $1 AND at >= $2 AND seq > $3 AND success = 0 AND observed = 1";

const STORE_HOUR: &str = "INSERT INTO hours (agent_key, hour, up_seconds, covered_seconds) \
    VALUES ($1, $2, $3, $4) ON CONFLICT (agent_key, hour) DO UPDATE SET \
    up_seconds = hours.up_seconds + excluded.up_seconds, \
    covered_seconds = hours.covered_seconds + excluded.covered_seconds";

/// Agents and pings in a SQLite database.
pub struct SqliteStore {
    writer: Worker,
    readers: Worker,
    /// `None` for a database in memory.
    _owner: Option<Owner>,
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SqliteStore")
    }
}

/// Opens a database, and creates the file if it does not exist. The file belongs to this store until it is dropped.
///
/// # Errors
/// A file that cannot be opened or written to, is no database, has newer tables, or belongs to another process.
pub async fn open(location: Location) -> anyhow::Result<SqliteStore> {
    tokio::task::spawn_blocking(move || open_blocking(location))
        .await
        .context("the thread that opens the database ended")?
}

fn open_blocking(location: Location) -> anyhow::Result<SqliteStore> {
    match location {
        Location::Memory => {
            let writer = Worker::start("sqlite", vec![Connection::in_memory()?])?;
            // Each connection to memory would have a memory of its own.
            let readers = writer.clone();
            Ok(SqliteStore {
                writer,
                readers,
                _owner: None,
            })
        }
        Location::File(path) => {
            let owner = Owner::lock(&path)?;
            let (writer, accepted) = Connection::writer(&path)?;
            let readers = (0..READERS).map(|_| Connection::reader(&path, &accepted));
            let readers = readers.collect::<Result<_, _>>()?;
            Ok(SqliteStore {
                writer: Worker::start("sqlite-writer", vec![writer])?,
                readers: Worker::start("sqlite-reader", readers)?,
                _owner: Some(owner),
            })
        }
    }
}

impl SqliteStore {
    async fn read<T: Send + 'static>(
        &self,
        operation: impl Fn(&rusqlite::Connection) -> Result<T, StoreError> + Send + Clone + 'static,
    ) -> Result<T, StoreError> {
        let again = operation.clone();
        let read = move |connection: &mut Connection| connection.read(operation);
        let result = self.readers.run(OPERATION_TIMEOUT, read).await;
        if !matches!(result, Err(StoreError::Unavailable(_))) {
            return result;
        }
        // The file may have been put back: whether it may be used is for the writer to decide.
        self.writer
            .run(OPERATION_TIMEOUT, Connection::ensure_current)
            .await?;
        self.readers
            .run(OPERATION_TIMEOUT, move |connection| connection.read(again))
            .await
    }

    async fn write<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.writer
            .run(OPERATION_TIMEOUT, |connection| connection.write(operation))
            .await
    }

    async fn write_acknowledged<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.writer
            .run(OPERATION_TIMEOUT, |connection| {
                connection.write_acknowledged(operation)
            })
            .await
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn register(&self, new: &Registration) -> Result<AgentRecord, StoreError> {
        let new = new.clone();
        self.write_acknowledged(move |transaction| {
            let at = new.at.timestamp_micros();
            transaction
                .prepare_cached(&sql::come_back(""))?
                .execute(params![new.agent_id, new.agent_url, at])?;
            transaction
                .prepare_cached(sql::NOT_DEPARTED)?
                .query_row([&new.agent_id], |_| Ok(()))
                .optional()?;
            let values = params![
                new.agent_id,
                new.agent_url,
                json(&new.capabilities.as_deref().unwrap_or_default()),
                json(&new.metadata.clone().unwrap_or_default()),
                at,
                at,
                interval_micros(new.interval.as_secs_f64() / 60.0),
                new.capabilities.is_some(),
                new.metadata.is_some(),
            ];
            let mut statement = transaction.prepare_cached(sql::REGISTER)?;
            statement.query_row(values, agent_row)?.try_into()
        })
        .await
    }

    async fn remove(
        &self,
        agent_id: &str,
        at: DateTime<Utc>,
        forget: bool,
    ) -> Result<bool, StoreError> {
        let agent_id = agent_id.to_owned();
        let at = at.timestamp_micros();
        self.write_acknowledged(move |transaction| {
            if !forget {
                transaction.execute(sql::DEPART, params![at, agent_id])?;
            }
            let delete = |sql| -> rusqlite::Result<Option<i64>> {
                let mut delete = transaction.prepare_cached(sql)?;
                delete.query_row([&agent_id], |row| row.get(0)).optional()
            };
            let removed = delete(sql::REMOVE)?;
            let forgotten = if forget {
                [removed, delete(sql::NOT_DEPARTED)?]
            } else {
                [None; 2]
            };
            for key in forgotten.into_iter().flatten() {
                transaction.execute(sql::REMEMBER_REMOVED, [key])?;
            }
            Ok(removed.or(forgotten[1]).is_some())
        })
        .await
    }

    async fn agent(&self, agent_id: &str) -> Result<Option<AgentRecord>, StoreError> {
        let agent_id = agent_id.to_owned();
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(sql::AGENT)?;
            let row = statement.query_row([&agent_id], agent_row).optional()?;
            row.map(AgentRecord::try_from).transpose()
        })
        .await
    }

    async fn agents(&self, page: AgentPage<'_>) -> Result<Vec<AgentRecord>, StoreError> {
        let after = page.after.to_owned();
        let due_at = page.due_at.map_or(i64::MAX, |at| at.timestamp_micros());
        let limit = count(page.limit);
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(sql::AGENTS)?;
            let rows = statement.query_map(params![after, due_at, limit], agent_row)?;
            rows.map(|row| row?.try_into()).collect()
        })
        .await
    }

    async fn totals(&self, now: DateTime<Utc>) -> Result<Totals, StoreError> {
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(sql::TOTALS)?;
            let totals = statement.query_row([now.timestamp_micros()], |row| {
                let count = |column| row.get(column).map(i64::unsigned_abs);
                Ok(Totals {
                    agents: count(0)?,
                    unreachable: count(1)?,
                    no_gpu: count(2)?,
                    unobserved: count(3)?,
                    unknown: count(4)?,
                    due: count(5)?,
                    poor: count(6)?,
                    pings: count(7)?,
                })
            })?;
            Ok(totals)
        })
        .await
    }

    async fn claim_due(&self, lease: Lease, limit: usize) -> Result<Vec<Claim>, StoreError> {
        self.write(move |transaction| {
            let token = Uuid::new_v4().to_string();
            let mut statement = transaction.prepare_cached(&sql::claim_due(""))?;
            let rows = statement.query_map(
                params![
                    token,
                    lease.until.timestamp_micros(),
                    lease.now.timestamp_micros(),
                    count(limit),
                ],
                agent_row,
            )?;
            rows.map(|row| {
                Ok(Claim {
                    known: claimed(transaction, row?)?,
                    token: token.clone(),
                })
            })
            .collect()
        })
        .await
    }

    async fn claim(&self, lease: Lease, agent_id: &str) -> Result<Claimed, StoreError> {
        let agent_id = agent_id.to_owned();
        self.write(move |transaction| {
            let token = Uuid::new_v4().to_string();
            let mut claim = transaction.prepare_cached(sql::CLAIM)?;
            let values = params![
                token,
                lease.until.timestamp_micros(),
                agent_id,
                lease.now.timestamp_micros(),
            ];
            if let Some(row) = claim.query_row(values, agent_row).optional()? {
                let known = claimed(transaction, row)?;
                return Ok(Claimed::Ours(Box::new(Claim { known, token })));
            }
            let mut agent = transaction.prepare_cached(sql::AGENT)?;
            Ok(if agent.exists([agent_id])? {
                Claimed::Taken
            } else {
                Claimed::Unknown
            })
        })
        .await
    }

    async fn release(&self, claims: &[Claim]) -> Result<(), StoreError> {
        let leases: Vec<(i64, String)> = claims
            .iter()
            .map(|claim| (claim.known.key, claim.token.clone()))
            .collect();
        self.write(move |transaction| {
            let mut statement = transaction.prepare_cached(RELEASE)?;
            for lease in leases {
                statement.execute(lease)?;
            }
            Ok(())
        })
        .await
    }

    async fn next_due_at(&self, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(sql::NEXT_DUE)?;
            let due_at = statement
                .query_row([now.timestamp_micros()], |row| row.get(0))
                .optional()?;
            Ok(due_at.map(instant))
        })
        .await
    }

    async fn record(&self, pings: Arc<[(Claim, PingRecord)]>) -> Result<Vec<bool>, StoreError> {
        self.write_acknowledged(move |transaction| {
            pings
                .iter()
                .map(|(claim, new)| store_ping(transaction, claim, new))
                .collect()
        })
        .await
    }

    async fn history(
        &self,
        agent_key: i64,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, Ping)>, StoreError> {
        let limit = count(limit);
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(sql::HISTORY)?;
            let values = params![agent_key, after.at_micros, after.seq, limit];
            let rows = statement.query_map(values, ping_row)?;
            rows.map(|row| row?.try_into()).collect()
        })
        .await
    }

    async fn latest(&self, agent_key: i64, limit: usize) -> Result<Vec<Ping>, StoreError> {
        let limit = count(limit);
        self.read(move |connection| {
            let mut statement = connection.prepare_cached(sql::LATEST)?;
            let rows = statement.query_map([agent_key, limit], ping_row)?;
            let mut pings = rows
                .map(|row| Ok(<(Cursor, Ping)>::try_from(row?)?.1))
                .collect::<Result<Vec<_>, StoreError>>()?;
            pings.reverse();
            Ok(pings)
        })
        .await
    }

    async fn sums_since(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        let filter = agent_keys.map_or(String::new(), |keys| {
            let keys: Vec<String> = keys.iter().map(i64::to_string).collect();
            format!(" WHERE a.key IN ({})", keys.join(", "))
        });
        self.read(move |connection| {
            let mut sums = Vec::new();
            for part in sql::sums(since.timestamp_micros(), &filter) {
                let mut statement = connection.prepare(&part.sql)?;
                let rows = statement.query_map([part.from, part.until], |row| {
                    let sum = Sum {
                        up_seconds: row.get(1)?,
                        covered_seconds: row.get(2)?,
                    };
                    Ok((row.get(0)?, sum))
                })?;
                for row in rows {
                    sums.push(row?);
                }
            }
            Ok(sums)
        })
        .await
    }

    async fn now(&self) -> Result<DateTime<Utc>, StoreError> {
        Ok(Utc::now())
    }

    async fn reschedule_overdue(
        &self,
        now: DateTime<Utc>,
        latest_lease_end: DateTime<Utc>,
    ) -> Result<(), StoreError> {
        self.write(move |transaction| {
            transaction.execute(sql::RESCHEDULE_OVERDUE, [now.timestamp_micros()])?;
            transaction.execute(sql::FREE_LEASES, [latest_lease_end.timestamp_micros()])?;
            Ok(())
        })
        .await
    }

    async fn void_failures(
        &self,
        claim: &Claim,
        since: DateTime<Utc>,
        reason: &str,
        after: &AgentRecord,
    ) -> Result<bool, StoreError> {
        let (claim, after, reason) = (claim.clone(), after.clone(), reason.to_owned());
        let since = since.timestamp_micros();
        self.write_acknowledged(move |transaction| {
            if !store_agent(transaction, &claim, &after)? {
                return Ok(false);
            }
            let key = claim.known.key;
            transaction.execute(sql::TAKE_VOID_FROM_HOURS, [key, since])?;
            transaction.execute(sql::VOID_FAILURES, params![reason, key, since])?;
            Ok(true)
        })
        .await
    }

    async fn retention_now(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.read(|connection| {
            let now: Option<i64> =
                connection.query_row(sql::RETENTION_NOW, [], |row| row.get(0))?;
            Ok(now.map(instant))
        })
        .await
    }

    async fn set_retention_now(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        self.write(move |transaction| {
            transaction.execute(sql::SET_RETENTION_NOW, [now.timestamp_micros()])?;
            Ok(())
        })
        .await
    }

    async fn prune(&self, before: DateTime<Utc>, from: PruneCursor) -> Result<Pruned, StoreError> {
        let before = before.timestamp_micros();
        self.write(move |transaction| prune(transaction, before, from))
            .await
    }

    async fn health(&self) -> Result<StoreHealth, StoreError> {
        let check = |transaction: &Transaction<'_>| {
            transaction.execute(sql::CHECK_WRITE, [Utc::now().timestamp_micros()])?;
            let version = connection::version(transaction)?;
            Ok(StoreHealth {
                kind: "sqlite",
                host: None,
                replication: None,
                schema_version: version.map_or(0, |version| version.version),
            })
        };
        self.writer
            .run(HEALTH_TIMEOUT, move |connection| connection.write(check))
            .await
    }
}

/// A claimed agent, with the time of its last answer.
fn claimed(transaction: &Transaction<'_>, row: AgentRow) -> Result<AgentRecord, StoreError> {
    let mut known = AgentRecord::try_from(row)?;
    if known.last_answered_at.is_none() {
        let mut statement = transaction.prepare_cached(sql::LAST_ANSWERED)?;
        let at = statement.query_row([known.key], |row| row.get(0));
        known.last_answered_at = at.optional()?.map(instant);
    }
    Ok(known)
}

/// Replaces a claimed agent and ends the claim; `false` if that was no longer valid.
fn store_agent(
    transaction: &Transaction<'_>,
    claim: &Claim,
    after: &AgentRecord,
) -> Result<bool, StoreError> {
    let agent = &after.agent;
    let updated = transaction.prepare_cached(STORE_AGENT)?.execute(params![
        agent.next_ping_at.timestamp_micros(),
        interval_micros(agent.ping_interval_minutes),
        count(agent.total_pings),
        after.streak.consecutive_poor,
        after.streak.good_in_a_row,
        agent.last_ping_at.map(|at| at.timestamp_micros()),
        last_success(agent.status),
        agent.last_uptime_percent.map(f64::from),
        after.answered_streak.consecutive_poor,
        after.answered_streak.good_in_a_row,
        agent.status.name(),
        json(&AgentDetails::of(after)),
        claim.known.key,
        claim.token,
    ])?;
    Ok(updated > 0)
}

/// Stores one ping and ends its claim; `false` if that was no longer valid.
fn store_ping(
    transaction: &Transaction<'_>,
    claim: &Claim,
    new: &PingRecord,
) -> Result<bool, StoreError> {
    if !store_agent(transaction, claim, &new.after)? {
        return Ok(false);
    }
    let ping = &new.ping;
    let at = ping.timestamp.timestamp_micros();
    let seq = count(new.after.agent.total_pings);
    if let Some(failures) = new.supersedes {
        let from = failures.from.timestamp_micros();
        let superseded = [claim.known.key, from, count(failures.after_seq)];
        transaction
            .prepare_cached(TAKE_FROM_HOURS)?
            .execute(superseded)?;
        transaction.prepare_cached(SUPERSEDE)?.execute(superseded)?;
    }
    transaction.prepare_cached(STORE_PING)?.execute(params![
        claim.known.key,
        at,
        seq,
        ping.success,
        ping.uptime_percent.map(f64::from),
        ping.window_seconds,
        ping.gpu_available,
        ping.first_ping,
        ping.response_time_ms,
        ping.error,
        new.covered_seconds,
        ping.covers_from.map(|from| from.timestamp_micros()),
        ping.observed,
    ])?;
    if new.covered_seconds > 0.0 {
        let uptime = ping.uptime_percent.map_or(0.0, f64::from);
        transaction.prepare_cached(STORE_HOUR)?.execute(params![
            claim.known.key,
            at.div_euclid(MICROS_PER_HOUR),
            new.covered_seconds * uptime / 100.0,
            new.covered_seconds,
        ])?;
    }
    Ok(true)
}

fn prune(
    transaction: &Transaction<'_>,
    before: i64,
    from: PruneCursor,
) -> Result<Pruned, StoreError> {
    transaction.execute(sql::EXPIRE_DEPARTED, [before])?;
    transaction.execute(sql::FORGET_DEPARTED, [before])?;
    let mut agents = transaction.prepare_cached(sql::PRUNE_AGENTS)?;
    let agents = agents
        .query_map([from.0, PRUNED_AGENTS], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?
        .collect::<rusqlite::Result<Vec<(i64, bool)>>>()?;
    let mut pruned = Pruned::default();
    for &(key, removed) in &agents {
        let before = if removed { i64::MAX } else { before };
        let values: [&dyn ToSql; 3] = [&key, &before, &PRUNED_PINGS_PER_AGENT];
        let deleted = transaction
            .prepare_cached(sql::PRUNE_PINGS)?
            .execute(values)?;
        pruned.add(deleted as u64);
        if deleted > 0 || removed {
            transaction
                .prepare_cached(sql::PRUNE_HOURS)?
                .execute([key, before.div_euclid(MICROS_PER_HOUR)])?;
        }
        if removed && deleted == 0 {
            transaction
                .prepare_cached(sql::FORGET_REMOVED)?
                .execute([key])?;
        }
    }
    pruned.next = sql::next_step(agents.iter().map(|&(key, _)| key));
    Ok(pruned)
}

fn agent_row(row: &Row<'_>) -> rusqlite::Result<AgentRow> {
    Ok(AgentRow {
        key: row.get(0)?,
        agent_id: row.get(1)?,
        agent_url: row.get(2)?,
        capabilities: row.get(3)?,
        metadata: row.get(4)?,
        registered_at: row.get(5)?,
        next_ping_at: row.get(6)?,
        ping_interval_us: row.get(7)?,
        total_pings: row.get(8)?,
        consecutive_poor: row.get(9)?,
        good_in_a_row: row.get(10)?,
        last_ping_at: row.get(11)?,
        last_success: row.get(12)?,
        last_uptime_percent: row.get(13)?,
        answered_poor: row.get(14)?,
        answered_good: row.get(15)?,
        status: row.get(16)?,
        status_seq: row.get(17)?,
        details: row.get(18)?,
    })
}

fn ping_row(row: &Row<'_>) -> rusqlite::Result<PingRow> {
    Ok(PingRow {
        at: row.get(0)?,
        seq: row.get(1)?,
        success: row.get(2)?,
        uptime_percent: row.get(3)?,
        window_seconds: row.get(4)?,
        gpu_available: row.get(5)?,
        first_ping: row.get(6)?,
        response_time_ms: row.get(7)?,
        error: row.get(8)?,
        covers_from: row.get(9)?,
        superseded: row.get(10)?,
        observed: row.get(11)?,
    })
}
