//! The store on PostgreSQL: several ping systems share it, and tell each other of new pings. It survives a failover
//! to another server: see `PostgresStore::run`.

mod batch;
mod connect;
mod failure;
mod listen;
mod options;
mod tls;
mod upgrade;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_trait::async_trait;
use chrono::{DateTime, Utc};
use deadpool_postgres::{
    Client, Hook, HookError, Manager, ManagerConfig, Metrics, Pool, PoolError, RecyclingMethod,
    Runtime, TimeoutType,
};
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio_postgres::{Config, Error, Row};
use uuid::Uuid;

use self::batch::Batch;
use self::connect::{PoolConnect, Servers};
use self::failure::{Consequence, consequence, store_error};
use self::listen::SEND_HEARTBEAT;
pub(crate) use self::listen::follow;
pub use self::options::PostgresOptions;
use self::upgrade::{first_value, is_pooled_by_transaction, upgrade, version};
use super::rows::{
    AgentDetails, AgentRow, PingRow, count, instant, interval_micros, json, last_success,
};
use super::sql::{self, MICROS_PER_HOUR, PRUNED_AGENTS, PRUNED_PINGS_PER_AGENT};
use super::{
    AgentPage, AgentRecord, Claim, Claimed, Cursor, HEALTH_TIMEOUT, Lease, OPERATION_TIMEOUT,
    PingRecord, PruneCursor, Pruned, Registration, Replication, Store, StoreError, StoreHealth,
    Sum, Totals,
};
use crate::wire::ping_system::served::Ping;

const CONNECTIONS: usize = 8;
/// A connection that was idle for longer must prove that it can write.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
/// The longest wait for that proof.
const PROOF_TIMEOUT: Duration = Duration::from_millis(500);
/// The longest wait for one answer. A server that is lost without a word must leave time for the next one.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before an operation is repeated.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long operations wait for a server to come back; later ones fail at once, until it is back.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// The longest wait for the database at the start.
const START_TIMEOUT: Duration = Duration::from_secs(3);

const RELEASE: &str = "UPDATE agents SET lease = NULL, lease_until = NULL \
    FROM unnest($1::bigint[], $2::text[]) AS claim (key, lease) \
    WHERE agents.key = claim.key AND agents.lease = claim.lease";

/// In microseconds; not the time at which the transaction began.
const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

const REPLACE_AGENT: &str = "UPDATE agents SET next_ping_at = $1, ping_interval_us = $2, \
    total_pings = $3, consecutive_poor = $4, good_in_a_row = $5, last_ping_at = $6, \
    last_success = $7, last_uptime_percent = $8, answered_poor = $9, answered_good = $10, \
    status = $11, status_seq = $3, details = $12, lease = NULL, lease_until = NULL \
    WHERE key = $13 AND lease = $14";

/// Takes rows that nobody else is just taking.
const SKIP_LOCKED: &str = " FOR UPDATE SKIP LOCKED";

/// Commit level, names of synchronous standbys, number of standbys.
const REPLICATION: &str = "SELECT current_setting('synchronous_commit'), \
    current_setting('synchronous_standby_names'), (SELECT COUNT(*) FROM pg_stat_replication)";

/// Agents and pings in a PostgreSQL database.
pub struct PostgresStore {
    servers: Arc<Servers>,
    pool: Pool,
    /// Set once the tables are there and the sessions are our own.
    usable: OnceCell<()>,
    /// Connections that were made before are not used any more.
    discarded: Arc<Mutex<Option<Instant>>>,
    /// Since when operations fail because no server can be reached.
    away_since: Mutex<Option<Instant>>,
    /// Marks our own notifications.
    origin: Uuid,
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PostgresStore").field(&self.servers).finish()
    }
}

/// Opens a database. If no server can be written to, the store is returned all the same: its operations fail until one
/// can.
///
/// # Errors
/// When the program cannot work with the database until somebody changes something.
pub async fn open(options: PostgresOptions) -> anyhow::Result<PostgresStore> {
    let store = PostgresStore::new(options)?;
    let client = tokio::time::timeout(START_TIMEOUT, store.client());
    match client.await {
        Ok(Ok(_)) => {}
        Ok(Err(error @ StoreError::Unusable(_))) => return Err(error.into()),
        Ok(Err(_)) | Err(_) => store.expect_no_server(),
    }
    Ok(store)
}

/// Whether an operation may be repeated when it is unknown whether the server did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// Doing it twice is the same as doing it once.
    Always,
    /// Only after an error by which the server says that it did nothing.
    IfRefused,
}

/// Why an operation ended.
enum Failure {
    Postgres(Error),
    Store(StoreError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Postgres(error)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl PostgresStore {
    fn new(options: PostgresOptions) -> anyhow::Result<Self> {
        let servers = Arc::new(Servers::new(options));
        let discarded = Arc::new(Mutex::new(None));
        let manager = Manager::from_connect(
            Config::new(),
            PoolConnect(Arc::clone(&servers)),
            ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(ATTEMPT_TIMEOUT))
            .create_timeout(Some(servers.timeout()))
            .pre_recycle(prove_writable(Arc::clone(&discarded)))
            .build()
            .context("the pool of connections cannot be set up")?;
        Ok(Self {
            servers,
            pool,
            usable: OnceCell::new(),
            discarded,
            away_since: Mutex::new(None),
            origin: Uuid::new_v4(),
        })
    }

    /// A connection to a server that can be written to, once the tables are known to be there.
    async fn client(&self) -> Result<Client, StoreError> {
        self.usable.get_or_try_init(|| self.make_usable()).await?;
        self.connection().await
    }

    async fn connection(&self) -> Result<Client, StoreError> {
        self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => self
                .servers
                .last_failure()
                .unwrap_or_else(|| store_error(&error)),
            PoolError::Timeout(TimeoutType::Create) => self
                .servers
                .last_failure()
                .unwrap_or(StoreError::no_answer(self.servers.timeout())),
            PoolError::Timeout(_) => StoreError::no_answer(ATTEMPT_TIMEOUT),
            error => StoreError::Unavailable(error.to_string()),
        })
    }

    /// Brings the tables to what this program needs, and checks that each connection is a session of its own.
    async fn make_usable(&self) -> Result<(), StoreError> {
        let mut client = self.connection().await?;
        upgrade(&mut client).await?;
        let other = self.connection().await?;
        if is_pooled_by_transaction(&client, &other)
            .await
            .map_err(|error| store_error(&error))?
        {
            let name = self.servers.current();
            return Err(StoreError::Unusable(format!("{name}{}", failure::POOLER)));
        }
        Ok(())
    }

    /// Runs an operation, on another connection again if the first one turns out to be lost or read-only, for up to
    /// 10 s. `operation` must not do more than `repeat` allows when it runs twice.
    async fn run<T, F>(
        &self,
        repeat: Repeat,
        operation: impl Fn(Client) -> F + Send + Sync,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Failure>> + Send,
    {
        let deadline = Instant::now() + OPERATION_TIMEOUT;
        loop {
            let client = self.client_before(deadline).await?;
            let failure = match tokio::time::timeout(ATTEMPT_TIMEOUT, operation(client)).await {
                Ok(Ok(result)) => return Ok(result),
                Ok(Err(failure)) => Some(failure),
                Err(_) => None,
            };
            self.prepare_to_repeat(repeat, failure, deadline).await?;
        }
    }

    /// A connection; if the server has just been lost, the first one that can be made, since another server may take
    /// its place.
    async fn client_before(&self, deadline: Instant) -> Result<Client, StoreError> {
        loop {
            let client = tokio::time::timeout(ATTEMPT_TIMEOUT, self.client()).await;
            let error = match client {
                Ok(Ok(client)) => {
                    *self.away_since.lock() = None;
                    return Ok(client);
                }
                Ok(Err(error)) => error,
                Err(_) => StoreError::no_answer(ATTEMPT_TIMEOUT),
            };
            let since = *self.away_since.lock().get_or_insert_with(Instant::now);
            if matches!(error, StoreError::Unusable(_)) || since.elapsed() > RECONNECT_PATIENCE {
                return Err(error);
            }
            pause(deadline, error).await?;
        }
    }

    /// Returns when the operation may be repeated, on a connection that is known to be another one if this one caused
    /// the failure. `None` stands for no answer.
    ///
    /// # Errors
    /// The failure, if a repetition could do harm or would be of no use.
    async fn prepare_to_repeat(
        &self,
        repeat: Repeat,
        failure: Option<Failure>,
        deadline: Instant,
    ) -> Result<(), StoreError> {
        let (error, consequence) = match failure {
            None => (StoreError::no_answer(ATTEMPT_TIMEOUT), Consequence::Lost),
            Some(Failure::Store(error)) => return Err(error),
            Some(Failure::Postgres(error)) => (store_error(&error), consequence(&error)),
        };
        if matches!(consequence, Consequence::ReadOnly | Consequence::Lost) {
            self.discard_connections();
        }
        let may_repeat = match consequence {
            Consequence::ReadOnly | Consequence::Conflict => true,
            Consequence::Lost => repeat == Repeat::Always,
            Consequence::Refused | Consequence::Unusable => false,
        };
        if !may_repeat {
            return Err(error);
        }
        pause(deadline, error).await
    }

    /// No connection may lead to the server that just failed.
    fn discard_connections(&self) {
        let now = Instant::now();
        *self.discarded.lock() = Some(now);
        self.pool.retain(|_, metrics| metrics.created > now);
    }

    /// Lets operations fail at once, without waiting for a server.
    fn expect_no_server(&self) {
        *self.away_since.lock() = Instant::now().checked_sub(RECONNECT_PATIENCE);
    }

    /// Whether operations fail because no server can be reached, which the pinger reports.
    fn is_away(&self) -> bool {
        self.away_since.lock().is_some()
    }

    /// Sends a heartbeat to all who listen, over a connection that must be able to write.
    async fn send_heartbeat(&self) -> Result<(), StoreError> {
        self.run(Repeat::Always, |client| async move {
            let now = Utc::now().timestamp_micros();
            let check = client.prepare_cached(sql::CHECK_WRITE).await?;
            client.execute(&check, &[&now]).await?;
            client.batch_execute(SEND_HEARTBEAT).await?;
            Ok(())
        })
        .await
    }
}

/// Waits before an operation is repeated; fails with `error` if no time would be left for it.
async fn pause(deadline: Instant, error: StoreError) -> Result<(), StoreError> {
    if Instant::now() + RETRY_PAUSE + ATTEMPT_TIMEOUT > deadline {
        return Err(error);
    }
    tokio::time::sleep(RETRY_PAUSE).await;
    Ok(())
}

/// Refuses connections that were discarded, and those that were idle and cannot be written to any more: the server may
/// have become a standby, and reads from it would be out of date.
fn prove_writable(discarded: Arc<Mutex<Option<Instant>>>) -> Hook {
    Hook::async_fn(move |client, metrics: &Metrics| {
        let is_discarded = discarded.lock().is_some_and(|at| metrics.created <= at);
        let is_trusted = metrics.last_used() < TRUSTED_IDLE;
        Box::pin(async move {
            if is_discarded {
                return Err(HookError::message("discarded"));
            }
            if is_trusted {
                return Ok(());
            }
            let read_only = client.simple_query("SHOW transaction_read_only");
            match tokio::time::timeout(PROOF_TIMEOUT, read_only).await {
                Ok(Ok(answer)) if first_value(&answer) == Some("off") => Ok(()),
                _ => Err(HookError::message("not writable")),
            }
        })
    })
}

#[async_trait]
impl Store for PostgresStore {
    async fn register(&self, new: &Registration) -> Result<AgentRecord, StoreError> {
        let at = new.at.timestamp_micros();
        let capabilities = json(&new.capabilities.as_deref().unwrap_or_default());
        let metadata = json(&new.metadata.clone().unwrap_or_default());
        let interval = interval_micros(new.interval.as_secs_f64() / 60.0);
        let (capabilities, metadata) = (&capabilities, &metadata);
        let told = [new.capabilities.is_some(), new.metadata.is_some()].map(i32::from);
        self.run(Repeat::Always, |mut client| async move {
            let transaction = client.transaction().await?;
            let come_back = sql::come_back("OVERRIDING SYSTEM VALUE ");
            transaction
                .execute(&come_back, &[&new.agent_id, &new.agent_url, &at])
                .await?;
            transaction
                .execute(sql::NOT_DEPARTED, &[&new.agent_id])
                .await?;
            let register = transaction.prepare_cached(sql::REGISTER).await?;
            let row = transaction
                .query_one(
                    &register,
                    &[
                        &new.agent_id,
                        &new.agent_url,
                        capabilities,
                        metadata,
                        &at,
                        &at,
                        &interval,
                        &told[0],
                        &told[1],
                    ],
                )
                .await?;
            let record = agent_record(&row)?;
            transaction.commit().await?;
            Ok(record)
        })
        .await
    }

    async fn remove(
        &self,
        agent_id: &str,
        at: DateTime<Utc>,
        forget: bool,
    ) -> Result<bool, StoreError> {
        let at = at.timestamp_micros();
        self.run(Repeat::IfRefused, |mut client| async move {
            let transaction = client.transaction().await?;
            if !forget {
                transaction.execute(sql::DEPART, &[&at, &agent_id]).await?;
            }
            let delete = async |sql| -> Result<Option<i64>, Error> {
                let row = transaction.query_opt(sql, &[&agent_id]).await?;
                row.map(|row| row.try_get(0)).transpose()
            };
            let removed = delete(sql::REMOVE).await?;
            let forgotten = if forget {
                [removed, delete(sql::NOT_DEPARTED).await?]
            } else {
                [None; 2]
            };
            for key in forgotten.into_iter().flatten() {
                transaction.execute(sql::REMEMBER_REMOVED, &[&key]).await?;
            }
            transaction.commit().await?;
            Ok(removed.or(forgotten[1]).is_some())
        })
        .await
    }

    async fn agent(&self, agent_id: &str) -> Result<Option<AgentRecord>, StoreError> {
        self.run(Repeat::Always, |client| async move {
            let agent = client.prepare_cached(sql::AGENT).await?;
            let row = client.query_opt(&agent, &[&agent_id]).await?;
            Ok(row.as_ref().map(agent_record).transpose()?)
        })
        .await
    }

    async fn agents(&self, page: AgentPage<'_>) -> Result<Vec<AgentRecord>, StoreError> {
        let due_at = page.due_at.map_or(i64::MAX, |at| at.timestamp_micros());
        let limit = count(page.limit);
        self.run(Repeat::Always, |client| async move {
            let agents = client.prepare_cached(sql::AGENTS).await?;
            let rows = client
                .query(&agents, &[&page.after, &due_at, &limit])
                .await?;
            let records = rows.iter().map(agent_record);
            Ok(records.collect::<Result<_, _>>()?)
        })
        .await
    }

    async fn totals(&self, now: DateTime<Utc>) -> Result<Totals, StoreError> {
        let now = now.timestamp_micros();
        self.run(Repeat::Always, |client| async move {
            let totals = client.prepare_cached(sql::TOTALS).await?;
            let row = client.query_one(&totals, &[&now]).await?;
            let count = |column: usize| row.try_get(column).map(i64::unsigned_abs);
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
        })
        .await
    }

    async fn claim_due(&self, lease: Lease, limit: usize) -> Result<Vec<Claim>, StoreError> {
        let token = Uuid::new_v4().to_string();
        let (token, claim) = (&token, &sql::claim_due(SKIP_LOCKED));
        let (now, until) = (lease.now.timestamp_micros(), lease.until.timestamp_micros());
        let limit = count(limit);
        self.run(Repeat::Always, |client| async move {
            let claim = client.prepare_cached(claim).await?;
            let rows = client.query(&claim, &[token, &until, &now, &limit]).await?;
            let mut claims = Vec::with_capacity(rows.len());
            for row in &rows {
                claims.push(Claim {
                    known: claimed(&client, row).await?,
                    token: token.clone(),
                });
            }
            Ok(claims)
        })
        .await
    }

    async fn claim(&self, lease: Lease, agent_id: &str) -> Result<Claimed, StoreError> {
        let token = Uuid::new_v4().to_string();
        let token = &token;
        let (now, until) = (lease.now.timestamp_micros(), lease.until.timestamp_micros());
        self.run(Repeat::Always, |client| async move {
            let claim = client.prepare_cached(sql::CLAIM).await?;
            let row = client
                .query_opt(&claim, &[token, &until, &agent_id, &now])
                .await?;
            if let Some(row) = row {
                return Ok(Claimed::Ours(Box::new(Claim {
                    known: claimed(&client, &row).await?,
                    token: token.clone(),
                })));
            }
            let agent = client.prepare_cached(sql::AGENT).await?;
            Ok(match client.query_opt(&agent, &[&agent_id]).await? {
                Some(_) => Claimed::Taken,
                None => Claimed::Unknown,
            })
        })
        .await
    }

    async fn release(&self, claims: &[Claim]) -> Result<(), StoreError> {
        let keys: Vec<i64> = claims.iter().map(|claim| claim.known.key).collect();
        let tokens: Vec<&str> = claims.iter().map(|claim| claim.token.as_str()).collect();
        let (keys, tokens) = (&keys, &tokens);
        self.run(Repeat::Always, |client| async move {
            let release = client.prepare_cached(RELEASE).await?;
            client.execute(&release, &[keys, tokens]).await?;
            Ok(())
        })
        .await
    }

    async fn next_due_at(&self, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>, StoreError> {
        let now = now.timestamp_micros();
        self.run(Repeat::Always, |client| async move {
            let next_due = client.prepare_cached(sql::NEXT_DUE).await?;
            let row = client.query_opt(&next_due, &[&now]).await?;
            let at = row.map(|row| row.try_get(0)).transpose()?;
            Ok(at.map(instant))
        })
        .await
    }

    async fn record(&self, pings: Arc<[(Claim, PingRecord)]>) -> Result<Vec<bool>, StoreError> {
        let batch = &Batch::new(self.origin, &pings);
        let pings = &pings;
        self.run(Repeat::Always, |client| async move {
            let stored = batch.store(&client).await?;
            let mut result = Vec::with_capacity(pings.len());
            for (claim, new) in pings.iter() {
                let key = (claim.known.key, claim.token.as_str());
                let is_stored = stored
                    .iter()
                    .any(|(agent_key, token)| (*agent_key, token.as_str()) == key);
                // An earlier attempt, whose answer was lost, may have stored it and ended its claim.
                result.push(is_stored || is_stored_already(&client, claim, new).await?);
            }
            Ok(result)
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
        self.run(Repeat::Always, |client| async move {
            let history = client.prepare_cached(sql::HISTORY).await?;
            let rows = client
                .query(
                    &history,
                    &[&agent_key, &after.at_micros, &after.seq, &limit],
                )
                .await?;
            rows.iter().map(ping).collect()
        })
        .await
    }

    async fn latest(&self, agent_key: i64, limit: usize) -> Result<Vec<Ping>, StoreError> {
        let limit = count(limit);
        self.run(Repeat::Always, |client| async move {
            let latest = client.prepare_cached(sql::LATEST).await?;
            let rows = client.query(&latest, &[&agent_key, &limit]).await?;
            let newest_last = rows.iter().rev();
            newest_last.map(|row| Ok(ping(row)?.1)).collect()
        })
        .await
    }

    async fn sums_since(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        let filter = agent_keys.map_or("", |_| " WHERE a.key = ANY($3)");
        let parts = &sql::sums(since.timestamp_micros(), filter);
        self.run(Repeat::Always, |client| async move {
            let mut sums = Vec::new();
            for part in parts {
                let sum = client.prepare_cached(&part.sql).await?;
                let rows = match &agent_keys {
                    Some(keys) => client.query(&sum, &[&part.from, &part.until, keys]).await?,
                    None => client.query(&sum, &[&part.from, &part.until]).await?,
                };
                for row in rows {
                    let sum = Sum {
                        up_seconds: row.try_get(1)?,
                        covered_seconds: row.try_get(2)?,
                    };
                    sums.push((row.try_get(0)?, sum));
                }
            }
            Ok(sums)
        })
        .await
    }

    async fn now(&self) -> Result<DateTime<Utc>, StoreError> {
        self.run(Repeat::Always, |client| async move {
            let now = client.query_one(NOW, &[]).await?;
            Ok(instant(now.try_get(0)?))
        })
        .await
    }

    async fn reschedule_overdue(
        &self,
        now: DateTime<Utc>,
        latest_lease_end: DateTime<Utc>,
    ) -> Result<(), StoreError> {
        let now = now.timestamp_micros();
        let latest = latest_lease_end.timestamp_micros();
        self.run(Repeat::Always, |client| async move {
            client.execute(sql::RESCHEDULE_OVERDUE, &[&now]).await?;
            client.execute(sql::FREE_LEASES, &[&latest]).await?;
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
        let since = since.timestamp_micros();
        let key = claim.known.key;
        self.run(Repeat::IfRefused, |mut client| async move {
            let transaction = client.transaction().await?;
            let agent = &after.agent;
            let streaks = [after.streak, after.answered_streak]
                .map(|streak| [streak.consecutive_poor, streak.good_in_a_row].map(i64::from));
            let updated = transaction
                .execute(
                    REPLACE_AGENT,
                    &[
                        &agent.next_ping_at.timestamp_micros(),
                        &interval_micros(agent.ping_interval_minutes),
                        &count(agent.total_pings),
                        &streaks[0][0],
                        &streaks[0][1],
                        &agent.last_ping_at.map(|at| at.timestamp_micros()),
                        &last_success(agent.status),
                        &agent.last_uptime_percent.map(f64::from),
                        &streaks[1][0],
                        &streaks[1][1],
                        &agent.status.name(),
                        &json(&AgentDetails::of(after)),
                        &key,
                        &claim.token,
                    ],
                )
                .await?;
            if updated == 0 {
                return Ok(false);
            }
            transaction
                .execute(sql::TAKE_VOID_FROM_HOURS, &[&key, &since])
                .await?;
            transaction
                .execute(sql::VOID_FAILURES, &[&reason, &key, &since])
                .await?;
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    async fn retention_now(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        self.run(Repeat::Always, |client| async move {
            let row = client.query_one(sql::RETENTION_NOW, &[]).await?;
            let now: Option<i64> = row.try_get(0)?;
            Ok(now.map(instant))
        })
        .await
    }

    async fn set_retention_now(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        let now = now.timestamp_micros();
        self.run(Repeat::Always, |client| async move {
            client.execute(sql::SET_RETENTION_NOW, &[&now]).await?;
            Ok(())
        })
        .await
    }

    async fn prune(&self, before: DateTime<Utc>, from: PruneCursor) -> Result<Pruned, StoreError> {
        let before = before.timestamp_micros();
        self.run(Repeat::Always, |mut client| async move {
            let transaction = client.transaction().await?;
            for departed in [sql::EXPIRE_DEPARTED, sql::FORGET_DEPARTED] {
                transaction.execute(departed, &[&before]).await?;
            }
            let agents = transaction.prepare_cached(sql::PRUNE_AGENTS).await?;
            let agents = transaction
                .query(&agents, &[&from.0, &PRUNED_AGENTS])
                .await?;
            let mut pruned = Pruned::default();
            let mut keys = Vec::with_capacity(agents.len());
            for row in &agents {
                let key: i64 = row.try_get(0)?;
                let removed = row.try_get::<_, i32>(1)? != 0;
                let before = if removed { i64::MAX } else { before };
                let prune = transaction.prepare_cached(sql::PRUNE_PINGS).await?;
                let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
                    [&key, &before, &PRUNED_PINGS_PER_AGENT];
                let deleted = transaction.execute(&prune, &values).await?;
                pruned.add(deleted);
                if deleted > 0 || removed {
                    let hour = before.div_euclid(MICROS_PER_HOUR);
                    transaction
                        .execute(sql::PRUNE_HOURS, &[&key, &hour])
                        .await?;
                }
                if removed && deleted == 0 {
                    transaction.execute(sql::FORGET_REMOVED, &[&key]).await?;
                }
                keys.push(key);
            }
            transaction.commit().await?;
            pruned.next = sql::next_step(keys.into_iter());
            Ok(pruned)
        })
        .await
    }

    async fn health(&self) -> Result<StoreHealth, StoreError> {
        let check = async {
            let client = self.client().await?;
            let checked = async {
                let now = Utc::now().timestamp_micros();
                let check = client.prepare_cached(sql::CHECK_WRITE).await?;
                client.execute(&check, &[&now]).await?;
                let replication = client.query_one(REPLICATION, &[]).await?;
                let version = version(&client).await?;
                Ok(StoreHealth {
                    kind: "postgresql",
                    host: Some(self.servers.current()),
                    replication: Some(replication_of(&replication)?),
                    schema_version: version.map_or(0, |version| version.version),
                })
            };
            checked.await.map_err(|failure| match failure {
                Failure::Store(error) => error,
                Failure::Postgres(error) => {
                    if matches!(
                        consequence(&error),
                        Consequence::ReadOnly | Consequence::Lost
                    ) {
                        self.discard_connections();
                    }
                    store_error(&error)
                }
            })
        };
        let healthy = tokio::time::timeout(HEALTH_TIMEOUT, check).await;
        healthy.unwrap_or_else(|_| {
            Err(self.servers.last_failure().unwrap_or_else(|| {
                let host = self.servers.current();
                let seconds = HEALTH_TIMEOUT.as_secs_f64();
                StoreError::Unavailable(format!("{host}: no answer within {seconds} s"))
            }))
        })
    }
}

/// Whether a commit waits for a standby, from the columns of [`REPLICATION`].
fn replication_of(row: &Row) -> Result<Replication, Error> {
    let commit: &str = row.try_get(0)?;
    let synchronous_names: &str = row.try_get(1)?;
    let standbys: i64 = row.try_get(2)?;
    let waits = matches!(commit, "on" | "remote_write" | "remote_apply");
    Ok(if waits && !synchronous_names.is_empty() {
        Replication::Synchronous
    } else if standbys > 0 {
        Replication::Asynchronous
    } else {
        Replication::None
    })
}

async fn is_stored_already(
    client: &Client,
    claim: &Claim,
    new: &PingRecord,
) -> Result<bool, Error> {
    let is_stored = client.prepare_cached(sql::IS_STORED).await?;
    let at = new.ping.timestamp.timestamp_micros();
    let seq = count(new.after.agent.total_pings);
    let row = client
        .query_one(&is_stored, &[&claim.known.key, &at, &seq])
        .await?;
    Ok(row.try_get::<_, i64>(0)? > 0)
}

/// A claimed agent, with the time of its last answer.
async fn claimed(client: &Client, row: &Row) -> Result<AgentRecord, Failure> {
    let mut known = agent_record(row)?;
    if known.last_answered_at.is_none() {
        let last_answered = client.prepare_cached(sql::LAST_ANSWERED).await?;
        let row = client.query_opt(&last_answered, &[&known.key]).await?;
        let at = row.map(|row| row.try_get(0)).transpose()?;
        known.last_answered_at = at.map(instant);
    }
    Ok(known)
}

fn agent_record(row: &Row) -> Result<AgentRecord, StoreError> {
    let read = || -> Result<AgentRow, Error> {
        Ok(AgentRow {
            key: row.try_get(0)?,
            agent_id: row.try_get(1)?,
            agent_url: row.try_get(2)?,
            capabilities: row.try_get(3)?,
            metadata: row.try_get(4)?,
            registered_at: row.try_get(5)?,
            next_ping_at: row.try_get(6)?,
            ping_interval_us: row.try_get(7)?,
            total_pings: row.try_get(8)?,
            consecutive_poor: row.try_get(9)?,
            good_in_a_row: row.try_get(10)?,
            last_ping_at: row.try_get(11)?,
            last_success: row.try_get(12)?,
            last_uptime_percent: row.try_get(13)?,
            answered_poor: row.try_get(14)?,
            answered_good: row.try_get(15)?,
            status: row.try_get(16)?,
            status_seq: row.try_get(17)?,
            details: row.try_get(18)?,
        })
    };
    read().map_err(|error| store_error(&error))?.try_into()
}

fn ping(row: &Row) -> Result<(Cursor, Ping), Failure> {
    let row = PingRow {
        at: row.try_get(0)?,
        seq: row.try_get(1)?,
        success: row.try_get(2)?,
        uptime_percent: row.try_get(3)?,
        window_seconds: row.try_get(4)?,
        gpu_available: row.try_get(5)?,
        first_ping: row.try_get(6)?,
        response_time_ms: row.try_get(7)?,
        error: row.try_get(8)?,
        covers_from: row.try_get(9)?,
        superseded: row.try_get(10)?,
        observed: row.try_get(11)?,
    };
    Ok(row.try_into()?)
}
