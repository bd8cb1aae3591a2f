//! `report` against figures that were worked out by hand.

use std::path::Path;

use crate::support::binary;
use crate::support::browser::Browser;
use serde_json::{Value, json};
use uptime_runner::records::open_to_write;

/// One run of two minutes: agent-001 at 100 % for a minute, at 96 % for half of one, at 80 % for
/// the rest; agent-002 never known.
pub(super) fn fixture(file: &Path) {
    let connection = open_to_write(file).unwrap();
    let second = 1_000_000;
    connection
        .execute_batch(&format!(
            "INSERT INTO runs (run, started_at, ended_at, version, policy, records_dropped) VALUES (1, 0, {end}, '1', 'tiers:99=100,95=50,90=10', 3);
             INSERT INTO agents VALUES (1, 'agent-001'), (2, 'agent-002');
             INSERT INTO run_agents (run, agent, price_wei, orchestrators) VALUES (1, 1, '1000', NULL), (1, 2, NULL, NULL);
             INSERT INTO capabilities VALUES (1, 'gpu-check'), (2, 'text-to-image');
             INSERT INTO polls (run, at, agent, state, uptime_percent, pings) VALUES (1, 0, 1, 'fresh', 100, 1), (1, {minute}, 1, 'fresh', 96, 2),
                (1, {later}, 1, 'fresh', 80, 3), (1, 0, 2, 'unknown', NULL, 0);
             INSERT INTO rates VALUES (1, 0, 1, 0, 60, 60, 100, 'uptime'),
                (1, {minute}, 1, 60, 30, 60, 96, 'uptime'), (1, {later}, 1, 30, 0, 60, 80, 'uptime');
             WITH RECURSIVE n(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM n WHERE n < 74)
             INSERT INTO jobs (run, sent_at, agent, capability, job_id, outcome, status, latency_us, send_lag_us, rate, uptime_percent, orchestrator, balance_wei, error) SELECT 1, n * {second}, 1, 1 + n % 5 / 4, x'00',
                CASE WHEN n % 25 = 24 THEN 'timeout' ELSE 'success' END, 200, 1000 * (n + 1), 0, 60, 100,
                NULL, NULL, NULL FROM n;",
            end = 120 * second,
            minute = 60 * second,
            later = 90 * second,
        ))
        .unwrap();
}

pub(super) fn report(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = binary();
    command.arg("report").args(arguments).env("TZ", "UTC");
    let output = command.output().unwrap();
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
        {"policy": "tiers:90=100", "jobs": 90.0, "jobs_more": 15.0, "good_jobs_more": 14.4, "failed_jobs_more": 0.6, "spent_more_wei": "15000"},
        {"policy": "tiers:99=100", "jobs": 60.0, "jobs_more": -15.0, "good_jobs_more": -14.4, "failed_jobs_more": -0.6, "spent_more_wei": "-15000"},
    ]);
    assert_eq!(agent["what_if"], expected);
    // No job took more than a second: 75 × 1000 wei, for 72 good ones; 45 slots were not paid for.
    let cost = &agent["cost"];
    for (field, value) in [
        ("source", json!("price")),
        ("spent_wei", json!("75000")),
        ("seconds_charged", json!(75)),
        ("per_good_job_wei", json!("1042")),
        ("not_spent_wei", json!("45000")),
    ] {
        assert_eq!(cost[field], value, "{field}");
    }
    // 72 good jobs for 75000 wei.
    let estimate = cost["good_jobs_per_eth"]["estimate"].as_f64().unwrap();
    assert!((estimate - 72.0 / 75e-15).abs() < 1e6, "{estimate}");
    assert_eq!(agent["withheld_by_reason"], json!({"uptime": 45.0}));
    assert_eq!(report["total"]["spent_wei"], "75000");
    // Two drops: 60 s and 90 s at 100 %, 30 s at 96 % before them; 30 s at 80 % after both, 30 s at 96 %.
    let punishment = &agent["punishment"];
    assert_eq!(punishment["drops"], 2);
    let second = &punishment["each"][1];
    assert_eq!(second["at"], "1970-01-01T00:01:30.000Z");
    assert_eq!(second["hour_before"]["jobs"], 75);
    assert_eq!(second["hours_after"][0]["uptime_percent"], 80.0);
    let uptime = |hour: &Value| hour["uptime_percent"].as_f64().unwrap();
    assert!(
        (uptime(&punishment["hour_before"]) - (120.0 * 100.0 + 30.0 * 96.0) / 150.0).abs() < 1e-6
    );
    assert!(
        (uptime(&punishment["hours_after"][0]) - (60.0 * 80.0 + 30.0 * 96.0) / 90.0).abs() < 1e-6
    );
    // Jobs 0 to 59 and 0 to 89 before: numbers 24, 49 and 24, 49, 74 of them failed.
    assert_eq!(punishment["hour_before"]["jobs"], 60 + 75);
    assert_eq!(punishment["hours_after"][0]["jobs"], 15);
    let nobody = &report["agents"]["agent-002"];
    assert_eq!(nobody["uptime_percent"], Value::Null);
    assert_eq!(nobody["slots"], 0.0);

    let (code, text, _) = self::report(&[&[file][..], &what_if].concat());
    assert_eq!(code, Some(0));
    insta::assert_snapshot!(text);
}

#[test]
fn a_period_is_reported_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    fixture(&file);
    let file = file.to_str().unwrap();
    let cut = [
        "--from",
        "1970-01-01T00:01:00Z",
        "--until",
        "1970-01-01 00:01:40",
    ];
    let (_, out, err) = report(&[&[file, "--json"][..], &cut].concat());
    let report: Value = serde_json::from_str(&out).expect(&err);
    let agent = &report["agents"]["agent-001"];
    // 30 s at 30/min and 10 s at 0, at 96 and 80 %; the jobs from number 60 on.
    for (field, value) in [
        ("seconds_followed", json!(40.0)),
        ("slots", json!(40.0)),
        ("slots_withheld", json!(25.0)),
        ("uptime_percent", json!(92.0)),
    ] {
        assert_eq!(agent[field], value, "{field}");
    }
    assert_eq!(report["total"]["jobs"], 15);
    assert_eq!(report["from"], "1970-01-01T00:01:00.000Z");
    let (code, _, err) = self::report(&[file, "--from", "1h", "--until", "2h"]);
    assert_eq!(code, Some(2));
    assert!(err.contains("--from is not before --until"), "{err}");
}

/// A run of 0.1.0: its slots follow from its rates, its uptime from what was known.
#[test]
fn a_statement_of_an_old_run_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    fixture(&file);
    let file = file.to_str().unwrap();
    let (_, out, err) = report(&[file, "--statement", "--json"]);
    let statements: Value = serde_json::from_str(&out).expect(&err);
    let head = &statements["statement"];
    assert_eq!(head["complete"], false);
    let because = head["incomplete_because"].as_array().unwrap();
    assert!(
        because[1].as_str().unwrap().contains("kept neither slots"),
        "{because:?}"
    );
    let statement = &statements["agents"][0];
    for (field, value) in [
        ("agent_id", json!("agent-001")),
        ("uptime_percent", json!(94.0)),
        (
            "slots",
            json!({"asked": 120, "sent": 75, "withheld": {"uptime": 45}, "dropped": {}, "unaccounted": 0}),
        ),
        ("amount_wei", json!("75000")),
        ("amount_eth", json!("0.000000000000075")),
        ("amount_from", json!("price")),
        (
            "withheld",
            json!([
                {"from": "1970-01-01T00:01:00.000000Z", "until": "1970-01-01T00:01:30.000000Z",
                    "reason": "uptime", "rate": 30, "base_rate": 60, "slots": 15},
                {"from": "1970-01-01T00:01:30.000000Z", "until": "1970-01-01T00:02:00.000000Z",
                    "reason": "uptime", "rate": 0, "base_rate": 60, "slots": 30},
            ]),
        ),
    ] {
        assert_eq!(statement[field], value, "{field}");
    }
    assert_eq!(statement["jobs"]["succeeded"], 72);
    let charged = statement["charged"].as_array().unwrap();
    let seconds: u64 = charged.iter().map(|c| c["seconds"].as_u64().unwrap()).sum();
    assert_eq!((charged.len(), seconds), (2, 75));
    let hidden = |text: String| text.replace(file, "FILE");
    let (_, csv, _) = report(&[file, "--statement", "--csv"]);
    insta::assert_snapshot!(hidden(csv));
    let (_, text, _) = report(&[file, "--statement"]);
    insta::assert_snapshot!(hidden(text));
    let (code, _, _) = report(&[file, "--csv"]);
    assert_eq!(code, Some(2), "CSV of what?");
}

/// One agent without a price, and the balances that its jobs' answers told.
fn balances(file: &Path, jobs: &[(i64, i64)]) {
    let connection = open_to_write(file).unwrap();
    connection
        .execute_batch(
            "INSERT INTO runs (run, started_at, ended_at, version, policy, records_dropped) VALUES (1, 0, 100000000, '1', 'tiers:99=100', 0);
             INSERT INTO agents VALUES (1, 'agent-001');
             INSERT INTO run_agents (run, agent, price_wei, orchestrators) VALUES (1, 1, NULL, NULL);
             INSERT INTO capabilities VALUES (1, 'gpu-check');
             INSERT INTO polls (run, at, agent, state, uptime_percent, pings) VALUES (1, 0, 1, 'fresh', 50, 1);
             INSERT INTO rates VALUES (1, 0, 1, 0, 0, 60, 50, 'uptime');",
        )
        .unwrap();
    for (second, balance) in jobs {
        connection
            .execute(
                "INSERT INTO jobs (run, sent_at, agent, capability, job_id, outcome, status, latency_us, send_lag_us, rate, uptime_percent, orchestrator, balance_wei, error) VALUES (1, ?1 * 1000000, 1, 1, x'00', 'success', 200, 20000, 0, 60, 50, 'https://o', ?2, NULL)",
                (second, balance.to_string()),
            )
            .unwrap();
    }
}

#[test]
fn without_a_price_the_balances_tell_what_was_spent() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    balances(
        &file,
        &[
            (0, 100),
            (1, 90),
            (2, 80),
            (3, 1080),
            (4, 1070),
            (5, 980),
            (6, -120_000),
        ],
    );
    let (_, out, err) = report(&[file.to_str().unwrap(), "--json"]);
    let report: Value = serde_json::from_str(&out).expect(&err);
    let cost = &report["agents"]["agent-001"]["cost"];
    // 10 + 10, 10 + 90, of four jobs; 100 slots were withheld at a mean of 30. Then the node forgot.
    for (field, value) in [
        ("source", json!("balance")),
        ("spent_wei", json!("120")),
        ("jobs", json!(4)),
        ("per_good_job_wei", json!("18")),
        ("not_spent_wei", json!("3000")),
        ("top_ups", json!(1)),
        ("topped_up_wei", json!("1000")),
        ("books_forgotten", json!(1)),
    ] {
        assert_eq!(cost[field], value, "{field}");
    }
}

#[test]
fn what_may_come_and_what_would_be_worth_most_is_told_where_it_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    fixture(&file);
    let file = file.to_str().unwrap();
    let (_, out, err) = report(&[file, "--json", "--forecast", "--suggest", "2000"]);
    let report: Value = serde_json::from_str(&out).expect(&err);
    let forecast = report["agents"]["agent-001"]["forecast"]
        .as_array()
        .unwrap();
    let tiers: Vec<f64> = forecast
        .iter()
        .map(|f| f["tier_percent"].as_f64().unwrap())
        .collect();
    assert_eq!(tiers, [99.0, 95.0, 90.0]);
    for tier in forecast {
        assert_eq!(tier["reached"], false);
        let chance = |when: &str| tier[when]["chance"].as_f64().unwrap();
        assert!(0.0 < chance("next_hour") && chance("next_hour") < chance("next_day"));
        // Two minutes are no past to compare with.
        assert_eq!(tier["next_hour"]["compared"], 0);
        assert_eq!(tier["next_hour"]["brier"], Value::Null);
    }
    let suggestion = &report["suggestion"];
    // Each job costs 1000 and nearly all are good: wherever the uptime was, it would have been worth it.
    assert_eq!(suggestion["cost_per_job_wei"], "1000");
    assert_eq!(suggestion["best"]["jobs"], 120.0);
    assert_eq!(suggestion["policies_compared"], 1141);
    let (_, text, _) = self::report(&[file, "--forecast", "--suggest", "2000"]);
    assert!(
        text.contains("not compared with any past yet") && text.contains("TIERS WORTH MOST"),
        "{text}"
    );
}

#[test]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
fn the_page_is_readable_in_light_in_dark_and_on_paper() {
    let mut browser = Browser::start();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    fixture(&file);
    let hostile = "<img src=x onerror=\"document.title='taken over'\">";
    let connection = open_to_write(&file).unwrap();
    connection
        .execute("UPDATE agents SET agent_id = ?1 WHERE agent = 1", [hostile])
        .unwrap();
    drop(connection);
    let page = folder.path().join("page.html");
    let (code, _, err) = report(&[
        file.to_str().unwrap(),
        "--html",
        page.to_str().unwrap(),
        "--forecast",
        "--suggest",
        "2000",
        "--what-if",
        "linear:90..99",
    ]);
    assert_eq!(code, Some(0), "{err}");
    browser.size(1200, 1800);
    browser.colours("light");
    browser.open(&format!("file://{}", page.display()));
    browser.wait_for("document.readyState", &json!("complete"));
    assert_eq!(browser.eval("document.title"), "uptime-runner: report");
    let headings =
        browser.eval("[...document.querySelectorAll('h2')].map(h => h.textContent).join('|')");
    assert!(headings.as_str().unwrap().contains(hostile), "{headings}");
    // Four charts of the agent of which something is known.
    for (what, count) in [
        ("svg[role=img][aria-label]", 4),
        (".line.uptime", 1),
        (".line.rate", 1),
        (".line.p50, .line.p90, .line.p99", 3),
    ] {
        let found = browser.eval(&format!("document.querySelectorAll('{what}').length"));
        assert_eq!(found, count, "{what}");
    }
    let bars = browser.eval("document.querySelectorAll('rect.good').length");
    assert!(bars.as_u64().unwrap() > 30, "{bars}");
    // Times are the reader's.
    let zone = "document.getElementById('zone').textContent";
    let resolved = browser.eval("Intl.DateTimeFormat().resolvedOptions().timeZone");
    assert!(
        browser
            .eval(zone)
            .as_str()
            .unwrap()
            .contains(resolved.as_str().unwrap())
    );

    let ground = "getComputedStyle(document.body).backgroundColor";
    let ink = "getComputedStyle(document.querySelector('svg text')).fill";
    let light = (browser.eval(ground), browser.eval(ink));
    browser.colours("dark");
    let dark = (browser.eval(ground), browser.eval(ink));
    assert!(light.0 != dark.0 && light.1 != dark.1, "{light:?} {dark:?}");
    let pictures = std::env::var_os("PICTURES");
    let keep = |name: &str, picture: Vec<u8>| {
        if let Some(folder) = &pictures {
            std::fs::write(Path::new(folder).join(name), picture).unwrap();
        }
    };
    keep("report-dark.png", browser.picture());
    // On paper it is light whatever the reader's screen is.
    let dark_paper =
        json!({"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]});
    browser.call("Emulation.setEmulatedMedia", &dark_paper);
    assert_eq!(browser.eval(ink), light.1);
    assert_eq!(browser.eval(ground), "rgb(255, 255, 255)");
    keep("report-print.png", browser.picture());
    browser.call("Emulation.setEmulatedMedia", &json!({"media": "screen"}));
    for width in [1200, 800, 390, 320] {
        browser.size(width, 800);
        let wide = browser.eval("document.documentElement.scrollWidth");
        assert!(
            wide.as_u64().unwrap() <= u64::from(width),
            "{wide} on {width}"
        );
    }
    keep("report-phone.png", browser.picture());
    assert_eq!(browser.misdeeds, [Value::Null; 0]);
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
    // A policy of a later release is not taken for the default.
    let later = folder.path().join("later.db");
    fixture(&later);
    open_to_write(&later)
        .unwrap()
        .execute("UPDATE runs SET policy = 'steps:1'", ())
        .unwrap();
    let (code, out, err) = report(&[later.to_str().unwrap()]);
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("runs.policy 'steps:1'"), "{err}");
    let (code, _, err) = report(&["x.db", "--what-if", "steps"]);
    assert_eq!(code, Some(2));
    assert!(
        err.contains("--what-if") && err.contains("expected tiers:"),
        "{err}"
    );
}

/// Releases up to 0.1.0 recorded whatever ids a ping system listed.
#[test]
fn names_in_a_record_cannot_act_on_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    fixture(&file);
    let connection = open_to_write(&file).unwrap();
    let hostile = "a\u{1b}[31m\n\u{202e}b";
    for (table, column, row) in [("agents", "agent_id", 1), ("capabilities", "name", 1)] {
        let update = format!("UPDATE {table} SET {column} = ?1 WHERE rowid = ?2");
        connection.execute(&update, (hostile, row)).unwrap();
    }
    drop(connection);
    let file = file.to_str().unwrap();
    for arguments in [&[file][..], &[file, "--statement"]] {
        let (code, out, err) = report(arguments);
        assert_eq!(code, Some(0), "{err}");
        assert!(out.contains("a\\u{1b}[31m \\u{202e}b"), "{out}");
        assert!(!out.contains(['\u{1b}', '\u{202e}']), "{out}");
    }
}
