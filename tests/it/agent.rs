//! The agent as a ping system sees it, with a simulated GPU and through the real FFI with a fake
//! NVML.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::ping_system::PingSystemProcess;
use crate::support::served::Served;
use crate::support::{RawServer, binary, fake_library, free_port, respond, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// An agent in a folder of its own.
struct Agent(Served);

impl Agent {
    fn start(folder: &TempDir, arguments: &[&str]) -> Self {
        Self::start_with(folder, arguments, &[])
    }

    fn start_with(folder: &TempDir, arguments: &[&str], environment: &[(&str, &Path)]) -> Self {
        let mut command = binary();
        command
            .args([
                "agent",
                "--agent-id",
                "agent-001",
                "--listen",
                "127.0.0.1:0",
            ])
            .args(arguments)
            .current_dir(folder.path())
            .envs(environment.iter().copied());
        Self(Served::spawn(command))
    }

    fn wait_for_status(&self, words: &str) -> Value {
        wait_until(words, || {
            let status = self.ask("/agent/gpu-status");
            status["status"]
                .as_str()
                .unwrap()
                .contains(words)
                .then_some(status)
        })
    }
}

impl Deref for Agent {
    type Target = Served;

    fn deref(&self) -> &Served {
        &self.0
    }
}

impl DerefMut for Agent {
    fn deref_mut(&mut self) -> &mut Served {
        &mut self.0
    }
}

/// Checked so seldom that no machine is too slow to keep to it.
const UP: [&str; 4] = ["--gpu", "simulated:up 1h", "--check-interval", "1m"];
/// As often as a busy machine keeps to.
const CHECKED_OFTEN: [&str; 4] = ["--gpu", "simulated:up 1h", "--check-interval", "500ms"];

#[test]
fn pings_answer_for_windows_that_follow_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(&folder, &UP);
    agent.wait_for_status("available");
    let first = agent.ask("/agent/uptime-since-last-ping");
    assert_eq!(
        (&first["first_ping"], &first["gpu_available"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(
        (&first["agent_id"], &first["gpu_count"]),
        (&json!("agent-001"), &json!(1))
    );
    let peeked = agent.ask("/agent/uptime-since-last-ping?peek=true");
    let second = agent.ask("/agent/uptime-since-last-ping");
    for report in [&peeked, &second] {
        assert_eq!(
            (&report["first_ping"], &report["since"]),
            (&json!(false), &first["timestamp"])
        );
        assert_eq!(report["uptime_percent"], 100.0);
        assert_eq!(report["boot_id"], first["boot_id"]);
    }
    let since = format!(
        "/agent/uptime-since-last-ping?since={}",
        first["since"].as_str().unwrap()
    );
    assert_eq!(agent.ask(&since)["since"], first["since"]);
    assert_eq!(
        agent.ask("/agent/uptime-since-last-ping")["since"],
        second["timestamp"]
    );
    assert_eq!(
        agent.ask("/agent/health"),
        json!({ "status": "ok", "agent_id": "agent-001" })
    );
    assert!(
        agent
            .ask_with("/metrics", "")
            .1
            .contains("uptime_agent_up 1")
    );
}

#[test]
fn wrong_questions_get_a_clear_answer() {
    let folder = tempfile::tempdir().unwrap();
    let agent = Agent::start(&folder, &UP);
    for (path, status) in [
        ("/agent/uptime-since-last-ping?since=yesterday", 400),
        ("/agent/uptime-since-last-ping?seconds=-1", 400),
        ("/agent/uptime-since-last-ping?seconds=NaN", 400),
        ("/agent/uptime-since-last-ping?seconds=1e300", 400),
        ("/agent/uptime-since-last-ping?seconds=soon", 400),
        // Sent along for agents of earlier releases.
        (
            "/agent/uptime-since-last-ping?seconds=1&since=2999-01-01T00:00:00Z",
            200,
        ),
        (
            "/agent/uptime-since-last-ping?since=2999-01-01T00:00:00Z",
            400,
        ),
        ("/agent/uptime-since-last-ping?peek=perhaps", 400),
        ("/agent/", 404),
    ] {
        assert_eq!(agent.ask_with(path, "").0, status, "{path}");
    }
    let mut slow = TcpStream::connect(&agent.address).unwrap();
    slow.write_all(b"GET /agent/health HTTP/1.1\r\nhost:")
        .unwrap();
    let mut huge = TcpStream::connect(&agent.address).unwrap();
    let _ = huge.write_all(format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(200_000)).as_bytes());
    assert_eq!(agent.ask("/agent/health")["status"], "ok");
}

/// An orchestrator hides a live runner while this says 503; the agent itself is healthy.
#[test]
fn it_is_ready_while_the_gpu_and_the_application_are() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "s3cret").unwrap();
    let is_healthy = Arc::new(AtomicBool::new(true));
    let healthy = Arc::clone(&is_healthy);
    let application = RawServer::start(move |stream, _| {
        let healthy = healthy.load(Ordering::Relaxed);
        respond(stream, if healthy { 204 } else { 500 }, "", "");
    });
    let url = format!("{}/health", application.url());
    let more = ["--token-file", "token", "--ready-also", &url];
    let agent = Agent::start(&folder, &[&UP[..], &more].concat());
    let wait_for = |status: u16, text: &str| {
        wait_until(text, || {
            let answer = agent.ask_with("/agent/ready", "");
            (answer.0 == status && answer.1.contains(text)).then_some(answer.1)
        })
    };
    assert_eq!(wait_for(200, "ready"), "{\"status\":\"ready\"}");
    is_healthy.store(false, Ordering::Relaxed);
    let answer = wait_for(503, "/health: status 500");
    assert!(answer.contains("\"status\":\"not ready\""), "{answer}");
    is_healthy.store(true, Ordering::Relaxed);
    wait_for(200, "ready");
    drop(agent);

    let lost = ["--check-interval", "100ms", "--gpu", "simulated:lost 1h"];
    let agent = Agent::start(&folder, &lost);
    agent.wait_for_status("lost");
    let (status, body) = agent.ask_with("/agent/ready", "");
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("lost"), "{body}");
    assert_eq!(agent.ask_with("/agent/health", "").0, 200);
}

#[test]
fn without_the_token_nothing_is_told_and_nothing_changes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "s3cret\n").unwrap();
    let mut arguments = UP.to_vec();
    arguments.extend(["--token-file", "token"]);
    let agent = Agent::start(&folder, &arguments);
    for path in [
        "/agent/uptime-since-last-ping",
        "/agent/gpu-status",
        "/metrics",
    ] {
        for header in [
            "",
            "Authorization: Bearer wrong\r\n",
            "Authorization: Basic s3cret\r\n",
        ] {
            let (status, body) = agent.ask_with(path, header);
            assert_eq!(status, 401, "{path} {header}");
            assert!(body.contains("error") && !body.contains("s3cret"));
        }
    }
    assert_eq!(agent.ask_with("/agent/health", "").0, 200);
    let right = "Authorization: Bearer s3cret\r\n";
    let (status, body) = agent.ask_with("/agent/uptime-since-last-ping", right);
    let report: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &report["first_ping"]), (200, &json!(true)));
    assert!(!agent.log().contains("s3cret"));
}

#[test]
fn beyond_loopback_a_token_or_a_waiver_is_needed() {
    let output = binary()
        .args(["agent", "--agent-id", "a", "--listen", "0.0.0.0:0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("--listen") && stderr.contains("--allow-unauthenticated"),
        "{stderr}"
    );
    for (arguments, word) in [
        (vec!["agent"], "--agent-id"),
        (
            vec!["agent", "--agent-id", "a", "--gpu", "simulated:down 5s"],
            "--gpu",
        ),
        (
            vec!["agent", "--agent-id", "a", "--check-interval", "0"],
            "--check-interval",
        ),
        (
            vec!["agent", "--agent-id", "a", "--require-gpus", "0"],
            "--require-gpus",
        ),
    ] {
        let output = binary().args(&arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains(word),
            "{arguments:?}"
        );
    }
}

#[test]
fn agent_mode_in_the_environment_means_the_agent() {
    for (mode, arguments) in [
        ("true", &[][..]),
        ("True", &["--check-interval", "50ms"][..]),
        ("yes", &["--max-history=2000"]),
        ("1", &[]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = binary();
        command.args(arguments).current_dir(folder.path()).envs([
            ("AGENT_MODE", mode),
            ("AGENT_ID", "from-environment"),
            ("AGENT_LISTEN", "127.0.0.1:0"),
            ("AGENT_GPU", "simulated:up 1h"),
            ("AGENT_GPU_CHECK_INTERVAL_SECONDS", "0.05"),
        ]);
        let agent = Agent(Served::spawn(command));
        assert_eq!(agent.ask("/agent/health")["agent_id"], "from-environment");
        let checkpoint = folder.path().join("uptime-agent-from-environment.json");
        wait_until("its checkpoint", || checkpoint.exists().then_some(()));
    }
    let output = binary().env("AGENT_MODE", "maybe").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("AGENT_MODE='maybe'"), "{said}");
    // A command that is named is that command.
    let output = binary()
        .env("AGENT_MODE", "true")
        .arg("mock")
        .arg("--help")
        .output()
        .unwrap();
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("uptime-runner mock")
    );
}

#[test]
fn a_reader_of_the_log_that_stops_holds_nothing_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = binary();
    command
        .args(["agent", "--agent-id", "a", "--listen", "127.0.0.1:0"])
        .args(UP)
        .env("RUST_LOG", "trace")
        .current_dir(folder.path())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = log.find_map(|line| {
        let line = line.unwrap();
        line.split_once("answers at http://")
            .map(|(_, address)| address.to_owned())
    });
    // From now on nobody reads, and the pipe is full soon.
    let address = address.unwrap();
    for _ in 0..500 {
        let answer = crate::support::get(&format!("http://{address}/agent/health"));
        assert!(answer.contains("ok"), "{answer}");
    }
    crate::support::signal(&child, Signal::TERM);
    let since = std::time::Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(since.elapsed() < Duration::from_secs(5));
}

/// Waits until what was known when this is called has been noted. One note may be on its way to the disk
/// already, and the next one waiting: the third one is of a later check.
fn wait_for_notes(folder: &Path) {
    for _ in 0..3 {
        let old = note(folder);
        wait_until("another note", || {
            note(folder).filter(|new| Some(new) != old.as_ref())
        });
    }
}

/// What the last check noted, if any has yet.
fn note(folder: &Path) -> Option<String> {
    let files = std::fs::read_dir(folder).unwrap();
    let mut paths = files.map(|file| file.unwrap().path());
    let noted = paths.find(|path| path.extension().is_some_and(|end| end == "watched"));
    std::fs::read_to_string(noted?).ok()
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
fn history_survives_the_end_of_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(&folder, &CHECKED_OFTEN);
    agent.wait_for_status("available");
    let begin = agent.ask("/agent/uptime-since-last-ping");
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL] {
        let checks = |agent: &Agent| {
            agent.ask("/agent/uptime-since-last-ping?peek=true")["checks_total"]
                .as_u64()
                .unwrap()
        };
        let before = checks(&agent);
        wait_until("more checks", || {
            (checks(&agent) > before + 3).then_some(())
        });
        let known = agent.ask("/agent/uptime-since-last-ping?peek=true");
        wait_for_notes(folder.path());
        agent.signal(signal);
        assert_eq!(
            agent.child.wait().unwrap().code(),
            (signal == Signal::TERM).then_some(0)
        );
        agent = Agent::start(&folder, &CHECKED_OFTEN);
        agent.wait_for_status("available");
        let after = agent.ask("/agent/uptime-since-last-ping?peek=true");
        assert_eq!(after["since"], begin["timestamp"], "the window goes on");
        assert_eq!(after["first_ping"], false);
        assert_ne!(after["boot_id"], known["boot_id"]);
        let up = |report: &Value| {
            report["uptime_percent"].as_f64().unwrap() * report["window_seconds"].as_f64().unwrap()
                / 100.0
        };
        // Nothing that was noted is lost.
        assert!(up(&after) >= up(&known) - 1e-9, "{known} {after}");
        assert!(up(&after) <= after["window_seconds"].as_f64().unwrap());
    }
}

#[test]
fn a_damaged_checkpoint_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("uptime-agent-agent-001.json");
    std::fs::write(&file, "{\"version\":1,").unwrap();
    let agent = Agent::start(&folder, &UP);
    assert!(agent.log().contains("damaged"), "{}", agent.log());
    let aside = folder.path().join("uptime-agent-agent-001.json.unusable-1");
    assert_eq!(std::fs::read_to_string(aside).unwrap(), "{\"version\":1,");
    agent.wait_for_status("available");
}

#[test]
fn a_checkpoint_that_cannot_be_written_is_written_once_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = CHECKED_OFTEN.to_vec();
    arguments.extend(["--checkpoint", "later/agent.json"]);
    let mut agent = Agent::start(&folder, &arguments);
    wait_until("the complaint", || {
        agent.log().contains("cannot be written").then_some(())
    });
    agent.wait_for_status("available");
    let before = agent.ask("/agent/uptime-since-last-ping");
    std::fs::create_dir(folder.path().join("later")).unwrap();
    wait_until("its end", || {
        agent.log().contains("is written again").then_some(())
    });
    // That may have been a note from before the ping.
    wait_for_notes(&folder.path().join("later"));
    agent.signal(Signal::KILL);
    agent.child.wait().unwrap();
    let agent = Agent::start(&folder, &arguments);
    let after = agent.ask("/agent/uptime-since-last-ping?peek=true");
    assert_eq!(after["since"], before["timestamp"], "nothing is lost");
}

/// An agent that looks through a fake NVML, and what steers that.
struct FakeDriver {
    agent: Agent,
    state: PathBuf,
    library: PathBuf,
    folder: TempDir,
}

impl FakeDriver {
    fn start(state: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = fake_library::compile("nvml", folder.path());
        Self::start_with(folder, &library, state)
    }

    fn start_with(folder: TempDir, library: &Path, state: &str) -> Self {
        let steering = folder.path().join("state");
        std::fs::write(&steering, state).unwrap();
        Self {
            agent: Self::agent(&folder, library, &steering),
            state: steering,
            library: library.to_owned(),
            folder,
        }
    }

    fn agent(folder: &TempDir, library: &Path, state: &Path) -> Agent {
        let library = library.to_str().unwrap();
        let arguments = ["--check-interval", "500ms", "--nvml-library", library];
        Agent::start_with(folder, &arguments, &[("FAKE_NVML_STATE", state)])
    }

    /// `kill -9`, and another one in its place.
    fn restart_agent(&mut self) {
        wait_for_notes(self.folder.path());
        self.agent.kill();
        self.agent = Self::agent(&self.folder, &self.library, &self.state);
    }

    fn set(&self, state: &str) {
        fake_library::set(&self.state, state);
    }

    /// The child processes of the agent.
    fn probe_pids(&self) -> Vec<u32> {
        let pid = self.agent.child.id();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let children = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        let pids = children.flat_map(|pids| {
            let pids = pids.split_whitespace().map(|pid| pid.parse().unwrap());
            pids.collect::<Vec<u32>>()
        });
        pids.collect()
    }

    fn probes(&self) -> usize {
        self.probe_pids().len()
    }

    fn checks(&self) -> u64 {
        let report = self
            .agent
            .ask("/agent/uptime-since-last-ping?seconds=86400");
        report["checks_total"].as_u64().unwrap()
    }
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_gpu_is_described_as_nvml_tells() {
    let driver = FakeDriver::start("ok");
    let status = driver.agent.wait_for_status("available");
    assert_eq!(
        status["devices"]["0"],
        json!({
            "device_id": 0, "health": "ok", "uuid": "GPU-fake-1", "name": "Fake GPU",
            "memory": { "total_bytes": 1000, "free_bytes": 750, "used_bytes": 250, "usage_percentage": 25.0 },
            "compute_capability": { "major": 8, "minor": 9, "version": "8.9" },
            "utilization": { "gpu_percent": 7, "memory_percent": 3 },
            "temperature_celsius": 55, "throttle_reasons": null, "uncorrected_ecc_errors": null,
            "since": status["devices"]["0"]["since"],
        })
    );
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn what_is_down_has_a_reason_and_comes_back_without_a_restart() {
    let driver = FakeDriver::start("nodriver");
    driver.agent.wait_for_status("driver is not loaded");
    for (state, words) in [
        ("none", "lists no GPU"),
        ("ok", "available"),
        ("lost", "GPU 0 lost"),
        ("busy", "available"),
        ("unsupported", "available"),
        ("old", "available"),
        ("old lost", "GPU 0 lost"),
        ("ok", "available"),
        ("recovery 2", "GPU 0 the driver asks to reboot the node"),
        ("ok", "available"),
        ("remap", "could not be remapped"),
        ("ok", "available"),
        ("retired", "wait to be retired"),
        ("ok", "available"),
        ("reset", "reset required"),
        ("ok", "available"),
        ("mig", "available"),
        ("mig lost", "GPU 0 lost"),
        ("ok", "available"),
        ("count 4000000000", "the driver lists 4000000000 GPUs"),
        ("ok", "available"),
        ("segv", "the driver's library crashed (SIGSEGV)"),
        ("ok", "available"),
        ("abort", "the driver's library crashed (SIGABRT)"),
        ("ok", "available"),
        ("print", "available"),
        ("exit", "the probe ended with exit status: 3"),
        ("ok", "available"),
        ("nodriver", "driver"),
        ("ok", "available"),
    ] {
        driver.set(state);
        let status = driver.agent.wait_for_status(words);
        assert_eq!(
            status["gpu_count"],
            u64::from(words == "available"),
            "{state}: {status}"
        );
    }
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_fatal_xid_holds_until_the_driver_is_loaded_anew() {
    let driver = FakeDriver::start("ok");
    driver.agent.wait_for_status("available");
    driver.set("xid 48");
    driver.agent.wait_for_status("xid 48");
    driver.set("ok");
    // However often it is asked, and also by another process.
    let mut driver = driver;
    driver.restart_agent();
    driver.agent.wait_for_status("xid 48");
    driver.set("nodriver");
    driver.agent.wait_for_status("not loaded");
    driver.set("ok");
    driver.agent.wait_for_status("available");
    driver.set("xid 43");
    wait_until("the fault of an application", || {
        driver
            .agent
            .log()
            .contains("of the application")
            .then_some(())
    });
    let log = driver.agent.log();
    let mut downs = log.lines().filter(|line| line.contains("INFO GPU down"));
    // A look that a busy machine held up is no fault of the driver's.
    let known = |line: &str| {
        ["xid 48", "timeout", "not loaded"]
            .iter()
            .any(|words| line.contains(words))
    };
    assert!(downs.all(known), "{log}");
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn all_gpus_seen_at_the_start_must_be_healthy() {
    let driver = FakeDriver::start("two");
    let status = driver.agent.wait_for_status("available");
    assert_eq!(status["gpu_count"], 2);
    // The second one offers no events, which must not keep those of the first from being seen.
    driver.set("two xid 79");
    let status = driver.agent.wait_for_status("1 of 2 GPUs ok, GPU 0 xid 79");
    assert_eq!(status["devices"]["1"]["health"], "ok");
    driver.set("nodriver");
    driver.agent.wait_for_status("not loaded");
    driver.set("two");
    driver.agent.wait_for_status("available");
    driver.set("ok");
    driver
        .agent
        .wait_for_status("1 of 1 GPUs ok, 2 required, GPU-fake-2 missing");
    assert_eq!(
        driver.agent.ask("/agent/uptime-since-last-ping?peek=true")["gpu_available"],
        false
    );
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_hanging_driver_blocks_no_answer_and_piles_up_no_processes() {
    let driver = FakeDriver::start("ok");
    driver.agent.wait_for_status("available");
    driver.set("hang");
    driver.agent.wait_for_status("timeout");
    for _ in 0..20 {
        let report = driver.agent.ask("/agent/uptime-since-last-ping?peek=true");
        assert_eq!(report["gpu_available"], false);
        assert!(driver.probes() <= 5, "{}", driver.probes());
    }
    driver.set("ok");
    driver.agent.wait_for_status("available");
    wait_until("one process again", || (driver.probes() == 1).then_some(()));
    driver.set("hang");
    driver.agent.wait_for_status("timeout");
    driver.agent.signal(Signal::TERM);
    let mut driver = driver;
    assert_eq!(
        driver.agent.child.wait().unwrap().code(),
        Some(0),
        "a hang does not hold up the end"
    );
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_library_that_is_missing_is_looked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let library = fake_library::compile("nvml", folder.path());
    let hidden = library.with_extension("hidden");
    std::fs::rename(&library, &hidden).unwrap();
    let driver = FakeDriver::start_with(folder, &library, "ok");
    driver.agent.wait_for_status("cannot be loaded");
    std::fs::rename(hidden, &library).unwrap();
    driver.agent.wait_for_status("available");
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_driver_that_hangs_again_and_again_is_up_as_soon_as_it_is_well() {
    let driver = FakeDriver::start("ok");
    for _ in 0..3 {
        driver.agent.wait_for_status("available");
        driver.set("hang");
        driver.agent.wait_for_status("timeout");
        driver.set("ok");
    }
    let since = std::time::Instant::now();
    driver.agent.wait_for_status("available");
    assert!(
        since.elapsed() < Duration::from_secs(3),
        "{:?}",
        since.elapsed()
    );
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_driver_that_is_slow_to_start_is_waited_for() {
    let driver = FakeDriver::start("slow");
    driver.agent.wait_for_status("the driver is starting");
    let started = driver.probe_pids();
    // Several check intervals later it is the same process that starts.
    for _ in 0..3 {
        let checks = driver.checks();
        wait_until("another check", || (driver.checks() > checks).then_some(()));
    }
    assert_eq!(driver.probe_pids(), started);
    driver.set("ok");
    driver.agent.wait_for_status("available");
    assert_eq!(driver.probe_pids(), started);
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn no_probe_outlives_its_agent() {
    let mut driver = FakeDriver::start("ok");
    driver.agent.wait_for_status("available");
    driver.set("hang");
    driver.agent.wait_for_status("timeout");
    let probes = driver.probe_pids();
    driver.agent.kill();
    for pid in probes {
        wait_until("its end", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            // A zombie waits for whoever reaps orphans here.
            stat.map_or(true, |stat| stat.contains(") Z "))
                .then_some(())
        });
    }
}

/// What the driver does at random, and what the agent may not say meanwhile.
#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn whatever_the_driver_does_the_agent_answers() {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let driver = FakeDriver::start("ok");
    driver.agent.wait_for_status("available");
    let states = [
        "ok",
        "hang",
        "segv",
        "abort",
        "exit",
        "print",
        "leak",
        "count 4000000000",
        "lost",
        "nodriver",
        "late 2000",
    ];
    let ok = ["ok", "print", "leak"];
    let (begin, mut slowest) = (std::time::Instant::now(), Duration::ZERO);
    while begin.elapsed() < Duration::from_secs(25) {
        let state = states[random.usize(0..states.len())];
        driver.set(state);
        // Once a whole check has been made since, the agent must know.
        let checks = driver.checks();
        let mut looks = 0;
        wait_until("two checks", || {
            let asked = std::time::Instant::now();
            driver.agent.ask("/agent/uptime-since-last-ping?peek=true");
            slowest = slowest.max(asked.elapsed());
            looks += 1;
            (driver.checks() >= checks + 2).then_some(())
        });
        let report = driver.agent.ask("/agent/uptime-since-last-ping?peek=true");
        if !ok.contains(&state) {
            assert_eq!(report["gpu_available"], false, "{state}");
        }
        assert!(driver.probe_pids().len() <= 6, "{state}");
        assert!(looks > 0);
    }
    driver.set("ok");
    driver.agent.wait_for_status("available");
    // A busy machine may be slow by itself.
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
}

#[test]
fn a_checkpoint_belongs_to_one_agent() {
    let folder = tempfile::tempdir().unwrap();
    let first = Agent::start(&folder, &UP);
    let mut second = binary();
    second
        .args([
            "agent",
            "--agent-id",
            "agent-001",
            "--listen",
            "127.0.0.1:0",
        ])
        .args(UP)
        .current_dir(folder.path());
    let output = second.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    let holder = format!("(process {})", first.child.id());
    assert!(
        said.contains(&holder) && said.contains("--checkpoint"),
        "{said}"
    );
    // Ids that look alike have files of their own, however long they are.
    let checkpoints = || {
        let files = std::fs::read_dir(folder.path()).unwrap();
        let paths = files.map(|file| file.unwrap().path());
        paths
            .filter(|path| path.extension().is_some_and(|end| end == "json"))
            .count()
    };
    let long = "\u{e4}".repeat(128);
    for (n, id) in ["a/b", "a_b", "a%2Fb", &long].into_iter().enumerate() {
        let mut command = binary();
        command
            .args(["agent", "--agent-id", id, "--listen", "127.0.0.1:0"])
            .args(UP)
            .current_dir(folder.path());
        let _agent = Agent(Served::spawn(command));
        wait_until("its checkpoint", || (checkpoints() == n + 2).then_some(()));
    }
}

#[test]
#[cfg_attr(no_root, ignore = "needs root")]
fn a_checkpoint_that_is_mounted_by_itself_survives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let (mounted, kept) = (
        folder.path().join("agent.json"),
        outside.path().join("kept.json"),
    );
    std::fs::write(&mounted, "").unwrap();
    std::fs::write(&kept, "").unwrap();
    let mount = |arguments: &[&Path]| {
        let mut command = std::process::Command::new("mount");
        assert!(command.args(arguments).status().unwrap().success());
    };
    mount(&[Path::new("--bind"), &kept, &mounted]);
    let arguments = [&CHECKED_OFTEN[..], &["--checkpoint", "agent.json"]].concat();
    let mut agent = Agent::start(&folder, &arguments);
    agent.wait_for_status("available");
    let before = agent.ask("/agent/uptime-since-last-ping");
    let noted = || std::fs::read_to_string(&kept).unwrap();
    for _ in 0..3 {
        let old = noted();
        wait_until("another checkpoint", || (noted() != old).then_some(()));
    }
    agent.kill();
    // Nothing but the file is kept.
    for file in std::fs::read_dir(folder.path()).unwrap().flatten() {
        if file.path() != mounted {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    let agent = Agent::start(&folder, &arguments);
    agent.wait_for_status("available");
    let after = agent.ask("/agent/uptime-since-last-ping?peek=true");
    assert_eq!(after["since"], before["timestamp"], "{}", agent.log());
    drop(agent);
    let unmounted = std::process::Command::new("umount").arg(&mounted).status();
    assert!(unmounted.unwrap().success());
}

#[test]
fn a_checkpoint_whose_folder_is_removed_is_written_whole_again() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let arguments = [&CHECKED_OFTEN[..], &["--checkpoint", "place/agent.json"]].concat();
    let mut agent = Agent::start(&folder, &arguments);
    agent.wait_for_status("available");
    let before = agent.ask("/agent/uptime-since-last-ping");
    std::fs::rename(&place, folder.path().join("gone")).unwrap();
    wait_until("the complaint", || {
        agent.log().contains("cannot be written").then_some(())
    });
    std::fs::create_dir(&place).unwrap();
    wait_until("its end", || {
        agent.log().contains("is written again").then_some(())
    });
    wait_for_notes(&place);
    agent.kill();
    let agent = Agent::start(&folder, &arguments);
    let after = agent.ask("/agent/uptime-since-last-ping?peek=true");
    assert_eq!(after["since"], before["timestamp"], "nothing is lost");
}

#[test]
fn it_registers_itself_and_says_why_not() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "s3cret").unwrap();
    std::fs::write(folder.path().join("wrong"), "other").unwrap();
    // The ping system comes later, at a port that is known before.
    let address = format!("127.0.0.1:{}", free_port());
    let url = format!("http://{address}");
    let start = |token: &str| {
        let register = ["--register-at", &url, "--register-token-file", token];
        Agent::start(&folder, &[&UP[..], &register].concat())
    };
    let agent = start("token");
    wait_until("the complaint", || {
        agent.log().contains("not registered at").then_some(())
    });
    let options = [
        "--listen",
        &address,
        "--token-file",
        "token",
        "--allow-simulated",
    ];
    let mut command = binary();
    command
        .arg("ping-system")
        .args(options)
        .current_dir(folder.path());
    let system = PingSystemProcess::spawn(command);
    let known = wait_until("the agent", || {
        let (status, agent) = system.ask_with("/ping-system/agents/agent-001", "");
        (status == 200).then(|| serde_json::from_str::<Value>(&agent).unwrap())
    });
    assert_eq!(known["agent_url"], format!("http://{}", agent.address));
    let known = system.wait_for_pings("agent-001", 1);
    assert_eq!(known["source"], "simulated");
    assert!(agent.log().contains("registered at"), "{}", agent.log());
    drop(agent);
    // A refusal is told, and stops nothing.
    let agent = start("wrong");
    wait_until("the refusal", || {
        agent
            .log()
            .contains("check --register-token-file")
            .then_some(())
    });
    agent.wait_for_status("available");
    assert!(!agent.log().contains("other"), "{}", agent.log());
    for (arguments, words) in [
        (&["--advertise", "http://a:1"][..], "--register-at"),
        (
            &[
                "--register-at",
                "http://a",
                "--listen",
                "0.0.0.0:0",
                "--allow-unauthenticated",
            ],
            "--advertise",
        ),
    ] {
        let output = binary()
            .args(["agent", "--agent-id", "b"])
            .args(arguments)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn systemd_is_told_that_it_is_ready_and_alive() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(crate::support::PATIENCE))
        .unwrap();
    let _agent = Agent::start_with(&folder, &CHECKED_OFTEN, &[("NOTIFY_SOCKET", &path)]);
    let mut heard = String::new();
    while heard.matches("WATCHDOG=1").count() < 3 {
        let mut piece = [0; 256];
        let length = socket.recv(&mut piece).unwrap();
        heard.push_str(&String::from_utf8_lossy(&piece[..length]));
        heard.push('\n');
    }
    assert!(heard.starts_with("READY=1"), "{heard}");
}
