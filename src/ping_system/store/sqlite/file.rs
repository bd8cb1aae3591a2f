//! The file of a SQLite database: its URL, its owner, and whether it is still the one that was opened.

use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, bail, ensure};

use crate::private_files;

/// The longest wait for the previous owner of a file to release it.
const OWNER_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a SQLite database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    File(PathBuf),
    /// It ends with the process.
    Memory,
}

impl Location {
    /// Parses what follows `sqlite:`, as in `sqlite:PATH`, `sqlite:///PATH` or `sqlite::memory:`. The path may be
    /// percent-encoded. Of parameters `mode=rwc` is the default and `mode=memory` the same as `:memory:`.
    ///
    /// # Errors
    /// No path, or another parameter.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let text = text.strip_prefix("//").unwrap_or(text);
        let (path, parameters) = text.split_once('?').unwrap_or((text, ""));
        if path == ":memory:" || parameters == "mode=memory" {
            return Ok(Self::Memory);
        }
        ensure!(!path.is_empty(), "expected sqlite:PATH");
        ensure!(
            matches!(parameters, "" | "mode=rwc"),
            "expected sqlite:PATH without parameters"
        );
        let path = percent_encoding::percent_decode_str(path);
        let path = path.decode_utf8().context("expected a path in UTF-8")?;
        Ok(Self::File(PathBuf::from(path.as_ref())))
    }
}

/// Held for as long as the file is used: leases that a killed process left behind can be ended at the start only
/// if no other process uses the file.
#[derive(Debug)]
pub(super) struct Owner {
    _lock: File,
}

impl Owner {
    /// Locks `PATH.lock`. Blocks up to 2 s while a process that was just killed still holds it.
    pub(super) fn lock(database: &Path) -> anyhow::Result<Self> {
        let path = with_suffix(database, ".lock");
        let shown = path.display();
        let lock = private_files::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("{shown}: cannot be created"))?;
        let begin = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self { _lock: lock }),
                Err(TryLockError::WouldBlock) if begin.elapsed() < OWNER_TIMEOUT => {
                    thread::sleep(OWNER_TIMEOUT / 20);
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
}

/// Identifies a file, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The file that a path names now; `None` if there is none.
    pub(super) fn of(path: &Path) -> io::Result<Option<Self>> {
        match std::fs::metadata(path) {
            Ok(metadata) => Ok(Some(Self {
                device: metadata.dev(),
                inode: metadata.ino(),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The write-ahead log of a database.
pub(super) fn wal(database: &Path) -> PathBuf {
    with_suffix(database, "-wal")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_file_or_memory() {
        for (text, path) in [
            ("a.db", "a.db"),
            ("///var/lib/a.db", "/var/lib/a.db"),
            ("//a.db?mode=rwc", "a.db"),
            ("with%20space.db", "with space.db"),
            ("with space.db", "with space.db"),
        ] {
            let expected = Location::File(path.into());
            assert_eq!(Location::parse(text).unwrap(), expected, "{text}");
        }
        for text in [":memory:", "//:memory:", "x?mode=memory"] {
            assert_eq!(Location::parse(text).unwrap(), Location::Memory, "{text}");
        }
        for bad in ["", "//", "?x", "a.db?mode=ro", "a.db?immutable=1", "%ff"] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }
}
