//! The real binary against answers that real servers gave.

use std::io::Write;
use std::process::Command;

use serde_json::Value;
use wiremock::matchers::{method, path, path_regex};
use wiremock::{Mock, MockServer};

use crate::support::ping_system::PingSystemProcess;
use crate::support::recorded::Recorded;
use crate::support::records::rows;
use crate::support::{PingSystem, RawServer, Runner, binary, instant};

/// Recorded pings are old by now.
const FOR_EVER: &str = "36500d";

async fn serving(matched: wiremock::MockBuilder, recorded: &Recorded) -> MockServer {
    let server = MockServer::start().await;
    let mock = matched.respond_with(recorded.response());
    mock.mount(&server).await;
    server
}

/// A job for each answer of a gateway: it is counted once, means what the answer means, and keeps its status, orchestrator
/// and balance, in what is printed and in the record.
#[tokio::test]
async fn each_answer_of_a_gateway_makes_one_job() {
    let pings = PingSystem::start(99.5);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    let record = ["--record", file.to_str().unwrap()];
    let mut printed = Vec::new();
    for (name, recorded) in Recorded::all("gateway") {
        let arguments = ["--rate", "6000", "--max-jobs", "1", "--timeout", "20s"];
        let arguments = [&arguments[..], &record].concat();
        let run = |gateway: &str| Runner::start(&pings.url(), gateway, &arguments).finish();
        let finished = if recorded.then.is_some() {
            run(&flooding(&recorded).url())
        } else {
            let route = path("/gateway/process/request/agent-net");
            let gateway = serving(Mock::given(method("POST")).and(route), &recorded).await;
            let finished = run(&gateway.uri());
            let requests = gateway.received_requests().await.unwrap();
            assert_eq!(requests.len(), 1, "{name}");
            finished
        };
        assert!(finished.status.success(), "{name}: {}", finished.stderr);
        let jobs = finished.of_kind("job");
        let [job] = jobs[..] else {
            panic!("{name}: {jobs:?}")
        };
        assert_eq!(job["outcome"], recorded.outcome, "{name}: {job}");
        assert_eq!(
            job["error"].is_null(),
            recorded.outcome == "success",
            "{name}"
        );
        assert_eq!(job["status"], recorded.status, "{name}");
        let text = |value: Option<&str>| value.filter(|value| !value.is_empty()).map(Value::from);
        let orchestrator = text(recorded.header("X-Orchestrator-Url"));
        assert_eq!(
            job["orchestrator"],
            orchestrator.unwrap_or_default(),
            "{name}"
        );
        // A stream tells it before its end.
        let told = recorded.body.split_once("{\"balance\": ").map(|(_, rest)| {
            let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
            Value::from(digits)
        });
        let balance = told.or(text(recorded.header("Livepeer-Balance")));
        assert_eq!(job["balance_wei"], balance.unwrap_or_default(), "{name}");
        let gpu_check = &finished.summary()["capabilities"]["gpu-check"];
        assert_eq!(gpu_check["attempts"], 1, "{name}");
        let status = recorded.status.to_string();
        assert_eq!(gpu_check["status_codes"][&status], 1, "{name}");
        assert_eq!(gpu_check["outcomes"][&recorded.outcome], 1, "{name}");
        printed.push(
            ["outcome", "status", "orchestrator", "balance_wei", "error"]
                .map(|key| job[key].clone()),
        );
    }
    let query = "SELECT outcome, status, orchestrator, balance_wei, error FROM jobs ORDER BY run";
    assert_eq!(rows(&file, query), printed);
}

/// The line of a job says how it ended, and why if it failed.
#[tokio::test]
async fn each_answer_of_a_gateway_makes_one_line() {
    let pings = PingSystem::start(99.5);
    for (name, recorded) in Recorded::all("gateway") {
        let run = |gateway: &str| {
            let arguments = ["--rate", "6000", "--max-jobs", "1", "--timeout", "20s"];
            let mut command = binary();
            command.args(["--agent", "agent-001", "--ping-url", &pings.url()]);
            command.args(["--gateway-url", gateway]).args(arguments);
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let text = if recorded.then.is_some() {
            run(&flooding(&recorded).url())
        } else {
            let gateway = serving(Mock::given(method("POST")), &recorded).await;
            let text = run(&gateway.uri());
            // Also lets the server end its work: dropped before that, it would wait for this thread.
            let requests = gateway.received_requests().await.unwrap();
            assert_eq!(requests.len(), 1, "{name}");
            text
        };
        let is_job = |line: &&str| line.starts_with(['✅', '❌']) && line.contains("] gpu-check: ");
        let lines: Vec<&str> = text.lines().filter(is_job).collect();
        let [line] = lines[..] else {
            panic!("{name}: {text}")
        };
        let Recorded {
            status, outcome, ..
        } = &recorded;
        assert!(line.contains(&format!("] gpu-check: {status} (")), "{line}");
        if outcome == "success" {
            assert!(
                line.starts_with('✅') && line.ends_with("| Uptime: 99.5%"),
                "{line}"
            );
        } else {
            assert!(line.starts_with('❌'), "{line}");
            let (_, reason) = line
                .split_once(&format!("| Uptime: 99.5% | {outcome}: "))
                .unwrap();
            assert!(!reason.is_empty(), "{line}");
        }
    }
}

/// A gateway that never ends its answer: its body, then the same bytes until the client goes.
fn flooding(recorded: &Recorded) -> RawServer {
    let headers = recorded.headers.iter();
    let lines: Vec<String> = headers
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let (status, lines, body) = (recorded.status, lines.concat(), &recorded.body);
    let head = format!("HTTP/1.1 {status} X\r\n{lines}\r\n{body}");
    let then = recorded.then.as_ref().expect("what follows");
    let flood = then["repeat"].as_str().unwrap().repeat(64);
    RawServer::start(move |stream, _| {
        let _ = stream.write_all(head.as_bytes());
        while stream.write_all(flood.as_bytes()).is_ok() {}
    })
}

/// What the orchestrators of live runners answer is kept for the runner that will ask them; here it is
/// only served as it was recorded.
#[tokio::test]
async fn recorded_answers_are_served_as_they_were() {
    for folder in ["gateway", "live-runner", "ping_system", "agent"] {
        for (name, recorded) in Recorded::all(folder) {
            let server = serving(Mock::given(path("/")), &recorded).await;
            let client = uptime_runner::net::client::new(false, Vec::new()).unwrap();
            let answer = client.get(server.uri()).send().await.unwrap();
            assert_eq!(answer.status().as_u16(), recorded.status, "{name}");
            for header in recorded.headers.keys() {
                let got = answer.headers()[header.as_str()].to_str().unwrap();
                assert_eq!(Some(got), recorded.header(header), "{name}: {header}");
            }
            let body = answer.bytes().await.unwrap();
            assert_eq!(body, recorded.body.as_bytes(), "{name}");
        }
    }
}

#[tokio::test]
async fn the_uptime_of_recorded_pings_is_their_mean_by_the_time_they_cover() {
    let (list, history) = (
        Recorded::read("ping_system/agents.json"),
        Recorded::read("ping_system/history.json"),
    );
    let pings = serving(Mock::given(path("/ping-system/agents")), &list).await;
    let of_agent = path("/ping-system/agents/agent-001/history");
    let mock = Mock::given(of_agent).respond_with(history.response());
    mock.mount(&pings).await;
    let arguments = ["--uptime-window", FOR_EVER, "--duration", "300ms"];
    let finished = Runner::start(&pings.uri(), "http://127.0.0.1:9", &arguments).finish();

    let (mut weighted, mut seconds) = (0.0, 0.0);
    let history = history.json();
    let pings = history["pings"].as_array().unwrap();
    for (n, ping) in pings.iter().enumerate() {
        // The first one only says that a GPU is there.
        if ping["first_ping"] == false {
            // Nobody speaks for more than the time since the answer before.
            let since = instant(&ping["timestamp"]) - instant(&pings[n - 1]["timestamp"]);
            let window = ping["window_seconds"].as_f64().unwrap();
            let window = window.min(since.as_seconds_f64());
            weighted += ping["uptime_percent"].as_f64().unwrap() * window;
            seconds += window;
        }
    }
    let uptime = finished.of_kind("uptime")[0];
    let told = uptime["uptime_percent"].as_f64().unwrap();
    assert!((told - weighted / seconds).abs() < 1e-6, "{uptime}");
    assert_eq!(uptime["pings"], 5);
    // They are long past.
    assert_eq!(uptime["state"], "stale");
    assert_eq!(
        uptime["total_pings"],
        list.json()["agents"][0]["total_pings"]
    );
}

#[tokio::test]
async fn a_ping_stores_what_an_agent_answered() {
    let folder = tempfile::tempdir().unwrap();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    for (file, uptime, success) in [
        ("agent/uptime.json", 73.804_138_054, true),
        ("agent/since-in-future.json", 0.0, false),
        ("agent/unauthorized.json", 0.0, false),
        ("agent/health.json", 0.0, false),
    ] {
        let recorded = Recorded::read(file);
        let agent = serving(
            Mock::given(path_regex("^/agent/uptime-since-last-ping$")),
            &recorded,
        )
        .await;
        system.register("agent-001", &agent.uri());
        // The first ping only asks whether a GPU is there.
        system.ping("agent-001");
        let ping = system.ping("agent-001");
        assert_eq!(ping["success"], success, "{file}: {ping}");
        if success {
            assert_eq!(ping["uptime_percent"], uptime, "{file}");
            // The answer's window is longer than the time since the last ping.
            assert!(ping["window_seconds"].as_f64().unwrap() < 7.6, "{file}");
        } else {
            assert_eq!(ping["uptime_percent"], Value::Null, "{file}");
            assert!(ping["error"].is_string(), "{file}");
        }
    }
}

#[tokio::test]
async fn check_says_what_a_recorded_ping_system_knows() {
    let recorded = Recorded::read("ping_system/agents-none.json");
    let pings = serving(Mock::given(path("/ping-system/agents")), &recorded).await;
    let mut check: Command = binary();
    check.args(["check", "--agent", "agent-001", "--ping-url", &pings.uri()]);
    let output = check.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("0 agents registered"), "{said}");
    assert!(said.contains("agent-001: not registered"), "{said}");
}
