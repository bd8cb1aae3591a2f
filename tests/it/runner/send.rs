//! What a gateway is sent, and what each of its answers means.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{
    Finished, OWN, PingSystem, RawServer, Runner, free_port, get, good_gateway, respond, wait_until,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};

/// Three jobs to a gateway that answers in this way.
fn run(
    arguments: &[&str],
    answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static,
) -> (Finished, RawServer) {
    let pings = PingSystem::start(99.5);
    let gateway = RawServer::start(answer);
    let mut all = vec!["--rate", "6000", "--max-jobs", "3"];
    all.extend(arguments);
    let finished = Runner::start(&pings.url(), &gateway.url(), &all).finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let [attempts, _, dropped] = finished.assert_accounts_add_up(6000);
    assert_eq!((attempts, dropped), (3, 0));
    (finished, gateway)
}

/// All three have this outcome and status.
fn means(
    outcome: &str,
    status: Option<u16>,
    arguments: &[&str],
    answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static,
) -> Finished {
    let (finished, gateway) = run(arguments, answer);
    for job in finished.of_kind("job") {
        assert_eq!(job["outcome"], outcome, "{job}");
        assert_eq!(job["status"], json!(status), "{job}");
        assert_eq!(job["error"].is_null(), outcome == "success", "{job}");
        assert!(job["latency_ms"].as_f64().unwrap() >= job["send_lag_ms"].as_f64().unwrap());
    }
    let account = &finished.summary()["capabilities"]["gpu-check"];
    assert_eq!(account["outcomes"], json!({ outcome: 3 }));
    assert_eq!(
        account["successful"],
        if outcome == "success" { 3 } else { 0 }
    );
    let requests = || gateway.requests.lock().unwrap().len();
    // One that was given up may be read later.
    wait_until("all jobs", || (requests() >= 3).then_some(()));
    assert_eq!(requests(), 3, "no job is sent twice");
    finished
}

macro_rules! means {
    ($($name:ident: $outcome:literal, $status:expr, $answer:expr;)*) => {
        $(#[test] fn $name() { means($outcome, $status, &[], $answer); })*
    };
}

const STREAM: &str = "Content-Type: text/event-stream\r\n";
const DONE_BY: &str = "X-Orchestrator-Url: https://orch-1.example:8935\r\n";

means! {
    a_body: "success", Some(200), |s, _| respond(s, 200, "", "{}");
    no_body_but_an_orchestrator: "success", Some(200), |s, _| respond(s, 200, DONE_BY, "");
    neither: "no_orchestrator", Some(200), |s, _| respond(s, 200, "", "");
    no_supply: "no_supply", Some(400), |s, _| respond(s, 400, OWN, "No orchestrators found for capability x\n");
    unpaid: "unpaid", Some(400), |s, _| respond(s, 400, OWN, "Insufficient balance for request\n");
    another_400: "http_error", Some(400), |s, _| respond(s, 400, OWN, "bad");
    status_500: "http_error", Some(500), |s, _| respond(s, 500, OWN, "oops");
    a_proxys_500: "bad_gateway", Some(500), |s, _| respond(s, 500, "", "oops");
    no_patience: "throttled", Some(503), |s, _| respond(s, 503, "Retry-After: 1\r\n", "");
    html: "bad_gateway", Some(502), |s, _| respond(s, 502, "Content-Type: text/html\r\n", "<html>Bad Gateway</html>");
    status_204: "bad_gateway", Some(204), |s, _| { let _ = s.write_all(b"HTTP/1.1 204 X\r\n\r\n"); };
    a_redirect_loop: "bad_gateway", Some(307), |s, head| {
        let path = head.split_whitespace().nth(1).unwrap();
        respond(s, 307, &format!("Location: {path}\r\n"), "");
    };
    closed_without_an_answer: "transport", None, |s, _| { let _ = s.shutdown(Shutdown::Both); };
    garbage: "transport", None, |s, _| {
        let _ = s.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n");
        let _ = s.shutdown(Shutdown::Both);
    };
    cut_half_way: "transport", Some(200), |s, _| {
        let _ = s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"status\":");
        let _ = s.shutdown(Shutdown::Both);
    };
    a_body_of_80_mb: "success", Some(200), |s, _| {
        let _ = s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 80000000\r\n\r\n");
        for _ in 0..80 {
            let _ = s.write_all(&vec![b'x'; 1_000_000]);
        }
    };
    a_stream_that_ends_early: "transport", Some(200), |s, _| respond(s, 200, STREAM, "data: {}\n\n");
    a_stream_that_goes_on_after_its_end: "success", Some(200), |s, _| {
        let _ = write!(s, "HTTP/1.1 200 OK\r\n{STREAM}\r\ndata: {{}}\n\ndata: [DO");
        let _ = s.flush();
        let _ = s.write_all(b"NE]\n\n");
        while s.write_all(b"\n").is_ok() {}
    };
}

/// The file of a capability that requires something of its answers.
const EXPECTING: &str = r#"
[capabilities.gpu-check]
headers = { X-Tenant = "a" }
expect = { "/status" = "success" }
"#;

#[test]
fn an_answer_must_hold_what_its_capability_expects() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    std::fs::write(&file, EXPECTING).unwrap();
    let with = ["--agent", "agent-001", "--config", file.to_str().unwrap()];
    let expecting = |outcome, extra: &str, body: &str| {
        let (extra, body) = (extra.to_owned(), body.to_owned());
        let finished = means(outcome, Some(200), &with, move |s, head| {
            assert!(
                head.to_ascii_lowercase().contains("\r\nx-tenant: a\r\n"),
                "{head}"
            );
            respond(s, 200, &extra, &body);
        });
        finished.of_kind("job")[0]["error"].clone()
    };
    expecting("success", DONE_BY, r#"{"status": "success"}"#);
    // A stream is exempt, and what no worker said is no answer of its.
    expecting("success", STREAM, "data: [DONE]\n");
    expecting("no_orchestrator", "", "");
    let error = expecting("unexpected", DONE_BY, r#"{"status": "failed"}"#);
    assert_eq!(error, r#"/status is "failed": expected "success""#);
    assert_eq!(expecting("unexpected", DONE_BY, ""), "the answer is empty");
    let nearly = |bytes: usize| format!(r#"{{"status": "success"{}}}"#, " ".repeat(bytes - 21));
    expecting("success", DONE_BY, &nearly(1 << 20));
    let error = expecting("unexpected", DONE_BY, &nearly((1 << 20) + 1));
    assert!(
        error.as_str().unwrap().contains("longer than 1 MiB"),
        "{error}"
    );
}

#[test]
fn only_the_beginning_of_a_long_header_is_kept() {
    let finished = means("success", Some(200), &[], |s, _| {
        let header = format!("X-Orchestrator-Url: {}\r\n", "x".repeat(5000));
        respond(s, 200, &header, "{}");
    });
    let job = finished.of_kind("job")[0];
    assert_eq!(job["orchestrator"].as_str().unwrap().len(), 4096);
}

#[test]
fn streams_that_are_not_tied_draw_one_warning() {
    let finished = means("success", Some(200), &[], |s, _| {
        respond(s, 200, STREAM, "data: [DONE]\n");
    });
    let warnings = finished
        .stderr
        .matches("answers with event streams")
        .count();
    assert_eq!(warnings, 1, "{}", finished.stderr);
}

#[test]
fn a_rejected_job_is_our_own_fault_and_logged_as_an_error() {
    let finished = means("rejected", Some(400), &[], |s, _| {
        respond(s, 400, OWN, "Unable to unmarshal job parameters err=x");
    });
    assert!(finished.stderr.contains("ERROR"), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("Unable to unmarshal"),
        "{}",
        finished.stderr
    );
}

#[test]
fn silence_is_a_timeout() {
    let finished = means("timeout", None, &["--timeout", "200ms"], |s, _| {
        let _ = s.read(&mut [0]);
    });
    assert!(
        finished.stderr.contains("--timeout 200ms is shorter"),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_body_without_end_is_a_timeout() {
    means("timeout", Some(200), &["--timeout", "200ms"], |s, _| {
        let _ = s.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while s.write_all(&[b'x'; 100]).is_ok() {
            std::thread::yield_now();
        }
    });
}

#[test]
fn nobody_there_is_no_connection() {
    let pings = PingSystem::start(99.5);
    let closed = format!("http://127.0.0.1:{}", free_port());
    let finished = Runner::start(
        &pings.url(),
        &closed,
        &["--rate", "6000", "--max-jobs", "3"],
    )
    .finish();
    assert!(finished.status.success());
    finished.assert_accounts_add_up(6000);
    for job in finished.of_kind("job") {
        assert_eq!(
            (&job["outcome"], &job["status"]),
            (&json!("connect"), &Value::Null)
        );
        assert!(job["error"].as_str().unwrap().contains("refused"), "{job}");
    }
}

#[test]
fn of_two_gateways_one_may_die_and_come_back() {
    let pings = PingSystem::start(99.5);
    let port = free_port();
    let first = format!("http://127.0.0.1:{port}");
    let second = good_gateway();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    let urls = format!(
        "gateway_url = ['{first}', '{}']\nrate = 600\n",
        second.url()
    );
    std::fs::write(&file, urls).unwrap();
    let arguments = ["--config", file.to_str().unwrap(), "--agent", "agent-001"];
    // The first one is not there yet: no job is lost.
    let mut command = crate::support::binary();
    command
        .args(["--output", "json", "--ping-url", &pings.url()])
        .args(arguments);
    let mut runner = Runner::spawn(command);
    let job = runner.wait_for_event("job");
    assert_eq!(job["outcome"], "success", "{job}");
    assert!(!second.requests.lock().unwrap().is_empty());
    // It comes, is found by a request without a job, and gets the jobs.
    let jobs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&jobs);
    let gateway = RawServer::start_at(port, move |stream, head| {
        if head.to_ascii_lowercase().contains("\r\nlivepeer:") {
            counted.fetch_add(1, Ordering::Relaxed);
            respond(stream, 200, DONE_BY, "{}");
        } else {
            respond(
                stream,
                400,
                OWN,
                "Unable to parse job request, err=unexpected end of JSON input\n",
            );
        }
    });
    wait_until("jobs at the first gateway", || {
        (jobs.load(Ordering::Relaxed) > 3).then_some(())
    });
    drop(gateway);
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert!(
        finished.stderr.contains("is down: jobs go to the next one"),
        "{}",
        finished.stderr
    );
    assert!(
        finished.stderr.contains("answers again"),
        "{}",
        finished.stderr
    );
    for job in finished.of_kind("job") {
        assert_eq!(job["outcome"], "success", "{job}");
    }
}

/// Only one of several is asked whether it is back.
#[test]
fn a_single_gateway_that_is_down_is_sent_nothing_but_jobs() {
    let pings = PingSystem::start(99.5);
    let gateway = RawServer::start(|stream, _| respond(stream, 502, "", ""));
    let arguments = ["--rate", "600", "--duration", "2500ms"];
    let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
    let jobs = finished.of_kind("job").len();
    assert!(jobs > 5);
    assert_eq!(gateway.requests.lock().unwrap().len(), jobs);
    assert!(!finished.stderr.contains("is down"), "{}", finished.stderr);
}

#[test]
fn the_time_of_a_new_connection_is_told() {
    let finished = means("success", Some(200), &[], |s, _| respond(s, 200, "", "{}"));
    let jobs = finished.of_kind("job");
    let connect = jobs[0]["connect_ms"].as_f64().unwrap();
    assert!(connect > 0.0 && connect < jobs[0]["latency_ms"].as_f64().unwrap());
}

#[test]
fn what_the_answer_tells_is_kept() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let finished = Runner::start(&pings.url(), &gateway.url(), &["--max-jobs", "1"]).finish();
    let job = finished.of_kind("job")[0];
    assert_eq!(job["orchestrator"], "https://orch-1.example:8935");
    assert_eq!(job["balance_wei"], "-12345678901234567890");
    assert_eq!(
        (&job["rate"], &job["uptime_percent"]),
        (&json!(60), &json!(99.5))
    );
    assert_eq!(
        (&job["agent"], &job["capability"]),
        (&json!("agent-001"), &json!("gpu-check"))
    );
    let started = finished.of_kind("started")[0];
    assert_eq!(started["agents"], json!(["agent-001"]));
    assert_eq!(started["base_rate"], 60);
    assert_eq!(started["version"], env!("CARGO_PKG_VERSION"));
}

/// The job that a request carries: path, header with the JSON inside unpacked, body.
fn job_of((head, body): &(String, Vec<u8>)) -> (String, Value, Value) {
    let path = head.split_whitespace().nth(1).unwrap().to_owned();
    let value = |name: &str| {
        head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    assert_eq!(value("content-type").as_deref(), Some("application/json"));
    assert!(head.contains("\r\nLivepeer: "), "{head}");
    let json = STANDARD
        .decode(value("livepeer").expect("the job header"))
        .unwrap();
    let mut header: Value = serde_json::from_slice(&json).unwrap();
    for inner in ["request", "parameters"] {
        header[inner] = serde_json::from_str(header[inner].as_str().unwrap()).unwrap();
    }
    (path, header, serde_json::from_slice(body).unwrap())
}

#[test]
fn jobs_look_as_the_contract_says() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let finished = Runner::start(
        &pings.url(),
        &format!("{}/", gateway.url()),
        &[
            "--rate",
            "60000",
            "--max-jobs",
            "60",
            "--gateway-prefix",
            "/proxy/",
            "--capabilities",
            "gpu-check",
            "text-to-image,prompt-enhance",
        ],
    )
    .finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let ids: Vec<Value> = finished
        .of_kind("job")
        .iter()
        .map(|job| job["job_id"].clone())
        .collect();
    let mut seen = BTreeMap::new();
    for request in gateway.requests.lock().unwrap().iter() {
        let (path, header, body) = job_of(request);
        assert!(ids.contains(&header["id"]));
        assert_eq!(header["timeout_seconds"], 60);
        assert_eq!(header["parameters"], json!({}));
        assert_eq!(header["request"], json!({ "run": header["capability"] }));
        assert_eq!(body["agent_id"], "agent-001");
        let sent = std::time::Duration::from_secs_f64(body["timestamp"].as_f64().unwrap());
        assert!(
            (std::time::UNIX_EPOCH + sent)
                .elapsed()
                .is_ok_and(|age| age.as_secs() < 3600)
        );
        let keys: Vec<&str> = body
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        *seen.entry((path, keys.join(" "))).or_insert(0) += 1;
    }
    let forms: Vec<(&str, &str)> = seen
        .keys()
        .map(|(path, keys)| (path.as_str(), keys.as_str()))
        .collect();
    assert_eq!(
        forms,
        [
            (
                "/proxy/process/request/agent-net",
                "action agent_id include_utilization timestamp"
            ),
            (
                "/proxy/process/request/prompt-enhance",
                "agent_id prompt timestamp"
            ),
            (
                "/proxy/process/request/text-to-image",
                "agent_id prompt seed timestamp"
            ),
        ]
    );
}

const FILE: &str = r#"
rate = 60000
uptime_interval = "10s"
max_jobs = 40
gateway_prefix = ""

[[agents]]
id = "agent-001"
orchestrators = ["https://orch-1.example:8935"]

[[agents]]
id = "agent-002"
orchestrators = ["https://orch-2.example:8935"]

[capabilities.upscale]
route = "upscale"
capability = "upscale-x4"
run = "upscale"
timeout_seconds = 60
weight = 2
payload = { image_url = "https://img.example/1.png", agent_id = "{agent_id}", seed = "{seed}", at = "{timestamp}", name = "{job_id}.png" }
"#;

#[test]
fn the_file_defines_agents_and_capabilities() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    std::fs::write(&file, FILE).unwrap();
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let finished = Runner::start(
        &pings.url(),
        &gateway.url(),
        &[
            "--config",
            file.to_str().unwrap(),
            "--capabilities",
            "upscale",
        ],
    )
    .finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    finished.summary();
    for request in gateway.requests.lock().unwrap().iter() {
        let (path, header, body) = job_of(request);
        assert_eq!(path, "/process/request/upscale");
        assert_eq!(header["capability"], "upscale-x4");
        assert_eq!(header["request"], json!({ "run": "upscale" }));
        assert_eq!(header["timeout_seconds"], 60);
        assert!(body["seed"].is_u64() && body["at"].is_number());
        assert_eq!(
            body["name"],
            format!("{}.png", header["id"].as_str().unwrap())
        );
        let own = format!(
            "https://orch-{}.example:8935",
            &body["agent_id"].as_str().unwrap()[8..]
        );
        assert_eq!(
            header["parameters"],
            json!({ "orchestrators": { "include": [own] } })
        );
    }
    // An orchestrator may call itself as it likes: here orch-1 did them all.
    for job in finished.of_kind("job") {
        assert_eq!(job["outcome"], "success");
    }
    let aliases = finished.of_kind("alias");
    let [alias] = aliases[..] else {
        panic!("{aliases:?}")
    };
    assert_eq!(alias["agent"], "agent-002");
    assert_eq!(alias["orchestrator"], "https://orch-2.example:8935");
    assert_eq!(alias["name"], "https://orch-1.example:8935");
    let told = finished.stderr.matches("calls itself").count();
    assert_eq!(told, 1, "{}", finished.stderr);
    let alias = r#"https://orch-2.example:8935 calls itself "https://orch-1.example:8935""#;
    assert!(finished.stderr.contains(alias), "{}", finished.stderr);
}

#[test]
fn the_same_seed_chooses_the_same_jobs() {
    let jobs = |seed: &str| {
        let pings = PingSystem::start(99.5);
        let gateway = good_gateway();
        let finished = Runner::start(
            &pings.url(),
            &gateway.url(),
            // One at a time, so that they arrive in the order in which they left.
            &[
                "--rate",
                "1200",
                "--max-jobs",
                "10",
                "--random-seed",
                seed,
                "--capabilities",
                "gpu-check,text-to-image",
            ],
        )
        .finish();
        assert!(finished.status.success());
        let requests = gateway.requests.lock().unwrap();
        let mut jobs: Vec<(String, String, Value)> = requests
            .iter()
            .map(job_of)
            .map(|(path, _, body)| (body["timestamp"].to_string(), path, body["seed"].clone()))
            .collect();
        jobs.sort_by(|a, b| a.0.cmp(&b.0));
        jobs.into_iter()
            .map(|(_, path, seed)| (path, seed))
            .collect::<Vec<_>>()
    };
    assert_eq!(jobs("7"), jobs("7"));
    assert_ne!(jobs("7"), jobs("8"));
}

#[test]
fn agents_have_their_own_rate_and_share_the_bound_on_jobs_in_flight() {
    let pings = PingSystem::start(99.5);
    let silent = RawServer::start(|s, _| {
        let _ = s.read(&mut [0]);
    });
    let mut runner = Runner::start(
        &pings.url(),
        &silent.url(),
        &[
            "--agent",
            "agent-001",
            "--agent",
            "agent-002",
            "--rate",
            "6000",
            "--max-in-flight",
            "4",
            "--timeout",
            "500ms",
            "--metrics-listen",
            "127.0.0.1:0",
        ],
    );
    runner.wait_for_rate(6000);
    runner.wait_for_rate(6000);
    let metrics_url = runner.wait_for_log("metrics at ");
    let value = |metrics: &str, series: &str| -> f64 {
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix(series))
            .expect(series);
        line.trim().parse().unwrap()
    };
    let metrics = wait_until("dropped slots of both agents", || {
        let metrics = get(&metrics_url);
        assert!(
            value(&metrics, "uptime_runner_in_flight") <= 4.0,
            "{metrics}"
        );
        let dropped = |agent: &str| {
            let labels = format!("{{agent=\"{agent}\",capability=\"gpu-check\"}}");
            value(&metrics, &format!("uptime_runner_dropped_total{labels}"))
        };
        (dropped("agent-001") > 9.0 && dropped("agent-002") > 9.0).then_some(metrics)
    });
    for agent in ["agent-001", "agent-002"] {
        let of = |name: &str| {
            value(
                &metrics,
                &format!("uptime_runner_{name}{{agent=\"{agent}\"}}"),
            )
        };
        assert!((of("job_rate_per_minute") - 6000.0).abs() < 0.1);
        assert!((of("agent_uptime_percent") - 99.5).abs() < 0.001);
        assert!((0.0..60.0).contains(&of("uptime_age_seconds")));
    }
    runner.wait_for_event("job");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert!(finished.status.success());
    let account = &finished.summary()["capabilities"]["gpu-check"];
    let attempts = account["attempts"].as_u64().unwrap();
    wait_until("all jobs", || {
        (silent.requests.lock().unwrap().len() as u64 >= attempts).then_some(())
    });
    assert_eq!(account["outcomes"], json!({ "timeout": attempts }));
    for agent in ["agent-001", "agent-002"] {
        assert_eq!(
            finished.summary()["agents"][agent],
            json!({
                "uptime_percent": 99.5, "consecutive_poor": 1, "ping_interval_minutes": 15.0,
                "total_pings": 8, "rate": 6000,
            })
        );
    }
}
