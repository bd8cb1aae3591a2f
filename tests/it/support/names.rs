//! A name that resolves to whatever a test says, also while a process uses it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::fake_library;

/// The name.
pub(crate) const NAME: &str = "gateway.test";

pub(crate) struct Names {
    library: PathBuf,
    file: PathBuf,
}

impl Names {
    /// With these addresses; its files are in this folder.
    pub(crate) fn in_folder(folder: &Path, addresses: &[&str]) -> Self {
        let names = Self {
            library: fake_library::compile("names", folder),
            file: folder.join("addresses"),
        };
        names.set(addresses);
        names
    }

    pub(crate) fn set(&self, addresses: &[&str]) {
        fake_library::set(&self.file, &addresses.join("\n"));
    }

    /// A process that is started by this command resolves the name so.
    pub(crate) fn apply_to(&self, command: &mut Command) {
        command.envs([
            ("LD_PRELOAD", self.library.as_os_str()),
            ("FAKE_NAME", NAME.as_ref()),
            ("FAKE_NAME_FILE", self.file.as_os_str()),
        ]);
    }
}
