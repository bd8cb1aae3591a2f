//! The runner with a real ping system, which tells it of each new ping at once.

use std::time::{Duration, Instant};

use crate::support::agents::Agents;
use crate::support::ping_system::PingSystemProcess;
use crate::support::proxy::Proxy;
use crate::support::wall_clock::WallClock;
use crate::support::{Runner, binary, good_gateway, instant};
use rustix::process::Signal;
use serde_json::json;

/// So long that no poll could be the reason for what is seen.
const SELDOM: [&str; 2] = ["--uptime-interval", "1h"];

#[test]
fn a_new_ping_changes_the_rate_without_a_poll() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    system.with_agent("agent-001", &agents);
    let gateway = good_gateway();
    let mut runner = Runner::start(&system.url(), &gateway.url(), &SELDOM);
    runner.wait_for_rate(60);
    // The second `uptime` event is that of the question after listening has begun.
    runner.wait_for_event("uptime");
    for (uptime, rate) in [(96.0, 30), (60.0, 0)] {
        agents.set_uptime("agent-001", uptime);
        let begun = Instant::now();
        let ping = system.ping("agent-001");
        let change = runner.wait_for_rate(rate);
        let since_asked = instant(&change["ts"]) - instant(&ping["timestamp"]);
        eprintln!(
            "{rate}/min {since_asked} after the question, {:?} in all",
            begun.elapsed()
        );
        assert!(since_asked.num_seconds() < 60, "{since_asked}");
    }
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    finished.assert_accounts_add_up(60);
}

#[test]
fn a_ping_system_that_comes_back_is_followed_again() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    system.with_agent("agent-001", &agents);
    let gateway = good_gateway();
    let arguments = ["--uptime-interval", "200ms"];
    let mut runner = Runner::start(&system.url(), &gateway.url(), &arguments);
    runner.wait_for_rate(60);
    let address = system.address.clone();
    system.kill();
    let mut command = crate::support::binary();
    command
        .args(["ping-system", "--base-interval", "1h", "--listen", &address])
        .current_dir(folder.path());
    let system = crate::support::served::Served::spawn(command);
    runner.wait_for("a good answer again", |event| {
        event["event"] == "uptime" && event["state"] == "fresh"
    });
    agents.set_uptime("agent-001", 60.0);
    system.request("POST", "/ping-system/agents/agent-001/ping", "", "");
    let change = runner.wait_for_rate(0);
    assert_eq!(change["reason"], json!("uptime"));
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    finished.assert_accounts_add_up(60);
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
fn a_stream_that_dies_silently_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    let network = Proxy::before(system.address.parse().unwrap());
    system.with_agent("agent-001", &agents);
    let gateway = good_gateway();
    let patient = [&SELDOM[..], &["--stale-after", "1h"]].concat();
    let mut runner = Runner::start(&network.url(), &gateway.url(), &patient);
    runner.wait_for_rate(60);
    runner.wait_for_event("uptime");
    // The connection stays open, and nothing comes through it any more.
    network.swallow();
    agents.set_uptime("agent-001", 60.0);
    system.ping("agent-001");
    let change = runner.wait_for_rate(0);
    assert_eq!(change["uptime_percent"], 60.0);
}

#[test]
#[cfg_attr(no_faketime, ignore = "needs faketime (package faketime)")]
fn a_clock_that_jumps_makes_the_runner_forget_no_outage() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    system.with_agent("agent-001", &agents);
    agents.set_uptime("agent-001", 60.0);
    system.ping("agent-001");
    let gateway = good_gateway();
    let mut command = binary();
    command
        .args(["--agent", "agent-001", "--output", "json"])
        .args(["--ping-url", &system.url(), "--gateway-url", &gateway.url()])
        .args(["--uptime-interval", "200ms"]);
    let clock = WallClock::in_folder(folder.path());
    clock.apply_to(&mut command);
    let mut runner = Runner::spawn(command);
    runner.wait_for_rate(0);
    for offset in ["+4000s", "-4000s", "+0s"] {
        clock.set(offset);
        let since = Instant::now();
        runner.wait_for("some polls by that clock", |event| {
            event["event"] == "uptime" && since.elapsed() > Duration::from_millis(500)
        });
        // It is asked again as soon as that is noticed.
        runner.wait_for_log("uptimes follow the ping system's");
    }
    runner.signal(Signal::INT);
    let finished = runner.finish();
    for uptime in finished.of_kind("uptime") {
        assert_eq!(
            (&uptime["uptime_percent"], &uptime["state"]),
            (&json!(60.0), &json!("fresh")),
            "{uptime}"
        );
    }
    assert_eq!(finished.of_kind("job").len(), 0);
    finished.assert_accounts_add_up(60);
}

#[test]
fn an_outage_of_the_ping_system_is_one_warning() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    let names = ["a", "b", "c", "d"];
    for name in names {
        system.with_agent(name, &agents);
    }
    let gateway = good_gateway();
    let arguments = names.map(|name| ["--agent", name]).concat();
    let often = ["--uptime-interval", "200ms", "--stale-after", "1s"];
    let arguments = [&arguments[..], &often].concat();
    let mut runner = Runner::start(&system.url(), &gateway.url(), &arguments);
    for _ in names {
        runner.wait_for_rate(60);
    }
    system.kill();
    for _ in names {
        runner.wait_for_rate(0);
    }
    runner.signal(Signal::INT);
    let finished = runner.finish();
    let warnings = finished.stderr.lines().filter(|line| line.contains("WARN"));
    let warnings: Vec<&str> = warnings.collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(warnings[0].contains("no good answer from the ping system"));
}
