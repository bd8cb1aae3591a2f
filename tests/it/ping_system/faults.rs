//! What the ping system has told is never lost, and after each fault it goes on by itself.

use std::collections::HashMap;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::agents::{Agents, report};
use crate::support::disk::Disk;
use crate::support::ping_system::{PingSystemProcess, is_same_ping};
use crate::support::postgres::Postgres;
use crate::support::{binary, instant, respond, wait_until};
use serde_json::Value;

const AGENTS: [&str; 4] = ["a", "b", "c", "d"];
const OFTEN: [&str; 4] = ["--base-interval", "1s", "--response-timeout", "2s"];

/// Pings that were told, by agent.
#[derive(Default)]
struct Told(Mutex<HashMap<String, Vec<Value>>>);

impl Told {
    fn add(&self, agent_id: &str, pings: impl IntoIterator<Item = Value>) {
        let mut told = self.0.lock().unwrap();
        told.entry(agent_id.to_owned()).or_default().extend(pings);
    }

    /// Each of them stands in the history, once, as it was told.
    fn assert_kept_by(&self, system: &PingSystemProcess) {
        for (agent_id, told) in &*self.0.lock().unwrap() {
            let history = system.history(agent_id);
            for ping in told {
                let found = history
                    .iter()
                    .filter(|kept| is_same_ping(kept, ping))
                    .count();
                assert_eq!(found, 1, "{agent_id}: {ping}");
            }
            let total = system.agent(agent_id)["total_pings"].as_u64().unwrap();
            assert!(total >= history.len() as u64);
        }
    }
}

#[test]
fn what_was_told_survives_kill_9_at_any_moment() {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let told = Told::default();
    for _ in 0..8 {
        let mut system = PingSystemProcess::start(folder.path(), &OFTEN);
        told.assert_kept_by(&system);
        for name in AGENTS {
            system.register(name, &agents.url(name));
        }
        let acknowledged = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let until = random.usize(0..40);
        std::thread::scope(|scope| {
            for name in AGENTS {
                let (system, told, acknowledged, stop) = (&*system, &told, &acknowledged, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let path = format!("/ping-system/agents/{name}/ping");
                        if let Some((200, ping)) = system.try_request("POST", &path, "", "") {
                            told.add(name, [serde_json::from_str(&ping).unwrap()]);
                            acknowledged.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            wait_until("acknowledged pings", || {
                (acknowledged.load(Ordering::Relaxed) >= until).then_some(())
            });
            let name = AGENTS[random.usize(0..4)];
            told.add(name, system.history(name));
            crate::support::kill_9(&system.child);
            stop.store(true, Ordering::Relaxed);
        });
        system.child.wait().unwrap();
    }
    let system = PingSystemProcess::start(folder.path(), &OFTEN);
    told.assert_kept_by(&system);
    // Each question was for the time since a ping that is stored: nothing was left out.
    for name in AGENTS {
        let history = system.history(name);
        for asked in agents.asked(name) {
            let Some((_, since)) = asked.split_once("since=") else {
                continue;
            };
            let since = since.split(' ').next().unwrap().replace("%3A", ":");
            let stored = history.iter().any(|ping| ping["timestamp"] == *since);
            assert!(stored, "{name}: {since}");
        }
    }
}

/// While `broken`, nothing is told to be stored that is not; afterwards the schedule is caught up.
fn goes_on_after(
    system: &PingSystemProcess,
    told: &Told,
    break_it: impl FnOnce(),
    mend: impl FnOnce(),
) {
    for name in AGENTS {
        system.wait_for_pings(name, 2);
        told.add(name, system.history(name));
        told.add(name, [system.ping(name)]);
    }
    break_it();
    let path = "/ping-system/agents/a/ping";
    wait_until("503", || match system.request("POST", path, "", "") {
        (503, error) => {
            assert!(error.contains("the database does not work"), "{error}");
            Some(())
        }
        (status, ping) => {
            // Room that was set aside before may still take some.
            assert_eq!(status, 200, "{ping}");
            told.add("a", [serde_json::from_str(&ping).unwrap()]);
            None
        }
    });
    wait_until("failing health", || {
        (system.ask_with("/health", "").0 == 503).then_some(())
    });
    mend();
    let before = AGENTS.map(|name| {
        wait_until("an answer", || {
            let path = format!("/ping-system/agents/{name}");
            let (status, agent) = system.ask_with(&path, "");
            let agent: Value = serde_json::from_str(&agent).unwrap();
            (status == 200).then(|| agent["total_pings"].as_u64().unwrap())
        })
    });
    for (name, before) in AGENTS.iter().zip(before) {
        system.wait_for_pings(name, before + 2);
    }
    assert_eq!(system.ask("/health")["status"], "ok");
    told.assert_kept_by(system);
}

#[test]
#[cfg_attr(no_root, ignore = "needs root")]
fn a_full_disk_loses_nothing_and_is_got_over() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::mount(folder.path());
    let agents = Agents::start();
    // Agents whose ping was not stored are given back: their leases would end too late for this test.
    let patient = ["--base-interval", "1s", "--response-timeout", "5m"];
    let mut system = PingSystemProcess::start(folder.path(), &patient);
    for name in AGENTS {
        system.register(name, &agents.url(name));
    }
    let told = Told::default();
    goes_on_after(&system, &told, || disk.fill(), || disk.empty());
    // Killed while the disk is full, it comes back as well.
    disk.fill();
    wait_until("failing health", || {
        (system.ask_with("/health", "").0 == 503).then_some(())
    });
    system.kill();
    disk.empty();
    let system = PingSystemProcess::start(folder.path(), &OFTEN);
    told.assert_kept_by(&system);
    system.ping("a");
}

#[test]
#[cfg_attr(no_root, ignore = "needs root")]
fn a_disk_that_is_read_only_is_told_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::mount(folder.path());
    let agents = Agents::start();
    let mut system = PingSystemProcess::start(folder.path(), &OFTEN);
    let told = Told::default();
    for name in AGENTS {
        system.with_agent(name, &agents);
        told.add(name, [system.ping(name)]);
    }
    system.kill();
    disk.remount("ro");
    let output = binary()
        .args(["ping-system", "--listen", "127.0.0.1:0"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("--database") && said.to_lowercase().contains("read-only"),
        "{said}"
    );
    disk.remount("rw");
    told.assert_kept_by(&PingSystemProcess::start(folder.path(), &OFTEN));
}

#[test]
#[cfg_attr(no_root, ignore = "needs root")]
fn a_file_that_becomes_read_only_loses_nothing_and_is_got_over() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &OFTEN);
    let change = |how: &str| {
        let mut chattr = Command::new("chattr");
        chattr.arg(how).current_dir(folder.path());
        chattr.args(["ping-system.db", "ping-system.db-wal"]);
        chattr.status().is_ok_and(|status| status.success())
    };
    assert!(change("+i"), "files can be made immutable here, as on ext4");
    let database = folder.path().join("ping-system.db");
    let opened = std::fs::OpenOptions::new().write(true).open(database);
    assert!(opened.is_err(), "an immutable file cannot be written");
    assert!(change("-i"));
    for name in AGENTS {
        system.register(name, &agents.url(name));
    }
    let told = Told::default();
    goes_on_after(
        &system,
        &told,
        || assert!(change("+i")),
        || assert!(change("-i")),
    );
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn a_restart_of_postgres_loses_nothing_and_is_got_over() {
    let mut server = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let database = server.database("pings");
    let options = [&OFTEN[..], &["--database", &database]].concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    for name in AGENTS {
        system.register(name, &agents.url(name));
    }
    let told = Told::default();
    let server = Mutex::new(&mut server);
    goes_on_after(
        &system,
        &told,
        || server.lock().unwrap().stop(),
        || server.lock().unwrap().boot(),
    );
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn two_ping_systems_share_the_agents_of_one_database() {
    let server = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let database = server.database("shared");
    let timeout = Duration::from_secs(2);
    let options = [
        "--database",
        &database,
        "--base-interval",
        "2s",
        "--response-timeout",
        "2s",
    ];
    let mut systems = [(); 2].map(|()| PingSystemProcess::start(folder.path(), &options));
    let names: Vec<String> = (0..30).map(|n| format!("agent-{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        systems[n % 2].register(name, &agents.url(name));
    }
    for name in &names {
        systems[0].wait_for_pings(name, 6);
    }
    // Each was asked once when it was due, though both asked.
    for system in &systems {
        let (_, metrics) = system.ask_with("/metrics", "");
        let asked = metrics.lines().find_map(|line| {
            line.strip_prefix(r#"uptime_ping_system_pings_total{result="answered"} "#)
        });
        assert!(asked.unwrap().parse::<u64>().unwrap() > 10, "{metrics}");
    }
    for name in &names {
        let history = systems[1].history(name);
        for pair in history.windows(2) {
            let gap = instant(&pair[1]["timestamp"]) - instant(&pair[0]["timestamp"]);
            assert!(gap.as_seconds_f64() >= 2.0 * 0.949, "{name}: {gap}");
        }
        let asked = agents.asked(name).len();
        assert!(
            (history.len()..=history.len() + 1).contains(&asked),
            "{name}: {asked}"
        );
    }

    // One is killed while it asks an agent: the other takes that one over, and all the others.
    agents.set("agent-0", |_, _| {});
    let asked = agents.asked("agent-0").len();
    let killed = wait_until("the one that asks", || {
        let asks = |system: &PingSystemProcess| {
            let (_, metrics) = system.ask_with("/metrics", "");
            metrics.contains("uptime_ping_system_in_flight 1\n")
        };
        let hangs = agents.asked("agent-0").len() > asked;
        (0..2).find(|&n| hangs && asks(&systems[n]) && !asks(&systems[1 - n]))
    });
    systems[killed].kill();
    let since = std::time::Instant::now();
    agents.set("agent-0", |stream, agent_id| {
        respond(stream, 200, "", &report(agent_id, 97.0).to_string());
    });
    let other = &systems[1 - killed];
    let totals: Vec<u64> = names
        .iter()
        .map(|name| other.agent(name)["total_pings"].as_u64().unwrap())
        .collect();
    wait_until("the other one's ping", || {
        (other.agent("agent-0")["last_uptime_percent"] == 97.0).then_some(())
    });
    let lease = timeout + Duration::from_secs(5);
    // The interval may have been made longer by the failed ping that went before.
    let longest = lease + 2 * timeout + Duration::from_secs(4);
    assert!(since.elapsed() < longest, "{:?}", since.elapsed());
    for (name, total) in names.iter().zip(totals) {
        other.wait_for_pings(name, total + 2);
    }
}
