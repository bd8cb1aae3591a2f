//! A PostgreSQL server of one's own, from the machine's package.

use std::io::Write;
use std::net::SocketAddr;
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
        Self::start_with("")
    }

    /// With further lines in its `postgresql.conf`.
    pub(crate) fn start_with(settings: &str) -> Self {
        let mut this = Self::new();
        let mut initdb = this.command("initdb");
        initdb
            .args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C"])
            .args(["--no-sync", "-D"])
            .arg(this.data());
        run(&mut initdb);
        this.configure(settings);
        this.boot();
        this
    }

    fn new() -> Self {
        let programs = programs().expect("PostgreSQL is installed (package postgresql)");
        let folder = tempfile::tempdir().unwrap();
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(folder.path()));
        }
        Self {
            folder,
            programs,
            port: free_port(),
            server: None,
        }
    }

    /// A standby of this server, which follows it.
    pub(crate) fn standby(&self) -> Self {
        let mut standby = Self::new();
        let mut basebackup = standby.command("pg_basebackup");
        basebackup
            .args(["-d", &self.url("postgres"), "-R", "-X", "stream"])
            .args(["--no-sync", "-c", "fast", "-D"])
            .arg(standby.data());
        run(&mut basebackup);
        standby.boot();
        standby
    }

    /// Adds lines to `postgresql.conf`, which take effect at the next start or [`reload`](Self::reload).
    pub(crate) fn configure(&self, settings: &str) {
        let path = self.data().join("postgresql.conf");
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        writeln!(file, "{settings}").unwrap();
    }

    pub(crate) fn reload(&self) {
        let server = self.server.as_ref().expect("it runs");
        kill_process(Pid::from_child(server), Signal::HUP).unwrap();
    }

    /// Writes a file that only the server may read, next to its data.
    pub(crate) fn write_file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).unwrap();
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(&path));
        }
        path
    }

    /// The rows that a query returns, columns separated by `|`.
    pub(crate) fn query(&self, database: &str, sql: &str) -> String {
        let mut psql = self.command("psql");
        psql.args([&self.url(database), "-qtAc", sql]);
        let output = psql.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{sql}: {said}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Runs a script.
    pub(crate) fn run_script(&self, database: &str, script: &str) {
        let mut psql = self.command("psql");
        psql.args([&self.url(database), "-q", "-v", "ON_ERROR_STOP=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let mut psql = psql.spawn().unwrap();
        let mut stdin = psql.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        drop(stdin);
        assert!(psql.wait().unwrap().success());
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Ends the server without a word to its clients or standbys, as a crash does.
    pub(crate) fn crash(&mut self) {
        if let Some(mut server) = self.server.take() {
            kill_process(Pid::from_child(&server), Signal::QUIT).unwrap();
            server.wait().unwrap();
        }
    }

    /// A program of the package, run as the server is.
    pub(crate) fn program(&self, path: &Path) -> Command {
        self.command_at(path)
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
        self.command_at(&self.programs.join(program))
    }

    fn command_at(&self, program: &Path) -> Command {
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
