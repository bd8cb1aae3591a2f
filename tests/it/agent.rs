//! The agent as a ping system sees it, with a simulated GPU and through the real FFI with a fake
//! NVML.

use std::io::Write;
use std::net::TcpStream;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use crate::support::served::Served;
use crate::support::{binary, nvml, wait_until};
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
    let folder = tempfile::tempdir().unwrap();
    let mut command = binary();
    command.current_dir(folder.path()).envs([
        ("AGENT_MODE", "true"),
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
    _folder: TempDir,
}

impl FakeDriver {
    fn start(state: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = nvml::compile(folder.path());
        Self::start_with(folder, &library, state)
    }

    fn start_with(folder: TempDir, library: &Path, state: &str) -> Self {
        let steering = folder.path().join("state");
        std::fs::write(&steering, state).unwrap();
        let arguments = [
            "--check-interval",
            "500ms",
            "--nvml-library",
            library.to_str().unwrap(),
        ];
        let agent = Agent::start_with(&folder, &arguments, &[("FAKE_NVML_STATE", &steering)]);
        Self {
            agent,
            state: steering,
            _folder: folder,
        }
    }

    fn set(&self, state: &str) {
        nvml::set(&self.state, state);
    }

    fn probe_threads(&self) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.agent.child.id())).unwrap();
        let names = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim() == "gpu").count()
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
            "temperature_celsius": 55,
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
        ("xids 79", "GPU 0 xid 79"),
        ("ok", "available"),
        ("unsupported", "available"),
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
fn an_xid_clears_once_the_gpu_passes_a_full_look_again() {
    let driver = FakeDriver::start("ok");
    driver.agent.wait_for_status("available");
    driver.set("xids 48");
    driver.agent.wait_for_status("xid 48");
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
    let mut downs = log.lines().filter(|line| line.contains("GPU down"));
    // A look that a busy machine held up is no fault of the driver's.
    let known = |line: &str| line.contains("xid 48") || line.contains("timeout");
    assert!(downs.all(known), "{log}");
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn all_gpus_seen_at_the_start_must_be_healthy() {
    let driver = FakeDriver::start("two");
    let status = driver.agent.wait_for_status("available");
    assert_eq!(status["gpu_count"], 2);
    // The second one offers no events, which must not keep those of the first from being seen.
    driver.set("two xids 79");
    let status = driver.agent.wait_for_status("1 of 2 GPUs ok, GPU 0 xid 79");
    assert_eq!(status["devices"]["1"]["health"], "ok");
    driver.set("two");
    driver.agent.wait_for_status("available");
    driver.set("ok");
    driver.agent.wait_for_status("1 of 1 GPUs ok, 2 required");
    assert_eq!(
        driver.agent.ask("/agent/uptime-since-last-ping?peek=true")["gpu_available"],
        false
    );
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_hanging_driver_blocks_no_answer_and_piles_up_no_threads() {
    let driver = FakeDriver::start("ok");
    driver.agent.wait_for_status("available");
    driver.set("hang");
    driver.agent.wait_for_status("two probes hang");
    for _ in 0..20 {
        let report = driver.agent.ask("/agent/uptime-since-last-ping?peek=true");
        assert_eq!(report["gpu_available"], false);
        assert!(driver.probe_threads() <= 2, "{}", driver.probe_threads());
    }
    driver.set("ok");
    driver.agent.wait_for_status("available");
    wait_until("one thread again", || {
        (driver.probe_threads() == 1).then_some(())
    });
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
    let library = nvml::compile(folder.path());
    let hidden = library.with_extension("hidden");
    std::fs::rename(&library, &hidden).unwrap();
    let driver = FakeDriver::start_with(folder, &library, "ok");
    driver.agent.wait_for_status("cannot be loaded");
    std::fs::rename(hidden, &library).unwrap();
    driver.agent.wait_for_status("available");
}
