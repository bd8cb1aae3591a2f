//! The dashboard in a real browser. With `UPDATE_PICTURES=1` the README's picture is taken anew.

use std::path::Path;
use std::time::Duration;

use crate::support::agents::Agents;
use crate::support::browser::Browser;
use crate::support::ping_system::PingSystemProcess;
use chrono::{TimeDelta, Utc};
use rustix::process::Signal;
use serde_json::{Value, json};
use uptime_runner::ping_system::evaluate::{PingAttempt, PingOutcome, PingPolicy};
use uptime_runner::ping_system::store::sqlite::{self, Location};
use uptime_runner::ping_system::store::{Claimed, Lease, Registration, Store};
use uptime_runner::ping_system::stretch::BootInstant;
use uptime_runner::units::Percent;
use uptime_runner::wire::agent::Reported;
use uuid::Uuid;

const HOSTILE: &str = "<img src=x onerror=\"document.title='taken over'\">";
const SELDOM: [&str; 2] = ["--base-interval", "15m"];

/// Uptime by the hour; `None` is no answer.
type Life = fn(i64) -> Option<f64>;

/// Two days of pings of some agents, as they would have come.
async fn live_through_two_days(folder: &Path, agents: &Agents) {
    let file = Location::File(folder.join("ping-system.db"));
    let store = sqlite::open(file).await.unwrap();
    let rules = PingPolicy::default();
    let begin = Utc::now() - TimeDelta::hours(48);
    let always: Life = |_| Some(100.0);
    let nearly: Life = |hour| Some(if hour % 9 == 4 { 98.7 } else { 99.8 });
    let at_night: Life = |hour| Some(if hour % 24 < 5 { 91.0 } else { 99.9 });
    let broken: Life = |hour| (hour < 40).then_some(99.5);
    let lives: [(&str, &str, Life); 6] = [
        ("agent-001", "a1", always),
        ("agent-002", "a2", nearly),
        ("agent-003", "a3", at_night),
        ("agent-004", "a4", broken),
        ("berlin-rtx-4090", "a5", always),
        (HOSTILE, "a6", nearly),
    ];
    for (name, path, uptime) in lives {
        store
            .register(&Registration {
                agent_id: name.to_owned(),
                agent_url: agents.url(path),
                capabilities: Some(vec!["gpu-check".to_owned(), "text-to-image".to_owned()]),
                metadata: json!({"region": "eu"}).as_object().cloned(),
                at: begin,
                interval: rules.interval.base,
            })
            .await
            .unwrap();
        let mut at = begin;
        while at < Utc::now() {
            let lease = Lease {
                now: at,
                until: at + TimeDelta::minutes(1),
            };
            let Claimed::Ours(claim) = store.claim(lease, name).await.unwrap() else {
                panic!("{name}");
            };
            let answer = uptime((at - begin).num_hours()).map(|uptime| Reported {
                uptime_percent: Percent::new(uptime).ok(),
                window_seconds: Some(claim.known.agent.ping_interval_minutes * 60.0),
                gpu_available: Some(true),
                ..Reported::default()
            });
            let asked = PingAttempt {
                at,
                took: Duration::from_millis(23),
                began: BootInstant {
                    boot_id: Uuid::nil(),
                    since_boot: (at - begin).to_std().unwrap(),
                },
                clock_offset_seconds: None,
                also_reported: Vec::new(),
                outcome: match answer {
                    Some(answer) => PingOutcome::Answered(answer),
                    None => PingOutcome::Failed("no whole answer in 10s".to_owned()),
                },
            };
            let new = rules.evaluate(&claim.known, asked, 0.5);
            at = new.after.agent.next_ping_at;
            store.record([(*claim, new)].into()).await.unwrap();
        }
    }
}

/// A ping system with a past, and the browser at its page.
async fn at_the_page(folder: &Path, agents: &Agents) -> (PingSystemProcess, Browser) {
    let mut browser = Browser::start();
    live_through_two_days(folder, agents).await;
    let system = PingSystemProcess::start(folder, &SELDOM);
    browser.size(1200, 760);
    browser.colours("light");
    browser.open(&system.url());
    browser.wait_for(ROWS, &json!(6));
    browser.wait_for(
        "document.getElementById('live').textContent",
        &json!("● live"),
    );
    (system, browser)
}

const ROWS: &str = "document.querySelectorAll('tr[data-agent]').length";
const NAMES: &str =
    "[...document.querySelectorAll('tr[data-agent] .name')].map(n => n.textContent)";

fn cell(agent_id: &str, column: usize) -> String {
    let agent_id = json!(agent_id);
    format!(
        "[...document.querySelectorAll('tr[data-agent]')].find(r => r.dataset.agent === {agent_id})?.children[{column}].textContent"
    )
}

fn click(browser: &mut Browser, selector: &str) {
    browser.eval(&format!(
        "document.querySelector({}).click()",
        json!(selector)
    ));
}

#[tokio::test]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
async fn agents_are_shown_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let (system, mut browser) = at_the_page(folder.path(), &agents).await;
    assert_eq!(
        browser.eval(NAMES),
        json!([
            HOSTILE,
            "agent-001",
            "agent-002",
            "agent-003",
            "agent-004",
            "berlin-rtx-4090"
        ])
    );
    assert_eq!(browser.eval("document.title"), "Ping system");
    assert_eq!(browser.eval("document.images.length"), 0);
    assert_eq!(
        browser.eval("document.getElementById('t-agents').textContent"),
        "6"
    );
    assert_eq!(
        browser.eval("document.getElementById('t-unreachable').textContent"),
        "1"
    );
    for (agent_id, column, text) in [
        ("agent-001", 1, "● active"),
        ("agent-001", 2, "100.00 %"),
        ("agent-001", 3, "100.00 %"),
        ("agent-001", 6, "15 min"),
        ("agent-004", 6, "8 h"),
    ] {
        assert_eq!(
            browser.eval(&cell(agent_id, column)),
            text,
            "{agent_id} {column}"
        );
    }
    let status = browser.eval(&cell("agent-004", 1));
    assert!(
        status.as_str().unwrap().starts_with("▲ unreachable"),
        "{status}"
    );
    // Colour is never all that tells good from poor.
    let strip = browser.eval(&cell("agent-002", 5));
    let strip = strip.as_str().unwrap();
    assert!(
        strip.contains('+') && strip.contains('!') && strip.chars().count() == 30,
        "{strip}"
    );
    assert!(
        browser
            .eval(&cell("agent-004", 5))
            .as_str()
            .unwrap()
            .ends_with('×')
    );

    // The means are those of the pings.
    let rows = system.ask("/ping-system/dashboard/agents?sort=agent");
    for (index, hours) in [(2, 1.0), (3, 24.0), (4, 168.0)] {
        let row = &rows["agents"][2];
        let field = ["", "", "uptime_1h", "uptime_24h", "uptime_7d"][index];
        let history = system.ask(&format!(
            "/ping-system/agents/agent-002/history?hours={hours}"
        ));
        let counted = history["pings"].as_array().unwrap().iter();
        let [up, all] = counted
            .filter(|ping| ping["first_ping"] == false)
            .map(|ping| {
                let seconds = ping["window_seconds"].as_f64().unwrap();
                [seconds * ping["uptime_percent"].as_f64().unwrap(), seconds]
            })
            .fold([0.0, 0.0], |[up, all], [ping, seconds]| {
                [up + ping, all + seconds]
            });
        let got = row[field].as_f64().unwrap();
        assert!(
            (got - up / all).abs() < 1e-6,
            "{field}: {got}, not {}",
            up / all
        );
        let shown = format!("{:.2} %", (got * 100.0 + 1e-8).floor() / 100.0);
        assert_eq!(browser.eval(&cell("agent-002", index)), shown);
    }
    assert_eq!(browser.misdeeds, [Value::Null; 0]);
}

#[tokio::test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
async fn a_new_ping_is_shown_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let (system, mut browser) = at_the_page(folder.path(), &agents).await;
    agents.set("a1", |stream, _| {
        let body = crate::support::agents::report("agent-001", 93.25).to_string();
        crate::support::respond(stream, 200, "", &body);
    });
    system.ping("agent-001");
    let last =
        "document.querySelector('tr[data-agent=agent-001] .strip').lastChild.title.split(': ')[1]";
    browser.wait_for(last, &json!("93.25 %"));
    browser.wait_for(&cell("agent-001", 6), &json!("30 min"));
    // A new agent, and one that is gone, are seen without a reload of the page, too.
    system.register("agent-000", &agents.url("a7"));
    browser.wait_for(ROWS, &json!(7));
    assert_eq!(browser.misdeeds, [Value::Null; 0]);
    // Without the ping system the page says so, and finds back to it.
    let address = system.address.clone();
    drop(system);
    browser.wait_for("document.getElementById('live').className", &json!("poor"));
    let notice = "document.getElementById('notice').textContent.slice(0, 31)";
    browser.wait_for(notice, &json!("The ping system does not answer"));
    let again = [&SELDOM[..], &["--listen", &address]].concat();
    let mut command = crate::support::binary();
    command
        .arg("ping-system")
        .args(again)
        .current_dir(folder.path());
    let system = crate::support::served::Served::spawn(command);
    browser.wait_for("document.getElementById('live').className", &json!("good"));
    browser.wait_for(notice, &json!(""));
    // One that hangs is told from one that has nothing to say.
    let since = std::time::Instant::now();
    crate::support::signal(&system.child, Signal::STOP);
    browser.wait_for(notice, &json!("The ping system is silent, what"));
    assert!(since.elapsed() < Duration::from_secs(15));
    crate::support::signal(&system.child, Signal::CONT);
    browser.wait_for(notice, &json!(""));
}

#[tokio::test]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
async fn an_agent_is_green_only_if_it_was_seen_with_its_gpus() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut browser = Browser::start();
    let options = [&SELDOM[..], &["--retries", "0"]].concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    for name in ["active", "no-gpu", "refuses", "refuses-too", "gone"] {
        system.with_agent(name, &agents);
    }
    agents.set("no-gpu", |stream, agent_id| {
        let mut report = crate::support::agents::report(agent_id, 0.0);
        report["gpu_available"] = json!(false);
        crate::support::respond(stream, 200, "", &report.to_string());
    });
    agents.set("gone", |_, _| {});
    for name in ["refuses", "refuses-too"] {
        agents.set(name, |stream, _| {
            crate::support::respond(stream, 401, "", "{}");
        });
    }
    for name in ["no-gpu", "gone", "refuses", "refuses-too"] {
        system.ping(name);
    }
    browser.open(&system.url());
    browser.wait_for(ROWS, &json!(5));
    let status = |agent_id: &str| {
        format!(
            "(() => {{ const s = document.querySelector('tr[data-agent={agent_id}] .state span'); return s.className + ' ' + s.textContent; }})()"
        )
    };
    for (agent_id, shown) in [
        ("active", "good ● active"),
        ("no-gpu", "bad ▲ no GPU"),
        ("gone", "bad ▲ unreachable"),
        ("refuses", "soft ○ not observed"),
        ("refuses-too", "soft ○ not observed"),
    ] {
        browser.wait_for(&status(agent_id), &json!(shown));
    }
    for (total, count) in [
        ("active", "1"),
        ("no_gpu", "1"),
        ("unreachable", "1"),
        ("unobserved", "2"),
    ] {
        let shown = format!("document.getElementById('t-{total}').textContent");
        browser.wait_for(&shown, &json!(count));
    }
    let notice = browser.eval("document.getElementById('notice').textContent");
    assert!(
        notice
            .as_str()
            .unwrap()
            .contains("refuse the ping system's token"),
        "{notice}"
    );
    assert_eq!(browser.misdeeds, [Value::Null; 0]);
}

#[tokio::test]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
async fn agents_are_sorted_filtered_and_opened() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let (_system, mut browser) = at_the_page(folder.path(), &agents).await;
    // By uptime over 24 h, the worst first, then the best.
    click(&mut browser, "#heads th:nth-child(4) button");
    let worst = "document.querySelector('tr[data-agent] .name').textContent";
    browser.wait_for(worst, &json!("agent-004"));
    assert_eq!(
        browser.eval("document.querySelector('th[aria-sort]').getAttribute('aria-sort')"),
        "ascending"
    );
    click(&mut browser, "#heads th:nth-child(4) button");
    browser.wait_for(worst, &json!("agent-001"));

    let filter = |text: &str| {
        let text = json!(text);
        format!(
            "(() => {{ const f = document.getElementById('filter'); f.value = {text}; f.dispatchEvent(new Event('input')); }})()"
        )
    };
    browser.eval(&filter("BERLIN"));
    browser.wait_for(NAMES, &json!(["berlin-rtx-4090"]));
    browser.eval(&filter("nothing of this name"));
    browser.wait_for(
        "document.getElementById('rows').textContent",
        &json!("No agent fits."),
    );
    browser.eval(&filter(""));
    browser.wait_for(ROWS, &json!(6));
    let status = "(() => { const s = document.getElementById('status'); s.value = 'unreachable'; s.dispatchEvent(new Event('change')); })()";
    browser.eval(status);
    browser.wait_for(NAMES, &json!(["agent-004"]));

    click(&mut browser, "tr[data-agent] .name");
    browser.wait_for("document.querySelectorAll('svg .curve').length", &json!(1));
    let label = browser.eval("document.querySelector('svg').getAttribute('aria-label')");
    assert!(
        label.as_str().unwrap().contains("without answer"),
        "{label}"
    );
    assert!(
        browser
            .eval("document.querySelectorAll('svg .mark').length")
            .as_u64()
            .unwrap()
            > 0
    );
    let facts = browser.eval("document.querySelector('.details dl').textContent");
    assert!(
        facts.as_str().unwrap().contains("no whole answer in 10s"),
        "{facts}"
    );
    click(&mut browser, "tr[data-agent] .name");
    browser.wait_for("document.querySelectorAll('svg').length", &json!(0));
    assert_eq!(browser.misdeeds, [Value::Null; 0]);
}

#[tokio::test]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
async fn it_fits_the_dark_and_the_phone() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let (_system, mut browser) = at_the_page(folder.path(), &agents).await;
    browser.eval(
        "(() => { const f = document.getElementById('filter'); f.value = 'agent-'; f.dispatchEvent(new Event('input')); })()",
    );
    browser.wait_for(ROWS, &json!(4));
    click(&mut browser, "tr[data-agent=agent-003] .name");
    browser.wait_for("document.querySelectorAll('svg .curve').length", &json!(1));
    let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join(".github/dashboard.png");
    let light = browser.picture();
    if std::env::var_os("UPDATE_PICTURES").is_some() {
        std::fs::write(&picture, &light).unwrap();
    }
    assert!(picture.exists(), "the README's picture");
    let ground = "getComputedStyle(document.body).backgroundColor";
    let light_ground = browser.eval(ground);
    browser.colours("dark");
    assert_ne!(browser.eval(ground), light_ground);
    assert_ne!(browser.picture(), light);
    for width in [1200, 800, 390, 320] {
        browser.size(width, 800);
        let wide = browser.eval("document.documentElement.scrollWidth");
        assert!(
            wide.as_u64().unwrap() <= u64::from(width),
            "{wide} on {width}"
        );
    }
    if let Some(folder) = std::env::var_os("PICTURES") {
        browser.size(390, 900);
        std::fs::write(Path::new(&folder).join("phone.png"), browser.picture()).unwrap();
        browser.size(1200, 760);
        std::fs::write(Path::new(&folder).join("dark.png"), browser.picture()).unwrap();
    }
    assert_eq!(browser.misdeeds, [Value::Null; 0]);
}

#[tokio::test]
#[cfg_attr(no_chromium, ignore = "needs Chromium (package chromium)")]
async fn where_reading_needs_a_token_the_page_asks_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut browser = Browser::start();
    live_through_two_days(folder.path(), &agents).await;
    std::fs::write(folder.path().join("token"), "re4d").unwrap();
    let options = [&SELDOM[..], &["--read-token-file", "token"]].concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    browser.open(&system.url());
    let enter = |token: &str| {
        format!(
            "(() => {{ const t = document.getElementById('token'); t.value = '{token}'; t.form.requestSubmit(); }})()"
        )
    };
    browser.wait_for("!!document.getElementById('token')", &json!(true));
    assert_eq!(browser.eval(ROWS), 0);
    browser.eval(&enter("wrong"));
    browser.wait_for("document.getElementById('token')?.value", &json!(""));
    browser.eval(&enter("re4d"));
    browser.wait_for(ROWS, &json!(6));
    browser.wait_for("document.getElementById('live').className", &json!("good"));
}
