//! The ping system and PostgreSQL servers that are lost, replaced, silent, or not what they should be.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::agents::Agents;
use crate::support::ping_system::PingSystemProcess;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::{PATIENCE, binary, free_port, wait_until, wait_until_or};
use rustix::process::Signal;
use serde_json::Value;

const SELDOM: [&str; 2] = ["--base-interval", "15m"];
/// What the contract allows for an answer about health, and for the end after SIGTERM.
const HEALTH_LIMIT: Duration = Duration::from_secs(1);
const END_LIMIT: Duration = Duration::from_secs(2);

fn start(folder: &tempfile::TempDir, database: &str, options: &[&str]) -> PingSystemProcess {
    let options = [&["--database", database], options].concat();
    PingSystemProcess::start(folder.path(), &options)
}

fn url_at(address: SocketAddr, database: &str) -> String {
    format!("postgres://postgres@{address}/{database}")
}

fn health(system: &PingSystemProcess) -> (u16, Value) {
    let begin = Instant::now();
    let (status, body) = system.ask_with("/health", "");
    let took = begin.elapsed();
    assert!(took < HEALTH_LIMIT, "{took:?}: {body}");
    (status, serde_json::from_str(&body).unwrap())
}

fn wait_for_health(system: &PingSystemProcess, expected: u16) -> Value {
    let mut last = Value::Null;
    let healthy = || {
        let (status, body) = health(system);
        last = body.clone();
        (status == expected).then_some(body)
    };
    wait_until_or(healthy, || format!("health {expected}: {}", system.log()))
}

fn assert_ends_in_time(mut system: PingSystemProcess) {
    let begin = Instant::now();
    system.signal(Signal::TERM);
    assert!(system.child.wait().unwrap().success(), "{}", system.log());
    let took = begin.elapsed();
    assert!(took < END_LIMIT, "{took:?}: {}", system.log());
}

/// The status and the message of a ping system that does not start.
fn refusal(folder: &tempfile::TempDir, database: &str) -> (Option<i32>, String) {
    let mut command = binary();
    command
        .args([
            "ping-system",
            "--listen",
            "127.0.0.1:0",
            "--database",
            database,
        ])
        .current_dir(folder.path());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() && begin.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    // One that did start is ended, and has no status.
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// Pings that were acknowledged with 200, by agent and time.
#[derive(Default)]
struct Acknowledged(Mutex<HashSet<(String, String)>>);

impl Acknowledged {
    /// Pings an agent until `stop`.
    fn ping(&self, system: &PingSystemProcess, agent_id: &str, stop: &AtomicBool) {
        let path = format!("/ping-system/agents/{agent_id}/ping");
        while !stop.load(Ordering::Relaxed) {
            if let Some((200, ping)) = system.try_request("POST", &path, "", "") {
                let ping: Value = serde_json::from_str(&ping).unwrap();
                let at = ping["timestamp"].as_str().unwrap().to_owned();
                self.0.lock().unwrap().insert((agent_id.to_owned(), at));
            }
        }
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn assert_kept_by(&self, system: &PingSystemProcess, agents: &[String]) {
        let mut kept = HashSet::new();
        for agent_id in agents {
            let history = system.history(agent_id);
            let times = history.iter().map(|ping| ping["timestamp"].as_str());
            kept.extend(times.map(|at| (agent_id.clone(), at.unwrap().to_owned())));
        }
        let acknowledged = self.0.lock().unwrap();
        let lost: Vec<_> = acknowledged.difference(&kept).collect();
        assert!(lost.is_empty(), "{} lost: {lost:?}", lost.len());
    }
}

/// Primary and standby, and the one address behind which the primary is reached.
struct Cluster {
    primary: Postgres,
    standby: Postgres,
    address: Proxy,
}

const WAIT_FOR_STANDBY: &str = "synchronous_standby_names = '*'";
const WAIT_FOR_NOBODY: &str = "synchronous_standby_names = ''";

impl Cluster {
    fn start() -> Self {
        let primary = Postgres::start();
        primary.database("failover");
        let standby = primary.standby();
        let address = Proxy::before(primary.address());
        let cluster = Self {
            primary,
            standby,
            address,
        };
        cluster.replicate_synchronously();
        cluster
    }

    fn replicate_synchronously(&self) {
        self.primary.configure(WAIT_FOR_STANDBY);
        self.primary.reload();
        wait_until("synchronous replication", || {
            let sql = "SELECT sync_state FROM pg_stat_replication";
            (self.primary.query("postgres", sql) == "sync").then_some(())
        });
    }

    /// Makes the standby the primary, and returns when it can be written to.
    fn promote(&mut self) -> Instant {
        // It has no standby yet that it could wait for.
        self.standby.configure(WAIT_FOR_NOBODY);
        self.standby.reload();
        self.standby.query("postgres", "SELECT pg_promote()");
        wait_until("a writable primary", || {
            let read_only = self.standby.query("postgres", "SHOW transaction_read_only");
            let waits_for = self
                .standby
                .query("postgres", "SHOW synchronous_standby_names");
            (read_only == "off" && waits_for.is_empty()).then_some(())
        });
        let writable_at = Instant::now();
        self.address.retarget(self.standby.address());
        writable_at
    }

    /// Replaces the lost server by a standby of the new primary.
    fn rebuild(&mut self) {
        let standby = self.standby.standby();
        self.primary = std::mem::replace(&mut self.standby, standby);
        self.replicate_synchronously();
    }
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn five_failovers_lose_no_acknowledged_ping() {
    let mut cluster = Cluster::start();
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let database = url_at(cluster.address.address, "failover");
    let options = ["--base-interval", "200ms", "--max-interval", "200ms"];
    let system = start(&folder, &database, &options);
    let names: Vec<String> = (0..20).map(|n| format!("agent-{n}")).collect();
    for name in &names {
        system.register(name, &agents.url(name));
    }
    assert_eq!(health(&system).1["database"]["replication"], "synchronous");
    let acknowledged = Acknowledged::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // In addition to the schedule, which asks for a hundred pings a second.
        for name in &names[..4] {
            scope.spawn(|| acknowledged.ping(&system, name, &stop));
        }
        for round in 0..5 {
            let before = acknowledged.count();
            wait_until("acknowledged pings", || {
                (acknowledged.count() >= before + 100).then_some(())
            });
            if round % 2 == 0 {
                cluster.primary.crash();
            } else {
                // Fenced: it answers, and its connections stay open, but nothing can be written.
                cluster
                    .primary
                    .configure("default_transaction_read_only = on");
                cluster.primary.reload();
                wait_for_health(&system, 503);
            }
            let writable_at = cluster.promote();
            wait_for_health(&system, 200);
            let took = writable_at.elapsed();
            assert!(took < Duration::from_secs(10), "{took:?}: {}", system.log());
            eprintln!("healthy {took:?} after failover {round}");
            cluster.rebuild();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(acknowledged.count() >= 500);
    acknowledged.assert_kept_by(&system, &names);
    // One outage is one warning.
    let log = system.log();
    let warnings = log.matches("the schedule cannot be read").count();
    assert!(warnings <= 5, "{log}");
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn of_several_hosts_the_one_that_can_be_written_to_is_used() {
    let primary = Postgres::start();
    primary.database("hosts");
    let standby = primary.standby();
    let silent = Proxy::before(primary.address());
    silent.swallow_new_ones();
    let hosts = [
        SocketAddr::from(([127, 0, 0, 1], free_port())),
        silent.address,
        silent.address,
        silent.address,
        standby.address(),
        primary.address(),
    ]
    .map(|address| address.to_string());
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let database = format!("postgres://postgres@{}/hosts", hosts.join(","));
    let system = start(&folder, &database, &SELDOM);
    let database = &wait_for_health(&system, 200)["database"];
    assert_eq!(database["kind"], "postgresql");
    assert_eq!(database["host"], primary.address().to_string());
    assert_eq!(database["replication"], "asynchronous");
    assert_eq!(database["schema_version"], 6);
    system.with_agent("a", &agents);
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn it_starts_while_the_server_is_away() {
    let mut server = Postgres::start();
    let database = server.database("away");
    server.stop();
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = start(&folder, &database, &SELDOM);
    let error = wait_for_health(&system, 503)["error"].to_string();
    let host = server.address().to_string();
    assert!(
        error.contains(&host) && error.contains("refused"),
        "{error}"
    );
    assert_eq!(system.ask_with("/ping-system/agents", "").0, 503);
    server.boot();
    wait_for_health(&system, 200);
    system.with_agent("a", &agents);
    server.stop();
    wait_for_health(&system, 503);
    assert_ends_in_time(system);
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn a_server_that_says_nothing_delays_neither_health_nor_the_end() {
    let server = Postgres::start();
    server.database("silent");
    let proxy = Proxy::before(server.address());
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let database = url_at(proxy.address, "silent");
    let system = start(&folder, &database, &["--base-interval", "1s"]);
    system.with_agent("a", &agents);
    proxy.swallow_new_ones();
    let error = wait_for_health(&system, 503)["error"].to_string();
    assert!(error.contains("no answer"), "{error}");
    assert_ends_in_time(system);

    // The same from the start.
    let system = start(&folder, &database, &SELDOM);
    let error = health(&system).1["error"].to_string();
    assert!(error.contains("no answer"), "{error}");
    // It comes back without a word as well.
    proxy.swallow();
    wait_for_health(&system, 200);
    proxy.swallow_new_ones();
    assert_ends_in_time(system);
}

/// The lines of a stream of events.
struct Lines(BufReader<TcpStream>);

impl Lines {
    fn of(system: &PingSystemProcess, path: &str) -> Self {
        let mut stream = TcpStream::connect(&system.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut lines = Self(BufReader::new(stream));
        lines.wait_for("\r\n");
        lines
    }

    fn wait_for(&mut self, expected: &str) {
        let mut line = String::new();
        while line != expected {
            line.clear();
            let read = self.0.read_line(&mut line).unwrap();
            assert!(read > 0, "the stream ended without {expected:?}");
        }
    }
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn a_connection_that_dies_silently_is_noticed_and_listeners_are_told() {
    let server = Postgres::start();
    let database = server.database("listen");
    let proxy = Proxy::before(server.address());
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let [here, there] = [url_at(proxy.address, "listen"), database]
        .map(|database| start(&folder, &database, &SELDOM));
    here.with_agent("a", &agents);
    let mut events = Lines::of(&here, "/ping-system/agents/a/events");
    there.ping("a");
    events.wait_for("event: ping\n");

    proxy.swallow();
    let begin = Instant::now();
    there.ping("a");
    events.wait_for("event: resync\n");
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    // What comes from now on is heard again.
    wait_until("a new connection", || {
        here.log().contains("are followed again").then_some(())
    });
    there.ping("a");
    events.wait_for("event: ping\n");
}

const DUMP: &str = include_str!("../../fixtures/databases/0.1.0-postgres.sql");

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn a_role_that_may_not_create_tables_can_use_those_that_exist() {
    let server = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    server.database("empty");
    server.query("empty", "CREATE ROLE modest LOGIN");
    server.query("empty", "REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    let as_modest = |database: &str| format!("postgres://modest@{}/{database}", server.address());
    let (status, said) = refusal(&folder, &as_modest("empty"));
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("--database") && said.contains("CREATE"),
        "{said}"
    );

    let grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO modest";
    let agents = Agents::start();
    // Tables of 0.1.0, and those that this release makes.
    server.database("old");
    server.run_script("old", DUMP);
    let (status, said) = refusal(&folder, &as_modest("old"));
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("owner of the tables"), "{said}");
    drop(start(&folder, &server.url("old"), &SELDOM));
    drop(start(&folder, &server.database("new"), &SELDOM));
    for database in ["old", "new"] {
        server.query(database, "REVOKE CREATE ON SCHEMA public FROM PUBLIC");
        server.query(database, grant);
        let system = start(&folder, &as_modest(database), &SELDOM);
        assert_eq!(health(&system).0, 200);
        system.with_agent("a", &agents);
        assert_ends_in_time(system);
    }
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn what_it_cannot_work_with_is_said_in_plain_words() {
    let server = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let database = server.database("newer");
    drop(start(&folder, &database, &SELDOM));
    let newer = "CREATE TABLE IF NOT EXISTS schema_version (version BIGINT, compatible_with BIGINT); \
        DELETE FROM schema_version; INSERT INTO schema_version VALUES (99, 99)";
    server.query("newer", newer);
    let missing = server.url("no_such_database");
    let role = format!("postgres://nobody@{}/newer", server.address());
    let tls = format!("{database}?sslmode=require");
    for (database, expected) in [
        (&database, "version 99"),
        (&missing, "no_such_database"),
        (&role, "nobody"),
        (&tls, "TLS"),
    ] {
        let (status, said) = refusal(&folder, database);
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains(expected), "{expected}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
    // Newer tables that this release may use.
    server.query("newer", "UPDATE schema_version SET compatible_with = 4");
    let system = start(&folder, &database, &SELDOM);
    assert_eq!(health(&system).1["database"]["schema_version"], 99);
}

/// A pgbouncer of one's own.
struct Pooler {
    child: Child,
    address: SocketAddr,
}

impl Pooler {
    fn start(server: &Postgres, mode: &str) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let users = server.write_file("users.txt", "\"postgres\" \"\"\n");
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {}\nunix_socket_dir =\nauth_type = trust\nauth_file = {}\n\
             pool_mode = {mode}\nignore_startup_parameters = extra_float_digits\n",
            server.address().port(),
            address.port(),
            users.display()
        );
        let settings = server.write_file(&format!("{mode}.ini"), &settings);
        let mut command: Command = server.program("pgbouncer".as_ref());
        let child = command
            .arg(settings)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pooler = Self { child, address };
        wait_until("the pooler", || TcpStream::connect(address).ok());
        pooler
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
#[cfg_attr(no_pgbouncer, ignore = "needs pgbouncer")]
fn a_pooler_in_transaction_mode_is_refused_and_in_session_mode_used() {
    let server = Postgres::start();
    server.database("pooled");
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let pooler = Pooler::start(&server, "transaction");
    let (status, said) = refusal(&folder, &url_at(pooler.address, "pooled"));
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("transaction mode"), "{said}");
    let pooler = Pooler::start(&server, "session");
    let system = start(&folder, &url_at(pooler.address, "pooled"), &SELDOM);
    assert_eq!(health(&system).0, 200);
    system.with_agent("a", &agents);
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn the_servers_certificate_is_verified_as_the_url_says() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut certificate = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    // As openssl makes self-signed ones.
    certificate.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = certificate.self_signed(&key).unwrap();
    let mut server = Postgres::start();
    server.database("tls");
    let files = [
        ("ssl_cert_file", "server.crt", certificate.pem()),
        ("ssl_key_file", "server.key", key.serialize_pem()),
    ];
    for (setting, name, pem) in files {
        let path = server.write_file(name, &pem);
        server.configure(&format!("{setting} = '{}'", path.display()));
    }
    server.configure("ssl = on");
    server.stop();
    server.boot();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.crt");
    std::fs::write(&root, certificate.pem()).unwrap();
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other_root = folder.path().join("other.crt");
    std::fs::write(&other_root, other.cert.pem()).unwrap();
    let port = server.address().port();
    let url = |host: &str, parameters: &str| {
        format!("postgres://postgres@{host}:{port}/tls?{parameters}")
    };
    let encrypted = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
        WHERE application_name = 'uptime-runner' LIMIT 1";
    let root = format!("sslrootcert={}", root.display());
    let other_root = format!("sslrootcert={}", other_root.display());
    for (host, parameters, is_encrypted) in [
        ("localhost", "sslmode=disable".to_owned(), "f"),
        ("localhost", String::new(), "t"),
        ("127.0.0.1", "sslmode=require".to_owned(), "t"),
        ("127.0.0.1", format!("sslmode=verify-ca&{root}"), "t"),
        ("localhost", format!("sslmode=verify-full&{root}"), "t"),
        ("localhost", root.clone(), "t"),
    ] {
        let system = start(&folder, &url(host, &parameters), &SELDOM);
        assert_eq!(health(&system).0, 200, "{parameters}");
        assert_eq!(server.query("tls", encrypted), is_encrypted, "{parameters}");
        assert_ends_in_time(system);
    }
    // Where the URL names no roots, those of the other connections count.
    let with_ca_file = [&SELDOM[..], &["--ca-file", "root.crt"]].concat();
    let system = start(
        &folder,
        &url("localhost", "sslmode=verify-full"),
        &with_ca_file,
    );
    assert_eq!(health(&system).0, 200);
    assert_ends_in_time(system);
    for (host, parameters) in [
        ("127.0.0.1", format!("sslmode=verify-full&{root}")),
        ("localhost", format!("sslmode=verify-ca&{other_root}")),
        ("localhost", format!("sslmode=require&{other_root}")),
        ("localhost", "sslmode=verify-full".to_owned()),
    ] {
        let (status, said) = refusal(&folder, &url(host, &parameters));
        assert_eq!(status, Some(1), "{parameters}: {said}");
        assert!(said.contains("certificate"), "{parameters}: {said}");
    }
}
