//! Values that are read from files, and reloaded when these change: tokens and certificates are replaced without a restart.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How often it is looked whether a file has changed, where its value is asked for.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A value of one or several files. Files that are bad or gone later leave the last good value in use.
pub(crate) struct WatchedFile<T> {
    paths: Vec<PathBuf>,
    read: fn(&[PathBuf]) -> anyhow::Result<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: T,
    versions: Vec<Option<Version>>,
    looked_at: Instant,
}

/// Tells a file's content from what it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Version {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

fn versions(paths: &[PathBuf]) -> Vec<Option<Version>> {
    paths.iter().map(|path| Version::of(path)).collect()
}

impl<T: Clone> WatchedFile<T> {
    /// Reads the files a first time.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) fn open(
        paths: Vec<PathBuf>,
        read: fn(&[PathBuf]) -> anyhow::Result<T>,
    ) -> anyhow::Result<Self> {
        let versions = versions(&paths);
        let value = read(&paths)?;
        Ok(Self {
            paths,
            read,
            state: Mutex::new(State {
                value,
                versions,
                looked_at: Instant::now(),
            }),
        })
    }

    /// The value as the file has it now, or had it when it was last good.
    pub(crate) fn get(&self) -> T {
        let mut state = self.state.lock();
        if state.looked_at.elapsed() >= LOOK_INTERVAL {
            state.looked_at = Instant::now();
            let versions = versions(&self.paths);
            if versions != state.versions {
                state.versions = versions;
                match (self.read)(&self.paths) {
                    Ok(value) => {
                        state.value = value;
                        tracing::info!("{self:?} has changed, and is reloaded");
                    }
                    Err(error) => tracing::warn!(
                        "{self:?} has changed, and cannot be used: what it held before stays in use: {error:#}"
                    ),
                }
            }
        }
        state.value.clone()
    }
}

impl<T> fmt::Debug for WatchedFile<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<String> = self
            .paths
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        f.write_str(&paths.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_is_reloaded_and_one_that_is_bad_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        let read = |paths: &[PathBuf]| -> anyhow::Result<u32> {
            Ok(std::fs::read_to_string(&paths[0])?.trim().parse()?)
        };
        std::fs::write(&path, "x").unwrap();
        assert!(WatchedFile::open(vec![path.clone()], read).is_err());
        std::fs::write(&path, "1").unwrap();
        let watched = WatchedFile::open(vec![path.clone()], read).unwrap();
        let look = || {
            watched.state.lock().looked_at -= LOOK_INTERVAL;
            watched.get()
        };
        assert_eq!(look(), 1);
        std::fs::write(&path, "23").unwrap();
        // It is not looked at for every request.
        assert_eq!(watched.get(), 1);
        assert_eq!(look(), 23);
        std::fs::write(&path, "bad").unwrap();
        assert_eq!(look(), 23);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look(), 23);
        std::fs::write(&path, "4").unwrap();
        assert_eq!(look(), 4);
    }
}
