//! What a newcomer tries first.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use crate::support::recorded::Recorded;
use crate::support::{Finished, Runner, binary, get};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A mock on a free port, and where it is.
fn mock(arguments: &[&str]) -> (std::process::Child, String) {
    let mut child = binary()
        .args(["mock", "--listen", "127.0.0.1:0"])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let url = line
        .split_whitespace()
        .find(|word| word.starts_with("http://"))
        .unwrap();
    (child, url.trim_end_matches(',').to_owned())
}

#[test]
fn the_mock_is_a_ping_system_and_a_strict_gateway() {
    let (mut child, url) = mock(&["--uptime", "96.2", "--latency", "0"]);
    for prefix in ["/gateway", ""] {
        let finished = Runner::start(
            &url,
            &url,
            &[
                "--rate",
                "6000",
                "--max-jobs",
                "20",
                "--gateway-prefix",
                prefix,
                "--capabilities",
                "gpu-check,text-to-image,prompt-enhance",
            ],
        )
        .finish();
        assert!(finished.status.success(), "{}", finished.stderr);
        assert_eq!(finished.of_kind("rate_changed")[0]["to"], 3000);
        for job in finished.of_kind("job") {
            assert_eq!(job["outcome"], "success", "{job}");
            assert!(job["balance_wei"].is_string() && job["orchestrator"].is_string());
        }
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_mock_fails_as_it_is_told() {
    for (failure, outcome) in [
        ("500:100%", "http_error"),
        ("502:100%", "bad_gateway"),
        ("empty:100%", "no_orchestrator"),
        ("no-supply:100%", "no_supply"),
        ("unpaid:100%", "unpaid"),
        ("reset:100%", "transport"),
        ("hang:100%", "timeout"),
    ] {
        let (mut child, url) = mock(&["--fail", failure, "--latency", "1ms"]);
        let arguments = ["--rate", "6000", "--max-jobs", "3", "--timeout", "500ms"];
        let finished = Runner::start(&url, &url, &arguments).finish();
        for job in finished.of_kind("job") {
            assert_eq!(job["outcome"], outcome, "{job}");
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[test]
fn a_worker_that_is_gone_stays_gone() {
    let (mut child, url) = mock(&["--fail", "worker-gone:100%", "--latency", "1ms"]);
    let arguments = ["--rate", "6000", "--max-jobs", "20"];
    let finished = Runner::start(&url, &url, &arguments).finish();
    let outcomes = &finished.summary()["capabilities"]["gpu-check"]["outcomes"];
    let gone = outcomes["no_orchestrator"].as_u64().unwrap();
    // Jobs may have been on their way when it went.
    assert!((1..20).contains(&gone), "{outcomes}");
    assert_eq!(outcomes["no_supply"].as_u64(), Some(20 - gone));
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn a_mock_without_a_free_place_has_no_supply() {
    let (mut child, url) = mock(&["--capacity", "3", "--latency", "300ms"]);
    let arguments = ["--rate", "6000", "--max-jobs", "100"];
    let finished = Runner::start(&url, &url, &arguments).finish();
    let outcomes = &finished.summary()["capabilities"]["gpu-check"]["outcomes"];
    let [good, refused] = ["success", "no_supply"].map(|name| outcomes[name].as_u64().unwrap());
    assert!(good >= 3 && refused > 0, "{outcomes}");
    assert_eq!(good + refused, 100);
    let _ = child.kill();
    let _ = child.wait();
}

/// A runner of the mock's live runner, with its end.
fn run_live(url: &str, arguments: &[&str]) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    let agent = format!("[[agents]]\nid = 'agent-001'\nrunner = '{url}/apps/agent-001/app'\n");
    std::fs::write(&file, agent).unwrap();
    let arguments = [&["--config", file.to_str().unwrap()], arguments].concat();
    Runner::start(url, "http://127.0.0.1:9", &arguments).finish()
}

#[test]
fn a_live_runner_fails_as_the_mock_is_told() {
    for (failure, outcome) in [
        ("502:100%", "http_error"),
        ("reset:100%", "transport"),
        ("hang:100%", "timeout"),
        ("no-capacity:100%", "no_place"),
        ("success:0%", "success"),
    ] {
        let (mut child, url) = mock(&["--fail-runner", failure, "--latency", "1ms"]);
        let arguments = ["--rate", "6000", "--max-jobs", "3", "--timeout", "500ms"];
        for job in run_live(&url, &arguments).of_kind("job") {
            assert_eq!(job["outcome"], outcome, "{job}");
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[test]
fn a_live_runner_whose_worker_is_gone_is_listed_no_more() {
    let (mut child, url) = mock(&["--fail-runner", "worker-gone:100%", "--latency", "1ms"]);
    let finished = run_live(&url, &["--rate", "600", "--max-jobs", "20"]);
    assert_eq!(finished.of_kind("discovery")[0]["listed"], true);
    let outcomes = &finished.summary()["capabilities"]["gpu-check"]["outcomes"];
    let gone = outcomes["worker_gone"].as_u64().unwrap();
    assert!((1..20).contains(&gone), "{outcomes}");
    assert_eq!(outcomes["unavailable"].as_u64(), Some(20 - gone));
    assert_eq!(
        get(&format!("{url}/discovery")).matches("/apps/").count(),
        0
    );
    let _ = child.kill();
    let _ = child.wait();
}

/// A client that gives up frees its place, which at a BYOC orchestrator it does not.
#[test]
fn a_live_runner_has_so_many_places_and_frees_those_of_clients_that_left() {
    let (mut child, url) = mock(&["--capacity", "3", "--latency", "400ms"]);
    let arguments = ["--rate", "6000", "--max-jobs", "100", "--timeout", "100ms"];
    let finished = run_live(&url, &arguments);
    let outcomes = &finished.summary()["capabilities"]["gpu-check"]["outcomes"];
    let [given_up, refused] = ["timeout", "no_place"].map(|name| outcomes[name].as_u64().unwrap());
    assert_eq!(given_up + refused, 100, "{outcomes}");
    assert!(given_up > 3 && refused > 0, "{outcomes}");
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn the_mocks_agents_have_uptimes_of_their_own() {
    let agents = [
        "--agent",
        "a=99.5",
        "--agent",
        "b=96.2@0s",
        "--agent",
        "c",
        "--uptime",
        "92",
    ];
    let (mut child, url) = mock(&agents);
    let arguments = [
        "--agent", "a", "--agent", "b", "--agent", "c", "--rate", "600",
    ];
    let arguments = [&arguments[..], &["--max-jobs", "30"]].concat();
    let finished = Runner::start(&url, &url, &arguments).finish();
    let rates = finished.of_kind("rate_changed").into_iter();
    let rates: BTreeMap<&str, &Value> = rates
        .map(|change| (change["agent"].as_str().unwrap(), &change["to"]))
        .collect();
    assert_eq!(json!(rates), json!({ "a": 600, "b": 300, "c": 60 }));
    let _ = child.kill();
    let _ = child.wait();
}

/// The mock gives each recorded answer, to the byte.
#[tokio::test]
async fn the_mock_gives_each_recorded_answer() {
    let client = uptime_runner::net::client::new(false, Vec::new()).unwrap();
    let of = |set: &'static str, option: &'static str, path: &'static str| {
        let mut all = Recorded::all(set);
        all.retain(|_, recorded| !recorded.outcome.is_empty());
        all.into_iter()
            .map(move |(file, recorded)| (file, recorded, option, path))
    };
    let of_gateway = of("gateway", "--fail", "gateway/process/request/agent-net");
    let of_runner = of("live-runner", "--fail-runner", "apps/agent-001/app/x");
    for (file, recorded, option, path) in of_gateway.chain(of_runner) {
        let name = file.strip_suffix(".json").unwrap();
        let (mut child, url) = mock(&["--latency", "0", option, &format!("{name}:100%")]);
        let job = r#"{"request": "{}", "parameters": "{}", "timeout_seconds": 30}"#;
        let request = client
            .post(format!("{url}/{path}"))
            .header("Livepeer", STANDARD.encode(job));
        let mut answer = request.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), recorded.status, "{name}");
        for header in recorded.headers.keys() {
            let got = answer.headers()[header.as_str()].to_str().unwrap();
            assert_eq!(Some(got), recorded.header(header), "{name}");
        }
        let floods = recorded.then.is_some();
        let wanted = recorded.body.len() + if floods { 100_000 } else { 0 };
        let mut body = Vec::new();
        while body.len() < wanted {
            let piece = answer.chunk().await.unwrap();
            body.extend(piece.unwrap_or_else(|| panic!("{name}: it ended")));
        }
        let (beginning, rest) = body.split_at(recorded.body.len());
        assert_eq!(beginning, recorded.body.as_bytes(), "{name}");
        assert!(rest.iter().all(|&byte| byte == b'\n'), "{name}");
        if !floods {
            assert_eq!(answer.chunk().await.unwrap(), None, "{name}");
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Each answer of the mock's gateway is one that was recorded, to the byte.
#[tokio::test]
async fn the_mock_answers_in_a_gateways_words() {
    let (mut child, url) = mock(&["--latency", "0"]);
    let client = uptime_runner::net::client::new(false, Vec::new()).unwrap();
    let process = format!("{url}/process/request/agent-net");
    let job = |parameters: &str, seconds: &str| {
        let job = format!(
            r#"{{"request": "{{}}", "parameters": "{parameters}", "capability": "agent-net"{seconds}}}"#
        );
        client
            .post(&process)
            .header("Livepeer", STANDARD.encode(job))
    };
    let seconds = r#", "timeout_seconds": 30"#;
    for (request, expected) in [
        (client.post(&process), "no-livepeer-header"),
        (
            client.post(&process).header("Livepeer", "%"),
            "header-not-base64",
        ),
        (job("{}", ""), "timeout-missing"),
        (job("{}", r#", "timeout_seconds": 5.5"#), "timeout-fraction"),
        (job("[]", seconds), "parameters-not-object"),
        (client.get(&process), "method-not-allowed"),
        (
            client.post(format!("{url}/elsewhere")),
            "wrong-path-at-the-node",
        ),
    ] {
        let recorded = Recorded::read(&format!("gateway/{expected}.json"));
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), recorded.status, "{expected}");
        for header in recorded.headers.keys() {
            let got = answer.headers()[header.as_str()].to_str().unwrap();
            assert_eq!(Some(got), recorded.header(header), "{expected}");
        }
        assert_eq!(answer.text().await.unwrap(), recorded.body, "{expected}");
    }
    // A book for each orchestrator and capability, no id, no type of the body.
    let to = |name: &str| format!(r#"{{\"orchestrators\": {{\"include\": [\"{name}\"]}}}}"#);
    for (name, balance) in [("a", "999999"), ("a", "999998"), ("b", "999999")] {
        let answer = job(&to(name), seconds).send().await.unwrap();
        let headers = answer.headers();
        assert_eq!(headers["X-Orchestrator-Url"], name);
        assert_eq!(
            headers["Livepeer-Balance"],
            format!("{balance}000000000000")
        );
        assert_eq!(headers["Content-Type"], "text/plain; charset=utf-8");
    }
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn the_demo_shows_rates_that_follow_the_uptime_and_the_statistics() {
    let output = binary()
        .args(["demo", "--duration", "10s"])
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    let text = String::from_utf8(output.stdout).unwrap();
    // Which uptimes there are depends on the machine: while it is held up nobody watches the GPU.
    // (That the story leads through each tier is tested beside it.)
    let lines: Vec<&str> = text.lines().collect();
    let changes = lines.windows(2).filter_map(|pair| {
        let change = pair[0].strip_prefix("📊 Job rate changed: ")?;
        let (_, to) = change.strip_suffix(" jobs/min")?.split_once(" → ")?;
        let uptime = pair[1].trim().strip_prefix("Uptime: ")?.strip_suffix('%')?;
        Some((to.parse().unwrap(), uptime.parse().unwrap()))
    });
    let changes: Vec<(u32, f64)> = changes.collect();
    for &(rate, uptime) in &changes {
        let earned = match uptime {
            99.0.. => 720,
            95.0.. => 360,
            90.0.. => 72,
            _ => 0,
        };
        assert_eq!(rate, earned, "{uptime} in {changes:?}");
    }
    assert!(changes.len() > 1, "{text}");
    assert!(text.contains("✅ [") && text.contains("] gpu-check: 200 ("));
    assert!(text.trim_end().ends_with('}') && text.contains("📊 Status Codes: {200: "));
    assert!(
        !text.contains('\x1b'),
        "no colour and no status line in a pipe"
    );
    assert!(
        log.contains("GPU down: 0 of 1 GPUs ok, GPU 0 lost"),
        "{log}"
    );
}

#[test]
fn a_demo_of_live_runners_can_be_interrupted() {
    let mut child = binary()
        .args(["demo", "--live-runners", "--duration", "10m"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    let mut listed = 0;
    while !line.contains('✅') {
        line.clear();
        assert!(out.read_line(&mut line).unwrap() > 0);
        listed += usize::from(line.contains("'s runner: listed, 0 of 1000 places in use"));
    }
    assert_eq!(listed, 4);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("STATISTICS SUMMARY"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
