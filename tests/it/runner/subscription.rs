//! The runner with a real ping system, which tells it of each new ping at once.

use std::time::Instant;

use crate::support::agents::Agents;
use crate::support::ping_system::PingSystemProcess;
use crate::support::{Runner, good_gateway, instant};
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
