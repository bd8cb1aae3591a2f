//! The store on a database that speaks SQL: what SQLite and PostgreSQL have in common, which is
//! nearly everything.

mod prune;
pub(super) mod record;
mod sums;

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{Any, AnyConnection, AnyPool, AssertSqlSafe, Connection, Row, SqlSafeStr};
use uuid::Uuid;

use super::rows::{self, AGENT_COLUMNS, PING_ELEMENTS, instant, interval_micros};
use super::{
    AgentRecord, Claim, Claimed, Cursor, Lease, PingRecord, PruneCursor, Pruned, Registration,
    Store, StoreError, Sum,
};
use crate::wire::ping_system::served::Ping;

/// A database that does not answer for so long will not.
const PATIENCE: Duration = Duration::from_secs(15);
const MICROS_PER_HOUR: i64 = 3_600_000_000;

const MIGRATIONS: [(i64, &str, &str); 2] = [
    (
        1,
        "agents and pings",
        include_str!("../migrations/1_agents_and_pings.sql"),
    ),
    (2, "health", include_str!("../migrations/2_health.sql")),
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
    /// What stands before and behind elements to make one JSON text of arrays out of all rows.
    pub(super) array_of_arrays: [&'static str; 2],
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

    /// The pings of a query in its order, as one JSON text.
    fn as_json(&self, pings: &str) -> String {
        let [before, after] = self.dialect.array_of_arrays;
        format!("SELECT {before}{PING_ELEMENTS}{after} FROM ({pings}) AS pings")
    }

    /// Ends all leases: for a database that is ours alone.
    pub(super) async fn release_all(&self) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE agents SET lease = NULL, lease_until = NULL WHERE lease IS NOT NULL")
            .execute(&self.write)
            .await?;
        Ok(())
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn register(&self, new: &Registration) -> Result<AgentRecord, StoreError> {
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

    async fn agent(&self, agent_id: &str) -> Result<Option<AgentRecord>, StoreError> {
        let sql = format!("SELECT {AGENT_COLUMNS} FROM agents WHERE agent_id = $1");
        let query = sqlx::query(AssertSqlSafe(sql)).bind(agent_id);
        let row = in_time(query.fetch_optional(&self.read)).await?;
        row.as_ref().map(rows::known).transpose()
    }

    async fn agents(&self, due_at: Option<DateTime<Utc>>) -> Result<Vec<AgentRecord>, StoreError> {
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

    async fn record(&self, pings: &[(Claim, PingRecord)]) -> Result<Vec<bool>, StoreError> {
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
        behind: Cursor,
        limit: usize,
    ) -> Result<Vec<(Cursor, Ping)>, StoreError> {
        let sql = self.as_json(
            "SELECT * FROM pings WHERE agent_key = $1 AND (at, seq) > ($2, $3) \
             ORDER BY at, seq LIMIT $4",
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(agent_key)
            .bind(behind.at_micros)
            .bind(behind.seq)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let row = in_time(query.fetch_one(&self.read)).await?;
        rows::pings(row.try_get(0)?)
    }

    async fn latest(&self, agent_key: i64, limit: usize) -> Result<Vec<Ping>, StoreError> {
        let sql = self.as_json(
            "SELECT * FROM pings WHERE agent_key = $1 ORDER BY at DESC, seq DESC LIMIT $2",
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(agent_key)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let row = in_time(query.fetch_one(&self.read)).await?;
        let newest_first = rows::pings(row.try_get(0)?)?;
        Ok(newest_first
            .into_iter()
            .rev()
            .map(|(_, ping)| ping)
            .collect())
    }

    async fn sums_since(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        self.sums(since, agent_keys).await
    }

    async fn reschedule_overdue(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        // A tenth more than the interval is beyond any spread.
        let query = sqlx::query(
            "UPDATE agents SET next_ping_at = $1 \
             WHERE next_ping_at > $1 + ping_interval_us + ping_interval_us / 10",
        )
        .bind(now.timestamp_micros());
        in_time(query.execute(&self.write)).await?;
        Ok(())
    }

    async fn prune(&self, before: DateTime<Utc>, from: PruneCursor) -> Result<Pruned, StoreError> {
        in_time(self.prune_step(before.timestamp_micros(), from)).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        let query =
            sqlx::query("UPDATE health SET checked_at = $1").bind(Utc::now().timestamp_micros());
        in_time(query.execute(&self.write)).await?;
        Ok(())
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
