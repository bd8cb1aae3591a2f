//! NVIDIA's management library as a small C file, steered by another file.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles the fake NVML.
pub(crate) fn compile(folder: &Path) -> PathBuf {
    let library = folder.join("libfake-nvml.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/fake_nvml.c");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(source)
        .status();
    let status = compiled.expect("a C compiler is installed (package gcc)");
    assert!(status.success(), "the fake NVML compiles");
    library
}

/// Makes the library do something else: whole or not at all, since it reads that at any moment.
pub(crate) fn set(state_file: &Path, state: &str) {
    let new = state_file.with_extension("new");
    std::fs::write(&new, state).unwrap();
    std::fs::rename(new, state_file).unwrap();
}
