//! Statements against the account that a gateway keeps itself.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::figures::report;
use crate::support::records::rows;
use crate::support::wall_clock::WallClock;
use crate::support::{OWN, PingSystem, RawServer, Runner, binary, respond};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};
use uptime_runner::records::open_to_write;

/// What a gateway keeps of each job: agent, orchestrator, outcome, and the seconds that it charges.
type Ledger = Arc<Mutex<BTreeMap<String, (String, String, &'static str, u64)>>>;

/// Answers in every way, in turn, and keeps its own account.
fn gateway_with_an_account() -> (RawServer, Ledger) {
    let ledger = Ledger::default();
    let kept = Arc::clone(&ledger);
    let server = RawServer::start(move |stream, request| {
        let began = Instant::now();
        let (job, agent, orchestrator) = job_of(request);
        let number = kept.lock().unwrap().len();
        let (outcome, charged) = answer(stream, number % 8, &orchestrator);
        let seconds = u64::from(charged) * (began.elapsed().as_secs() + 1);
        kept.lock()
            .unwrap()
            .insert(job, (agent, orchestrator, outcome, seconds));
    });
    (server, ledger)
}

fn job_of(head: &str) -> (String, String, String) {
    let mut lines = head.lines();
    let is_job = |line: &&str| line.to_ascii_lowercase().starts_with("livepeer:");
    let (_, header) = lines.find(is_job).unwrap().split_once(':').unwrap();
    let header: Value = serde_json::from_slice(&STANDARD.decode(header.trim()).unwrap()).unwrap();
    let parameters: Value = serde_json::from_str(header["parameters"].as_str().unwrap()).unwrap();
    let orchestrator = parameters["orchestrators"]["include"][0].as_str().unwrap();
    // Each agent has one of its own.
    let agent = if orchestrator.contains("orch-1") {
        "agent-001"
    } else {
        "agent-002"
    };
    let id = header["id"].as_str().unwrap();
    (id.to_owned(), agent.to_owned(), orchestrator.to_owned())
}

/// Returns how the job ended, and whether an orchestrator charges it.
fn answer(stream: &mut TcpStream, way: usize, orchestrator: &str) -> (&'static str, bool) {
    let by = format!("X-Orchestrator-Url: {orchestrator}\r\n");
    match way {
        0 => respond(stream, 500, OWN, "oops"),
        1 => respond(
            stream,
            400,
            OWN,
            "No orchestrators found for capability agent-net\n",
        ),
        2 => respond(stream, 400, OWN, "Insufficient balance for request\n"),
        3 => respond(stream, 502, "", ""),
        // Without patience, so that nothing is withheld.
        4 => respond(stream, 503, "Retry-After: 0\r\n", ""),
        5 => respond(stream, 200, "", ""),
        _ => respond(stream, 200, &by, "{}"),
    }
    [
        ("http_error", true),
        ("no_supply", false),
        ("unpaid", false),
        ("bad_gateway", false),
        ("throttled", false),
        ("no_orchestrator", true),
    ]
    .get(way)
    .copied()
    .unwrap_or(("success", true))
}

const TWO_AGENTS: &str = r#"
rate = 6000
[[agents]]
id = "agent-001"
orchestrators = ["https://orch-1.example:8935"]
price = 1000
[[agents]]
id = "agent-002"
orchestrators = ["https://orch-2.example:8935"]
price = 30000000000000000000
"#;

struct Stated {
    folder: tempfile::TempDir,
    statement: Value,
}

impl Stated {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What `verify` says of the two files, and its exit status.
    fn verify(&self) -> (String, Option<i32>) {
        let mut command = binary();
        command.arg("verify").arg(self.path("s.json"));
        command.arg("--jobs").arg(self.path("jobs.csv"));
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        (said.trim_end().to_owned(), output.status.code())
    }
}

/// Runs of two agents, the last of which is killed, and their statement.
fn two_runs_and_a_kill(gateway: &RawServer) -> Stated {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("runner.toml");
    std::fs::write(&config, TWO_AGENTS).unwrap();
    let record = folder.path().join("runs.db");
    let pings = PingSystem::start(99.5);
    let (config, file) = (config.to_str().unwrap(), record.to_str().unwrap());
    let arguments = ["--config", config, "--record", file];
    let start = |extra: &[&str]| {
        let arguments = [&arguments[..], extra].concat();
        Runner::start(&pings.url(), &gateway.url(), &arguments)
    };
    // Two at once.
    let both = [(); 2].map(|()| start(&["--max-jobs", "100"]));
    for runner in both {
        let finished = runner.finish();
        assert!(finished.status.success(), "{}", finished.stderr);
    }
    let mut killed = start(&[]);
    let recorded = || rows(&record, "SELECT COUNT(*) FROM jobs WHERE run = 3")[0][0].as_u64();
    killed.wait_for("some commits", |_| recorded() > Some(100));
    killed.signal(Signal::KILL);
    drop(killed);
    let out = folder.path().join("s.json");
    let jobs = folder.path().join("jobs.csv");
    let (code, _, err) = report(&[
        file,
        "--statement",
        "--json",
        "--out",
        out.to_str().unwrap(),
        "--jobs",
        jobs.to_str().unwrap(),
    ]);
    assert_eq!(code, Some(0), "{err}");
    let statement = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
    Stated { folder, statement }
}

#[test]
fn a_statement_agrees_with_the_gateways_account() {
    let (gateway, ledger) = gateway_with_an_account();
    let stated = two_runs_and_a_kill(&gateway);
    let head = &stated.statement["statement"];
    assert_eq!(head["runs"].as_array().unwrap().len(), 3);
    let because = head["incomplete_because"].as_array().unwrap();
    assert_eq!(because.len(), 1, "{because:?}");
    assert!(because[0].as_str().unwrap().ends_with("was killed"));

    // To the job.
    let ledger = ledger.lock().unwrap();
    let mut listed = csv::Reader::from_path(stated.path("jobs.csv")).unwrap();
    let mut jobs = 0;
    for row in listed.records() {
        let row = row.unwrap();
        if &row[5] == "unknown" {
            continue;
        }
        jobs += 1;
        let (agent, orchestrator, outcome, seconds) = &ledger[&row[0]];
        assert_eq!((&row[1], &row[5]), (&**agent, *outcome), "{row:?}");
        assert_eq!(
            (&row[3], row[6].parse()),
            (&**orchestrator, Ok(*seconds)),
            "{row:?}"
        );
    }
    // The gateway may have seen what the killed run had not yet written.
    assert!(jobs > 250 && ledger.len() >= jobs, "{jobs}");

    // To the wei.
    for agent in stated.statement["agents"].as_array().unwrap() {
        let sum = |key: &str| agent["slots"][key].as_object().unwrap().values().count();
        assert_eq!(
            (sum("withheld"), agent["slots"]["unaccounted"].as_u64()),
            (0, Some(0))
        );
        let jobs = &agent["jobs"];
        let outcomes = jobs["outcomes"].as_object().unwrap();
        assert_eq!(outcomes["no_supply"]["amount_wei"], "0");
        let seconds: u128 = outcomes
            .values()
            .map(|o| u128::from(o["seconds"].as_u64().unwrap()))
            .sum();
        let price: u128 = agent["charged"][0]["price_wei"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(agent["amount_wei"], (seconds * price).to_string());
        assert_eq!(agent["slots"]["sent"], jobs["sent"]);
    }
    assert_eq!(stated.verify(), ("equal".to_owned(), Some(0)));
}

#[test]
fn whatever_is_changed_in_a_statement_is_found() {
    let (gateway, _) = gateway_with_an_account();
    let stated = two_runs_and_a_kill(&gateway);
    let original = stated.statement.to_string();
    for (what, pointer, value) in [
        ("jobs.sent", "/agents/0/jobs/sent", json!(1)),
        ("slots.asked", "/agents/1/slots/asked", json!(7)),
        ("amount_wei", "/agents/1/amount_wei", json!("1")),
        ("days", "/agents/0/days", json!([])),
        ("jobs_sha256", "/jobs_sha256", json!("00")),
        ("x: jobs.sent", "/agents/0/agent_id", json!("x")),
    ] {
        let mut wrong: Value = serde_json::from_str(&original).unwrap();
        *wrong.pointer_mut(pointer).unwrap() = value;
        std::fs::write(stated.path("s.json"), wrong.to_string()).unwrap();
        let (said, code) = stated.verify();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(what), "{said}");
    }
    std::fs::write(stated.path("s.json"), "no JSON").unwrap();
    assert_eq!(stated.verify().1, Some(2));
    std::fs::write(stated.path("s.json"), &original).unwrap();
    std::fs::write(stated.path("jobs.csv"), "a,b\n1,2\n").unwrap();
    assert_eq!(stated.verify().1, Some(2));
}

/// The script of the documentation, which an owner without this program would use.
#[test]
fn a_script_computes_the_same_amounts_from_the_list_of_jobs() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join(".github/docs/money.md");
    let text = std::fs::read_to_string(docs).unwrap();
    let (_, script) = text.split_once("```python\n").unwrap();
    let (script, _) = script.split_once("```").unwrap();
    assert!(script.lines().count() <= 120);
    let (gateway, _) = gateway_with_an_account();
    let stated = two_runs_and_a_kill(&gateway);
    std::fs::write(stated.path("recompute.py"), script).unwrap();
    let run = || {
        let mut python = Command::new("python3");
        let output = python
            .arg(stated.path("recompute.py"))
            .arg(stated.path("s.json"))
            .arg(stated.path("jobs.csv"))
            .output()
            .expect("python3 is there");
        (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            output.status.code(),
        )
    };
    assert_eq!(run(), ("equal\n".to_owned(), Some(0)));
    let mut changed = stated.statement.clone();
    changed["agents"][0]["amount_wei"] = json!("1");
    std::fs::write(stated.path("s.json"), changed.to_string()).unwrap();
    let (said, code) = run();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("amount_wei"), "{said}");
}

/// An agent was down from 23:30 to midnight: that is its day's, not the next one's.
#[test]
fn an_outage_counts_in_the_day_in_which_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    let connection = open_to_write(&file).unwrap();
    let minute = 60_000_000_i64;
    let two_days = 2 * 24 * 60;
    connection
        .execute_batch(&format!(
            "INSERT INTO runs (run, run_id, started_at, ended_at, alive_at, version, policy)
                VALUES (1, randomblob(16), 0, {end}, {end}, '1', 'tiers:99=100');
             INSERT INTO agents VALUES (1, 'a');
             WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {two_days} / 15)
             INSERT INTO pings (agent, timestamp, covers_from, success, is_void, first_ping, uptime_percent)
                SELECT 1, n * 15 * {minute}, (n - 1) * 15 * {minute}, n NOT IN (95, 96), 0, 0, 100 FROM n;",
            end = two_days * minute,
        ))
        .unwrap();
    drop(connection);
    let uptime = |from: &str, until: &str| {
        let period = ["--from", from, "--until", until];
        let arguments = [
            &[file.to_str().unwrap(), "--statement", "--json"][..],
            &period,
        ]
        .concat();
        let (_, out, err) = report(&arguments);
        let statement: Value = serde_json::from_str(&out).expect(&err);
        assert_eq!(
            statement["statement"]["from"],
            format!("{}.000000Z", &from[..19])
        );
        let uptime = &statement["agents"][0]["uptime_percent"];
        format!("{:.2}", uptime.as_f64().unwrap())
    };
    let days = [
        "1970-01-01T00:00:00Z",
        "1970-01-02T00:00:00Z",
        "1970-01-03T00:00:00Z",
    ];
    assert_eq!(uptime(days[0], days[1]), "97.92");
    assert_eq!(uptime(days[1], days[2]), "100.00");
    assert_eq!(
        uptime("1970-01-01T23:37:30Z", "1970-01-02T00:07:30Z"),
        "25.00"
    );
}

#[test]
fn a_period_without_records_is_stated_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    drop(open_to_write(&file).unwrap());
    let period = [
        "--from",
        "2026-11-24T10:00:00Z",
        "--until",
        "2026-11-24T11:00:00Z",
    ];
    let file = file.to_str().unwrap();
    let arguments = [
        &[file, "--statement", "--json", "--agent", "=a"][..],
        &period,
    ]
    .concat();
    let (_, out, err) = report(&arguments);
    let statement: Value = serde_json::from_str(&out).expect(&err);
    let head = &statement["statement"];
    assert_eq!(head["from"], "2026-11-24T10:00:00.000000Z");
    assert_eq!(head["until"], "2026-11-24T11:00:00.000000Z");
    assert_eq!(head["gaps"].as_array().unwrap().len(), 1);
    assert_eq!(statement["agents"][0]["amount_wei"], "0");
    assert_eq!(statement["agents"][0]["amount_from"], "none");
    let arguments = [
        &[file, "--statement", "--csv", "--agent", "=a"][..],
        &period,
    ]
    .concat();
    let (_, csv, _) = report(&arguments);
    assert!(
        csv.lines().nth(1).unwrap().starts_with("'=a,total,"),
        "{csv}"
    );
}

/// The time of a run goes on steadily whatever the wall clock does, over midnight too.
#[test]
#[cfg_attr(no_faketime, ignore = "needs faketime (package faketime)")]
fn no_clock_step_and_no_midnight_changes_an_account() {
    let folder = tempfile::tempdir().unwrap();
    let clock = WallClock::in_folder(folder.path());
    let now = chrono::Utc::now().timestamp();
    // Two seconds before midnight.
    let ahead = 86_400 - now.rem_euclid(86_400) - 2;
    clock.set(&format!("+{ahead}s"));
    let (gateway, ledger) = gateway_with_an_account();
    let config = folder.path().join("runner.toml");
    std::fs::write(&config, TWO_AGENTS).unwrap();
    let record = folder.path().join("runs.db");
    let pings = PingSystem::start(99.5);
    let mut command = binary();
    command.args(["--output", "json", "--config"]).arg(&config);
    command
        .arg("--record")
        .arg(&record)
        .args(["--duration", "4s"]);
    command.args(["--ping-url", &pings.url(), "--gateway-url", &gateway.url()]);
    clock.apply_to(&mut command);
    let mut runner = Runner::spawn(command);
    runner.wait_for_event("job");
    clock.set(&format!("+{}s", ahead - 40_000));
    let finished = runner.finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let arguments = [record.to_str().unwrap(), "--statement", "--json"];
    let (_, out, err) = report(&arguments);
    let statement: Value = serde_json::from_str(&out).expect(&err);
    assert_eq!(statement["statement"]["complete"], true, "{statement}");
    let mut jobs = 0;
    for agent in statement["agents"].as_array().unwrap() {
        let days = agent["days"].as_array().unwrap();
        assert_eq!(days.len(), 2, "{days:?}");
        let of_days: u64 = days.iter().map(|day| day["jobs"].as_u64().unwrap()).sum();
        assert_eq!(agent["jobs"]["sent"].as_u64(), Some(of_days));
        assert_eq!(agent["slots"]["unaccounted"], 0);
        jobs += of_days;
    }
    let ledger = ledger.lock().unwrap();
    assert_eq!(jobs, ledger.len() as u64);
    // Each of the two days by itself has its own part, and none is counted twice.
    let midnight = (now + 86_400) / 86_400 * 86_400;
    let midnight = chrono::DateTime::from_timestamp(midnight, 0)
        .unwrap()
        .to_rfc3339();
    let sent = |period: [&str; 2]| {
        let arguments = [&arguments[..], &period].concat();
        let (_, out, err) = report(&arguments);
        let statement: Value = serde_json::from_str(&out).expect(&err);
        let agents = statement["agents"].as_array().unwrap().iter();
        let count = |agent: &Value| {
            assert_eq!(agent["days"].as_array().unwrap().len(), 1);
            agent["slots"]["asked"].as_u64().unwrap()
        };
        agents.map(count).sum::<u64>()
    };
    let parts = sent(["--until", &midnight]) + sent(["--from", &midnight]);
    assert!(parts.abs_diff(jobs) <= 2, "{parts} {jobs}");
}

/// The same run in several files, or one file twice, counts once.
#[test]
fn a_run_that_is_given_twice_counts_once() {
    let (gateway, _) = gateway_with_an_account();
    let stated = two_runs_and_a_kill(&gateway);
    let copy = stated.path("copy.db");
    let file = stated.path("runs.db");
    // With what is still in its write-ahead log.
    let connection = rusqlite::Connection::open(&file).unwrap();
    connection
        .execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
        .unwrap();
    drop(connection);
    let files = [file.to_str().unwrap(), copy.to_str().unwrap()];
    let (_, out, err) = report(&[&files[..], &["--statement", "--json"]].concat());
    let both: Value = serde_json::from_str(&out).expect(&err);
    assert_eq!(both["agents"], stated.statement["agents"]);
}
