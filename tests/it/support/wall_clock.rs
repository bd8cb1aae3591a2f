//! A wall clock that processes see instead of the machine's, and that can be set while they run.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::fake_library;

pub(crate) struct WallClock {
    file: PathBuf,
}

impl WallClock {
    /// One that is right until it is set. Its state is a file in this folder.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        let clock = Self {
            file: folder.join("clock"),
        };
        clock.set("+0s");
        clock
    }

    /// Sets it so much ahead of the true time, as in `+3600s`, or behind it.
    pub(crate) fn set(&self, offset: &str) {
        fake_library::set(&self.file, offset);
    }

    /// A process that is started by this command sees it.
    pub(crate) fn apply_to(&self, command: &mut Command) {
        let library = library().expect("faketime is installed (package faketime)");
        command.envs([
            ("LD_PRELOAD", library.as_os_str()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.as_os_str()),
            ("FAKETIME_NO_CACHE", "1".as_ref()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".as_ref()),
            ("DONT_FAKE_MONOTONIC", "1".as_ref()),
        ]);
    }
}

fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
    let mut libraries = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1"));
    libraries.find(|library| library.exists())
}
