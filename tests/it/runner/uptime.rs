//! Whatever a ping system answers, the runner goes on, its rate is right and its accounts add up.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use crate::support::{PingSystem, RawServer, Runner, good_gateway, respond};
use rustix::process::Signal;

const RATE: u32 = 600;

/// Good answers, then broken ones until the last good one is stale, then good ones again.
fn survives(broken: impl Fn(&mut TcpStream) + Send + Sync + 'static) {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let mut runner = Runner::start(
        &pings.url(),
        &gateway.url(),
        &[
            "--rate",
            "600",
            "--uptime-interval",
            "300ms",
            "--stale-after",
            "900ms",
        ],
    );
    runner.wait_for_event("job");
    pings.break_with(broken);
    let stale = runner.wait_for_rate(0);
    assert_eq!(
        (&stale["from"], &stale["reason"]),
        (&600.into(), &"stale".into())
    );
    assert_eq!(stale["uptime_percent"], 99.5);
    let polled = runner.wait_for("poll after that", |e| {
        e["event"] == "uptime" && e["state"] == "stale"
    });
    assert_eq!(polled["uptime_percent"], 99.5);
    pings.mend();
    let back = runner.wait_for_rate(600);
    assert_eq!(
        (&back["from"], &back["reason"]),
        (&0.into(), &"uptime".into())
    );
    runner.wait_for_event("job");
    runner.signal(Signal::INT);
    let finished = runner.finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let [attempts, ..] = finished.assert_accounts_add_up(RATE);
    assert_eq!(gateway.requests.lock().unwrap().len() as u64, attempts);
    assert!(
        finished
            .stderr
            .contains("no good answer from the ping system"),
        "{}",
        finished.stderr
    );

    // Between the two rate changes nothing was sent.
    let (fell, rose) = (
        crate::support::instant(&stale["ts"]),
        crate::support::instant(&back["ts"]),
    );
    for job in finished.of_kind("job") {
        let sent = crate::support::instant(&job["ts"]);
        assert!(
            sent <= fell || sent >= rose,
            "{job} between {fell} and {rose}"
        );
    }
}

macro_rules! survives {
    ($($name:ident: $broken:expr;)*) => {
        $(#[test] fn $name() { survives($broken); })*
    };
}

survives! {
    status_500: |stream| respond(stream, 500, "", "oops");
    half_a_document: |stream| respond(stream, 200, "", r#"{"agents":[{"agent_id":"agent-001","last_upt"#);
    html: |stream| respond(stream, 200, "Content-Type: text/html\r\n", "<html><body>It works!</body></html>");
    an_empty_body: |stream| respond(stream, 200, "", "");
    a_huge_number: |stream| respond(stream, 200, "", r#"[{"agent_id":"agent-001","timestamp":1,"last_uptime_percent":1e400,"uptime_percent":1e400}]"#);
    a_negative_percentage: |stream| respond(stream, 200, "", r#"[{"agent_id":"agent-001","timestamp":1,"last_uptime_percent":-1,"uptime_percent":-1}]"#);
    an_unknown_agent: |stream| respond(stream, 200, "", r#"{"agents":[{"agent_id":"agent-007"}],"count":1}"#);
    a_redirect_loop: |stream| respond(stream, 302, "Location: /ping-system/agents\r\n", "");
    garbage_in_place_of_http: |stream| {
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n");
        let _ = stream.shutdown(Shutdown::Both);
    };
    a_closed_connection: |stream| { let _ = stream.shutdown(Shutdown::Both); };
    an_answer_cut_half_way: |stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n{\"agents\":[");
        let _ = stream.shutdown(Shutdown::Both);
    };
    silence: |stream| { let _ = stream.read(&mut [0]); };
    an_answer_of_80_mb: |stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 80000000\r\n\r\n[");
        for _ in 0..80 {
            if stream.write_all(&vec![b' '; 1_000_000]).is_err() {
                return;
            }
        }
    };
    an_answer_without_end: |stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n[");
        while stream.write_all(&vec![b' '; 100_000]).is_ok() {}
    };
}

#[test]
fn a_ping_system_that_is_not_there_is_waited_for() {
    let nobody = RawServer::start(|stream, _| {
        let _ = stream.shutdown(Shutdown::Both);
    });
    let gateway = good_gateway();
    let mut runner = Runner::start(
        &nobody.url(),
        &gateway.url(),
        &["--uptime-interval", "50ms", "--duration", "500ms"],
    );
    let polled = runner.wait_for_event("uptime");
    assert_eq!(polled["state"], "unknown");
    assert!(polled["uptime_percent"].is_null() && polled["total_pings"].is_null());
    let finished = runner.finish();
    assert_eq!(finished.status.code(), Some(1));
    assert_eq!(finished.assert_accounts_add_up(60), [0, 0, 0]);
    assert!(gateway.requests.lock().unwrap().is_empty());
}

#[test]
fn uptime_changes_the_rate_within_one_poll() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let mut runner = Runner::start(
        &pings.url(),
        &gateway.url(),
        &["--rate", "600", "--uptime-interval", "100ms"],
    );
    for (uptime, rate) in [
        (99.0, 600),
        (96.2, 300),
        (92.0, 60),
        (85.0, 0),
        (100.0, 600),
    ] {
        pings.set_uptime(uptime);
        let changed = runner.wait_for_rate(rate);
        assert_eq!(changed["reason"], "uptime");
        if rate > 0 {
            let job = runner.wait_for("job at it", |e| e["event"] == "job" && e["rate"] == rate);
            assert!(job["uptime_percent"].as_f64().unwrap() >= 90.0);
        }
    }
    runner.signal(Signal::TERM);
    let finished = runner.finish();
    assert!(finished.status.success());
    finished.assert_accounts_add_up(RATE);
}

#[test]
fn the_ping_system_is_asked_as_the_contract_says() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let url = format!("{}/base/", pings.url());
    let mut command = crate::support::binary();
    command
        .env("UPTIME_RUNNER_PING_TOKEN", "s3cret")
        .args([
            "--agent",
            "agent-001",
            "--uptime-window",
            "90m",
            "--max-jobs",
            "1",
        ])
        .args([
            "--ping-url",
            &url,
            "--gateway-url",
            &gateway.url(),
            "--output",
            "json",
        ]);
    let finished = Runner::spawn(command).finish();
    assert!(finished.status.success());
    let requests = pings.server.requests.lock().unwrap();
    let lines: Vec<&str> = requests
        .iter()
        .map(|(head, _)| head.lines().next().unwrap())
        .collect();
    assert_eq!(lines[0], "GET /base/ping-system/agents/agent-001 HTTP/1.1");
    assert_eq!(
        lines[1],
        "GET /base/ping-system/agents/agent-001/history?hours=2&limit=2000 HTTP/1.1"
    );
    for (head, _) in requests.iter() {
        assert!(
            head.to_ascii_lowercase()
                .contains("authorization: bearer s3cret"),
            "{head}"
        );
    }
    assert!(!finished.stderr.contains("s3cret"));
    let gateway_requests = gateway.requests.lock().unwrap();
    assert!(
        !gateway_requests[0].0.contains("s3cret"),
        "each token goes to its own place only"
    );
}

#[test]
fn the_policy_that_is_asked_for_decides() {
    let gateway = good_gateway();
    for (uptime, policy, rate) in [
        (94.5, "linear:90..99", 3000),
        (50.0, "proportional:2", 1500),
        (12.0, "tiers:99=100 probe_rate=60", 60),
        (98.0, "tiers:99=100,97=25,90=10", 1500),
    ] {
        let pings = PingSystem::start(uptime);
        let arguments = ["--rate", "6000", "--policy", policy, "--max-jobs", "1"];
        let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
        assert_eq!(finished.of_kind("rate_changed")[0]["to"], rate, "{policy}");
    }
    let pings = PingSystem::start(99.0);
    let arguments = ["--rate", "5", "--max-jobs", "1"];
    let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
    assert!(
        finished
            .stderr
            .contains("an uptime of 90 % earns is less than one job"),
        "{}",
        finished.stderr
    );
}

#[test]
fn agents_have_rates_and_capabilities_of_their_own_and_fall_to_one_shard() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    let config = "capabilities = [\"gpu-check\", \"text-to-image\"]\nrate = 6000\n\
        [[agents]]\nid = \"agent-001\"\nrate = 3000\ncapabilities = [\"text-to-image\"]\n\
        [[agents]]\nid = \"agent-002\"\n";
    std::fs::write(&file, config).unwrap();
    let mut followed = Vec::new();
    for shard in ["1/1", "1/3", "2/3", "3/3"] {
        let arguments = ["--config", file.to_str().unwrap(), "--shard", shard];
        let arguments = [&arguments[..], &["--duration", "300ms"]].concat();
        let finished = Runner::start(&pings.url(), &gateway.url(), &arguments).finish();
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
        for change in finished.of_kind("rate_changed") {
            let rate = if change["agent"] == "agent-001" {
                3000
            } else {
                6000
            };
            assert_eq!(change["to"], rate);
        }
        for job in finished.of_kind("job") {
            assert!(
                job["agent"] != "agent-001" || job["capability"] == "text-to-image",
                "{job}"
            );
        }
        let agents = finished.of_kind("started")[0]["agents"]
            .as_array()
            .unwrap()
            .clone();
        followed.push(agents);
    }
    let [whole, shards @ ..] = &followed[..] else {
        panic!("{followed:?}")
    };
    let mut together: Vec<_> = shards.iter().flatten().cloned().collect();
    together.sort_by_key(std::string::ToString::to_string);
    assert_eq!(&together, whole);
}

/// Without a route for one agent the list is read, and both list and history to their last page.
#[test]
fn pages_are_read_to_the_last_one() {
    let pings = RawServer::start(|stream, head| {
        let at = |seconds_ago| {
            (chrono::Utc::now() - chrono::TimeDelta::seconds(seconds_ago)).to_rfc3339()
        };
        let ping = |seconds_ago, uptime| {
            let at = at(seconds_ago);
            format!(
                r#"{{"timestamp":"{at}","success":true,"uptime_percent":{uptime},"window_seconds":60}}"#
            )
        };
        let (path, query) = head
            .split_once(' ')
            .unwrap()
            .1
            .split_once('?')
            .unwrap_or((head, ""));
        let is_second = query.contains("&after=");
        let body = if path.ends_with("/history") && is_second {
            format!(r#"{{"pings":[{}]}}"#, ping(10, 92.0))
        } else if path.ends_with("/history") {
            format!(
                r#"{{"pings":[{}],"next":"2026-01-01T00:00:00+00:00"}}"#,
                ping(70, 98.0)
            )
        } else if path.ends_with("/agents") && is_second {
            r#"{"agents":[{"agent_id":"agent-001"}]}"#.to_owned()
        } else if path.ends_with("/agents") {
            r#"{"agents":[{"agent_id":"agent-000"}],"next":"agent-000"}"#.to_owned()
        } else {
            return respond(stream, 404, "", "no such path");
        };
        respond(stream, 200, "", &body);
    });
    let gateway = good_gateway();
    let mut runner = Runner::start(&pings.url(), &gateway.url(), &["--uptime-interval", "1h"]);
    let uptime = runner.wait_for_event("uptime");
    assert_eq!(
        (&uptime["uptime_percent"], &uptime["pings"]),
        (&95.0.into(), &2.into())
    );
    let requests = pings.requests.lock().unwrap();
    let asked = requests
        .iter()
        .filter_map(|(head, _)| head.split(' ').nth(1));
    assert_eq!(
        asked.take(5).collect::<Vec<_>>(),
        [
            "/ping-system/agents/agent-001",
            "/ping-system/agents?limit=1000&metadata=false",
            "/ping-system/agents?limit=1000&metadata=false&after=agent-000",
            "/ping-system/agents/agent-001/history?hours=1&limit=2000",
            "/ping-system/agents/agent-001/history?hours=1&limit=2000&after=2026-01-01T00%3A00%3A00%2B00%3A00",
        ]
    );
}
