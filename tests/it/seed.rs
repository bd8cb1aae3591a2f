//! The tests that the Python scripts had, by their names: `uptime_query`, `job_rate_calculation`,
//! `punishment_logic`, `end_to_end` (in [`super::end_to_end`]). `.github/docs/migration.md` lists what else
//! of theirs is tested where.

use rustix::process::Signal;
use serde_json::json;

use crate::support::{PingSystem, Runner, good_gateway};

/// The agent and its history are asked for, and the uptime follows from the history.
#[test]
fn uptime_query() {
    let pings = PingSystem::start(96.25);
    let gateway = good_gateway();
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &["--uptime-interval", "1h"]);
    let uptime = runner.wait_for_event("uptime");
    for (field, value) in [
        ("uptime_percent", json!(96.25)),
        ("state", json!("fresh")),
        ("pings", json!(1)),
        ("consecutive_poor", json!(1)),
        ("ping_interval_minutes", json!(15.0)),
        ("total_pings", json!(8)),
    ] {
        assert_eq!(uptime[field], value, "{field}");
    }
    let requests = pings.server.requests.lock().unwrap();
    let asked = requests
        .iter()
        .map(|(head, _)| head.lines().next().unwrap());
    let expected = [
        "GET /ping-system/agents/agent-001 HTTP/1.1",
        "GET /ping-system/agents/agent-001/history?hours=1&limit=2000 HTTP/1.1",
    ];
    assert_eq!(asked.take(2).collect::<Vec<_>>(), expected);
}

/// 99 % and over earn the whole rate, 95 % half, 90 % a tenth, below nothing; fractions are cut off.
#[test]
fn job_rate_calculation() {
    for (uptime, base, expected) in [
        (100.0, 60, 60),
        (99.0, 60, 60),
        (98.99, 60, 30),
        (95.0, 60, 30),
        (94.99, 60, 6),
        (90.0, 60, 6),
        (89.99, 60, 0),
        (0.0, 60, 0),
        (96.0, 31, 15),
        (92.0, 19, 1),
    ] {
        let pings = PingSystem::start(uptime);
        let gateway = good_gateway();
        let rate = base.to_string();
        let mut runner = Runner::start(&pings.url(), &gateway.url(), &["--rate", &rate]);
        let change = runner.wait_for_event("rate_changed");
        assert_eq!(change["to"], expected, "{uptime} % of {base}");
        assert_eq!(change["from"], 0);
    }
}

/// A falling uptime lowers the rate down to nothing, a better one restores it, and each slot that was
/// withheld is counted.
#[test]
fn punishment_logic() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let arguments = ["--rate", "6000", "--uptime-interval", "50ms"];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    runner.wait_for_rate(6000);
    for (uptime, rate) in [(96.2, 3000), (92.0, 600), (85.0, 0), (99.0, 6000)] {
        pings.set_uptime(uptime);
        let change = runner.wait_for_rate(rate);
        assert_eq!(change["uptime_percent"], uptime);
        assert_eq!(change["reason"], "uptime");
    }
    runner.signal(Signal::INT);
    let finished = runner.finish();
    let [attempts, delayed, dropped] = finished.assert_accounts_add_up(6000);
    assert!(
        attempts > 0 && delayed > 0,
        "{attempts} {delayed} {dropped}"
    );
}
