//! Libraries of the system as small C files, steered by other files: NVIDIA's management library, and what others replace.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles one of the C files beside this one.
pub(crate) fn compile(name: &str, folder: &Path) -> PathBuf {
    let library = folder.join(format!("libfake-{name}.so"));
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(sources.join(name).with_extension("c"))
        .status();
    let status = compiled.expect("a C compiler is installed (package gcc)");
    assert!(status.success(), "{name} compiles");
    library
}

/// Makes the library do something else: whole or not at all, since it reads that at any moment.
pub(crate) fn set(state_file: &Path, state: &str) {
    let new = state_file.with_extension("new");
    std::fs::write(&new, state).unwrap();
    std::fs::rename(new, state_file).unwrap();
}
