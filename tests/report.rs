//! `report` against figures that were worked out by hand.

mod common;

use std::path::Path;

use common::binary;
use serde_json::{Value, json};
use uptime_runner::records::open_to_write;

/// One run of two minutes: agent-001 at 100 % for a minute, at 96 % for half of one, at 80 % for
/// the rest; agent-002 never known.
fn fixture(file: &Path) {
    let connection = open_to_write(file).unwrap();
    let second = 1_000_000;
    connection
        .execute_batch(&format!(
            "INSERT INTO runs VALUES (1, 0, {end}, '1', 'tiers:99=100,95=50,90=10', 3);
             INSERT INTO agents VALUES (1, 'agent-001'), (2, 'agent-002');
             INSERT INTO capabilities VALUES (1, 'gpu-check'), (2, 'text-to-image');
             INSERT INTO polls VALUES (1, 0, 1, 'fresh', 100, 1), (1, {minute}, 1, 'fresh', 96, 2),
                (1, {later}, 1, 'fresh', 80, 3), (1, 0, 2, 'unknown', NULL, 0);
             INSERT INTO rates VALUES (1, 0, 1, 0, 60, 60, 100, 'uptime'),
                (1, {minute}, 1, 60, 30, 60, 96, 'uptime'), (1, {later}, 1, 30, 0, 60, 80, 'uptime');
             WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < 74)
             INSERT INTO jobs SELECT 1, n * {second}, 1, 1 + n % 5 / 4, x'00',
                CASE WHEN n % 25 = 24 THEN 'timeout' ELSE 'success' END, 200, 1000 * (n + 1), 0, 60, 100,
                NULL, NULL, NULL FROM n;",
            end = 120 * second,
            minute = 60 * second,
            later = 90 * second,
        ))
        .unwrap();
}

fn report(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = binary().arg("report").args(arguments).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), out, err)
}

#[test]
fn each_figure_is_the_one_that_was_worked_out() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    fixture(&file);
    let file = file.to_str().unwrap();
    let what_if = ["--what-if", "tiers:90=100", "--what-if", "tiers:99=100"];
    let (code, out, err) = report(&[&[file, "--json"][..], &what_if].concat());
    assert_eq!(code, Some(0), "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&report["runs"], &report["records_dropped"]),
        (&json!(1), &json!(3))
    );
    let agent = &report["agents"]["agent-001"];
    // 60 s at 60/min, 30 s at 30/min, 30 s at 0: 75 of 120 slots.
    for (field, value) in [
        ("seconds_followed", json!(120.0)),
        ("seconds_suspended", json!(30.0)),
        ("slots", json!(120.0)),
        ("slots_withheld", json!(45.0)),
        ("rate_changes", json!(3)),
        // (60 × 100 + 30 × 96 + 30 × 80) / 120
        ("uptime_percent", json!(94.0)),
    ] {
        assert_eq!(agent[field], value, "{field}");
    }
    // Every fifth job is the other capability; of 75, numbers 24, 49 and 74 failed, all of that kind.
    let [checks, images] = ["gpu-check", "text-to-image"].map(|name| &agent["capabilities"][name]);
    assert_eq!(
        (&checks["jobs"], &checks["successful"]),
        (&json!(60), &json!(60))
    );
    assert_eq!(
        (&images["jobs"], &images["successful"]),
        (&json!(15), &json!(12))
    );
    assert_eq!(images["success_rate_percent"], 80.0);
    assert_eq!(images["outcomes"], json!({"success": 12, "timeout": 3}));
    // Latencies of the images: 5, 10, … 75 ms.
    let p50 = images["latency_ms"]["p50"].as_f64().unwrap();
    assert!((p50 - 40.0).abs() < 0.1, "{p50}");
    // All for 90 s, and all for 60 s; 96 % of the jobs were good.
    let expected = json!([
        {"policy": "tiers:90=100", "jobs": 90.0, "jobs_more": 15.0, "good_jobs_more": 14.4, "failed_jobs_more": 0.6},
        {"policy": "tiers:99=100", "jobs": 60.0, "jobs_more": -15.0, "good_jobs_more": -14.4, "failed_jobs_more": -0.6},
    ]);
    assert_eq!(agent["what_if"], expected);
    let nobody = &report["agents"]["agent-002"];
    assert_eq!(nobody["uptime_percent"], Value::Null);
    assert_eq!(nobody["slots"], 0.0);

    let (code, text, _) = self::report(&[&[file][..], &what_if].concat());
    assert_eq!(code, Some(0));
    insta::assert_snapshot!(text);
}

#[test]
fn what_cannot_be_reported_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.db");
    std::fs::write(
        &text,
        "no database at all, but long enough to be looked at by one",
    )
    .unwrap();
    for (file, reason) in [
        (folder.path().join("none.db"), "unable to open"),
        (text, "not a database"),
    ] {
        let (code, out, err) = report(&[file.to_str().unwrap()]);
        assert_eq!((code, out.as_str()), (Some(1), ""));
        assert!(
            err.contains(reason) && err.contains("cannot be reported"),
            "{err}"
        );
    }
    let (code, _, err) = report(&["x.db", "--what-if", "steps"]);
    assert_eq!(code, Some(2));
    assert!(
        err.contains("--what-if") && err.contains("expected tiers:"),
        "{err}"
    );
}
