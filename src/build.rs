//! Runs before each build: tells the program which commit it is, and the tests which tools this machine
//! lacks. A test without its tool is reported as ignored, except where `CI` is set: there it runs, and
//! fails.

use std::path::Path;
use std::process::{Command, Stdio};

/// A tool, and the `cfg` that says that it is missing.
const TOOLS: [(&str, &str); 11] = [
    ("no_cc", "cc"),
    ("no_chromium", "chromium"),
    ("no_curl", "curl"),
    ("no_ip", "ip"),
    ("no_pgbouncer", "pgbouncer"),
    ("no_promtool", "promtool"),
    ("no_systemd_analyze", "systemd-analyze"),
    ("no_yamllint", "yamllint"),
    ("no_kubernetes_validate", "kubernetes-validate"),
    ("no_check_jsonschema", "check-jsonschema"),
    ("no_setpriv", "setpriv"),
];

fn main() {
    println!("cargo::rustc-env=PROGRAM_VERSION={}", version());
    println!("cargo::rerun-if-changed=.git/HEAD");
    println!("cargo::rerun-if-changed=.git/logs/HEAD");
    println!("cargo::rerun-if-changed=src/build.rs");
    for variable in ["BUILD_COMMIT", "CI", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let in_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
    for (cfg, tool) in TOOLS {
        tell(cfg, !in_ci && !is_in_path(tool));
    }
    tell(
        "no_postgres",
        !in_ci && !has_library("postgresql", "bin/postgres"),
    );
    tell(
        "no_faketime",
        !in_ci && !has_library("", "faketime/libfaketime.so.1"),
    );
    // The longest tests run in CI, and elsewhere where they are asked for (-- --ignored).
    tell("quick", !in_ci);
    // No tools, but privileges: CI need not have them.
    tell("no_root", !is_root());
    tell("no_unshare", !can_unshare_network());
}

fn tell(cfg: &str, is_set: bool) {
    println!("cargo::rustc-check-cfg=cfg({cfg})");
    if is_set {
        println!("cargo::rustc-cfg={cfg}");
    }
}

/// The release, with the commit where it is built from a checkout.
fn version() -> String {
    let release = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    // An image is built without the repository, and is given the commit.
    let given = std::env::var("BUILD_COMMIT").ok().filter(|c| !c.is_empty());
    let described = || output("git", &["describe", "--always", "--dirty", "--exclude=*"]);
    let commit = given.or_else(|| described().filter(|_| Path::new(".git").exists()));
    match commit {
        Some(commit) => format!("{release} ({commit})"),
        None => release,
    }
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// Whether Debian's `/usr/lib/FOLDER/*/FILE` is there.
fn has_library(folder: &str, file: &str) -> bool {
    let folders = std::fs::read_dir(Path::new("/usr/lib").join(folder));
    let mut folders = folders.into_iter().flatten().flatten();
    folders.any(|folder| folder.path().join(file).exists())
}

fn can_unshare_network() -> bool {
    output("unshare", &["-rn", "true"]).is_some()
}

fn is_root() -> bool {
    output("id", &["-u"]).is_some_and(|id| id == "0")
}
