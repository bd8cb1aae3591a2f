//! `--record`: what was printed is what stands in the file.

use crate::support::disk::Disk;
use crate::support::records::rows;
use std::path::Path;

use crate::support::{PingSystem, Runner, binary, good_gateway, instant, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

fn micros(ts: &Value) -> i64 {
    instant(ts).timestamp_micros()
}

/// A kill after any row of slots would leave no job out that the row counts.
fn assert_slots_count_recorded_jobs(file: &Path) {
    let uncounted = rows(
        file,
        "SELECT at, asked FROM slots AS s WHERE asked - withheld - dropped_in_flight - dropped_late - dropped_budget \
         > (SELECT COUNT(*) FROM jobs WHERE run = s.run AND agent = s.agent AND sent_at <= s.at)",
    );
    assert!(uncounted.is_empty(), "{uncounted:?}");
}

#[test]
fn all_that_was_printed_is_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    for run in 1..=2 {
        let record = ["--record", file.to_str().unwrap(), "--rate", "6000"];
        let arguments = [&record[..], &["--uptime-interval", "50ms"]].concat();
        let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
        runner.wait_for_rate(6000);
        runner.wait_for_event("job");
        pings.set_uptime(96.0);
        runner.wait_for_rate(3000);
        runner.wait_for_event("job");
        pings.set_uptime(99.5);
        runner.signal(Signal::INT);
        let finished = runner.finish();
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);

        let jobs = rows(
            &file,
            &format!(
                "SELECT sent_at, agent_id, name, outcome, status, latency_us, send_lag_us, rate, \
                 uptime_percent, orchestrator, balance_wei, error, lower(hex(job_id)) FROM jobs \
                 JOIN agents USING (agent) JOIN capabilities USING (capability) \
                 WHERE run = {run} ORDER BY jobs.rowid"
            ),
        );
        let printed: Vec<Vec<Value>> = finished
            .of_kind("job")
            .into_iter()
            .map(|job| {
                let whole = |ms: &Value| json!((ms.as_f64().unwrap() * 1e3).round());
                let id = job["job_id"].as_str().unwrap().replace('-', "");
                let mut row = vec![json!(micros(&job["ts"]))];
                row.extend(["agent", "capability", "outcome", "status"].map(|f| job[f].clone()));
                row.extend([whole(&job["latency_ms"]), whole(&job["send_lag_ms"])]);
                row.extend(
                    [
                        "rate",
                        "uptime_percent",
                        "orchestrator",
                        "balance_wei",
                        "error",
                    ]
                    .map(|f| job[f].clone()),
                );
                row.push(json!(id));
                row
            })
            .collect();
        assert!(!printed.is_empty());
        // Microseconds are cut in one, rounded in the other.
        for (kept, printed) in jobs.iter().zip(&printed) {
            for (column, (kept, printed)) in kept.iter().zip(printed).enumerate() {
                let near = (5..=6).contains(&column)
                    && (kept.as_f64().unwrap() - printed.as_f64().unwrap()).abs() <= 1.0;
                assert!(kept == printed || near, "{column}: {kept} {printed}");
            }
        }
        assert_eq!(jobs.len(), printed.len());
        assert_slots_count_recorded_jobs(&file);
        let changes = rows(
            &file,
            &format!(
                "SELECT rate_before, rate, base_rate, reason FROM rates WHERE run = {run} ORDER BY rowid"
            ),
        );
        let printed: Vec<Vec<Value>> = finished
            .of_kind("rate_changed")
            .into_iter()
            .map(|change| {
                vec![
                    change["from"].clone(),
                    change["to"].clone(),
                    json!(6000),
                    change["reason"].clone(),
                ]
            })
            .collect();
        assert_eq!(changes, printed);
        let polls = rows(
            &file,
            &format!("SELECT state, uptime_percent FROM polls WHERE run = {run}"),
        );
        let told: Vec<_> = finished
            .of_kind("uptime")
            .iter()
            .map(|poll| vec![poll["state"].clone(), poll["uptime_percent"].clone()])
            .collect();
        assert_eq!(polls, told);
        let runs = rows(
            &file,
            &format!(
                "SELECT ended_at > started_at, policy, records_dropped FROM runs WHERE run = {run}"
            ),
        );
        assert_eq!(
            runs,
            [[json!(1), json!("tiers:99=100,95=50,90=10"), json!(0)]]
        );
    }
}

#[test]
fn kill_9_loses_at_most_the_last_second() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let arguments = ["--record", file.to_str().unwrap(), "--rate", "6000"];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    for _ in 0..100 {
        runner.wait_for_event("job");
    }
    // Those were printed over a second before this one was sent, whatever the machine does meanwhile.
    let printed: Vec<Value> = runner.events.clone();
    let last = micros(&runner.events.last().unwrap()["ts"]);
    runner.wait_for("a later job", |event| {
        event["event"] == "job" && micros(&event["ts"]) > last + 2_000_000
    });
    runner.signal(Signal::KILL);
    drop(runner);
    let kept = rows(&file, "SELECT lower(hex(job_id)) FROM jobs");
    for job in printed.iter().filter(|event| event["event"] == "job") {
        let id = job["job_id"].as_str().unwrap().replace('-', "");
        assert!(kept.contains(&vec![json!(id)]), "{job}");
    }
    assert_eq!(rows(&file, "SELECT ended_at FROM runs"), [[Value::Null]]);
}

#[test]
#[cfg_attr(no_root, ignore = "needs root")]
fn a_full_disk_stops_no_job_and_what_is_missing_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let disk_folder = folder.path().join("disk");
    std::fs::create_dir(&disk_folder).unwrap();
    let disk = Disk::mount(&disk_folder);
    let file = disk_folder.join("runs.db");
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let arguments = ["--record", file.to_str().unwrap(), "--rate", "60000"];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    runner.wait_for_event("job");
    wait_until("records", || has_jobs(&file).then_some(()));
    disk.fill();
    runner.wait_for_log("jobs go on, and at most");
    runner.wait_for_event("job");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    finished.assert_accounts_add_up(60_000);
    let (_, told) = finished
        .stderr
        .split_once("records are missing in the file")
        .expect("told");
    let missing: u64 = told
        .split_once("records=")
        .unwrap()
        .1
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let kept = rows(&file, "SELECT COUNT(*) FROM jobs")[0][0]
        .as_u64()
        .unwrap();
    // Beside jobs there are other records.
    let jobs = finished.of_kind("job").len() as u64;
    assert!(kept + missing >= jobs, "{kept} + {missing} of {jobs}");
}

/// Whether the file is there, and jobs are in it.
fn has_jobs(file: &Path) -> bool {
    uptime_runner::records::open_to_read(file).is_ok()
        && !rows(file, "SELECT run FROM jobs LIMIT 1").is_empty()
}

/// What becomes of a record file in a run: jobs go on, it is told, and the statement of all that is left says so.
fn statement_of(files: &[&Path]) -> Value {
    let mut command = binary();
    command
        .arg("report")
        .args(files)
        .args(["--statement", "--json"]);
    let output = command.output().unwrap();
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_file_that_is_moved_or_deleted_is_replaced_by_a_new_one() {
    for deleted in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let [file, moved] = ["runs.db", "moved.db"].map(|name| folder.path().join(name));
        let pings = PingSystem::start(99.5);
        let gateway = good_gateway();
        let arguments = ["--record", file.to_str().unwrap(), "--rate", "6000"];
        let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
        runner.wait_for_event("job");
        wait_until("records", || has_jobs(&file).then_some(()));
        if deleted {
            for suffix in ["", "-wal", "-shm"] {
                let _ = std::fs::remove_file(format!("{}{suffix}", file.display()));
            }
            runner.wait_for_log("the file was deleted");
        } else {
            std::fs::rename(&file, &moved).unwrap();
            runner.wait_for_log("the file was moved");
        }
        runner.wait_for_event("job");
        runner.signal(Signal::INT);
        let finished = runner.finish();
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
        finished.assert_accounts_add_up(6000);
        let jobs = finished.of_kind("job").len() as u64;
        let files = if deleted {
            vec![&*file]
        } else {
            vec![&*file, &*moved]
        };
        let stated = statement_of(&files);
        let runs = stated["statement"]["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 1, "{runs:?}");
        let agent = &stated["agents"][0];
        assert_eq!(agent["slots"]["asked"].as_u64(), Some(jobs), "{agent}");
        if deleted {
            assert_eq!(stated["statement"]["complete"], false);
            assert!(runs[0]["records_dropped"].as_u64() > Some(0));
            assert!(
                finished.stderr.contains("records are missing"),
                "{}",
                finished.stderr
            );
        } else {
            assert_eq!(agent["jobs"]["sent"].as_u64(), Some(jobs), "{stated}");
        }
    }
}

#[test]
fn a_file_that_is_locked_at_the_start_delays_no_job() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    drop(uptime_runner::records::open_to_write(&file).unwrap());
    let other = rusqlite::Connection::open(&file).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let arguments = ["--record", file.to_str().unwrap(), "--rate", "6000"];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    runner.wait_for_event("job");
    runner.wait_for_log("jobs go on, and at most");
    other.execute_batch("COMMIT").unwrap();
    runner.wait_for_log("jobs are recorded again");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    let jobs = finished.of_kind("job").len() as u64;
    let stated = statement_of(&[&file]);
    assert_eq!(stated["statement"]["complete"], true, "{stated}");
    assert_eq!(stated["agents"][0]["jobs"]["sent"].as_u64(), Some(jobs));
}

#[test]
fn a_file_that_is_something_else_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let other = folder.path().join("other.db");
    rusqlite::Connection::open(&other)
        .unwrap()
        .execute_batch("CREATE TABLE x (y)")
        .unwrap();
    let text = folder.path().join("text.db");
    std::fs::write(
        &text,
        "no database at all, but long enough to be looked at by one",
    )
    .unwrap();
    // One of ours, of which a disk has lost all but the first page.
    let damaged = folder.path().join("damaged.db");
    drop(uptime_runner::records::open_to_write(&damaged).unwrap());
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[4096..].fill(0);
    std::fs::write(&damaged, bytes).unwrap();
    for (file, reason) in [
        (damaged, "malformed"),
        (other, "something else"),
        (text, "something else"),
        (folder.path().join("no/such/x.db"), "folder does not exist"),
    ] {
        let arguments = ["--record", file.to_str().unwrap()];
        let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
        assert_eq!(finished.status.code(), Some(2));
        assert!(
            finished.stderr.contains("--record") && finished.stderr.contains(reason),
            "{}",
            finished.stderr
        );
        assert!(finished.events.is_empty());
    }
}
