//! The file of recorded runs: what `--record` writes and `report` reads.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

/// Marks the file as one of ours ("UPRR").
const APPLICATION_ID: i32 = 0x5550_5252;
const SCHEMA_VERSION: i32 = 2;

/// Instants are microseconds since 1970, outcomes the names of `.github/docs/protocol.md` section 3.2, wei text, since
/// they may be of 256 bits.
const SCHEMA: &str = "
CREATE TABLE runs (
    run INTEGER PRIMARY KEY,
    started_at INTEGER NOT NULL,
    -- When the run was closed; NULL where it was killed.
    ended_at INTEGER,
    version TEXT NOT NULL,
    policy TEXT NOT NULL,
    -- Records that could not be kept, since the disk was too slow.
    records_dropped INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE agents (agent INTEGER PRIMARY KEY, agent_id TEXT NOT NULL UNIQUE);
CREATE TABLE capabilities (capability INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
-- Who was followed in a run, and on which terms.
CREATE TABLE run_agents (
    run INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    -- Wei for a second of compute; NULL where no price is known.
    price_wei TEXT,
    -- Who could do its jobs and did nobody else's, one a line: only then do they say something of it.
    orchestrators TEXT,
    PRIMARY KEY (run, agent)
);
CREATE TABLE jobs (
    run INTEGER NOT NULL,
    sent_at INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    capability INTEGER NOT NULL,
    job_id BLOB NOT NULL,
    outcome TEXT NOT NULL,
    status INTEGER,
    latency_us INTEGER NOT NULL,
    send_lag_us INTEGER NOT NULL,
    rate INTEGER NOT NULL,
    uptime_percent REAL NOT NULL,
    orchestrator TEXT,
    balance_wei TEXT,
    error TEXT
);
CREATE TABLE polls (
    run INTEGER NOT NULL,
    at INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    state TEXT NOT NULL,
    uptime_percent REAL,
    pings INTEGER NOT NULL
);
CREATE TABLE rates (
    run INTEGER NOT NULL,
    at INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    rate_before INTEGER NOT NULL,
    rate INTEGER NOT NULL,
    -- The slots that are accounted for: what full uptime would earn.
    base_rate INTEGER NOT NULL,
    uptime_percent REAL,
    reason TEXT NOT NULL
);";

/// Why a file of records cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file or the disk.
    #[error("{0}")]
    Database(#[from] rusqlite::Error),
    /// Something else is in it.
    #[error("holds something else: expected a file that --record wrote, or none yet")]
    NotOurs,
    /// A later version of this program wrote it.
    #[error("has form {0}, expected {SCHEMA_VERSION}: it was written by another version")]
    OtherVersion(i32),
}

/// Opens a file to add a run to it, and creates it where there is none.
///
/// # Errors
/// A file that cannot be written to, or holds something else.
pub fn open_to_write(file: &Path) -> Result<Connection, RecordsError> {
    let mut connection = Connection::open(file)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    // Each commit survives kill -9; power loss may take the last ones, and is not waited for.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let transaction = connection.transaction()?;
    let tables: i64 =
        transaction.query_row("SELECT COUNT(*) FROM sqlite_master", (), |row| row.get(0))?;
    if tables == 0 {
        transaction.execute_batch(SCHEMA)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    check(&transaction)?;
    transaction.commit()?;
    Ok(connection)
}

/// Opens a file to read it; a runner may go on writing meanwhile.
///
/// # Errors
/// A file that is not there, or holds something else.
pub fn open_to_read(file: &Path) -> Result<Connection, RecordsError> {
    // Reading a write-ahead log may need its index to be made, hence not only to be read.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "query_only", "ON")?;
    check(&connection)?;
    Ok(connection)
}

fn check(connection: &Connection) -> Result<(), RecordsError> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    if number("application_id")? != APPLICATION_ID {
        return Err(RecordsError::NotOurs);
    }
    match number("user_version")? {
        SCHEMA_VERSION => Ok(()),
        other => Err(RecordsError::OtherVersion(other)),
    }
}
