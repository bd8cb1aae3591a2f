//! The file of recorded runs: what `--record` writes and `report` reads (`.github/docs/money.md`).

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use chrono::{DateTime, Utc};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction};

use crate::private_files;

/// Marks the file as one of ours ("UPRR").
const APPLICATION_ID: i32 = 0x5550_5252;
const SCHEMA_VERSION: i32 = 3;
/// The format of 0.1.0, which is read, and brought up to date when it is written to.
const OLD_VERSION: i32 = 2;

/// Instants are microseconds since 1970, outcomes the names of `.github/docs/protocol.md` section 3.2, wei text, since
/// they may be of 256 bits. Jobs stand in the order of their ends.
const SCHEMA: &str = "
CREATE TABLE runs (
    run INTEGER PRIMARY KEY,
    started_at INTEGER NOT NULL,
    -- When the run was closed; NULL where it was killed, or goes on.
    ended_at INTEGER,
    version TEXT NOT NULL,
    policy TEXT NOT NULL,
    -- Records that could not be kept.
    records_dropped INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE agents (agent INTEGER PRIMARY KEY, agent_id TEXT NOT NULL UNIQUE);
CREATE TABLE capabilities (capability INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
-- Who was followed in a run, and on which terms.
CREATE TABLE run_agents (
    run INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    -- Wei for a second of compute, or for a job; NULL where no price is known.
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

/// What the format of 0.1.0 lacks. A column that is NULL was not recorded.
const ADDITIONS: &str = "
-- The same run may go on in another file, under the same id.
ALTER TABLE runs ADD COLUMN run_id BLOB;
-- When the run was last known to go on, and from when on it sent no more jobs.
ALTER TABLE runs ADD COLUMN alive_at INTEGER;
ALTER TABLE runs ADD COLUMN stopped_at INTEGER;
ALTER TABLE runs ADD COLUMN uptime_window_us INTEGER;
ALTER TABLE runs ADD COLUMN stale_after_us INTEGER;
-- Whether a price is for a second or for a job; NULL is for a second.
ALTER TABLE run_agents ADD COLUMN price_per TEXT;
-- One a line.
ALTER TABLE runs ADD COLUMN ping_urls TEXT;
ALTER TABLE runs ADD COLUMN gateway_urls TEXT;
-- Rates, limits and budgets, as JSON.
ALTER TABLE runs ADD COLUMN terms TEXT;
ALTER TABLE jobs ADD COLUMN is_stream INTEGER;
-- From its sending to the end of its answer, or until the money of a stream ran out.
ALTER TABLE jobs ADD COLUMN worked_us INTEGER;
ALTER TABLE jobs ADD COLUMN timeout_seconds INTEGER;
-- The orchestrator that alone could do it.
ALTER TABLE jobs ADD COLUMN sent_to TEXT;
CREATE INDEX jobs_by_sent_at ON jobs (sent_at);
-- Jobs that were sent and have not ended; after a kill nobody knows how they did.
CREATE TABLE jobs_in_flight (
    job_id BLOB PRIMARY KEY,
    run INTEGER NOT NULL,
    sent_at INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    capability INTEGER NOT NULL
) WITHOUT ROWID;
-- The ping system's time, and the pings that it told.
ALTER TABLE polls ADD COLUMN ping_time INTEGER;
CREATE TABLE pings (
    agent INTEGER NOT NULL,
    timestamp INTEGER NOT NULL,
    covers_from INTEGER,
    success INTEGER NOT NULL,
    -- Superseded, or not observed.
    is_void INTEGER NOT NULL,
    first_ping INTEGER NOT NULL,
    gpu_available INTEGER,
    uptime_percent REAL,
    window_seconds REAL,
    PRIMARY KEY (agent, timestamp)
) WITHOUT ROWID;
-- The slots of an agent since the beginning of the run, at each change of its rate and every second. What was withheld
-- since the row before was withheld for this reason.
CREATE TABLE slots (
    run INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    at INTEGER NOT NULL,
    base_rate INTEGER NOT NULL,
    rate INTEGER NOT NULL,
    reason TEXT NOT NULL,
    asked INTEGER NOT NULL,
    withheld INTEGER NOT NULL,
    dropped_in_flight INTEGER NOT NULL,
    dropped_late INTEGER NOT NULL,
    dropped_budget INTEGER NOT NULL
);
CREATE INDEX slots_by_agent ON slots (agent, at);
CREATE TABLE claims (
    run INTEGER NOT NULL,
    at INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    contradicted INTEGER NOT NULL,
    uptime_percent REAL NOT NULL,
    claimed_tier_percent REAL,
    jobs INTEGER,
    successful INTEGER,
    chance REAL
);
-- What orchestrators told of live runners: listed, full, not listed or unknown, with the places of the runner and its
-- price; at each change, but for the places in use.
CREATE TABLE discoveries (
    run INTEGER NOT NULL,
    at INTEGER NOT NULL,
    agent INTEGER NOT NULL,
    listing TEXT NOT NULL,
    capacity INTEGER,
    in_use INTEGER,
    price TEXT,
    currency TEXT,
    unit TEXT
);
CREATE INDEX discoveries_by_agent ON discoveries (agent, at);";

/// A file of 0.1.0, as the columns and tables of now.
const OLD_VIEWS: &str = "
CREATE TEMP VIEW runs AS SELECT *, NULL AS run_id, NULL AS alive_at, NULL AS stopped_at, NULL AS uptime_window_us,
    NULL AS stale_after_us, NULL AS ping_urls, NULL AS gateway_urls, NULL AS terms FROM main.runs;
CREATE TEMP VIEW run_agents AS SELECT *, NULL AS price_per FROM main.run_agents;
CREATE TEMP VIEW jobs AS SELECT rowid, *, NULL AS is_stream, NULL AS worked_us, NULL AS timeout_seconds, NULL AS sent_to
    FROM main.jobs;
CREATE TEMP VIEW polls AS SELECT rowid, *, NULL AS ping_time FROM main.polls;
CREATE TEMP TABLE jobs_in_flight (job_id, run, sent_at, agent, capability);
CREATE TEMP TABLE pings (agent, timestamp, covers_from, success, is_void, first_ping, gpu_available, uptime_percent,
    window_seconds);
CREATE TEMP TABLE slots (run, agent, at, base_rate, rate, reason, asked, withheld, dropped_in_flight, dropped_late,
    dropped_budget);
CREATE TEMP TABLE claims (run, at, agent, contradicted, uptime_percent, claimed_tier_percent, jobs, successful, chance);
CREATE TEMP TABLE discoveries (run, at, agent, listing, capacity, in_use, price, currency, unit);";

/// Why a file of records cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file or the disk.
    #[error("{0}")]
    Database(#[from] rusqlite::Error),
    #[error("{0}")]
    Io(std::io::Error),
    /// Something else is in it.
    #[error("holds something else: expected a file that --record wrote, or none yet")]
    NotOurs,
    /// It would be written through a link.
    #[error("is a symbolic link, expected the file itself")]
    Link,
    /// Its folder.
    #[error("its folder does not exist: expected a file in an existing folder")]
    NoFolder,
    /// A later version of this program wrote it.
    #[error("{column} is out of range: expected times that --record writes")]
    Time { column: &'static str },
    #[error("has form {0}, expected at most {SCHEMA_VERSION}: it was written by another version")]
    OtherVersion(i32),
}

/// Opens a file to add a run to it. Creates a missing file, and brings one of 0.1.0 up to date.
///
/// # Errors
/// A file that cannot be written to, or holds something else.
pub fn open_to_write(file: &Path) -> Result<Connection, RecordsError> {
    private_files::ensure(file).map_err(RecordsError::Io)?;
    let mut connection = Connection::open(file)?;
    // Whoever holds the file for longer is waited for by trying again.
    connection.busy_timeout(Duration::from_secs(1))?;
    // Each commit survives kill -9; power loss may take the last ones, and is not waited for.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let transaction = connection.transaction()?;
    let tables: i64 =
        transaction.query_row("SELECT COUNT(*) FROM sqlite_master", (), |row| row.get(0))?;
    if tables == 0 {
        transaction.execute_batch(SCHEMA)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        bring_up_to_date(&transaction)?;
    } else if version(&transaction)? == OLD_VERSION {
        bring_up_to_date(&transaction)?;
    }
    transaction.commit()?;
    Ok(connection)
}

fn bring_up_to_date(transaction: &Transaction<'_>) -> Result<(), RecordsError> {
    transaction.execute_batch(ADDITIONS)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    Ok(())
}

/// Opens a file to read it; a runner may go on writing meanwhile. One of 0.1.0 is shown as one of now, with NULL for all
/// that it lacks.
///
/// # Errors
/// A file that is not there, or holds something else.
pub fn open_to_read(file: &Path) -> Result<Connection, RecordsError> {
    // Reading a write-ahead log may need its index to be made, hence not only to be read.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(file, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    if version(&connection)? == OLD_VERSION {
        connection.execute_batch(OLD_VIEWS)?;
    }
    connection.pragma_update(None, "query_only", "ON")?;
    Ok(connection)
}

/// Whether a runner has a file open to write to it. To be asked before the file is opened as a database.
#[must_use]
pub fn is_written(file: &Path) -> bool {
    let is_locked = |file: File| matches!(file.try_lock(), Err(TryLockError::WouldBlock));
    File::open(file).is_ok_and(is_locked)
}

/// Checks before a run that a file can be one of records. What may pass by itself, a lock or a full disk, is no error.
///
/// # Errors
/// A folder that does not exist, a file that holds something else, was written by a later release or is damaged.
pub fn check_usable(file: &Path) -> Result<(), RecordsError> {
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        return Err(RecordsError::NoFolder);
    }
    if file.is_dir() {
        return Err(RecordsError::NotOurs);
    }
    if std::fs::symlink_metadata(file).is_ok_and(|metadata| metadata.is_symlink()) {
        return Err(RecordsError::Link);
    }
    let is_empty = std::fs::metadata(file).is_ok_and(|metadata| metadata.len() == 0);
    if is_empty || !file.exists() {
        return Ok(());
    }
    let read = || -> Result<i64, RecordsError> {
        let connection = open_to_read(file)?;
        // Reads the schema.
        Ok(connection.query_row("SELECT COUNT(*) FROM runs", (), |row| row.get(0))?)
    };
    match read() {
        Err(error @ (RecordsError::NotOurs | RecordsError::OtherVersion(_))) => Err(error),
        Err(RecordsError::Database(error)) => match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Err(RecordsError::NotOurs),
            Some(ErrorCode::DatabaseCorrupt) => Err(error.into()),
            _ => Ok(()),
        },
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The times that reports read.
pub(crate) const REPORT_TIMES: [&str; 7] = [
    "runs.started_at",
    "runs.ended_at",
    "runs.alive_at",
    "jobs.sent_at",
    "polls.at",
    "rates.at",
    "discoveries.at",
];
/// The times that only statements read.
pub(crate) const STATEMENT_TIMES: [&str; 4] = [
    "slots.at",
    "pings.timestamp",
    "pings.covers_from",
    "jobs_in_flight.sent_at",
];
/// The latest time, the end of the year 9999 in microseconds. Differences and sums of a few such do not overflow.
const LATEST: i64 = 253_402_300_800_000_000;

/// Checks that times, named by table and column, are those of a file that --record wrote: from 1970 to the year 9999.
///
/// # Errors
/// The first that is not, or a file that cannot be read.
pub(crate) fn check_times(
    connection: &Connection,
    columns: impl IntoIterator<Item = &'static str>,
) -> Result<(), RecordsError> {
    for column in columns {
        let (table, name) = column
            .split_once('.')
            .expect("each names a table and a column");
        // A time that is no number compares as greater than all numbers.
        let query =
            format!("SELECT EXISTS (SELECT 1 FROM {table} WHERE {name} < 0 OR {name} > {LATEST})");
        if connection.query_row(&query, (), |row| row.get(0))? {
            return Err(RecordsError::Time { column });
        }
    }
    Ok(())
}

fn version(connection: &Connection) -> Result<i32, RecordsError> {
    let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    if number("application_id")? != APPLICATION_ID {
        return Err(RecordsError::NotOurs);
    }
    match number("user_version")? {
        version @ OLD_VERSION..=SCHEMA_VERSION => Ok(version),
        other => Err(RecordsError::OtherVersion(other)),
    }
}

/// Deletes the runs that ended before an instant, and all that belongs to them alone.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn forget_runs_before(
    transaction: &Transaction<'_>,
    before: DateTime<Utc>,
) -> rusqlite::Result<()> {
    let before = before.timestamp_micros();
    let old = "SELECT run FROM runs WHERE COALESCE(ended_at, alive_at, started_at) < ?1";
    for table in [
        "jobs",
        "jobs_in_flight",
        "polls",
        "rates",
        "slots",
        "claims",
        "discoveries",
        "run_agents",
    ] {
        transaction.execute(
            &format!("DELETE FROM {table} WHERE run IN ({old})"),
            [before],
        )?;
    }
    transaction.execute("DELETE FROM pings WHERE timestamp < ?1", [before])?;
    transaction.execute(&format!("DELETE FROM runs WHERE run IN ({old})"), [before])?;
    Ok(())
}
