//! What the ping system could not see, it holds against nobody; and clocks change no figure.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use chrono::TimeDelta;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::agents::{Agents, report};
use crate::support::ping_system::PingSystemProcess;
use crate::support::postgres::Postgres;
use crate::support::proxy::Proxy;
use crate::support::wall_clock::WallClock;
use crate::support::{binary, free_port, instant, respond, wait_until};

const OFTEN: [&str; 4] = ["--base-interval", "1s", "--response-timeout", "1s"];
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// Its pings that the agent could be blamed for: failed, or below 100 %.
fn blamed(system: &PingSystemProcess, agent_id: &str) -> Vec<Value> {
    let history = system.history(agent_id).into_iter();
    history
        .filter(|ping| ping["observed"] == true && ping["superseded"] == false)
        .filter(|ping| ping["uptime_percent"] != 100.0)
        .collect()
}

fn is_well(agent: &Value) -> bool {
    agent["status"] == "active" && agent["consecutive_poor_uptime"] == 0
}

/// Registers agents that are always up, each pinged twice.
fn with_good_agents(system: &PingSystemProcess, agents: &Agents, names: &[&str]) {
    for name in names {
        agents.set_uptime(name, 100.0);
        system.register(name, &agents.url(name));
    }
    for name in names {
        system.wait_for_pings(name, 2);
    }
}

fn assert_none_is_blamed(system: &PingSystemProcess, names: &[&str]) {
    for name in names {
        wait_until("an agent that is well", || {
            is_well(&system.agent(name)).then_some(())
        });
        assert_eq!(blamed(system, name), [Value::Null; 0], "{name}");
    }
}

fn hindrances(system: &PingSystemProcess) -> Vec<Value> {
    let health = system.ask("/health");
    assert_eq!(health["status"], "ok");
    health["unobserved"].as_array().unwrap().clone()
}

#[test]
fn one_lost_connection_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    agents.set_uptime("a", 100.0);
    system.register("a", &agents.url("a"));
    system.wait_for_pings("a", 1);
    // Only the first connection is closed without an answer.
    agents.fail_once("a");
    let ping = system.ping("a");
    assert_eq!(
        (&ping["success"], &ping["uptime_percent"]),
        (&json!(true), &json!(100.0))
    );
    assert_eq!(system.agent("a")["total_pings"], 2);
    assert_eq!(agents.asked("a").len(), 3);
}

#[test]
fn an_outage_of_our_own_network_is_no_agents_fault() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let network = Proxy::before(agents.address());
    let system = PingSystemProcess::start(folder.path(), &OFTEN);
    for name in NAMES {
        agents.set_uptime(name, 100.0);
        system.register(name, &format!("{}/{name}", network.url()));
    }
    for name in NAMES {
        system.wait_for_pings(name, 3);
    }
    network.cut(true);
    wait_until("an outage that is noticed", || {
        (!hindrances(&system).is_empty()).then_some(())
    });
    let hindrance = &hindrances(&system)[0];
    assert_eq!(hindrance["obstacle"], "mass_failure");
    for name in NAMES {
        // Also those that failed before it was noticed.
        wait_until("an unobserved agent", || {
            let agent = system.agent(name);
            let is_unobserved = agent["status"] == "unobserved";
            (is_unobserved && agent["consecutive_poor_uptime"] == 0).then_some(())
        });
    }
    network.cut(false);
    assert_none_is_blamed(&system, &NAMES);
    for name in NAMES {
        let history = system.history(name);
        let unobserved = history.iter().filter(|ping| ping["observed"] == false);
        assert!(unobserved.clone().count() > 0, "{name}");
        assert!(unobserved.clone().all(|ping| ping["window_seconds"] == 0.0));
        // The stretches of the answers leave no time out.
        let answered: Vec<&Value> = history
            .iter()
            .filter(|ping| ping["success"] == true)
            .collect();
        for pair in answered.windows(2) {
            assert_eq!(pair[1]["covers_from"], pair[0]["timestamp"], "{name}");
        }
    }
    wait_until("that it is over", || {
        hindrances(&system).is_empty().then_some(())
    });
    let log = system.log();
    for said in ["agents are not observed", "agents are observed again"] {
        assert_eq!(log.matches(said).count(), 1, "{log}");
    }
}

#[test]
fn a_reference_tells_whose_network_is_down() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let port = free_port();
    let reference = format!("127.0.0.1:{port}");
    let options = [&OFTEN[..], &["--reference", &reference, "--retries", "0"]].concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    with_good_agents(&system, &agents, &["a"]);
    agents.set("a", |_, _| {});
    wait_until("an unobserved agent", || {
        (system.agent("a")["status"] == "unobserved").then_some(())
    });
    assert_eq!(hindrances(&system)[0]["obstacle"], "reference_unreachable");
    // As soon as the reference answers, the agent itself is at fault.
    let listener = std::net::TcpListener::bind(&*reference).unwrap();
    wait_until("an agent that failed", || {
        (system.agent("a")["status"] == "unreachable").then_some(())
    });
    drop(listener);
    agents.set_uptime("a", 100.0);
    wait_until("an agent that is well", || {
        is_well(&system.agent("a")).then_some(())
    });
}

#[test]
fn a_process_that_stood_still_blames_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let options = [&OFTEN[..], &["--retries", "0"]].concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    with_good_agents(&system, &agents, &["a"]);
    // The answer would come in time, if anybody were there to read it.
    agents.set("a", |stream, agent_id| {
        std::thread::sleep(Duration::from_millis(500));
        respond(stream, 200, "", &report(agent_id, 100.0).to_string());
    });
    let asked = agents.asked("a").len();
    wait_until("a request", || {
        (agents.asked("a").len() > asked).then_some(())
    });
    system.signal(Signal::STOP);
    // Longer than its patience.
    std::thread::sleep(Duration::from_secs(2));
    system.signal(Signal::CONT);
    let total = system.agent("a")["total_pings"].as_u64().unwrap();
    system.wait_for_pings("a", total + 2);
    assert_none_is_blamed(&system, &["a"]);
}

#[test]
fn our_own_rules_and_token_are_no_agents_fault() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut system = PingSystemProcess::start(folder.path(), &OFTEN);
    with_good_agents(&system, &agents, &["a", "b"]);
    system.kill();
    let strict = [&OFTEN[..], &["--allow-agents", "10.0.0.0/8"]].concat();
    let mut system = PingSystemProcess::start(folder.path(), &strict);
    wait_until("an unobserved agent", || {
        (system.agent("a")["status"] == "unobserved").then_some(())
    });
    assert_eq!(hindrances(&system)[0]["obstacle"], "address_rules");
    system.kill();

    let system = PingSystemProcess::start(folder.path(), &OFTEN);
    assert_none_is_blamed(&system, &["a", "b"]);
    // One agent that refuses the token has changed it; two have not.
    let refuse = |name: &str| agents.set(name, |stream, _| respond(stream, 401, "", "{}"));
    refuse("a");
    wait_until("an agent that failed", || {
        (system.agent("a")["status"] == "unreachable").then_some(())
    });
    refuse("b");
    for name in ["a", "b"] {
        wait_until("an unobserved agent", || {
            (system.agent(name)["status"] == "unobserved").then_some(())
        });
    }
    for name in ["a", "b"] {
        agents.set_uptime(name, 100.0);
    }
    assert_none_is_blamed(&system, &["a", "b"]);
}

#[test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
fn a_sick_ping_system_drags_no_agent_down_for_another() {
    let server = Postgres::start();
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let database = server.database("shared");
    let well = [&OFTEN[..], &["--database", &database]].concat();
    let system = PingSystemProcess::start(folder.path(), &well);
    with_good_agents(&system, &agents, &NAMES);
    let sick = [&well[..], &["--allow-agents", "10.0.0.0/8"]].concat();
    let sick = PingSystemProcess::start(folder.path(), &sick);
    wait_until("pings by the sick one", || {
        let (_, metrics) = sick.ask_with("/metrics", "");
        let unobserved = metrics.lines().find_map(|line| {
            line.strip_prefix(r#"uptime_ping_system_pings_total{result="unobserved"} "#)
        });
        (unobserved?.parse::<u64>().unwrap() >= 10).then_some(())
    });
    drop(sick);
    assert_none_is_blamed(&system, &NAMES);
}

#[test]
#[cfg_attr(no_faketime, ignore = "needs faketime (package faketime)")]
fn a_clock_that_jumps_delays_no_ping_and_changes_no_stretch() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let clock = WallClock::in_folder(folder.path());
    let start = || {
        let mut command = binary();
        command
            .args(["ping-system", "--listen", "127.0.0.1:0"])
            .args(OFTEN)
            // An hour ahead, all would be older than that.
            .args(["--retention", "30m"])
            .current_dir(folder.path());
        clock.apply_to(&mut command);
        PingSystemProcess::spawn(command)
    };
    let begin = std::time::Instant::now();
    let mut system = start();
    with_good_agents(&system, &agents, &["a"]);
    let first = system.history("a")[0].clone();
    for offset in ["+3600s", "-86400s", "+0s"] {
        clock.set(offset);
        let hours = offset.trim_matches(['+', 's']).parse::<i64>().unwrap() / 3600;
        wait_until("pings by that clock", || {
            let ahead = instant(&system.agent("a")["last_ping_at"]) - chrono::Utc::now();
            ((ahead.num_minutes() - hours * 60).abs() < 5).then_some(())
        });
        // Killed in it, and started again when the clock is right.
        system.kill();
        clock.set("+0s");
        system = start();
        let total = system.agent("a")["total_pings"].as_u64().unwrap();
        system.wait_for_pings("a", total + 2);
    }
    let elapsed = begin.elapsed().as_secs_f64();
    let history = system.ask("/ping-system/agents/a/history?hours=100");
    let pings = history["pings"].as_array().unwrap();
    // Nothing was deleted, and all answers together cover the time that has passed.
    assert!(
        pings
            .iter()
            .any(|ping| ping["timestamp"] == first["timestamp"])
    );
    let covered: f64 = pings
        .iter()
        .filter_map(|ping| ping["window_seconds"].as_f64())
        .sum();
    assert!(
        covered < elapsed && covered > elapsed - 6.0,
        "{covered} of {elapsed}"
    );
    assert_none_is_blamed(&system, &["a"]);
}

/// A script in a network of its own, whose loopback it can take down: `$1` is our program.
fn in_a_network(folder: &Path, script: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["-rn", "sh", "-ec", script, "sh"])
        .arg(binary().get_program())
        .current_dir(folder);
    command
}

#[tokio::test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(
    any(no_unshare, no_ip),
    ignore = "needs a network of its own (unshare -rn) and ip (package iproute2)"
)]
async fn agents_outlive_the_network_of_their_ping_system() {
    use uptime_runner::ping_system::store::{Cursor, Registration, Store, sqlite};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ping-system.db");
    let location = || sqlite::Location::File(path.clone());
    let store = sqlite::open(location()).await.unwrap();
    for (n, name) in NAMES.into_iter().enumerate() {
        let registration = Registration {
            agent_id: name.to_owned(),
            agent_url: format!("http://127.0.0.1:{}", 9001 + n),
            capabilities: None,
            metadata: None,
            at: chrono::Utc::now(),
            interval: Duration::from_secs(1),
        };
        store.register(&registration).await.unwrap();
    }
    drop(store);
    let script = "ip link set lo up
        n=9001
        for name in a b c d e f; do
            \"$1\" agent --agent-id $name --listen 127.0.0.1:$n --check-interval 500ms --gpu 'simulated:up 1h' 2>/dev/null &
            n=$((n + 1))
        done
        sleep 3
        \"$1\" ping-system --allow-simulated --base-interval 1s --response-timeout 1s 2>log &
        sleep 5; ip link set lo down; sleep 8; ip link set lo up; sleep 9
        kill -TERM $!; wait $!; kill 0";
    let mut command = in_a_network(folder.path(), script);
    // `kill 0` ends it with its agents, and not the tests.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let _ = tokio::task::spawn_blocking(move || command.status().unwrap()).await;
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();

    let store = sqlite::open(location()).await.unwrap();
    let begin = chrono::Utc::now() - TimeDelta::hours(1);
    for name in NAMES {
        let agent = store.agent(name).await.unwrap().unwrap();
        assert_eq!(agent.agent.consecutive_poor_uptime, 0, "{name}\n{log}");
        let pings = store
            .history(agent.key, Cursor::before(begin), 1000)
            .await
            .unwrap();
        let pings: Vec<_> = pings.into_iter().map(|(_, ping)| ping).collect();
        assert!(pings.iter().any(|ping| !ping.observed), "{name}\n{log}");
        let blamed = pings.iter().filter(|ping| {
            let up = ping.uptime_percent.is_some_and(|up| up.get() > 99.9);
            ping.observed && !ping.superseded && !up
        });
        assert_eq!(blamed.count(), 0, "{name}: {pings:#?}\n{log}");
        let last = pings.last().unwrap();
        assert!(last.success, "{name}: {last:?}\n{log}");
    }
    assert_eq!(log.matches("agents are not observed").count(), 1, "{log}");
}
