//! Jobs to live runners, whose orchestrators answer as recorded ones did.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::support::recorded::Recorded;
use crate::support::records::rows;
use crate::support::{
    OWN, PingSystem, RawServer, Runner, binary, good_gateway, respond, wait_until,
};
use rustix::process::Signal;
use serde_json::{Value, json};

const RUNNER: &str = "/apps/agent-001/app";

/// An orchestrator that gives one recorded answer to all jobs.
fn orchestrator(recorded: Recorded) -> RawServer {
    RawServer::start(move |stream, head| {
        if head.starts_with("GET /discovery ") {
            let listed = Recorded::read("live-runner/discovery.json");
            return respond(
                stream,
                200,
                "content-type: application/json\r\n",
                &listed.body,
            );
        }
        let headers = recorded.headers.iter();
        let headers = headers.filter(|(name, _)| *name != "Content-Length");
        let headers: Vec<String> = headers.map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        respond(stream, recorded.status, &headers.concat(), &recorded.body);
    })
}

/// A file with these agents.
fn config(folder: &Path, agents: &[String]) -> PathBuf {
    let file = folder.join("runner.toml");
    let agents: Vec<String> = agents
        .iter()
        .map(|a| format!("[[agents]]\n{a}\n"))
        .collect();
    std::fs::write(&file, agents.concat()).unwrap();
    file
}

fn runner_agent(id: &str, orchestrator: &str, more: &str) -> String {
    format!("id = '{id}'\nrunner = '{orchestrator}/apps/{id}/app'\n{more}")
}

fn run(pings: &PingSystem, file: &Path, arguments: &[&str]) -> Runner {
    // No gateway is needed.
    let config = ["--config", file.to_str().unwrap()];
    let arguments = [&config[..], arguments].concat();
    Runner::start(&pings.url(), "http://127.0.0.1:9", &arguments)
}

/// What is recorded of orchestrators' answers to jobs.
fn answers() -> BTreeMap<String, Recorded> {
    let mut all = Recorded::all("live-runner");
    all.retain(|_, recorded| !recorded.outcome.is_empty());
    assert!(all.len() >= 25);
    all
}

/// What nobody is paid for.
const FREE: [&str; 4] = ["bad_gateway", "unavailable", "no_place", "unpaid"];

/// A job for each answer: its outcome, what it costs, its event and its record.
#[test]
fn each_answer_of_an_orchestrator_makes_one_job() {
    let pings = PingSystem::start(99.5);
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("runs.db");
    let mut printed = Vec::new();
    for (name, recorded) in answers() {
        let (status, outcome) = (recorded.status, recorded.outcome.clone());
        let metadata = recorded.header("X-Metadata").map(Value::from);
        let server = orchestrator(recorded);
        let agent = runner_agent("agent-001", &server.url(), "price = 7");
        let file = config(folder.path(), &[agent]);
        let arguments = ["--rate", "6000", "--max-jobs", "1", "--record"];
        let arguments = [&arguments[..], &[record.to_str().unwrap()]].concat();
        let finished = run(&pings, &file, &arguments).finish();
        assert!(finished.status.success(), "{name}: {}", finished.stderr);
        let jobs = finished.of_kind("job");
        let [job] = jobs[..] else {
            panic!("{name}: {jobs:?}")
        };
        assert_eq!(job["outcome"], outcome, "{name}: {job}");
        assert_eq!(job["status"], status, "{name}");
        assert_eq!(
            job["error"].is_null(),
            outcome == "success",
            "{name}: {job}"
        );
        let cost = if FREE.contains(&&*outcome) { "0" } else { "7" };
        assert_eq!(job["cost_wei"], cost, "{name}: {job}");
        assert_eq!(job["metadata"], metadata.unwrap_or_default(), "{name}");
        // What a worker says of orchestrators and balances is not told.
        assert!(job["orchestrator"].is_null() && job["balance_wei"].is_null());
        let gpu_check = &finished.summary()["capabilities"]["gpu-check"];
        assert_eq!(gpu_check["outcomes"][&outcome], 1, "{name}");
        let asked = server.requests.lock().unwrap();
        let jobs: Vec<_> = asked
            .iter()
            .filter(|(head, _)| head.starts_with("POST "))
            .collect();
        let [(head, body)] = jobs[..] else {
            panic!("{name}: {asked:?}")
        };
        assert_looks_as_promised(head, body, job);
        let sent_to = format!("{}{RUNNER}", server.url());
        let keys = ["outcome", "status", "error"].map(|key| job[key].clone());
        printed.push([&keys[..], &[json!(sent_to)]].concat());
    }
    let query = "SELECT outcome, status, error, sent_to FROM jobs ORDER BY run";
    assert_eq!(rows(&record, query), printed);
    assert_statement(&record, folder.path(), &printed);
}

fn assert_looks_as_promised(head: &str, body: &[u8], job: &Value) {
    let begin = format!("POST {RUNNER}/agent-net HTTP/1.1\r\n");
    assert!(head.starts_with(&begin), "{head}");
    let head = head.to_ascii_lowercase();
    let id = format!("\r\nx-job-id: {}\r\n", job["job_id"].as_str().unwrap());
    assert!(head.contains(&id), "{head}");
    assert!(
        head.contains("\r\ncontent-type: application/json\r\n"),
        "{head}"
    );
    for absent in ["livepeer", "authorization"] {
        assert!(!head.contains(&format!("\r\n{absent}")), "{head}");
    }
    let payload: Value = serde_json::from_slice(body).unwrap();
    assert_eq!(payload["action"], "gpu-check");
    assert_eq!(payload["agent_id"], "agent-001");
}

/// The statement charges each job that is charged its price, and can be recomputed.
fn assert_statement(record: &Path, folder: &Path, jobs: &[Vec<Value>]) {
    let [statement, list] = ["statement.json", "jobs.csv"].map(|name| folder.join(name));
    let mut report = binary();
    report.args(["report", "--statement", "--json"]).arg(record);
    report.arg("--out").arg(&statement).arg("--jobs").arg(&list);
    let output = report.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = std::fs::read_to_string(&statement).unwrap();
    let stated: Value = serde_json::from_str(&text).unwrap();
    let charged = jobs
        .iter()
        .filter(|job| !FREE.contains(&job[0].as_str().unwrap()));
    let charged = charged.count();
    let agent = &stated["agents"][0];
    assert_eq!(agent["amount_wei"], (7 * charged).to_string(), "{agent}");
    let by_price = agent["charged"].as_array().unwrap();
    assert_eq!(by_price.len(), 1, "{by_price:?}");
    assert_eq!(
        (&by_price[0]["per"], &by_price[0]["jobs"]),
        (&json!("job"), &json!(charged))
    );
    let mut report = binary();
    let text = report.arg("report").arg(record).output().unwrap().stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains(&format!("({charged} jobs charged)")),
        "{text}"
    );
    let mut report = binary();
    let output = report.args(["report", "--statement"]).arg(record).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let line = format!("gpu-check: {charged} jobs × 7 wei = {} wei", 7 * charged);
    assert!(text.contains(&line), "{text}");
    assert!(text.contains("from the price of each job\n"), "{text}");
    let verify = || {
        let mut verify = binary();
        verify.arg("verify").arg(&statement);
        verify.arg("--jobs").arg(&list).output().unwrap()
    };
    assert_eq!(String::from_utf8(verify().stdout).unwrap(), "equal\n");
    // A job that costs twice its price.
    let jobs = std::fs::read_to_string(&list).unwrap();
    std::fs::write(&list, jobs.replacen(",7,7\r", ",7,14\r", 1)).unwrap();
    assert_eq!(verify().status.code(), Some(1));
}

#[test]
fn each_answer_of_an_orchestrator_makes_one_line() {
    let pings = PingSystem::start(99.5);
    let folder = tempfile::tempdir().unwrap();
    for (name, recorded) in answers() {
        let (status, outcome) = (recorded.status, recorded.outcome.clone());
        let server = orchestrator(recorded);
        let file = config(
            folder.path(),
            &[runner_agent("agent-001", &server.url(), "")],
        );
        let mut command = binary();
        command.args([
            "--ping-url",
            &pings.url(),
            "--rate",
            "6000",
            "--max-jobs",
            "1",
        ]);
        let output = command.arg("--config").arg(&file).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let is_job = |line: &&str| line.contains(&format!("] gpu-check: {status} ("));
        let lines: Vec<&str> = text.lines().filter(is_job).collect();
        let [line] = lines[..] else {
            panic!("{name}: {text}")
        };
        if outcome == "success" {
            assert!(line.starts_with('✅'), "{name}: {line}");
        } else {
            let (_, reason) = line.split_once(&format!("% | {outcome}: ")).unwrap();
            assert!(line.starts_with('❌') && !reason.is_empty(), "{line}");
        }
    }
}

/// A ping system at which each of these agents is up.
fn all_up() -> PingSystem {
    PingSystem::start(99.5)
}

#[test]
fn agents_of_both_kinds_are_sent_jobs_as_if_alone() {
    let pings = all_up();
    let gateway = good_gateway();
    let server = orchestrator(Recorded::read("live-runner/success.json"));
    let folder = tempfile::tempdir().unwrap();
    let file = config(
        folder.path(),
        &[
            runner_agent("agent-001", &server.url(), "rate = 600\nprice = 5"),
            "id = 'agent-002'\nrate = 300\nprice = 11".to_owned(),
        ],
    );
    let arguments = ["--config", file.to_str().unwrap(), "--duration", "2900ms"];
    let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let jobs_of = |agent: &str| {
        let jobs = finished.of_kind("job").into_iter();
        jobs.filter(|job| job["agent"] == agent).count()
    };
    let (live, byoc) = (jobs_of("agent-001"), jobs_of("agent-002"));
    assert!(live.abs_diff(2 * byoc) <= 3, "{live} and {byoc}");
    let posts = server.requests.lock().unwrap();
    let posts = posts.iter().filter(|(head, _)| head.starts_with("POST "));
    assert_eq!(posts.count(), live);
    assert_eq!(gateway.requests.lock().unwrap().len(), byoc);
    let agents = &finished.summary()["agents"];
    assert_eq!(agents["agent-001"]["spent_wei"], (5 * live).to_string());
    assert_eq!(agents["agent-002"]["spent_wei"], (11 * byoc).to_string());
    assert_eq!(agents["agent-001"]["discovery"]["listed"], true);
    assert!(agents["agent-002"]["discovery"].is_null());
}

/// An orchestrator of any labels, whose workers can be killed.
struct Workers {
    server: RawServer,
    is_gone: Arc<AtomicBool>,
}

impl Workers {
    fn start(gone: &'static str) -> Self {
        let is_gone = Arc::new(AtomicBool::new(false));
        let gone_now = Arc::clone(&is_gone);
        let gone = Recorded::read(gone);
        let server = RawServer::start(move |stream, head| {
            let is_gone = gone_now.load(Ordering::Relaxed);
            if head.starts_with("GET ") {
                respond(stream, 200, "", "[]");
            } else if is_gone && head.starts_with(&format!("POST {RUNNER}")) {
                respond(stream, gone.status, OWN, &gone.body);
            } else {
                respond(stream, 200, "", "{}");
            }
        });
        Self { server, is_gone }
    }
}

#[test]
fn the_agent_of_a_worker_that_was_killed_is_accused_and_the_other_is_not() {
    for gone in ["worker-refuses", "runner-not-found"] {
        let name = if gone == "worker-refuses" {
            "live-runner/worker-refuses.json"
        } else {
            "live-runner/runner-not-found.json"
        };
        let workers = Workers::start(name);
        let pings = all_up();
        let folder = tempfile::tempdir().unwrap();
        let agents = ["agent-001", "agent-002"];
        let agents = agents.map(|id| runner_agent(id, &workers.server.url(), ""));
        let file = config(folder.path(), &agents);
        let policy = "tiers:99=100,95=50,90=10 trust=verified";
        let arguments = [
            "--rate",
            "600",
            "--policy",
            policy,
            "--uptime-interval",
            "1s",
        ];
        let mut runner = run(&pings, &file, &arguments);
        runner.wait_for("a success of agent-001", |event| {
            event["event"] == "job" && event["agent"] == "agent-001"
        });
        workers.is_gone.store(true, Ordering::Relaxed);
        let claim = runner.wait_for_event("claim");
        assert_eq!(claim["agent"], "agent-001", "{gone}: {claim}");
        assert_eq!(claim["contradicted"], true);
        runner.wait_for("a rate of 0", |event| {
            event["event"] == "rate_changed" && event["agent"] == "agent-001" && event["to"] == 0
        });
        runner.signal(Signal::INT);
        let finished = runner.finish();
        let claims = finished.of_kind("claim");
        assert!(
            claims.iter().all(|claim| claim["agent"] == "agent-001"),
            "{claims:?}"
        );
    }
}

/// Whoever wrote a wrong label is told so, and accuses nobody.
#[test]
fn a_runner_that_was_never_seen_is_told_as_a_wrong_label() {
    let pings = all_up();
    let server = RawServer::start(|stream, head| {
        let recorded = Recorded::read("live-runner/runner-not-found.json");
        if head.starts_with("GET ") {
            respond(stream, 200, "", "[]");
        } else {
            respond(stream, 404, OWN, &recorded.body);
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let file = config(
        folder.path(),
        &[runner_agent("agent-001", &server.url(), "")],
    );
    let arguments = [
        "--rate",
        "6000",
        "--max-jobs",
        "200",
        "--uptime-interval",
        "100ms",
    ];
    let finished = run(&pings, &file, &arguments).finish();
    assert!(finished.of_kind("claim").is_empty());
    for job in finished.of_kind("job") {
        assert_eq!(job["outcome"], "unavailable");
        let error = job["error"].as_str().unwrap();
        assert!(
            error.contains("is the label in the address right?"),
            "{error}"
        );
    }
    let discovery = finished.of_kind("discovery");
    assert_eq!(
        (discovery.len(), &discovery[0]["listed"]),
        (1, &json!(false))
    );
}

#[test]
fn retry_after_holds_back_that_agents_jobs_only() {
    let pings = all_up();
    let jobs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&jobs);
    let server = RawServer::start(move |stream, head| {
        if head.starts_with(&format!("POST {RUNNER}")) {
            respond(stream, 429, "retry-after: 60\r\n", "{\"error\":\"busy\"}");
        } else {
            counted.fetch_add(1, Ordering::Relaxed);
            respond(stream, 200, "", "[]");
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let agents = ["agent-001", "agent-002"].map(|id| runner_agent(id, &server.url(), ""));
    let mut runner = run(&pings, &config(folder.path(), &agents), &["--rate", "600"]);
    let changed = runner.wait_for("throttling", |event| event["reason"] == "throttled");
    assert_eq!(
        (&changed["agent"], &changed["to"]),
        (&json!("agent-001"), &json!(0))
    );
    let before = jobs.load(Ordering::Relaxed);
    wait_until("more jobs of the other agent", || {
        (jobs.load(Ordering::Relaxed) > before + 10).then_some(())
    });
    runner.signal(Signal::INT);
    let finished = runner.finish();
    let throttled = finished.of_kind("rate_changed").into_iter();
    let throttled = throttled.filter(|change| change["reason"] == "throttled");
    assert_eq!(throttled.count(), 1);
    let of_first = finished.of_kind("job").into_iter();
    let of_first = of_first.filter(|job| job["agent"] == "agent-001").count();
    assert!(of_first <= 3, "{of_first} jobs");
}

/// What an orchestrator lists, as JSON.
fn listed(runners: &[Value]) -> String {
    json!([{ "address": "https://its-own-name:8935", "runners": runners }]).to_string()
}

fn listed_runner(id: &str, in_use: u32) -> Value {
    json!({
        "url": format!("https://its-own-name:8935/apps/{id}/app"), "mode": "single-shot",
        "capacity": 2, "capacity_used": in_use,
        "price_info": { "price": 33_333_333_333_u64, "currency": "wei", "unit": "fixed" },
    })
}

#[test]
fn discovery_is_told_at_changes_and_recorded() {
    let pings = all_up();
    let list = Arc::new(Mutex::new(listed(&[listed_runner("agent-001", 1)])));
    let told = Arc::clone(&list);
    let server = RawServer::start(move |stream, head| {
        let list = told.lock().unwrap().clone();
        let is_list = head.starts_with("GET ");
        respond(stream, 200, "", if is_list { &list } else { "{}" });
    });
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("runs.db");
    let file = config(
        folder.path(),
        &[runner_agent("agent-001", &server.url(), "")],
    );
    let arguments = ["--rate", "60", "--record", record.to_str().unwrap()];
    let mut runner = run(&pings, &file, &arguments);
    let discovery = runner.wait_for_event("discovery");
    assert_eq!(
        ["agent", "listed", "capacity", "in_use", "price_wei", "unit"].map(|k| &discovery[k]),
        [
            &json!("agent-001"),
            &json!(true),
            &json!(2),
            &json!(1),
            &json!("33333333333"),
            &json!("fixed")
        ]
    );
    *list.lock().unwrap() = listed(&[]);
    let discovery = runner.wait_for_event("discovery");
    assert_eq!(discovery["listed"], false, "{discovery}");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    // The uptime and the rate are what they were.
    assert_eq!(finished.of_kind("rate_changed").len(), 1);
    let query =
        "SELECT listing, capacity, in_use, price, currency, unit FROM discoveries ORDER BY at";
    assert_eq!(
        rows(&record, query),
        [
            vec![
                json!("listed"),
                json!(2),
                json!(1),
                json!("33333333333"),
                json!("wei"),
                json!("fixed")
            ],
            [vec![json!("not listed")], vec![Value::Null; 5]].concat(),
        ]
    );
}

/// The report of a record, in JSON and as text.
fn report(record: &Path) -> (Value, String) {
    let ask = |arguments: &[&str]| {
        let output = binary()
            .arg("report")
            .args(arguments)
            .arg(record)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    (serde_json::from_str(&ask(&["--json"])).unwrap(), ask(&[]))
}

/// Jobs to a runner that was listed, and then not, are evidence: in the run and in its report.
#[test]
fn the_report_judges_as_the_run_did_and_tells_what_was_listed() {
    let pings = all_up();
    let list = listed(&[listed_runner("agent-001", 0)]);
    let server = RawServer::start(move |stream, head| {
        if head.starts_with("GET ") {
            respond(stream, 200, "", &list);
        } else {
            let gone = Recorded::read("live-runner/runner-not-found.json");
            respond(stream, 404, OWN, &gone.body);
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("runs.db");
    let agents = ["agent-001", "agent-002"].map(|id| runner_agent(id, &server.url(), ""));
    let file = config(folder.path(), &agents);
    let arguments = ["--rate", "600", "--uptime-interval", "200ms", "--record"];
    let arguments = [&arguments[..], &[record.to_str().unwrap()]].concat();
    let mut runner = run(&pings, &file, &arguments);
    let claim = runner.wait_for_event("claim");
    assert_eq!(claim["agent"], "agent-001");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    let jobs = finished.of_kind("job").into_iter();
    let jobs = jobs.filter(|job| job["agent"] == "agent-001").count();
    let (json, text) = report(&record);
    let [first, second] = ["agent-001", "agent-002"].map(|id| &json["agents"][id]);
    let evidence = first["claims"]["jobs"].as_u64().unwrap();
    // Those that ended before the list was there say nothing.
    assert!(evidence >= 50 && evidence <= jobs as u64, "{first}");
    assert_eq!(first["claims"]["contradicted"].as_array().unwrap().len(), 1);
    assert!(second["claims"].is_null(), "{second}");
    let minutes = &first["discovery"];
    assert!(minutes["minutes_listed"].as_f64().unwrap() > 0.0, "{first}");
    assert_eq!(minutes["minutes_up_but_not_listed"], 0.0);
    let not_listed = &second["discovery"]["minutes_up_but_not_listed"];
    assert!(not_listed.as_f64().unwrap() > 0.0, "{second}");
    assert!(
        text.contains("Its orchestrator listed its runner for 0."),
        "{text}"
    );
    assert!(text.contains("unavailable"), "{text}");
}

fn requests_to(server: &RawServer, begin: &str) -> usize {
    let requests = server.requests.lock().unwrap();
    requests
        .iter()
        .filter(|(head, _)| head.starts_with(begin))
        .count()
}

#[test]
fn each_orchestrator_is_asked_once_whatever_its_runners() {
    let pings = all_up();
    let server = || RawServer::start(|stream, _| respond(stream, 200, "", "[]"));
    let servers: Vec<RawServer> = (0..10).map(|_| server()).collect();
    let agents: Vec<String> = (0..1000)
        .map(|n| runner_agent(&format!("agent-{n:03}"), &servers[n % 10].url(), ""))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let runner = run(&pings, &config(folder.path(), &agents), &["--rate", "1"]);
    wait_until("a discovery at each", || {
        servers
            .iter()
            .all(|server| requests_to(server, "GET /discovery ") > 0)
            .then_some(())
    });
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.of_kind("discovery").len(), 1000);
    for server in &servers {
        assert_eq!(requests_to(server, "GET "), 1);
    }
}

#[test]
fn an_abandoned_job_is_charged_and_frees_its_place() {
    let pings = all_up();
    let server = RawServer::start(|stream, head| {
        if head.starts_with("GET ") {
            respond(stream, 200, "", "[]");
        } else {
            std::thread::park();
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let agent = runner_agent("agent-001", &server.url(), "price = 7");
    let mut runner = run(&pings, &config(folder.path(), &[agent]), &["--rate", "60"]);
    runner.wait_for_event("rate_changed");
    wait_until("a job", || {
        (requests_to(&server, "POST ") > 0).then_some(())
    });
    runner.signal(Signal::INT);
    runner.wait_for_log("a second signal abandons");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(130));
    let job = finished.of_kind("job")[0];
    assert_eq!(
        (&job["outcome"], &job["cost_wei"]),
        (&json!("cut_short"), &json!("7"))
    );
    assert!(
        job["error"].as_str().unwrap().contains("free again"),
        "{job}"
    );
    assert!(
        !finished.stderr.contains("stays taken"),
        "{}",
        finished.stderr
    );
}
