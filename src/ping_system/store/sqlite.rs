//! The store in a file of SQLite: one process, nothing to be installed.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use sqlx::AnyPool;
use sqlx::any::AnyPoolOptions;

use super::sql::{Dialect, SqlStore, try_to_connect};

/// Connections that read while the one that writes is writing.
const READERS: u32 = 4;
/// The longest wait for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

const DIALECT: Dialect = Dialect {
    identity: "INTEGER PRIMARY KEY AUTOINCREMENT",
    clustered: " WITHOUT ROWID",
    skip_locked: "",
    array_of_arrays: ["json_group_array(json_array(", "))"],
    notify: None,
};

/// The longest wait for the last owner of a file to let go of it.
const LAST_OWNERS_END: Duration = Duration::from_secs(2);

/// A write ahead log, so that readers do not wait, synced at each commit, so that what was
/// acknowledged survives power loss.
const SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
    PRAGMA busy_timeout = 5000; PRAGMA cache_size = -8192";

/// Held for as long as the store is: leases that a killed process left behind can be ended at the
/// start only where no other process works on the file.
#[derive(Debug)]
pub struct Owner {
    _lock: Option<File>,
}

/// Opens `sqlite:PATH`, and creates the file where there is none.
///
/// # Errors
/// A file that cannot be opened or written to, is no database, or belongs to another process.
pub async fn open(url: &str) -> anyhow::Result<(SqlStore, Owner)> {
    let in_memory = url.contains(":memory:") || url.contains("mode=memory");
    let owner = if in_memory {
        Owner { _lock: None }
    } else {
        own(&path(url)).await?
    };
    let url = match (in_memory, url.contains('?')) {
        (true, _) => url.to_owned(),
        (false, true) => format!("{url}&mode=rwc"),
        (false, false) => format!("{url}?mode=rwc"),
    };
    try_to_connect(&url, SETTINGS).await?;
    let write = pool(&url, 1, "").await?;
    // Each connection to memory would have a memory of its own.
    let read = if in_memory {
        write.clone()
    } else {
        pool(&url, READERS, "; PRAGMA query_only = ON").await?
    };
    let store = SqlStore::prepare(write, read, DIALECT).await?;
    store.release_all().await?;
    Ok((store, owner))
}

async fn pool(url: &str, connections: u32, further: &'static str) -> anyhow::Result<AnyPool> {
    let pool = AnyPoolOptions::new()
        .max_connections(connections)
        .min_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                let settings = sqlx::AssertSqlSafe(format!("{SETTINGS}{further}"));
                sqlx::raw_sql(settings).execute(connection).await?;
                Ok(())
            })
        })
        .connect(url)
        .await?;
    Ok(pool)
}

/// The file that a URL names.
fn path(url: &str) -> PathBuf {
    let path = url
        .trim_start_matches("sqlite://")
        .trim_start_matches("sqlite:");
    path.split_once('?').map_or(path, |(path, _)| path).into()
}

async fn own(database: &Path) -> anyhow::Result<Owner> {
    let mut path = database.as_os_str().to_owned();
    path.push(".lock");
    let shown = Path::new(&path).display();
    let lock = File::create(&path).with_context(|| format!("{shown}: cannot be created"))?;
    let begin = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Owner { _lock: Some(lock) }),
            // One that has just been killed may not be gone altogether.
            Err(TryLockError::WouldBlock) if begin.elapsed() < LAST_OWNERS_END => {
                tokio::time::sleep(LAST_OWNERS_END / 20).await;
            }
            Err(TryLockError::WouldBlock) => bail!(
                "{}: another ping system works on it; several share a PostgreSQL database (postgres://…)",
                database.display()
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("{shown}: cannot be locked"));
            }
        }
    }
}
