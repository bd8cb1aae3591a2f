//! A PostgreSQL server of one's own, from the machine's package.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{free_port, wait_until};

/// A server in a folder that goes away with it.
pub(crate) struct Postgres {
    folder: TempDir,
    programs: PathBuf,
    port: u16,
    server: Option<Child>,
}

impl Postgres {
    pub(crate) fn start() -> Self {
        let programs = programs().expect("PostgreSQL is installed (package postgresql)");
        let folder = tempfile::tempdir().unwrap();
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(folder.path()));
        }
        let mut this = Self {
            folder,
            programs,
            port: free_port(),
            server: None,
        };
        let mut initdb = this.command("initdb");
        initdb
            .args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C"])
            .args(["--no-sync", "-D"])
            .arg(this.data());
        run(&mut initdb);
        this.boot();
        this
    }

    /// The address of a new, empty database.
    pub(crate) fn database(&self, name: &str) -> String {
        let mut psql = self.command("psql");
        let url = self.url("postgres");
        psql.args([&url, "-qc", &format!("CREATE DATABASE {name}")]);
        run(&mut psql);
        self.url(name)
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Stops the server: its clients lose their connections.
    pub(crate) fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            kill_process(Pid::from_child(&server), Signal::INT).unwrap();
            server.wait().unwrap();
        }
    }

    /// Starts it again, at the same address.
    pub(crate) fn boot(&mut self) {
        let mut postgres = self.command("postgres");
        postgres
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-F"])
            .args(["-k", "", "-D"])
            .arg(self.data())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.server = Some(postgres.spawn().unwrap());
        wait_until("the PostgreSQL server", || {
            let mut psql = self.command("psql");
            psql.args([&self.url("postgres"), "-qc", "SELECT 1"])
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            psql.status().unwrap().success().then_some(())
        });
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The server refuses to run as root.
    fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command
                .args([
                    "--reuid",
                    "postgres",
                    "--regid",
                    "postgres",
                    "--clear-groups",
                ])
                .args(["--pdeathsig", "SIGINT"])
                .arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir(self.folder.path());
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The newest version that is installed.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut found: Vec<PathBuf> = versions
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|folder: &PathBuf| Path::exists(&folder.join("postgres")))
        .collect();
    found.sort();
    found.pop()
}
