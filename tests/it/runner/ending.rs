//! How a run ends, and what it says then.

use std::io::Read;
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex};

use crate::support::{
    PingSystem, RawServer, Runner, binary, free_port, good_gateway, respond, wait_until,
};
use rustix::process::Signal;

/// A gateway that answers once it is let go on.
fn held_gateway() -> (RawServer, impl Fn()) {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let inside = Arc::clone(&gate);
    let server = RawServer::start(move |stream, _| {
        let (open, opened) = &*inside;
        drop(
            opened
                .wait_while(open.lock().unwrap(), |open| !*open)
                .unwrap(),
        );
        respond(stream, 200, "", "{}");
    });
    let open = move || {
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
    };
    (server, open)
}

#[test]
fn the_first_signal_waits_for_answers_under_way() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let pings = PingSystem::start(99.5);
        let (gateway, open) = held_gateway();
        let mut runner = Runner::start(&pings.url(), &gateway.url(), &["--rate", "600"]);
        runner.wait_for_rate(600);
        wait_until("jobs", || {
            (gateway.requests.lock().unwrap().len() >= 3).then_some(())
        });
        runner.signal(signal);
        open();
        let finished = runner.finish();
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
        let [attempts, ..] = finished.assert_accounts_add_up(600);
        assert_eq!(attempts, gateway.requests.lock().unwrap().len() as u64);
        let account = &finished.summary()["capabilities"]["gpu-check"];
        assert_eq!(account["successful"].as_u64(), Some(attempts));
    }
}

/// As under nohup.
#[test]
fn an_ignored_hangup_stays_ignored() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let mut command = std::process::Command::new("nohup");
    command.arg(binary().get_program());
    command.args(["--agent", "agent-001", "--rate", "600", "--output", "json"]);
    command.args(["--ping-url", &pings.url(), "--gateway-url", &gateway.url()]);
    let mut runner = Runner::spawn(command);
    runner.wait_for_event("job");
    runner.signal(Signal::HUP);
    runner.wait_for_event("job");
    runner.wait_for_event("job");
    runner.signal(Signal::INT);
    assert_eq!(runner.finish().status.code(), Some(0));
}

#[test]
fn a_run_that_never_knew_an_uptime_failed() {
    let gateway = good_gateway();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let finished = Runner::start(&nobody, &gateway.url(), &["--duration", "300ms"]).finish();
    assert_eq!(finished.status.code(), Some(1));
    let told = finished.stderr.contains("no agent's uptime was ever known");
    assert!(told, "{}", finished.stderr);
    finished.summary();
}

#[test]
fn the_first_signal_waits_no_longer_than_the_timeout() {
    let pings = PingSystem::start(99.5);
    let (gateway, _open) = held_gateway();
    let mut runner = Runner::start(
        &pings.url(),
        &gateway.url(),
        &["--rate", "600", "--timeout", "300ms"],
    );
    runner.wait_for_event("job");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(0));
    finished.assert_accounts_add_up(600);
}

#[test]
fn the_second_signal_ends_at_once() {
    let pings = PingSystem::start(99.5);
    let (gateway, _open) = held_gateway();
    let arguments = ["--rate", "600", "--price", "1000"];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    runner.wait_for_rate(600);
    wait_until("a job", || {
        (!gateway.requests.lock().unwrap().is_empty()).then_some(())
    });
    runner.signal(Signal::INT);
    // Two signals of one kind at the same time are one: the first must have been taken.
    runner.wait_for_log("stopping: ");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(130), "{}", finished.stderr);
    let jobs = finished.of_kind("job");
    let sent = finished.summary()["jobs_sent"].as_u64().unwrap();
    assert!(sent > 0 && jobs.len() as u64 == sent, "{jobs:?}");
    for job in jobs {
        assert_eq!(job["outcome"], "cut_short");
        // The orchestrator worked for it.
        assert_ne!(job["cost_wei"], "0");
        assert!(job["error"].as_str().unwrap().contains("stays taken"));
    }
    let told = format!("{sent} jobs are abandoned");
    assert!(finished.stderr.contains(&told), "{}", finished.stderr);
}

#[test]
fn a_duration_and_a_number_of_jobs_end_as_asked() {
    for arguments in [["--duration", "400ms"], ["--max-jobs", "5"]] {
        let pings = PingSystem::start(99.5);
        let gateway = good_gateway();
        let mut all = vec!["--rate", "6000", "--stats-every", "2"];
        all.extend(arguments);
        let finished = Runner::start(&pings.url(), &gateway.url(), &all).finish();
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
        let [attempts, ..] = finished.assert_accounts_add_up(6000);
        assert_eq!(finished.of_kind("statistics").len() as u64, attempts / 2);
        if arguments[0] == "--max-jobs" {
            assert_eq!(attempts, 5);
            assert_eq!(gateway.requests.lock().unwrap().len(), 5);
        }
    }
}

#[test]
fn requirements_decide_over_the_status() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let status = |requirements: &[&str], jobs: &str| {
        let mut arguments = vec!["--rate", "6000", "--max-jobs", jobs];
        for requirement in requirements {
            arguments.extend(["--require", requirement]);
        }
        let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
        (finished.status.code(), finished.stderr)
    };
    let met = status(&["success_rate>=99", "p99<=1m", "jobs>=3"], "3");
    assert_eq!(met.0, Some(0), "{}", met.1);
    let missed = status(&["success_rate>=99", "jobs>=4", "p50<=1us"], "3");
    assert_eq!(missed.0, Some(1));
    for told in [
        "❌ missed: required jobs>=4, got 3",
        "❌ missed: required p50<=1us, got ",
        "✅ met: required success_rate>=99, got 100%",
    ] {
        assert!(missed.1.contains(told), "{}", missed.1);
    }
}

#[test]
fn a_threshold_without_data_is_missed() {
    let pings = PingSystem::start(80.0);
    let gateway = good_gateway();
    let mut runner = Runner::start(
        &pings.url(),
        &gateway.url(),
        &["--require", "success_rate>=0", "--require", "failed<=0"],
    );
    runner.wait_for_rate(0);
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(1));
    let told = finished.stderr.matches("got no data").count();
    assert_eq!(told, 2, "{}", finished.stderr);
    assert!(gateway.requests.lock().unwrap().is_empty());
}

#[test]
fn an_output_that_takes_no_more_ends_the_run_with_status_1() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    for out in ["closed", "full"] {
        let stdout = if out == "full" {
            Stdio::from(
                std::fs::OpenOptions::new()
                    .write(true)
                    .open("/dev/full")
                    .unwrap(),
            )
        } else {
            Stdio::piped()
        };
        let mut child = binary()
            .args(["--agent", "agent-001", "--output", "json"])
            .args(["--ping-url", &pings.url(), "--gateway-url", &gateway.url()])
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{stderr}");
        assert!(
            stderr.contains("standard output cannot be written"),
            "{stderr}"
        );
    }
}

/// Whoever reads slowly loses no line, and the accounts add up.
#[test]
fn a_reader_that_stalls_loses_no_event() {
    let pings = PingSystem::start(99.5);
    let big = "x".repeat(60_000);
    let gateway = RawServer::start(move |stream, _| {
        // Long headers make long lines, so that little is needed to fill the queue.
        respond(stream, 200, &format!("X-Metadata: {big}\r\n"), "{}");
    });
    let mut command = binary();
    command
        .args([
            "--agent",
            "agent-001",
            "--output",
            "json",
            "--rate",
            "60000",
        ])
        .args(["--ping-url", &pings.url(), "--gateway-url", &gateway.url()])
        .args(["--max-in-flight", "20"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Nothing is read: the queue fills, then the places stay taken.
    wait_until("a full queue", || {
        (gateway.requests.lock().unwrap().len() >= 80).then_some(())
    });
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::INT).unwrap();
    let mut out = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut out)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let events: Vec<serde_json::Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let jobs = events
        .iter()
        .filter(|event| event["event"] == "job")
        .count() as u64;
    let account = &events.last().unwrap()["capabilities"]["gpu-check"];
    assert_eq!(account["attempts"].as_u64(), Some(jobs));
    assert_eq!(gateway.requests.lock().unwrap().len() as u64, jobs);
}
