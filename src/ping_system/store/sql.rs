//! The store on a database that speaks SQL: what SQLite and PostgreSQL have in common, which is
//! nearly everything.

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{Any, AnyConnection, AnyPool, AssertSqlSafe, Connection, Row, SqlSafeStr, Transaction};
use uuid::Uuid;

use super::rows::{self, AGENT_COLUMNS, PING_COLUMNS, instant, interval_micros};
use super::{
    Claim, Claimed, Known, Lease, NewPing, Place, PruneFrom, Pruned, Registration, Store,
    StoreError, Sum,
};
use crate::wire::ping_system::served::{Ping, PingEvent, Status};

/// A database that does not answer for so long will not.
const PATIENCE: Duration = Duration::from_secs(15);
const MICROS_PER_HOUR: i64 = 3_600_000_000;
/// How much one step of pruning does at most.
const PRUNED_AGENTS: i64 = 100;
const PRUNED_PINGS_PER_AGENT: i64 = 1000;

const MIGRATIONS: [(i64, &str, &str); 2] = [
    (
        1,
        "agents and pings",
        include_str!("migrations/1_agents_and_pings.sql"),
    ),
    (2, "health", include_str!("migrations/2_health.sql")),
];

/// What the databases spell differently.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dialect {
    /// A key that is never given twice.
    pub(super) identity: &'static str,
    /// A table that is its own index.
    pub(super) clustered: &'static str,
    /// Takes rows that nobody else is just taking.
    pub(super) skip_locked: &'static str,
    /// Tells other processes what `$1` says once the transaction is done; `None` where there are
    /// no others.
    pub(super) notify: Option<&'static str>,
}

/// Agents and pings in tables.
#[derive(Debug)]
pub struct SqlStore {
    write: AnyPool,
    read: AnyPool,
    dialect: Dialect,
    /// Marks our own notifications.
    origin: Uuid,
}

/// Connects once and runs `settings`, to find out what is wrong: a pool only tells that time is up.
pub(super) async fn try_to_connect(url: &str, settings: &'static str) -> Result<(), sqlx::Error> {
    sqlx::any::install_default_drivers();
    let mut connection = AnyConnection::connect(url).await?;
    sqlx::raw_sql(settings).execute(&mut connection).await?;
    connection.close().await
}

impl SqlStore {
    /// Brings the tables to what this program needs.
    pub(super) async fn prepare(
        write: AnyPool,
        read: AnyPool,
        dialect: Dialect,
    ) -> anyhow::Result<Self> {
        let migrations = MIGRATIONS.map(|(version, description, sql)| {
            let sql = sql
                .replace("{{identity}}", dialect.identity)
                .replace("{{clustered}}", dialect.clustered);
            let sql = AssertSqlSafe(sql).into_sql_str();
            Migration::new(
                version,
                description.into(),
                MigrationType::Simple,
                sql,
                false,
            )
        });
        Migrator::with_migrations(migrations.into())
            .run(&write)
            .await?;
        Ok(Self {
            write,
            read,
            dialect,
            origin: Uuid::new_v4(),
        })
    }

    /// What marks our own notifications.
    pub(in crate::ping_system) fn origin(&self) -> Uuid {
        self.origin
    }

    /// Ends all leases: for a database that is ours alone.
    pub(super) async fn release_all(&self) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE agents SET lease = NULL, lease_until = NULL WHERE lease IS NOT NULL")
            .execute(&self.write)
            .await?;
        Ok(())
    }

    async fn store_ping(
        &self,
        transaction: &mut Transaction<'static, Any>,
        claim: &Claim,
        new: &NewPing,
    ) -> Result<bool, StoreError> {
        let (agent, ping) = (&new.after.agent, &new.ping);
        let at = ping.timestamp.timestamp_micros();
        let seq = count(agent.total_pings);
        let updated = sqlx::query(
            "UPDATE agents SET next_ping_at = $1, ping_interval_us = $2, total_pings = $3, \
             consecutive_poor = $4, good_in_a_row = $5, last_ping_at = $6, last_success = $7, \
             last_uptime_percent = NULLIF($8, -1.0), lease = NULL, lease_until = NULL \
             WHERE key = $9 AND lease = $10",
        )
        .bind(agent.next_ping_at.timestamp_micros())
        .bind(interval_micros(agent.ping_interval_minutes))
        .bind(seq)
        .bind(i64::from(new.after.behaviour.consecutive_poor))
        .bind(i64::from(new.after.behaviour.good_in_a_row))
        .bind(at)
        .bind(i64::from(agent.status == Status::Active))
        .bind(or_nothing(agent.last_uptime_percent.map(f64::from)))
        .bind(claim.known.key)
        .bind(claim.token.as_str())
        .execute(&mut **transaction)
        .await?;
        if updated.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query(
            "INSERT INTO pings (agent_key, at, seq, success, uptime_percent, window_seconds, \
             gpu_available, first_ping, response_time_ms, error, covered_seconds) \
             VALUES ($1, $2, $3, $4, NULLIF($5, -1.0), NULLIF($6, -1.0), $7, $8, \
             NULLIF($9, -1.0), $10, $11)",
        )
        .bind(claim.known.key)
        .bind(at)
        .bind(seq)
        .bind(i64::from(ping.success))
        .bind(or_nothing(ping.uptime_percent.map(f64::from)))
        .bind(or_nothing(ping.window_seconds))
        .bind(ping.gpu_available.map(i64::from))
        .bind(i64::from(ping.first_ping))
        .bind(or_nothing(ping.response_time_ms))
        .bind(ping.error.clone())
        .bind(new.covered_seconds)
        .execute(&mut **transaction)
        .await?;
        if new.covered_seconds > 0.0 {
            let uptime = ping.uptime_percent.map_or(0.0, f64::from);
            sqlx::query(
                "INSERT INTO hours (agent_key, hour, up_seconds, covered_seconds) \
                 VALUES ($1, $2, $3, $4) ON CONFLICT (agent_key, hour) DO UPDATE SET \
                 up_seconds = hours.up_seconds + excluded.up_seconds, \
                 covered_seconds = hours.covered_seconds + excluded.covered_seconds",
            )
            .bind(claim.known.key)
            .bind(at.div_euclid(MICROS_PER_HOUR))
            .bind(new.covered_seconds * uptime / 100.0)
            .bind(new.covered_seconds)
            .execute(&mut **transaction)
            .await?;
        }
        if let Some(notify) = self.dialect.notify {
            let event = Notification {
                origin: self.origin,
                event: PingEvent::from(new),
            };
            if let Ok(event) = serde_json::to_string(&event) {
                sqlx::query(notify)
                    .bind(event)
                    .execute(&mut **transaction)
                    .await?;
            }
        }
        Ok(true)
    }

    /// Sums of pings in `[from, until)`, given in microseconds.
    async fn sums_of(
        &self,
        table: &'static str,
        column: &'static str,
        up: &'static str,
        [from, until]: [i64; 2],
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        let mut sql = format!(
            "SELECT a.key AS key, SUM({up}) AS up_seconds, SUM(t.covered_seconds) AS covered_seconds \
             FROM agents a JOIN {table} t ON t.agent_key = a.key AND t.{column} >= $1 AND t.{column} < $2"
        );
        if let Some(keys) = agent_keys {
            let places: Vec<String> = (3..3 + keys.len()).map(|n| format!("${n}")).collect();
            sql.push_str(" WHERE a.key IN (");
            sql.push_str(&places.join(", "));
            sql.push(')');
        }
        sql.push_str(" GROUP BY a.key");
        let mut query = sqlx::query(AssertSqlSafe(sql)).bind(from).bind(until);
        for &key in agent_keys.unwrap_or_default() {
            query = query.bind(key);
        }
        let rows = query.fetch_all(&self.read).await?;
        let sum = |row: &AnyRow| -> Result<(i64, Sum), StoreError> {
            let sum = Sum {
                up_seconds: row.try_get::<Option<f64>, _>("up_seconds")?.unwrap_or(0.0),
                covered_seconds: row.try_get("covered_seconds")?,
            };
            Ok((row.try_get("key")?, sum))
        };
        rows.iter().map(sum).collect()
    }
}

/// A ping that other processes on the same database are told of.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Notification {
    pub(super) origin: Uuid,
    pub(super) event: PingEvent,
}

impl From<&NewPing> for PingEvent {
    fn from(new: &NewPing) -> Self {
        let agent = &new.after.agent;
        Self {
            agent_id: agent.agent_id.clone(),
            status: agent.status,
            next_ping_at: agent.next_ping_at,
            total_pings: agent.total_pings,
            consecutive_poor_uptime: agent.consecutive_poor_uptime,
            ping_interval_minutes: agent.ping_interval_minutes,
            ping: new.ping.clone(),
        }
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn register(&self, new: &Registration) -> Result<Known, StoreError> {
        let sql = format!(
            "INSERT INTO agents (agent_id, agent_url, capabilities, metadata, registered_at, \
             next_ping_at, ping_interval_us) VALUES ($1, $2, $3, $4, $5, $6, $7) \
             ON CONFLICT (agent_id) DO UPDATE SET agent_url = excluded.agent_url, \
             capabilities = excluded.capabilities, metadata = excluded.metadata \
             RETURNING {AGENT_COLUMNS}"
        );
        let at = new.at.timestamp_micros();
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(new.agent_id.as_str())
            .bind(new.agent_url.as_str())
            .bind(json(&new.capabilities))
            .bind(json(&new.metadata))
            .bind(at)
            .bind(at)
            .bind(interval_micros(new.interval.as_secs_f64() / 60.0));
        let row = in_time(written(query, &self.write)).await?;
        rows::known(&row.ok_or(sqlx::Error::RowNotFound)?)
    }

    async fn remove(&self, agent_id: &str) -> Result<bool, StoreError> {
        in_time(async {
            let mut transaction = self.write.begin().await?;
            let removed = sqlx::query("DELETE FROM agents WHERE agent_id = $1 RETURNING key")
                .bind(agent_id)
                .fetch_optional(&mut *transaction)
                .await?;
            let Some(row) = removed else {
                return Ok(false);
            };
            sqlx::query("INSERT INTO removed_agents (key) VALUES ($1)")
                .bind(row.try_get::<i64, _>("key")?)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    async fn agent(&self, agent_id: &str) -> Result<Option<Known>, StoreError> {
        let sql = format!("SELECT {AGENT_COLUMNS} FROM agents WHERE agent_id = $1");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(agent_id);
        let row = in_time(query.fetch_optional(&self.read)).await?;
        row.as_ref().map(rows::known).transpose()
    }

    async fn agents(&self, due_at: Option<DateTime<Utc>>) -> Result<Vec<Known>, StoreError> {
        let sql = format!(
            "SELECT {AGENT_COLUMNS} FROM agents WHERE next_ping_at <= $1 ORDER BY agent_id"
        );
        let due_at = due_at.map_or(i64::MAX, |at| at.timestamp_micros());
        let query = sqlx::query(AssertSqlSafe(sql)).bind(due_at);
        let rows = in_time(query.fetch_all(&self.read)).await?;
        rows.iter().map(rows::known).collect()
    }

    async fn claim_due(&self, lease: Lease, limit: usize) -> Result<Vec<Claim>, StoreError> {
        let sql = format!(
            "UPDATE agents SET lease = $1, lease_until = $2 WHERE key IN (\
             SELECT key FROM agents WHERE next_ping_at <= $3 \
             AND (lease_until IS NULL OR lease_until <= $3) \
             ORDER BY next_ping_at LIMIT $4 {}) RETURNING {AGENT_COLUMNS}",
            self.dialect.skip_locked
        );
        let token = Uuid::new_v4().to_string();
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(token.as_str())
            .bind(lease.until.timestamp_micros())
            .bind(lease.now.timestamp_micros())
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = in_time(query.fetch_all(&self.write)).await?;
        let claim = |row| {
            let known = rows::known(row)?;
            let token = token.clone();
            Ok(Claim { known, token })
        };
        rows.iter().map(claim).collect()
    }

    async fn claim(&self, lease: Lease, agent_id: &str) -> Result<Claimed, StoreError> {
        let sql = format!(
            "UPDATE agents SET lease = $1, lease_until = $2 WHERE agent_id = $3 \
             AND (lease_until IS NULL OR lease_until <= $4) RETURNING {AGENT_COLUMNS}"
        );
        let token = Uuid::new_v4().to_string();
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(token.as_str())
            .bind(lease.until.timestamp_micros())
            .bind(agent_id)
            .bind(lease.now.timestamp_micros());
        if let Some(row) = in_time(written(query, &self.write)).await? {
            let known = rows::known(&row)?;
            return Ok(Claimed::Ours(Box::new(Claim { known, token })));
        }
        Ok(match self.agent(agent_id).await? {
            Some(_) => Claimed::Taken,
            None => Claimed::Unknown,
        })
    }

    async fn release(&self, claims: &[Claim]) -> Result<(), StoreError> {
        in_time(async {
            let mut transaction = self.write.begin().await?;
            for claim in claims {
                sqlx::query(
                    "UPDATE agents SET lease = NULL, lease_until = NULL WHERE key = $1 AND lease = $2",
                )
                .bind(claim.known.key)
                .bind(claim.token.as_str())
                .execute(&mut *transaction)
                .await?;
            }
            transaction.commit().await
        })
        .await
    }

    async fn next_due_at(&self, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>, StoreError> {
        let query = sqlx::query(
            "SELECT next_ping_at FROM agents WHERE lease_until IS NULL OR lease_until <= $1 \
             ORDER BY next_ping_at LIMIT 1",
        )
        .bind(now.timestamp_micros());
        let row = in_time(query.fetch_optional(&self.read)).await?;
        let at = row.map(|row| row.try_get("next_ping_at")).transpose()?;
        Ok(at.map(instant))
    }

    async fn record(&self, pings: &[(Claim, NewPing)]) -> Result<Vec<bool>, StoreError> {
        tokio::time::timeout(PATIENCE, async {
            let mut transaction = self.write.begin().await?;
            let mut stored = Vec::with_capacity(pings.len());
            for (claim, new) in pings {
                stored.push(self.store_ping(&mut transaction, claim, new).await?);
            }
            transaction.commit().await?;
            Ok(stored)
        })
        .await
        .unwrap_or(Err(StoreError::Timeout(PATIENCE)))
    }

    async fn history(
        &self,
        agent_key: i64,
        behind: Place,
        limit: usize,
    ) -> Result<Vec<(Place, Ping)>, StoreError> {
        let sql = format!(
            "SELECT {PING_COLUMNS} FROM pings WHERE agent_key = $1 AND (at, seq) > ($2, $3) \
             ORDER BY at, seq LIMIT $4"
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(agent_key)
            .bind(behind.at_micros)
            .bind(behind.seq)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = in_time(query.fetch_all(&self.read)).await?;
        rows.iter().map(rows::ping).collect()
    }

    async fn latest(&self, agent_key: i64, limit: usize) -> Result<Vec<Ping>, StoreError> {
        let sql = format!(
            "SELECT {PING_COLUMNS} FROM pings WHERE agent_key = $1 \
             ORDER BY at DESC, seq DESC LIMIT $2"
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(agent_key)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = in_time(query.fetch_all(&self.read)).await?;
        let newest_last = rows.iter().rev();
        newest_last
            .map(|row| rows::ping(row).map(|(_, ping)| ping))
            .collect()
    }

    async fn sums_since(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        let from = since.timestamp_micros();
        // Whole hours from their sums, what stands before them from the pings themselves.
        let first_hour = from.div_euclid(MICROS_PER_HOUR) + 1;
        let before = [from, first_hour * MICROS_PER_HOUR];
        let up = "t.covered_seconds * COALESCE(t.uptime_percent, 0.0) / 100.0";
        let whole = [first_hour, i64::MAX];
        let mut sums = self
            .sums_of("hours", "hour", "t.up_seconds", whole, agent_keys)
            .await?;
        sums.extend(self.sums_of("pings", "at", up, before, agent_keys).await?);
        Ok(sums)
    }

    async fn pull_in(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        // A tenth more than the interval is beyond any spread.
        let query = sqlx::query(
            "UPDATE agents SET next_ping_at = $1 \
             WHERE next_ping_at > $1 + ping_interval_us + ping_interval_us / 10",
        )
        .bind(now.timestamp_micros());
        in_time(query.execute(&self.write)).await?;
        Ok(())
    }

    async fn prune(&self, before: DateTime<Utc>, from: PruneFrom) -> Result<Pruned, StoreError> {
        in_time(self.prune_step(before.timestamp_micros(), from)).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        let query =
            sqlx::query("UPDATE health SET checked_at = $1").bind(Utc::now().timestamp_micros());
        in_time(query.execute(&self.write)).await?;
        Ok(())
    }
}

impl SqlStore {
    async fn prune_step(&self, before: i64, from: PruneFrom) -> Result<Pruned, sqlx::Error> {
        let mut transaction = self.write.begin().await?;
        let due = sqlx::query(
            "SELECT key, removed FROM (SELECT key, 0 AS removed FROM agents UNION ALL \
             SELECT key, 1 AS removed FROM removed_agents) AS a \
             WHERE key > $1 ORDER BY key LIMIT $2",
        )
        .bind(from.0)
        .bind(PRUNED_AGENTS)
        .fetch_all(&mut *transaction)
        .await?;
        let mut pruned = Pruned {
            pings: 0,
            next: None,
            more: false,
        };
        for row in &due {
            let key: i64 = row.try_get("key")?;
            let removed = row.try_get::<i32, _>("removed")? != 0;
            let before = if removed { i64::MAX } else { before };
            let deleted = sqlx::query(
                "DELETE FROM pings WHERE agent_key = $1 AND at < $2 AND at <= COALESCE((\
                 SELECT at FROM pings WHERE agent_key = $1 AND at < $2 \
                 ORDER BY at LIMIT 1 OFFSET $3), $2)",
            )
            .bind(key)
            .bind(before)
            .bind(PRUNED_PINGS_PER_AGENT)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
            pruned.pings += deleted;
            pruned.more |= deleted > PRUNED_PINGS_PER_AGENT.unsigned_abs();
            if deleted > 0 || removed {
                sqlx::query("DELETE FROM hours WHERE agent_key = $1 AND hour < $2")
                    .bind(key)
                    .bind(before.div_euclid(MICROS_PER_HOUR))
                    .execute(&mut *transaction)
                    .await?;
            }
            if removed && deleted == 0 {
                sqlx::query("DELETE FROM removed_agents WHERE key = $1")
                    .bind(key)
                    .execute(&mut *transaction)
                    .await?;
            }
        }
        transaction.commit().await?;
        if i64::try_from(due.len()) == Ok(PRUNED_AGENTS) {
            let last = due.last().map(|row| row.try_get("key")).transpose()?;
            pruned.next = last.map(PruneFrom);
        }
        Ok(pruned)
    }
}

/// The row that a statement returns once it has written it. It must be run to its end: the row comes
/// before the commit, and only what comes after it tells whether that failed.
async fn written(
    query: sqlx::query::Query<'_, Any, AnyArguments>,
    pool: &AnyPool,
) -> Result<Option<AnyRow>, sqlx::Error> {
    Ok(query.fetch_all(pool).await?.pop())
}

async fn in_time<T>(
    answer: impl Future<Output = Result<T, sqlx::Error>> + Send,
) -> Result<T, StoreError> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(StoreError::from),
        Err(_) => Err(StoreError::Timeout(PATIENCE)),
    }
}

/// Names and JSON values always have a JSON form.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Stands for no number where all numbers are from 0, and becomes NULL in the statement: sqlx's Any
/// binds the lack of an f64 as that of an f32, which PostgreSQL keeps to for all later uses.
fn or_nothing(number: Option<f64>) -> f64 {
    number.unwrap_or(-1.0)
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
