//! The store on PostgreSQL: several ping systems share it, and tell each other of new pings.

use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::postgres::PgListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::sql::record::Notification;
use super::sql::{Dialect, SqlStore, try_to_connect};
use crate::ping_system::feed::Feed;

const CONNECTIONS: u32 = 8;
/// The longest wait for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before listening is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// A statement that takes longer is given up by the server, too.
const SETTINGS: &str = "SET statement_timeout = '10s'";
const CHANNEL: &str = "uptime_runner_pings";

const DIALECT: Dialect = Dialect {
    identity: "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    clustered: "",
    skip_locked: "FOR UPDATE SKIP LOCKED",
    array_of_arrays: ["CAST(json_agg(json_build_array(", ")) AS TEXT)"],
    // Counted, since what the function itself gives has no type.
    notify: Some("SELECT COUNT(pg_notify('uptime_runner_pings', $1))"),
};

/// Opens `postgres://…`.
///
/// # Errors
/// A server that cannot be reached, or refuses.
pub async fn open(url: &str) -> anyhow::Result<SqlStore> {
    try_to_connect(url, SETTINGS).await?;
    let pool = AnyPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_connect(|connection, _| {
            Box::pin(async move {
                sqlx::raw_sql(SETTINGS).execute(connection).await?;
                Ok(())
            })
        })
        .connect(url)
        .await?;
    SqlStore::prepare(pool.clone(), pool, DIALECT).await
}

/// Passes the pings of other processes on to those who listen here, until `stop`.
pub async fn follow(url: &str, origin: Uuid, feed: &Feed, stop: CancellationToken) {
    let mut told = false;
    loop {
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = pass_on(url, origin, feed, &mut told) => ended,
        };
        if let Err(error) = ended
            && !std::mem::replace(&mut told, true)
        {
            tracing::warn!(%error, "pings of other ping systems cannot be followed, trying again");
        }
        // What came meanwhile is lost: whoever listens must ask anew.
        feed.interrupt();
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn pass_on(url: &str, origin: Uuid, feed: &Feed, told: &mut bool) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect(url).await?;
    listener.listen(CHANNEL).await?;
    *told = false;
    // `None` says that the connection was lost.
    while let Some(notification) = listener.try_recv().await? {
        match serde_json::from_str::<Notification>(notification.payload()) {
            Ok(told) if told.origin == origin => {}
            Ok(told) => feed.publish(&told.event),
            Err(error) => tracing::warn!(%error, "a notification that cannot be read"),
        }
    }
    Ok(())
}
