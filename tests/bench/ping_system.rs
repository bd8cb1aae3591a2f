//! Measures the ping system at the size that it is made for, and prints what comes of it:
//!
//! ```console
//! $ cargo bench --bench ping_system            # all, in about four minutes
//! $ cargo bench --bench ping_system -- pings   # or saturation, questions, fleet
//! $ cargo bench --bench ping_system -- saturation postgres://postgres@127.0.0.1/bench
//! ```
//!
//! The agents are simulated in another process; all is on loopback and in a temporary folder. A URL stands for an empty
//! database to be used in place of a file. `BENCH_BINARY` names another build to be measured.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uptime_runner::net;

const AGENTS: usize = 10_000;
const FLEET: usize = 100_000;
const INTERVAL_SECONDS: u64 = 15;
const STORED_PINGS: u64 = 10_000_000;
/// One agent has a ping each 15 s of a day, the others share the rest.
const DAY_OF_PINGS: u64 = 24 * 3600 / INTERVAL_SECONDS;
const WARM_UP: Duration = Duration::from_secs(20);
const MEASURED: Duration = Duration::from_mins(1);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| {
        let mut names = arguments
            .iter()
            .filter(|a| !a.starts_with("--") && !a.contains("://"));
        names.clone().count() == 0 || names.any(|a| a == name)
    };
    if arguments.first().is_some_and(|a| a == "simulated-agents") {
        return simulate_agents().await;
    }
    let database = arguments.iter().find(|a| a.contains("://"));
    if wanted("pings") {
        pings(database).await;
    }
    if wanted("saturation") {
        saturation(database).await;
    }
    if wanted("questions") {
        questions().await;
    }
    if wanted("fleet") {
        fleet().await;
    }
}

/// Answers as an agent under every path, and says where.
async fn simulate_agents() {
    let answer = get(
        async |axum::extract::Path(agent_id): axum::extract::Path<String>| {
            Json(json!({
                "agent_id": agent_id, "uptime_percent": 99.5, "window_seconds": 15.0,
                "first_ping": false, "gpu_available": true, "gpu_count": 1,
            }))
        },
    );
    let routes = Router::new().route("/{agent_id}/agent/uptime-since-last-ping", answer);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let settings = net::server::ServerSettings::default();
    net::server::serve(listener, routes, settings, CancellationToken::new()).await;
}

/// A program of ours that says its address in a line, and is killed in the end.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(mut command: Command, says: &str) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines: Box<dyn BufRead + Send> = if says.is_empty() {
            Box::new(BufReader::new(child.stdout.take().unwrap()))
        } else {
            Box::new(BufReader::new(child.stderr.take().unwrap()))
        };
        let mut line = String::new();
        while line.is_empty() || !line.contains(says) {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended");
        }
        let address = line.trim().rsplit('/').next().unwrap().to_owned();
        // Nothing must wait for a reader.
        std::thread::spawn(move || for _ in lines.lines() {});
        Self { child, address }
    }

    fn ping_system(folder: &Path, interval_seconds: u64, database: Option<&String>) -> Self {
        let built = env!("CARGO_BIN_EXE_uptime-runner").to_owned();
        let mut command = Command::new(std::env::var("BENCH_BINARY").unwrap_or(built));
        command
            .args(["ping-system", "--listen", "127.0.0.1:0", "--base-interval"])
            .arg(interval_seconds.to_string())
            .args(database.map(|url| format!("--database={url}")))
            .current_dir(folder)
            .env("RUST_LOG", "info,uptime_runner::ping_system::api=warn");
        // The address comes in the one line that is let through first.
        Self::start(command, "the ping system answers at")
    }

    fn memory_mb(&self, what: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with(what)).unwrap();
        let kilobytes: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kilobytes / 1024.0
    }

    fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        let ticks = |n: usize| fields[n].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / 100.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn simulated_agents() -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("simulated-agents");
    Process::start(command, "")
}

/// Many more agents are due than can be asked.
async fn saturation(database: Option<&String>) {
    let folder = tempfile::tempdir().unwrap();
    let agents = simulated_agents();
    let ping_system = Process::ping_system(folder.path(), 1, database);
    let client = net::client::new(false, Vec::new()).unwrap();
    let url = format!("http://{}", ping_system.address);
    for n in 0..AGENTS {
        register(&client, &url, &agents, n).await;
    }
    tokio::time::sleep(WARM_UP / 4).await;
    let stored = async || {
        let text = client.get(format!("{url}/metrics")).send().await.unwrap();
        let text = text.text().await.unwrap();
        metric(
            &text,
            r#"uptime_ping_system_pings_total{result="answered"}"#,
        )
    };
    let (before, cpu_before, begun) = (stored().await, ping_system.cpu_seconds(), Instant::now());
    tokio::time::sleep(MEASURED / 2).await;
    let pings = stored().await - before;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = ping_system.cpu_seconds() - cpu_before;
    println!(
        "{:.0} pings/s stored over {seconds:.0} s, CPU {:.0} µs a ping, memory {:.0} MB at most",
        pings / seconds,
        cpu / pings * 1e6,
        ping_system.memory_mb("VmHWM")
    );
}

async fn register(client: &reqwest::Client, url: &str, agents: &Process, n: usize) {
    let id = format!("agent-{n:05}");
    let body = json!({
        "agent_id": id, "agent_url": format!("http://{}/{id}", agents.address),
        "capabilities": ["gpu-check"], "metadata": {},
    });
    let sent = client
        .post(format!("{url}/ping-system/agents/register"))
        .body(body.to_string());
    assert!(sent.send().await.unwrap().status().is_success());
}

/// A hundred thousand agents.
async fn fleet() {
    let folder = tempfile::tempdir().unwrap();
    drop(Process::ping_system(folder.path(), INTERVAL_SECONDS, None));
    let connection = rusqlite::Connection::open(folder.path().join("ping-system.db")).unwrap();
    let fill = format!(
        "PRAGMA synchronous = OFF;
        INSERT INTO agents (agent_id, agent_url, capabilities, metadata, registered_at,
            next_ping_at, ping_interval_us, total_pings, last_ping_at, last_success, last_uptime_percent)
            WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < {FLEET}),
            now AS (SELECT CAST(unixepoch('subsec') * 1e6 AS INTEGER) AS now)
            SELECT printf('agent-%06d', n), 'http://127.0.0.1:9/agent', '[\"gpu-check\"]',
            '{{\"region\":\"eu-west\",\"operator\":\"example\"}}', now, now + 7200000000, 900000000, 1000, now, 1, 99.5
            FROM n, now;
        PRAGMA wal_checkpoint(TRUNCATE);"
    );
    connection.execute_batch(&fill).unwrap();
    drop(connection);
    let ping_system = Process::ping_system(folder.path(), INTERVAL_SECONDS, None);
    let client = net::client::new(false, Vec::new()).unwrap();
    let url = format!("http://{}", ping_system.address);
    for (what, path) in [
        (
            "history of one agent",
            "agents/agent-050000/history?hours=1",
        ),
        (
            "page of 1000 agents",
            "agents?limit=1000&after=agent-050000",
        ),
        ("list of all agents", "agents"),
        ("list without metadata", "agents?metadata=false"),
        ("page of the dashboard", "dashboard/agents?limit=50"),
    ] {
        let answer = timed(&client, &format!("{url}/ping-system/{path}")).await;
        let memory = ping_system.memory_mb("VmHWM");
        println!("{what} of {FLEET}: {answer}, memory {memory:.0} MB at most");
    }
}

async fn pings(database: Option<&String>) {
    let folder = tempfile::tempdir().unwrap();
    let agents = simulated_agents();
    let ping_system = Process::ping_system(folder.path(), INTERVAL_SECONDS, database);
    let client = net::client::new(false, Vec::new()).unwrap();
    let url = format!("http://{}", ping_system.address);

    // Spread over an interval, as in a fleet that has been running for a while.
    let begun = Instant::now();
    for n in 0..AGENTS {
        register(&client, &url, &agents, n).await;
        let due = Duration::from_millis(n as u64 * INTERVAL_SECONDS * 1000 / AGENTS as u64);
        tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
    }
    println!(
        "{AGENTS} agents registered in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    tokio::time::sleep(WARM_UP).await;

    let metrics = async || {
        let text = client.get(format!("{url}/metrics")).send().await.unwrap();
        text.text().await.unwrap()
    };
    let (before, cpu_before) = (metrics().await, ping_system.cpu_seconds());
    let begun = Instant::now();
    tokio::time::sleep(MEASURED).await;
    let after = metrics().await;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = ping_system.cpu_seconds() - cpu_before;
    let grown = |name: &str| metric(&after, name) - metric(&before, name);
    let stored = grown(r#"uptime_ping_system_pings_total{result="answered"}"#);
    let failed = grown(r#"uptime_ping_system_pings_total{result="failed"}"#);
    let asked = grown("uptime_ping_system_ping_lateness_seconds_count");
    let lateness = |seconds: &str| {
        let bucket =
            format!(r#"uptime_ping_system_ping_lateness_seconds_bucket{{le="{seconds}"}}"#);
        asked - grown(&bucket)
    };
    println!(
        "{:.0} pings/s stored over {seconds:.0} s, {failed} failed",
        stored / seconds
    );
    for late in ["0.025", "0.05", "0.1", "0.25", "1"] {
        println!("  {} of {asked} later than {late} s", lateness(late));
    }
    println!(
        "CPU {:.1} % of a core, {:.0} µs a ping",
        cpu / seconds * 100.0,
        cpu / stored * 1e6
    );
    println!(
        "memory {:.0} MB now, {:.0} MB at most",
        ping_system.memory_mb("VmRSS"),
        ping_system.memory_mb("VmHWM")
    );
    let list = timed(&client, &format!("{url}/ping-system/agents")).await;
    println!("list of {AGENTS} agents meanwhile: {list}");
}

async fn questions() {
    let folder = tempfile::tempdir().unwrap();
    // The ping system makes its tables, then they are filled.
    drop(Process::ping_system(folder.path(), INTERVAL_SECONDS, None));
    let begun = Instant::now();
    fill(&folder.path().join("ping-system.db"));
    println!(
        "{STORED_PINGS} pings written in {:.0} s",
        begun.elapsed().as_secs_f64()
    );

    let ping_system = Process::ping_system(folder.path(), INTERVAL_SECONDS, None);
    let client = net::client::new(false, Vec::new()).unwrap();
    let url = format!("http://{}", ping_system.address);
    for (what, path) in [
        (
            "history of one agent over 24 h",
            "agents/agent-05000/history?hours=24",
        ),
        ("list of all agents", "agents"),
        ("totals", "dashboard"),
        ("page of the dashboard", "dashboard/agents?limit=50"),
        (
            "page sorted by uptime over 24 h",
            "dashboard/agents?limit=50&sort=uptime_24h",
        ),
        (
            "page sorted by uptime over 7 d",
            "dashboard/agents?limit=50&sort=uptime_7d",
        ),
    ] {
        let answer = timed(&client, &format!("{url}/ping-system/{path}")).await;
        println!("{what}: {answer}");
    }
    println!("memory {:.0} MB at most", ping_system.memory_mb("VmHWM"));
}

fn fill(database: &Path) {
    let connection = rusqlite::Connection::open(database).unwrap();
    let hour = 3_600_000_000_i64;
    let others = (STORED_PINGS - DAY_OF_PINGS) / (AGENTS as u64 - 1);
    let fill = format!(
        "PRAGMA synchronous = OFF;
        CREATE TEMP TABLE n AS WITH RECURSIVE c(n) AS
            (SELECT 0 UNION ALL SELECT n + 1 FROM c WHERE n < 10000) SELECT n FROM c;
        CREATE TEMP TABLE now AS SELECT CAST(unixepoch('subsec') * 1e6 AS INTEGER) AS now;
        INSERT INTO agents (agent_id, agent_url, capabilities, metadata, registered_at,
            next_ping_at, ping_interval_us, total_pings, last_ping_at, last_success, last_uptime_percent)
            SELECT printf('agent-%05d', n), 'http://127.0.0.1:9/agent', '[\"gpu-check\"]', '{{}}', now - 8 * 24 * {hour},
            now + 2 * {hour}, 900000000, 1000, now, 1, 99.5 FROM n, now WHERE n < {AGENTS};
        INSERT INTO pings SELECT a.key, now - i.n * gap, i.n, 1, 99.5, gap / 1e6, 1, 0, 1.25, NULL, gap / 1e6
            FROM (SELECT key, agent_id = 'agent-05000' AS busy FROM agents ORDER BY key) a, now,
            (SELECT 15000000 AS gap) JOIN n i ON i.n < IIF(busy, {DAY_OF_PINGS}, {others}) ORDER BY 1, 2;
        INSERT INTO hours SELECT key, now / {hour} - i.n, 3582.0, 3600.0 FROM agents, now, n i WHERE i.n <= 168 ORDER BY 1, 2;
        PRAGMA wal_checkpoint(TRUNCATE);"
    );
    connection.execute_batch(&fill).unwrap();
    let count: i64 = connection
        .query_row("SELECT COUNT(*) FROM pings", [], |row| row.get(0))
        .unwrap();
    assert!(count.unsigned_abs() > STORED_PINGS - AGENTS as u64);
}

/// The times of some answers in order, and what the last one was.
async fn timed(client: &reqwest::Client, url: &str) -> String {
    let mut times = Vec::new();
    let mut length = 0;
    let mut count = Value::Null;
    for _ in 0..11 {
        let begun = Instant::now();
        let body = client.get(url).send().await.unwrap().bytes().await.unwrap();
        times.push(begun.elapsed());
        length = body.len();
        let answer: Value = serde_json::from_slice(&body).unwrap();
        count = answer["count"].clone();
    }
    times[1..].sort();
    format!(
        "median {:.1} ms, slowest {:.1} ms, the first {:.1} ms ({} kB, {count} entries)",
        times[6].as_secs_f64() * 1e3,
        times[10].as_secs_f64() * 1e3,
        times[0].as_secs_f64() * 1e3,
        length / 1000
    )
}

fn metric(text: &str, name: &str) -> f64 {
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.map_or(0.0, |value| value.trim().parse().unwrap())
}
