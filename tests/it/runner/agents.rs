//! Several agents in one run: who is followed, how a total is shared out, what may be spent, and whose
//! claims are contradicted.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{
    OWN, PingSystem, RawServer, Runner, free_port, get, good_gateway, respond, wait_until,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::Value;

/// A ping system whose agents, with their uptimes, can be changed.
struct Listing {
    server: RawServer,
    uptimes: Arc<Mutex<BTreeMap<String, f64>>>,
}

impl Listing {
    fn of(agents: &[(&str, f64)]) -> Self {
        let uptimes: BTreeMap<String, f64> = agents
            .iter()
            .map(|&(id, uptime)| (id.to_owned(), uptime))
            .collect();
        let uptimes = Arc::new(Mutex::new(uptimes));
        let known = Arc::clone(&uptimes);
        let server = RawServer::start(move |stream, head| {
            let now = chrono::Utc::now().to_rfc3339();
            let known = known.lock().unwrap().clone();
            let path = head.split(' ').nth(1).unwrap();
            let Some((_, of)) = path.split_once("/agents/") else {
                let agents = known.iter().map(|(id, uptime)| {
                    format!(
                        r#"{{"agent_id":"{id}","ping_interval_minutes":15,"last_ping_at":"{now}","last_uptime_percent":{uptime}}}"#
                    )
                });
                let agents: Vec<String> = agents.collect();
                return respond(stream, 200, "", &format!("[{}]", agents.join(",")));
            };
            // It tells of all agents at once only.
            let (id, what) = of.split_once('/').unwrap_or((of, ""));
            match known.get(id).filter(|_| what.starts_with("history")) {
                Some(uptime) => respond(
                    stream,
                    200,
                    "",
                    &format!(
                        r#"[{{"timestamp":"{now}","success":true,"uptime_percent":{uptime},"window_seconds":900}}]"#
                    ),
                ),
                None => respond(stream, 404, "", ""),
            }
        });
        Self { server, uptimes }
    }

    fn set(&self, agent: &str, uptime: f64) {
        self.uptimes
            .lock()
            .unwrap()
            .insert(agent.to_owned(), uptime);
    }

    fn remove(&self, agent: &str) {
        self.uptimes.lock().unwrap().remove(agent);
    }
}

fn config(folder: &Path, text: &str) -> PathBuf {
    let file = folder.join("runner.toml");
    std::fs::write(&file, text).unwrap();
    file
}

/// Waits for an event that fits, or has come already.
fn expect(runner: &mut Runner, what: &str, fits: impl Fn(&Value) -> bool) {
    if !runner.events.iter().any(&fits) {
        runner.wait_for(what, fits);
    }
}

fn rate_of(agent: &str, to: u64) -> impl Fn(&Value) -> bool + '_ {
    move |event| event["event"] == "rate_changed" && event["agent"] == agent && event["to"] == to
}

#[test]
fn whoever_is_listed_is_followed_while_it_is() {
    let listing = Listing::of(&[("a", 99.5), ("b", 96.0)]);
    let gateway = good_gateway();
    let folder = tempfile::tempdir().unwrap();
    let file = config(
        folder.path(),
        "all_agents = true\nrate = 600\nuptime_interval = \"100ms\"\n[[agents]]\nid = \"b\"\nrate = 60\n",
    );
    let arguments = ["--config", file.to_str().unwrap()];
    let mut runner = Runner::start(&listing.server.url(), &gateway.url(), &arguments);
    expect(&mut runner, "rate of a", rate_of("a", 600));
    // The file says how to follow it.
    expect(&mut runner, "rate of b", rate_of("b", 30));
    listing.set("c", 99.5);
    runner.wait_for("c", |event| {
        event["event"] == "agent_joined" && event["agent"] == "c"
    });
    runner.wait_for("rate of c", rate_of("c", 600));
    listing.remove("a");
    let left = runner.wait_for("a gone", |event| {
        event["event"] == "agent_left" && event["agent"] == "a"
    });
    // Once a later job of another agent has come, those that were under way have come, too.
    let of_c = |event: &Value| {
        let is_job = event["event"] == "job" && event["agent"] == "c";
        is_job && crate::support::instant(&event["ts"]) > crate::support::instant(&left["ts"])
    };
    let asked_of_a = || {
        let requests = gateway.requests.lock().unwrap();
        let bodies = requests
            .iter()
            .map(|(_, body)| String::from_utf8_lossy(body));
        bodies
            .filter(|body| body.contains(r#""agent_id":"a""#))
            .count()
    };
    runner.wait_for("a job of c", of_c);
    let before = asked_of_a();
    assert!(before > 0);
    for _ in 0..5 {
        runner.wait_for("a job of c", of_c);
    }
    assert_eq!(asked_of_a(), before);
    // It comes back under the same name, and is accounted for as before.
    listing.set("a", 96.0);
    runner.wait_for("rate of a", rate_of("a", 300));
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let agents = finished.summary()["agents"].as_object().unwrap();
    assert_eq!(agents.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
}

#[test]
fn what_an_agent_loses_of_a_total_goes_to_a_better_one_where_that_is_wanted() {
    for (redistribute, better) in [(false, 300), (true, 600)] {
        let listing = Listing::of(&[("a", 99.5), ("b", 80.0)]);
        let gateway = good_gateway();
        let mut arguments = vec!["--agent", "a", "--agent", "b", "--total-rate", "600"];
        arguments.extend(["--uptime-interval", "100ms"]);
        if redistribute {
            arguments.push("--redistribute");
        }
        let mut runner = Runner::start(&listing.server.url(), &gateway.url(), &arguments);
        runner.wait_for("rate of a", rate_of("a", better));
        runner.wait_for("b known", |event| {
            event["event"] == "uptime" && event["agent"] == "b"
        });
        // Better again, it has its own part again.
        listing.set("b", 99.0);
        runner.wait_for("rate of b", rate_of("b", 300));
        runner.wait_for("jobs of both", |event| {
            event["event"] == "job" && event["agent"] == "b"
        });
        runner.signal(Signal::INT);
        let finished = runner.finish();
        assert!(finished.status.success(), "{}", finished.stderr);
        if redistribute {
            let changes = finished.of_kind("rate_changed");
            let back = changes
                .iter()
                .rfind(|change| change["agent"] == "a")
                .unwrap();
            assert_eq!(
                (&back["to"], &back["reason"]),
                (&300.into(), &"allotment".into())
            );
        }
    }
}

#[test]
fn no_job_is_sent_that_the_budget_does_not_pay_for() {
    let listing = Listing::of(&[("a", 99.5)]);
    let gateway = good_gateway();
    // Each of these jobs takes less than a second, so 1000 wei.
    let arguments = [
        "--agent",
        "a",
        "--rate",
        "600",
        "--price",
        "1000",
        "--budget-wei",
        "5500",
    ];
    let finished = Runner::start(&listing.server.url(), &gateway.url(), &arguments).finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    assert_eq!(finished.of_kind("job").len(), 5);
    let job = finished.of_kind("job")[0];
    assert_eq!(job["cost_wei"], "1000");
    assert_eq!(finished.summary()["agents"]["a"]["spent_wei"], "5000");
    assert!(
        finished.stderr.contains("--budget-wei is spent"),
        "{}",
        finished.stderr
    );
    finished.assert_accounts_add_up(600);
}

#[test]
fn an_agent_whose_budget_is_spent_is_sent_nothing_while_others_are() {
    let listing = Listing::of(&[("a", 99.5), ("b", 99.5)]);
    let gateway = good_gateway();
    let folder = tempfile::tempdir().unwrap();
    let file = config(
        folder.path(),
        "rate = 600\nprice = 7\n[[agents]]\nid = \"a\"\nbudget_wei = \"21\"\n[[agents]]\nid = \"b\"\n",
    );
    let arguments = ["--config", file.to_str().unwrap()];
    let mut runner = Runner::start(&listing.server.url(), &gateway.url(), &arguments);
    let spent = runner.wait_for("the end of a", rate_of("a", 0));
    assert_eq!(spent["reason"], "budget");
    for _ in 0..3 {
        runner.wait_for("a job of b", |event| {
            event["event"] == "job" && event["agent"] == "b"
        });
    }
    runner.signal(Signal::INT);
    let finished = runner.finish();
    let of_a = finished
        .of_kind("job")
        .into_iter()
        .filter(|job| job["agent"] == "a");
    assert_eq!(of_a.count(), 3);
    finished.assert_accounts_add_up(1200);
}

/// Whether a job may only be done by the second orchestrator.
fn tied_to_the_second(head: &str) -> bool {
    let header = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("livepeer").then_some(value)
    });
    let job = STANDARD.decode(header.unwrap()).unwrap();
    String::from_utf8(job).unwrap().contains("orch-2.example")
}

/// Jobs that are tied to the second orchestrator fail.
fn half_good_gateway() -> RawServer {
    RawServer::start(|stream: &mut TcpStream, head| {
        let second = tied_to_the_second(head);
        let by = if second { 2 } else { 1 };
        let header = format!("{OWN}X-Orchestrator-Url: https://orch-{by}.example:8935\r\n");
        respond(stream, if second { 500 } else { 200 }, &header, "{}");
    })
}

#[test]
fn an_agent_whose_jobs_hang_takes_no_place_of_the_others() {
    let listing = Listing::of(&[("a", 99.5), ("b", 99.5)]);
    // Jobs that are tied to the second orchestrator get no answer.
    let gateway = RawServer::start(|stream, head| {
        if !tied_to_the_second(head) {
            respond(stream, 200, "", "{}");
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let file = config(
        folder.path(),
        "rate = 600\nmax_in_flight = 20\ntimeout = \"1m\"\n[[agents]]\nid = \"a\"\n\
         [[agents]]\nid = \"b\"\nrate = 60000\norchestrators = [\"https://orch-2.example:8935\"]\n",
    );
    let metrics = format!("127.0.0.1:{}", free_port());
    let arguments = [
        "--config",
        file.to_str().unwrap(),
        "--metrics-listen",
        &metrics,
    ];
    let mut runner = Runner::start(&listing.server.url(), &gateway.url(), &arguments);
    let dropped = |agent: &str| {
        let text = get(&format!("http://{metrics}/metrics"));
        let name =
            format!("uptime_runner_dropped_total{{agent=\"{agent}\",capability=\"gpu-check\"}} ");
        let count = text.lines().find_map(|line| line.strip_prefix(&name));
        count.unwrap().parse::<u64>().unwrap()
    };
    // It listens before it says anything.
    runner.wait_for_event("started");
    // Soon b has all places that it can get.
    wait_until("b's slots are dropped", || (dropped("b") > 0).then_some(()));
    for _ in 0..10 {
        runner.wait_for("a job of a", |event| {
            event["event"] == "job" && event["agent"] == "a"
        });
    }
    let (of_a, of_b) = (dropped("a"), dropped("b"));
    // A machine that is held up for a second drops slots of anybody; places are not what is missing.
    assert!(of_a * 20 < of_b, "{of_a} {of_b}");
    assert_eq!(
        runner
            .events
            .iter()
            .filter(|event| event["agent"] == "b" && event["event"] == "job")
            .count(),
        0
    );
}

#[test]
fn an_agent_whose_jobs_fail_is_not_believed_where_that_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    for verified in [false, true] {
        let listing = Listing::of(&[("a", 99.5), ("b", 99.5)]);
        let gateway = half_good_gateway();
        let trust = if verified { " trust=verified" } else { "" };
        let file = config(
            folder.path(),
            &format!(
                "rate = 6000\nuptime_interval = \"100ms\"\npolicy = \"tiers:99=100,95=50,90=10{trust}\"\n\
                 [[agents]]\nid = \"a\"\norchestrators = [\"https://orch-1.example:8935\"]\n\
                 [[agents]]\nid = \"b\"\norchestrators = [\"https://orch-2.example:8935\"]\n"
            ),
        );
        let arguments = ["--config", file.to_str().unwrap()];
        let mut runner = Runner::start(&listing.server.url(), &gateway.url(), &arguments);
        let claim = runner.wait_for_event("claim");
        assert_eq!(
            (&claim["agent"], &claim["contradicted"]),
            (&"b".into(), &true.into())
        );
        assert_eq!(claim["claimed_tier_percent"], 99.0);
        assert!(claim["jobs"].as_u64().unwrap() >= 50);
        if verified {
            let punished = runner.wait_for("the punishment", rate_of("b", 0));
            assert_eq!(punished["reason"], "evidence");
            assert_eq!(punished["uptime_percent"], 99.5);
        } else {
            // Two more looks change nothing.
            for _ in 0..2 {
                runner.wait_for("a look", |event| {
                    event["event"] == "uptime" && event["agent"] == "b"
                });
            }
        }
        runner.signal(Signal::INT);
        let finished = runner.finish();
        let summary = finished.summary();
        assert_eq!(summary["agents"]["a"]["rate"], 6000);
        assert_eq!(
            summary["agents"]["b"]["rate"],
            if verified { 0 } else { 6000 }
        );
    }
}

/// A gateway that answers by the number of the request, from 0.
fn counting_gateway(answer: impl Fn(&mut TcpStream, usize) + Send + Sync + 'static) -> RawServer {
    let asked = AtomicUsize::new(0);
    RawServer::start(move |stream, _| answer(stream, asked.fetch_add(1, Ordering::Relaxed)))
}

#[test]
fn a_proxy_that_asks_for_patience_is_given_it() {
    let pings = PingSystem::start(99.5);
    let gateway = counting_gateway(|stream, number| {
        if number == 5 {
            respond(stream, 429, "Retry-After: 2\r\n", "");
        } else {
            respond(stream, 200, "", "{}");
        }
    });
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &["--rate", "600"]);
    let held = runner.wait_for("the patience", |event| event["reason"] == "throttled");
    assert_eq!((&held["from"], &held["to"]), (&600.into(), &0.into()));
    let begin = Instant::now();
    let back = runner.wait_for_rate(600);
    assert_eq!(back["reason"], "uptime");
    let passed = begin.elapsed();
    assert!(passed > Duration::from_millis(1500), "{passed:?}");
    runner.wait_for_event("job");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    finished.assert_accounts_add_up(600);
    let jobs = finished.of_kind("job");
    let throttled = jobs
        .iter()
        .filter(|job| job["outcome"] == "throttled")
        .count();
    assert_eq!(throttled, 1);
}

#[test]
fn jobs_that_do_no_good_are_paused_until_one_succeeds() {
    let pings = PingSystem::start(99.5);
    let gateway = counting_gateway(|stream, number| {
        if number < 5 {
            respond(stream, 502, "", "");
        } else {
            respond(stream, 200, "", "{}");
        }
    });
    let arguments = ["--rate", "60", "--pause-after", "5"];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    let paused = runner.wait_for_event("paused");
    assert_eq!(
        (&paused["jobs"], &paused["outcome"]),
        (&5.into(), &"bad_gateway".into())
    );
    let held = runner.wait_for_rate(6);
    assert_eq!(held["reason"], "paused");
    runner.wait_for_event("resumed");
    let back = runner.wait_for_rate(60);
    assert_eq!(back["reason"], "uptime");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    finished.assert_accounts_add_up(60);
}

/// The first answers of a gateway are good; then the worker is gone.
fn gateway_that_loses_its_worker(good: usize) -> RawServer {
    let asked = AtomicUsize::new(0);
    RawServer::start(
        move |stream, _| match asked.fetch_add(1, Ordering::Relaxed) {
            n if n < good => respond(
                stream,
                200,
                "X-Orchestrator-Url: https://orch-1.example:8935\r\n",
                "{}",
            ),
            n if n == good => respond(stream, 200, "", ""),
            _ => respond(
                stream,
                400,
                OWN,
                "No orchestrators found for capability agent-net\n",
            ),
        },
    )
}

const TIED: &str = "rate = 6000\nuptime_interval = \"100ms\"\n\
    [[agents]]\nid = \"agent-001\"\norchestrators = [\"https://orch-1.example:8935\"]\n";

#[test]
fn an_agent_whose_worker_is_gone_is_accused() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), TIED);
    let pings = PingSystem::start(99.5);
    let gateway = gateway_that_loses_its_worker(10);
    let arguments = ["--config", file.to_str().unwrap()];
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &arguments);
    let claim = runner.wait_for_event("claim");
    assert_eq!(claim["contradicted"], true, "{claim}");
}

#[test]
fn an_agent_whose_places_are_taken_is_not_accused() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), TIED);
    let pings = PingSystem::start(99.5);
    let in_use = Mutex::new(0);
    let gateway = RawServer::start(move |stream, _| {
        let has_place = {
            let mut in_use = in_use.lock().unwrap();
            let has_place = *in_use < 3;
            *in_use += u32::from(has_place);
            has_place
        };
        if has_place {
            std::thread::sleep(Duration::from_millis(300));
            // It is free before the client knows that it is.
            *in_use.lock().unwrap() -= 1;
            respond(
                stream,
                200,
                "X-Orchestrator-Url: https://orch-1.example:8935\r\n",
                "{}",
            );
        } else {
            respond(
                stream,
                400,
                OWN,
                "No orchestrators found for capability agent-net\n",
            );
        }
    });
    let arguments = ["--config", file.to_str().unwrap(), "--max-jobs", "300"];
    let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
    let outcomes = &finished.summary()["capabilities"]["gpu-check"]["outcomes"];
    assert!(outcomes["no_supply"].as_u64() > Some(100), "{outcomes}");
    assert_eq!(
        finished.of_kind("claim"),
        Vec::<&Value>::new(),
        "{outcomes}"
    );
}

#[test]
fn what_does_not_fit_together_is_refused() {
    for (arguments, expected) in [
        (
            &["--all-agents", "--agent", "a"][..],
            "--agent and --all-agents: expected one",
        ),
        (
            &["--agent", "a", "--split", "uptime"],
            "--split says how a total is shared out",
        ),
        (
            &["--agent", "a", "--redistribute"],
            "--redistribute says how",
        ),
        (
            &["--agent", "a", "--rate", "5", "--total-rate", "5"],
            "--total-rate and --rate",
        ),
        (
            &["--agent", "a", "--total-rate", "5", "--split", "fair"],
            "equal, uptime or performance",
        ),
        (
            &["--agent", "a", "--budget-wei", "5"],
            "no price is known for a",
        ),
        (
            &["--all-agents", "--budget-wei", "5"],
            "no price is known for the agents that are listed",
        ),
        (&["--agent", "a", "--price", "-1"], "whole wei per second"),
        (
            &["--agent", "a", "--price", "1", "--budget-wei", "0"],
            "wei over 0",
        ),
    ] {
        let output = crate::support::binary().args(arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?} {error}");
        assert!(error.contains(expected), "{arguments:?} {error}");
    }
}
