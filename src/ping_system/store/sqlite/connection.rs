//! A connection that notices when its file is deleted or replaced: what it writes then would be lost.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::{OpenFlags, Transaction, TransactionBehavior};

use super::super::StoreError;
use super::super::schema::{self, Dialect, SELECT_LEGACY_VERSION, SELECT_VERSION, SchemaVersion};
use super::file::{FileId, wal};

use crate::private_files;

/// A write-ahead log, so that readers do not wait; synced at each commit, so that what was acknowledged survives
/// power loss.
const SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
    PRAGMA busy_timeout = 5000; PRAGMA cache_size = -8192;";
const READER_SETTINGS: &str = "PRAGMA query_only = ON;";
/// More than there are statements.
const CACHED_STATEMENTS: usize = 64;
/// The pause before a file that was refused is looked at again.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

const COUNT_COMMIT: &str =
    "UPDATE commits SET acknowledged = acknowledged + 1 RETURNING acknowledged";
const SELECT_COMMITS: &str = "SELECT database_id, acknowledged FROM commits";

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Unavailable(error.to_string())
    }
}

/// A connection of one thread, for reading or for writing.
pub(super) struct Connection {
    inner: rusqlite::Connection,
    /// `None` for a database in memory.
    file: Option<OpenFile>,
    /// `None` for a reader.
    commits: Option<Commits>,
}

/// The file of a connection.
struct OpenFile {
    path: PathBuf,
    id: FileId,
    /// The write-ahead log, once there is one.
    wal: Option<FileId>,
    accepted: AcceptedFile,
    refused: Option<(FileId, Instant)>,
}

/// The file that the writer uses, which readers must use as well.
pub(super) type AcceptedFile = Arc<Mutex<FileId>>;

/// What the writer has acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Commits {
    database_id: String,
    acknowledged: i64,
}

impl Commits {
    fn read(connection: &rusqlite::Connection) -> rusqlite::Result<Self> {
        connection.query_row(SELECT_COMMITS, [], |row| {
            Ok(Self {
                database_id: row.get(0)?,
                acknowledged: row.get(1)?,
            })
        })
    }
}

impl Connection {
    /// The writer of a file, which is created if it does not exist. The tables are brought to the newest version,
    /// and the leases of an earlier process are ended.
    ///
    /// # Errors
    /// A file that cannot be opened or written to, is no database, or has newer tables.
    pub(super) fn writer(path: &Path) -> Result<(Self, AcceptedFile), StoreError> {
        private_files::ensure(path)
            .map_err(|error| StoreError::Unusable(format!("{}: {error}", path.display())))?;
        let mut inner = open(path, OpenFlags::SQLITE_OPEN_CREATE)?;
        let commits = prepare(&mut inner)?;
        let id = existing(path)?;
        let accepted = Arc::new(Mutex::new(id));
        let file = OpenFile::new(path, id, &accepted);
        let writer = Self {
            inner,
            file: Some(file),
            commits: Some(commits),
        };
        Ok((writer, accepted))
    }

    /// A reader of the same file.
    ///
    /// # Errors
    /// A file that cannot be opened.
    pub(super) fn reader(path: &Path, accepted: &AcceptedFile) -> Result<Self, StoreError> {
        let inner = open(path, OpenFlags::empty())?;
        inner.execute_batch(READER_SETTINGS)?;
        Ok(Self {
            inner,
            file: Some(OpenFile::new(path, existing(path)?, accepted)),
            commits: None,
        })
    }

    /// The reader and writer of a database in memory.
    ///
    /// # Errors
    /// When there is no memory.
    pub(super) fn in_memory() -> Result<Self, StoreError> {
        let mut inner = rusqlite::Connection::open_in_memory()?;
        inner.set_prepared_statement_cache_capacity(CACHED_STATEMENTS);
        let commits = prepare(&mut inner)?;
        Ok(Self {
            inner,
            file: None,
            commits: Some(commits),
        })
    }

    /// Reads from the file that the writer uses.
    ///
    /// # Errors
    /// The operation's, or a file that was deleted or replaced.
    pub(super) fn read<T>(
        &mut self,
        operation: impl FnOnce(&rusqlite::Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.ensure_current()?;
        operation(&self.inner)
    }

    /// Runs a transaction whose loss would cost nothing but work: leases, checks.
    ///
    /// # Errors
    /// The operation's, a full or read-only disk, or a file that was deleted or replaced.
    pub(super) fn write<T>(
        &mut self,
        operation: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.ensure_current()?;
        let transaction = self
            .inner
            .transaction_with_behavior(TransactionBehavior::Immediate)?;
        let result = operation(&transaction)?;
        transaction.commit()?;
        Ok(result)
    }

    /// Runs a transaction that is acknowledged to somebody. It is counted in the database, by which a file that is
    /// put back proves that it holds it.
    ///
    /// # Errors
    /// As for [`write`](Self::write). If the file was deleted or replaced meanwhile, the transaction may have taken
    /// place, but in a file that is gone.
    pub(super) fn write_acknowledged<T>(
        &mut self,
        operation: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let (result, acknowledged) = self.write(|transaction| {
            let result = operation(transaction)?;
            let acknowledged = transaction
                .prepare_cached(COUNT_COMMIT)?
                .query_row([], |row| row.get(0))?;
            Ok((result, acknowledged))
        })?;
        // Before it is acknowledged.
        self.ensure_current()?;
        if let Some(commits) = &mut self.commits {
            commits.acknowledged = acknowledged;
        }
        Ok(result)
    }

    /// Makes sure that the path still names the file that is open; another file is opened if it may take its place.
    pub(super) fn ensure_current(&mut self) -> Result<(), StoreError> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let shown = file.path.display();
        let Some(found) = FileId::of(&file.path).map_err(|error| unavailable(&shown, &error))?
        else {
            return Err(StoreError::Unavailable(format!(
                "{shown} was deleted or moved away: put it back"
            )));
        };
        if found != file.id {
            return self.replace(found);
        }
        if self.commits.is_none() {
            return Ok(());
        }
        let wal = wal(&file.path);
        let found = FileId::of(&wal).map_err(|error| unavailable(&wal.display(), &error))?;
        if file.wal.is_none() {
            file.wal = found;
        } else if found != file.wal {
            // What is only in the lost log is saved; new pings must not go there.
            let _ = self.inner.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
            return Err(StoreError::Unavailable(format!(
                "{} was deleted or replaced: put it back, or restart the ping system",
                wal.display()
            )));
        }
        Ok(())
    }

    /// Opens the file that has taken the place of ours: the writer if it holds all that was acknowledged, a reader
    /// if the writer uses it.
    fn replace(&mut self, found: FileId) -> Result<(), StoreError> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let refusal = || {
            StoreError::Unavailable(format!(
                "{} was replaced by a file that lacks acknowledged pings: put the right one back, or restart \
                 the ping system to use this one",
                file.path.display()
            ))
        };
        let Some(commits) = &self.commits else {
            if *file.accepted.lock() != found {
                return Err(refusal());
            }
            self.inner = open(&file.path, OpenFlags::empty())?;
            self.inner.execute_batch(READER_SETTINGS)?;
            file.id = found;
            return Ok(());
        };
        if let Some((id, at)) = file.refused
            && id == found
            && at.elapsed() < REFUSED_PAUSE
        {
            return Err(refusal());
        }
        // Read-only: a file that is refused, or is just being copied here, stays as it is.
        let complete = rusqlite::Connection::open_with_flags(
            &file.path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .and_then(|candidate| Commits::read(&candidate))
        .is_ok_and(|there| {
            there.database_id == commits.database_id && there.acknowledged >= commits.acknowledged
        });
        if !complete {
            file.refused = Some((found, Instant::now()));
            return Err(refusal());
        }
        self.inner = open(&file.path, OpenFlags::empty())?;
        file.id = found;
        file.wal = None;
        *file.accepted.lock() = found;
        tracing::info!(
            "{}: another file is in its place, which holds all acknowledged pings; it is used",
            file.path.display()
        );
        Ok(())
    }
}

impl OpenFile {
    fn new(path: &Path, id: FileId, accepted: &AcceptedFile) -> Self {
        Self {
            path: path.to_owned(),
            id,
            wal: None,
            accepted: Arc::clone(accepted),
            refused: None,
        }
    }
}

fn open(path: &Path, flags: OpenFlags) -> Result<rusqlite::Connection, StoreError> {
    let flags = flags | OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = rusqlite::Connection::open_with_flags(path, flags)?;
    connection.set_prepared_statement_cache_capacity(CACHED_STATEMENTS);
    connection.execute_batch(SETTINGS)?;
    Ok(connection)
}

/// Brings the tables to the newest version and ends all leases.
fn prepare(connection: &mut rusqlite::Connection) -> Result<Commits, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let script = schema::upgrade(Dialect::Sqlite, version(&transaction)?)
        .map_err(|newer| StoreError::Unusable(newer.to_string()))?;
    if let Some(script) = script {
        transaction.execute_batch(&script)?;
    }
    transaction.execute(
        "UPDATE agents SET lease = NULL, lease_until = NULL WHERE lease IS NOT NULL",
        [],
    )?;
    let commits = Commits::read(&transaction)?;
    transaction.commit()?;
    Ok(commits)
}

/// The version of the tables; `None` if there are none.
pub(super) fn version(
    connection: &rusqlite::Connection,
) -> rusqlite::Result<Option<SchemaVersion>> {
    if connection.table_exists(None, "schema_version")? {
        let version = connection.query_row(SELECT_VERSION, [], |row| {
            Ok(SchemaVersion {
                version: row.get(0)?,
                compatible_with: row.get(1)?,
            })
        })?;
        return Ok(Some(version));
    }
    if !connection.table_exists(None, "_sqlx_migrations")? {
        return Ok(None);
    }
    let version = connection.query_row(SELECT_LEGACY_VERSION, [], |row| row.get(0))?;
    Ok(Some(SchemaVersion::legacy(version)))
}

fn existing(path: &Path) -> Result<FileId, StoreError> {
    let found = FileId::of(path).and_then(|id| id.ok_or(io::ErrorKind::NotFound.into()));
    found.map_err(|error| unavailable(&path.display(), &error))
}

fn unavailable(path: &std::path::Display<'_>, error: &io::Error) -> StoreError {
    StoreError::Unavailable(format!("{path}: {error}"))
}
