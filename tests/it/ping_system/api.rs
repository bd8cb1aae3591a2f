//! The ping system as agents, operators and other programs see it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use crate::support::agents::{Agents, Answer, report};
use crate::support::ping_system::PingSystemProcess;
use crate::support::{binary, free_port, respond, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

const SELDOM: [&str; 2] = ["--base-interval", "1h"];

#[test]
fn an_agent_is_registered_pinged_remembered_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    assert_eq!(
        system.ask("/ping-system/agents"),
        json!({"agents": [], "count": 0})
    );
    let body = json!({
        "agent_id": "agent-001", "agent_url": agents.url("agent-001"),
        "capabilities": ["gpu-check"], "metadata": {"region": "eu"},
    });
    let (status, new) = system.call("POST", "/ping-system/agents/register", &body);
    assert_eq!(status, 200);
    for (field, value) in [
        ("capabilities", json!(["gpu-check"])),
        ("metadata", json!({"region": "eu"})),
        ("status", json!("unknown")),
        ("last_ping_at", Value::Null),
        ("last_error", Value::Null),
        ("clock_offset_seconds", Value::Null),
        ("warnings", json!([])),
        ("total_pings", json!(0)),
        ("consecutive_poor_uptime", json!(0)),
        ("ping_interval_minutes", json!(60.0)),
        ("last_uptime_percent", Value::Null),
    ] {
        assert_eq!(new[field], value, "{field}");
    }

    // The first ping comes at once, and asks only whether a GPU is there.
    system.wait_for_pings("agent-001", 1);
    let first = &system.history("agent-001")[0];
    assert_eq!(first["first_ping"], true);
    assert_eq!(first["uptime_percent"], 100.0);
    assert!(!agents.asked("agent-001")[0].contains("since="));

    // Each further one asks for the time since the one that was stored last.
    let second = system.ping("agent-001");
    assert_eq!(
        (
            &second["success"],
            &second["uptime_percent"],
            &second["covers_from"]
        ),
        (&json!(true), &json!(99.5), &first["timestamp"])
    );
    let covered = crate::support::instant(&second["timestamp"])
        - crate::support::instant(&first["timestamp"]);
    assert_eq!(second["window_seconds"], covered.as_seconds_f64());
    assert_eq!(
        (
            &second["first_ping"],
            &second["gpu_available"],
            &second["error"]
        ),
        (&json!(false), &json!(true), &Value::Null)
    );
    assert!(second["response_time_ms"].as_f64().unwrap() > 0.0);
    let since = first["timestamp"].as_str().unwrap().replace(':', "%3A");
    let asked = &agents.asked("agent-001")[1];
    let seconds = covered.as_seconds_f64();
    let expected = format!("?seconds={seconds}&since={since} ");
    assert!(asked.contains(&expected), "{asked}");

    let agent = system.agent("agent-001");
    assert_eq!(agent["last_ping_at"], second["timestamp"]);
    assert_eq!(agent["last_uptime_percent"], 99.5);
    assert_eq!(system.history("agent-001"), [first.clone(), second]);
    assert_eq!(system.ask("/ping-system/agents")["agents"], json!([agent]));
    assert_eq!(system.ask("/ping-system/agents/due-for-ping")["count"], 0);
    let totals = system.ask("/ping-system/dashboard");
    assert_eq!(
        (
            &totals["agents"],
            &totals["total_pings"],
            &totals["unreachable"]
        ),
        (&json!(1), &json!(2), &json!(0))
    );
    assert_eq!(system.ask("/health")["status"], "ok");
    let (_, metrics) = system.ask_with("/metrics", "");
    assert!(metrics.contains(r#"uptime_ping_system_pings_total{result="answered"} 2"#));

    // Registered again, it keeps its history.
    let again = system.register("agent-001", &agents.url("agent-001"));
    assert_eq!(again["total_pings"], 2);
    // What it does not tell stays.
    assert_eq!(again["capabilities"], json!(["gpu-check"]));
    let (status, _) = system.call("DELETE", "/ping-system/agents/agent-001", &Value::Null);
    assert_eq!(status, 200);
    for path in ["", "/history", "/events"] {
        let path = format!("/ping-system/agents/agent-001{path}");
        assert_eq!(system.ask_with(&path, "").0, 404, "{path}");
    }
    for (method, path) in [("POST", "/ping"), ("DELETE", "")] {
        let path = format!("/ping-system/agents/agent-001{path}");
        assert_eq!(system.call(method, &path, &Value::Null).0, 404, "{path}");
    }
}

#[test]
fn agents_and_pings_are_listed_by_pages() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    // More than are read from the database at once.
    let names: Vec<String> = (0..1201).map(|n| format!("agent-{n:04}")).collect();
    for name in &names {
        let body = json!({
            "agent_id": name, "agent_url": agents.url(name), "metadata": {"region": "eu"},
        });
        system.call("POST", "/ping-system/agents/register", &body);
    }
    let ids = |list: &Value| -> Vec<String> {
        let agents = list["agents"].as_array().unwrap().iter();
        let ids = agents.map(|agent| agent["agent_id"].as_str().unwrap().to_owned());
        let ids: Vec<_> = ids.collect();
        assert_eq!(list["count"], ids.len());
        ids
    };
    let all = system.ask("/ping-system/agents");
    assert_eq!(ids(&all), names);
    assert_eq!(all["agents"][0]["metadata"], json!({"region": "eu"}));
    assert_eq!(all["next"], Value::Null);
    let lean = system.ask("/ping-system/agents?metadata=false&after=agent-1000");
    assert_eq!(ids(&lean), names[1001..]);
    assert_eq!(lean["agents"][0].get("metadata"), None);

    let mut paged = Vec::new();
    let mut after = String::new();
    loop {
        // At most a thousand, whatever is asked for.
        let path = format!("/ping-system/agents?limit=5000&after={after}");
        let page = system.ask(&path);
        paged.extend(ids(&page));
        let Some(next) = page["next"].as_str() else {
            break;
        };
        assert_eq!(page["count"], 1000);
        assert_eq!(Some(next), paged.last().map(String::as_str));
        after = next.to_owned();
    }
    assert_eq!(paged, names);

    system.wait_for_pings("agent-0000", 1);
    for _ in 0..4 {
        system.ping("agent-0000");
    }
    let history = "/ping-system/agents/agent-0000/history";
    let pings = system.history("agent-0000");
    let mut paged: Vec<Value> = Vec::new();
    let mut path = format!("{history}?hours=1&limit=2");
    loop {
        let page = system.ask(&path);
        assert_eq!(page["count"], page["pings"].as_array().unwrap().len());
        paged.extend(page["pings"].as_array().unwrap().iter().cloned());
        let Some(next) = page["next"].as_str() else {
            break;
        };
        path = format!("{history}?limit=2&after={next}");
    }
    assert_eq!(paged, pings);

    for (path, expected) in [
        ("/ping-system/agents?limit=0", "limit"),
        ("/ping-system/agents?limit=many", "limit"),
        ("/ping-system/agents?after=%00", "after"),
        ("/ping-system/agents?metadata=perhaps", "metadata"),
        (&format!("{history}?limit=0"), "limit"),
        (&format!("{history}?after=yesterday"), "after"),
    ] {
        let (status, error) = system.ask_with(path, "");
        assert_eq!(status, 400, "{path}");
        assert!(error.contains(expected), "{path}: {error}");
    }
}

#[test]
fn intervals_follow_how_an_agent_behaves() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let options = ["--base-interval", "6s", "--max-interval", "30s"];
    let system = PingSystemProcess::start(folder.path(), &options);
    system.with_agent("a", &agents);
    let after = |uptime: f64| {
        agents.set_uptime("a", uptime);
        let ping = system.ping("a");
        let agent = system.agent("a");
        let gap = crate::support::instant(&agent["next_ping_at"])
            - crate::support::instant(&ping["timestamp"]);
        let minutes = agent["ping_interval_minutes"].as_f64().unwrap();
        let spread = gap.as_seconds_f64() / (minutes * 60.0);
        assert!((0.949..=1.051).contains(&spread), "{spread}");
        let seconds = minutes * 60.0;
        (
            agent["consecutive_poor_uptime"].as_u64().unwrap(),
            seconds.round(),
        )
    };
    assert_eq!(after(98.9), (1, 12.0));
    assert_eq!(after(50.0), (2, 24.0));
    assert_eq!(after(0.0), (3, 30.0));
    assert_eq!(after(0.0), (4, 30.0));
    assert_eq!(after(99.0), (3, 30.0));
    assert_eq!(after(99.0), (2, 24.0));
    assert_eq!(after(100.0), (0, 6.0));
    // It is pinged on schedule, too.
    let pings = system.agent("a")["total_pings"].as_u64().unwrap();
    system.wait_for_pings("a", pings + 1);
}

/// What an agent may do wrong, and what is to be said about it.
fn wrong_answers(elsewhere: &str) -> Vec<(Answer, &'static str)> {
    fn answer(answer: impl Fn(&mut TcpStream) + Send + Sync + 'static) -> Answer {
        Arc::new(move |stream, _| answer(stream))
    }
    let status = |status: u16, headers: String| {
        answer(move |stream| respond(stream, status, &headers, "{}"))
    };
    let mut cases = vec![
        (status(500, String::new()), "status 500"),
        (status(401, String::new()), "--agent-token-file"),
        (
            status(302, format!("location: {elsewhere}\r\n")),
            "redirects are not followed",
        ),
        (
            answer(|stream| respond(stream, 200, "", &"x".repeat(8 << 20))),
            "over 65536 bytes",
        ),
        (
            answer(|stream| {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{");
                let _ = stream.shutdown(Shutdown::Both);
            }),
            "",
        ),
        (answer(|stream| drop(stream.shutdown(Shutdown::Both))), ""),
        (answer(|_| {}), "no whole answer in 0.5s"),
    ];
    for (body, reason) in [
        ("<html>", "not a valid answer"),
        ("", "not a valid answer"),
        (
            r#"{"agent_id":"a","uptime_percent":99.5"#,
            "not a valid answer",
        ),
        (
            r#"{"agent_id":"a","uptime_percent":NaN}"#,
            "not a valid answer",
        ),
        (
            r#"{"agent_id":"a","uptime_percent":1e400}"#,
            "not a valid answer",
        ),
        (
            r#"{"agent_id":"a","uptime_percent":100.5}"#,
            "100.5 is not a percentage",
        ),
        (
            r#"{"agent_id":"a","uptime_percent":-1}"#,
            "-1 is not a percentage",
        ),
        (
            r#"{"agent_id":"a","uptime_percent":99,"window_seconds":-5}"#,
            "window_seconds is -5",
        ),
        (
            r#"{"agent_id":"b","uptime_percent":99}"#,
            "answered as agent 'b'",
        ),
        (
            r#"{"agent_id":"a","gpu_available":true}"#,
            "no uptime_percent",
        ),
    ] {
        cases.push((answer(move |stream| respond(stream, 200, "", body)), reason));
    }
    cases
}

#[test]
fn every_wrong_answer_is_a_failed_ping_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = format!("http://{}/stolen", other.local_addr().unwrap());
    let options = [&SELDOM[..], &["--response-timeout", "500ms"]].concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    system.with_agent("a", &agents);
    let mut poor = 0;
    for (answer, reason) in wrong_answers(&elsewhere) {
        agents.set("a", move |stream, agent_id| answer(stream, agent_id));
        let ping = system.ping("a");
        poor += 1;
        assert_eq!(ping["success"], false, "{reason}");
        assert_eq!(ping["uptime_percent"], Value::Null, "{reason}");
        let said = ping["error"].as_str().unwrap();
        assert!(
            said.contains(reason) && !said.is_empty(),
            "{said}: {reason}"
        );
        let agent = system.agent("a");
        assert_eq!(agent["status"], "unreachable");
        assert_eq!(agent["last_uptime_percent"], Value::Null);
        assert_eq!(agent["consecutive_poor_uptime"], poor);
        assert_eq!(system.history("a").last(), Some(&ping));
    }
    system.register("a", &format!("http://127.0.0.1:{}", free_port()));
    let refused = system.ping("a");
    assert!(
        refused["error"].as_str().unwrap().contains("no connection"),
        "{refused}"
    );
    other.set_nonblocking(true).unwrap();
    assert!(other.accept().is_err(), "a redirect was followed");
}

#[test]
fn a_lost_answer_costs_an_agent_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    let first = system.with_agent("a", &agents);
    let before = system.ping("a");
    agents.set("a", |stream, _| {
        let _ = stream.shutdown(Shutdown::Both);
    });
    for poor in 1..=2 {
        let failed = system.ping("a");
        assert_eq!(failed["success"], false);
        let agent = system.agent("a");
        assert_eq!(agent["consecutive_poor_uptime"], poor);
        assert_eq!(agent["status"], "unreachable");
    }
    agents.set_uptime("a", 100.0);
    let answered = system.ping("a");
    assert_eq!(answered["covers_from"], before["timestamp"]);
    let asked = agents.asked("a").pop().unwrap();
    let since = before["timestamp"].as_str().unwrap().replace(':', "%3A");
    assert!(asked.contains(&format!("&since={since} ")), "{asked}");
    let history = system.history("a");
    for failed in &history[2..4] {
        assert_eq!(failed["superseded"], true, "{failed}");
        assert_eq!(failed["window_seconds"], 0.0, "{failed}");
    }
    assert_eq!(history[4], answered);
    let agent = system.agent("a");
    assert_eq!(agent["consecutive_poor_uptime"], 0);
    assert_eq!(
        agent["ping_interval_minutes"],
        first["ping_interval_minutes"]
    );
    let rows = system.ask("/ping-system/dashboard/agents");
    assert!(
        rows["agents"][0]["uptime_1h"].as_f64().unwrap() >= 99.5,
        "{rows}"
    );
}

#[test]
fn an_agent_whose_clock_is_behind_is_asked_by_its_own_clock() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    system.with_agent("a", &agents);
    // Far behind it refuses; a little behind it has nothing to tell of yet.
    let mut nothing_yet = report("a", 0.0);
    nothing_yet["window_seconds"] = json!(0.0);
    for (status, first) in [(400, "{}".to_owned()), (200, nothing_yet.to_string())] {
        let asked = agents.asked("a").len();
        let answers = AtomicUsize::new(0);
        agents.set("a", move |stream, agent_id| {
            if answers.fetch_add(1, Ordering::Relaxed) == 0 {
                let date = "date: Thu, 01 Jan 2026 12:00:00 GMT\r\n";
                respond(stream, status, date, &first);
            } else {
                respond(stream, 200, "", &report(agent_id, 97.0).to_string());
            }
        });
        assert_eq!(system.ping("a")["uptime_percent"], 97.0);
        // As much time before its own noon.
        let again = &agents.asked("a")[asked + 1];
        assert!(again.contains("&since=2026-01-01T11%3A59%3A"), "{again}");
    }
}

#[test]
fn an_agent_that_hangs_costs_only_its_own_place() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    for hanging in ["hangs-1", "hangs-2"] {
        agents.set(hanging, |_, _| {});
    }
    let mut options = vec!["--base-interval", "1s", "--max-concurrent", "3"];
    options.extend(["--response-timeout", "10m"]);
    let system = PingSystemProcess::start(folder.path(), &options);
    for name in ["hangs-1", "hangs-2", "good-1", "good-2", "good-3"] {
        system.register(name, &agents.url(name));
    }
    for good in ["good-1", "good-2", "good-3"] {
        system.wait_for_pings(good, 4);
    }
    // All that while those two had not even failed once.
    for hanging in ["hangs-1", "hangs-2"] {
        assert_eq!(system.agent(hanging)["total_pings"], 0);
        assert_eq!(agents.asked(hanging).len(), 1);
    }
}

#[test]
fn a_ping_that_is_asked_for_twice_at_once_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    system.with_agent("a", &agents);
    let (release, held) = channel::<()>();
    let held = std::sync::Mutex::new(held);
    agents.set("a", move |stream, agent_id| {
        let _ = held.lock().unwrap().recv();
        respond(stream, 200, "", &report(agent_id, 98.0).to_string());
    });
    let answers = std::thread::scope(|scope| {
        let ask = || system.ping("a");
        let first = scope.spawn(ask);
        wait_until("the question", || {
            (agents.asked("a").len() == 2).then_some(())
        });
        let second = scope.spawn(ask);
        // The second one either waits for the first, or comes after it.
        drop(release);
        [first.join().unwrap(), second.join().unwrap()]
    });
    for answer in &answers {
        assert_eq!(answer["uptime_percent"], 98.0);
    }
    let history = system.history("a");
    assert_eq!(history.len(), agents.asked("a").len());
    assert!(answers.iter().all(|answer| history.contains(answer)));
}

#[test]
fn hostile_requests_get_a_clear_answer() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    system.with_agent("a", &agents);
    let register = |body: String| system.request("POST", "/ping-system/agents/register", "", &body);
    let named = |id: &str| json!({"agent_id": id, "agent_url": "http://127.0.0.1:9"}).to_string();
    for bad in [
        String::new(),
        "{".to_owned(),
        "null".to_owned(),
        "[".repeat(60_000),
        "\0\u{1}".to_owned(),
        named(""),
        named(".."),
        named("two\nlines"),
        named(&"x".repeat(10_000)),
        named("due-for-ping"),
        json!({"agent_id": "b"}).to_string(),
        json!({"agent_id": "b", "agent_url": 5}).to_string(),
        json!({"agent_id": "b", "agent_url": "file:///etc/passwd"}).to_string(),
        json!({"agent_id": "b", "agent_url": "http://user:secret@127.0.0.1"}).to_string(),
        json!({"agent_id": "b", "agent_url": system.url()}).to_string(),
        json!({"agent_id": "b", "agent_url": "http://x", "metadata": {"x": "y".repeat(5000)}})
            .to_string(),
    ] {
        let shown: String = bad.chars().take(60).collect();
        let (status, answer) = register(bad);
        assert_eq!(status, 400, "{shown}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"].is_string(), "{shown}");
        assert!(!answer.to_string().contains("secret"), "{answer}");
    }
    // Names that only look dangerous are names.
    for (id, path) in [
        ("x/../y", "x%2F..%2Fy"),
        (
            "'; DROP TABLE agents; --",
            "%27%3B%20DROP%20TABLE%20agents%3B%20--",
        ),
        ("\"q\"", "%22q%22"),
    ] {
        system.register(id, &agents.url("x"));
        assert_eq!(system.agent(path)["agent_id"], id);
        assert_eq!(
            system
                .call(
                    "DELETE",
                    &format!("/ping-system/agents/{path}"),
                    &Value::Null
                )
                .0,
            200
        );
    }
    for (path, expected) in [
        ("/ping-system/agents/a/history?hours=-1", 400),
        ("/ping-system/agents/a/history?hours=0", 400),
        ("/ping-system/agents/a/history?hours=NaN", 400),
        ("/ping-system/agents/a/history?hours=inf", 400),
        ("/ping-system/agents/a/history?hours=", 400),
        ("/ping-system/agents/a/history?hours=1;DROP", 400),
        ("/ping-system/agents/a/history?hours=1e300", 200),
        ("/ping-system/agents/a/history?hours=0.5", 200),
        ("/ping-system/agents/a/history", 200),
        ("/ping-system/agents/%00/history", 404),
        ("/ping-system/agents/%FF", 400),
        ("/ping-system/agents/nobody", 404),
        ("/ping-system/agents/../../etc/passwd", 404),
        ("/ping-system/agents/register", 405),
        ("/ping-system/dashboard/agents?limit=-1", 400),
        ("/ping-system/dashboard/agents?sort=x%27", 400),
        (
            "/ping-system/dashboard/agents?offset=99999999&limit=99999999",
            200,
        ),
        ("/nothing", 404),
    ] {
        let (status, answer) = system.ask_with(path, "");
        assert_eq!(status, expected, "{path}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(
            answer["error"].is_string(),
            status != 200,
            "{path}: {answer}"
        );
    }
    let long = format!("/ping-system/agents/{}", "x".repeat(10_000));
    assert_eq!(system.ask_with(&long, "").0, 414);
    assert_eq!(system.request("PUT", "/ping-system/agents", "", "").0, 405);
}

#[test]
fn huge_and_slow_bodies_hold_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    system.with_agent("a", &agents);
    // Of 100 MB nothing is read but the announcement.
    let mut huge = TcpStream::connect(&system.address).unwrap();
    huge.write_all(b"POST /ping-system/agents/register HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000000\r\n\r\n{").unwrap();
    let mut start = [0; 12];
    let _ = huge.write_all(&vec![b' '; 200_000]);
    huge.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 413");
    // Slow ones are let wait without holding anybody up.
    let slow: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut slow = TcpStream::connect(&system.address).unwrap();
            slow.write_all(b"POST /ping-system/agents/register HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{").unwrap();
            slow
        })
        .collect();
    assert_eq!(system.history("a").len(), 1);
    assert_eq!(system.ask("/ping-system/agents")["count"], 1);
    drop(slow);
}

#[test]
fn tokens_tell_who_may_read_and_who_may_write() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    for (file, token) in [("w", "wr1te"), ("r", "re4d"), ("a", "ag3nt")] {
        std::fs::write(folder.path().join(file), token).unwrap();
    }
    let options = [
        &SELDOM[..],
        &[
            "--token-file",
            "w",
            "--read-token-file",
            "r",
            "--agent-token-file",
            "a",
        ],
    ]
    .concat();
    let system = PingSystemProcess::start(folder.path(), &options);
    let [nobody, wrong, reader, writer] = [
        "",
        "authorization: Bearer guessed\r\n",
        "authorization: Bearer re4d\r\n",
        "authorization: Bearer wr1te\r\n",
    ];
    let body = json!({"agent_id": "a", "agent_url": agents.url("a")}).to_string();
    for (method, path, may) in [
        ("POST", "/ping-system/agents/register", [401, 401, 401, 200]),
        ("POST", "/ping-system/agents/a/ping", [401, 401, 401, 200]),
        ("GET", "/ping-system/agents", [401, 401, 200, 200]),
        (
            "GET",
            "/ping-system/agents/due-for-ping",
            [401, 401, 200, 200],
        ),
        ("GET", "/ping-system/agents/a", [401, 401, 200, 200]),
        ("GET", "/ping-system/agents/a/history", [401, 401, 200, 200]),
        ("GET", "/ping-system/dashboard", [401, 401, 200, 200]),
        ("GET", "/ping-system/dashboard/agents", [401, 401, 200, 200]),
        ("GET", "/metrics", [401, 401, 200, 200]),
        ("GET", "/health", [200, 200, 200, 200]),
        ("GET", "/", [200, 200, 200, 200]),
        ("DELETE", "/ping-system/agents/a", [401, 401, 401, 200]),
    ] {
        for (headers, expected) in [nobody, wrong, reader, writer].into_iter().zip(may) {
            let (status, answer) = system.request(method, path, headers, &body);
            assert_eq!(status, expected, "{method} {path} {headers}: {answer}");
        }
    }
    for path in ["/ping-system/events", "/ping-system/agents/a/events"] {
        assert_eq!(system.ask_with(path, "").0, 401, "{path}");
    }
    assert!(
        agents.asked("a")[0]
            .to_lowercase()
            .contains("authorization: bearer ag3nt\r\n")
    );
    for secret in ["wr1te", "re4d", "ag3nt"] {
        assert!(!system.log().contains(secret));
    }
}

#[test]
fn agents_are_only_called_where_they_may_be() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let options = [
        &SELDOM[..],
        &[
            "--allow-agents",
            "10.0.0.0/8",
            "--allow-agents",
            "192.0.2.7",
        ],
    ];
    let system = PingSystemProcess::start(folder.path(), &options.concat());
    let body = json!({"agent_id": "a", "agent_url": agents.url("a")});
    let (status, refused) = system.call("POST", "/ping-system/agents/register", &body);
    assert_eq!(status, 400);
    assert!(
        refused["error"]
            .as_str()
            .unwrap()
            .contains("--allow-agents"),
        "{refused}"
    );
    // A name tells only when it is looked up where it leads to.
    let by_name = agents.url("a").replace("127.0.0.1", "localhost");
    system.register("a", &by_name);
    let ping = system.ping("a");
    assert!(
        ping["error"].as_str().unwrap().contains("--allow-agents"),
        "{ping}"
    );
    assert!(agents.asked("a").is_empty());
}

#[test]
fn variables_of_existing_deployments_are_understood() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut command = binary();
    command.arg("ping-system").current_dir(folder.path()).envs([
        ("PING_LISTEN", "127.0.0.1:0"),
        ("PING_DATABASE", "sqlite:by-variable.db"),
        ("PING_BASE_INTERVAL_MINUTES", "0.5"),
        ("PING_UPTIME_THRESHOLD", "95"),
        ("PING_ESCALATION_MULTIPLIER", "3.0"),
        ("PING_MAX_INTERVAL_HOURS", "0.05"),
        ("PING_RECOVERY_THRESHOLD_PINGS", "2"),
        ("PING_FIRST_PING_GRACE_PERIOD", "False"),
        ("PING_RESPONSE_TIMEOUT_SECONDS", "2.5"),
        ("PING_MAX_CONCURRENT_AGENTS", "7"),
        ("PING_RETENTION", "2d"),
        ("PING_TOKEN", "t0ken"),
        ("PING_ALLOW_AGENTS", "10.0.0.0/8,127.0.0.0/8"),
    ]);
    let system = crate::support::served::Served::spawn(command);
    assert!(folder.path().join("by-variable.db").exists());
    let token = "authorization: Bearer t0ken\r\n";
    agents.set_uptime("a", 95.0);
    let body = json!({"agent_id": "a", "agent_url": agents.url("a")}).to_string();
    let call = |path: &str, body: &str| system.request("POST", path, token, body).0;
    assert_eq!(call("/ping-system/agents/register", &body), 200);
    let minutes = |uptime: f64| {
        agents.set_uptime("a", uptime);
        assert_eq!(call("/ping-system/agents/a/ping", ""), 200);
        system.ask("/ping-system/agents/a")["ping_interval_minutes"]
            .as_f64()
            .unwrap()
    };
    // Without grace the very first one counts.
    assert!((minutes(95.0) - 0.5).abs() < 1e-9);
    let poor = minutes(94.9);
    assert!((poor - 1.5).abs() < 1e-9, "{poor}");
    let poorest = minutes(94.9);
    assert!((poorest - 3.0).abs() < 1e-9, "{poorest}");
    minutes(95.0);
    assert!((minutes(95.0) - 0.5).abs() < 1e-9);
    let history = system.ask("/ping-system/agents/a/history?hours=1000");
    assert_eq!(history["hours"], 48);
}

#[test]
fn bad_input_ends_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let ends = |arguments: &[&str], variable: Option<(&str, &str)>| {
        let mut command = binary();
        command
            .arg("ping-system")
            .args(arguments)
            .envs(variable)
            .current_dir(folder.path());
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    };
    for (name, value) in [
        ("PING_BASE_INTERVAL_MINUTES", "0"),
        ("PING_BASE_INTERVAL_MINUTES", "soon"),
        ("PING_UPTIME_THRESHOLD", "101"),
        ("PING_ESCALATION_MULTIPLIER", "0.5"),
        ("PING_MAX_INTERVAL_HOURS", "-1"),
        ("PING_MAX_INTERVAL_HOURS", "0.01"),
        ("PING_RECOVERY_THRESHOLD_PINGS", "0"),
        ("PING_FIRST_PING_GRACE_PERIOD", "perhaps"),
        ("PING_RESPONSE_TIMEOUT_SECONDS", "nan"),
        ("PING_MAX_CONCURRENT_AGENTS", "0"),
        ("PING_RETENTION", "for ever"),
        ("PING_DATABASE", "mysql://user:pa55@host/db"),
        ("PING_ALLOW_AGENTS", "10.0.0.0/33"),
        ("PING_TOKEN", "two words"),
        ("PING_TOKEN", ""),
        ("PING_READ_TOKEN", ""),
        ("PING_READ_TOKEN", " "),
        ("PING_AGENT_TOKEN", ""),
        // Whoever may register an agent is shown it.
        ("PING_AGENT_TOKEN", "secret"),
        ("PING_LISTEN", "nowhere"),
    ] {
        let (code, said) = ends(&[], Some((name, value)));
        assert_eq!(code, Some(2), "{name}={value}: {said}");
        let flag = match name {
            "PING_FIRST_PING_GRACE_PERIOD" => "--first-ping-grace",
            "PING_DATABASE" => "--database",
            "PING_UPTIME_THRESHOLD" => "--uptime-threshold",
            "PING_ESCALATION_MULTIPLIER" => "--escalation-multiplier",
            "PING_RECOVERY_THRESHOLD_PINGS" => "--recovery-threshold",
            "PING_MAX_CONCURRENT_AGENTS" => "--max-concurrent",
            "PING_RETENTION" => "--retention",
            "PING_ALLOW_AGENTS" => "--allow-agents",
            "PING_LISTEN" => "--listen",
            variable => variable,
        };
        assert!(said.contains(flag) && said.contains("expected"), "{said}");
        assert!(!said.contains("pa55"), "{said}");
    }
    let (code, said) = ends(&["--listen", "0.0.0.0:0"], None);
    assert_eq!(code, Some(2));
    assert!(
        said.contains("PING_TOKEN") && said.contains("--allow-unauthenticated"),
        "{said}"
    );
    // Reading would be open to everybody.
    let (code, said) = ends(&["--listen", "0.0.0.0:0"], Some(("PING_TOKEN", "secret")));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("PING_READ_TOKEN"), "{said}");
    let database = "sqlite:no/such/folder/x.db";
    let (code, said) = ends(&["--listen", "127.0.0.1:0", "--database", database], None);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("--database"), "{said}");
}

/// A stream of server-sent events.
struct Events(std::io::BufReader<TcpStream>);

impl Events {
    fn of(system: &PingSystemProcess, path: &str) -> Self {
        let mut stream = TcpStream::connect(&system.address).unwrap();
        stream
            .set_read_timeout(Some(crate::support::PATIENCE))
            .unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut events = Self(std::io::BufReader::new(stream));
        assert!(events.line().unwrap().starts_with("HTTP/1.1 200"));
        events
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = std::io::BufRead::read_line(&mut self.0, &mut line).unwrap();
        (read > 0).then_some(line)
    }

    /// The next ping, or `None` when the stream ends.
    fn next(&mut self) -> Option<Value> {
        loop {
            let line = self.line()?;
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(serde_json::from_str(data).unwrap());
            }
            // The last piece of a stream.
            if line == "0\r\n" {
                return None;
            }
        }
    }
}

#[test]
fn new_pings_are_told_to_those_who_listen() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    for name in ["a", "b"] {
        system.with_agent(name, &agents);
    }
    let mut of_a = Events::of(&system, "/ping-system/agents/a/events");
    let mut of_all = Events::of(&system, "/ping-system/events");
    agents.set_uptime("a", 42.0);
    let [b, a] = ["b", "a"].map(|name| system.ping(name));
    let told = of_a.next().unwrap();
    assert_eq!(told["ping"], a);
    assert_eq!(told["agent_id"], "a");
    let agent = system.agent("a");
    for field in [
        "status",
        "next_ping_at",
        "total_pings",
        "consecutive_poor_uptime",
        "ping_interval_minutes",
    ] {
        assert_eq!(told[field], agent[field], "{field}");
    }
    assert_eq!(of_all.next().unwrap()["ping"], b);
    assert_eq!(of_all.next().unwrap(), told);
    // Whoever listens to an agent that is removed is told so by the end of the stream.
    system.call("DELETE", "/ping-system/agents/a", &Value::Null);
    assert_eq!(of_a.next(), None);
}

#[test]
fn a_gentle_end_stores_what_is_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut system = PingSystemProcess::start(folder.path(), &SELDOM);
    let (release, held) = channel::<()>();
    let held = std::sync::Mutex::new(held);
    agents.set("a", move |stream, agent_id| {
        let _ = held.lock().unwrap().recv();
        respond(stream, 200, "", &report(agent_id, 98.0).to_string());
    });
    system.register("a", &agents.url("a"));
    wait_until("the question", || {
        (!agents.asked("a").is_empty()).then_some(())
    });
    system.signal(Signal::TERM);
    drop(release);
    assert_eq!(
        system.child.wait().unwrap().code(),
        Some(0),
        "{}",
        system.log()
    );
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    assert_eq!(system.history("a").len(), 1);
}

#[test]
fn an_agent_that_hangs_does_not_delay_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let mut system = PingSystemProcess::start(folder.path(), &SELDOM);
    let (_release, held) = channel::<()>();
    let held = std::sync::Mutex::new(held);
    agents.set("a", move |_, _| {
        let _ = held.lock().unwrap().recv();
    });
    system.register("a", &agents.url("a"));
    wait_until("the question", || {
        (!agents.asked("a").is_empty()).then_some(())
    });
    let begin = std::time::Instant::now();
    system.signal(Signal::TERM);
    assert!(system.child.wait().unwrap().success(), "{}", system.log());
    let took = begin.elapsed();
    assert!(took < std::time::Duration::from_secs(2), "{took:?}");
    assert!(system.log().contains("given up"), "{}", system.log());
}

#[test]
fn simulated_gpus_and_those_that_two_agents_report_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    let reporting = |name: &str, source: &'static str, uuids: &'static [&'static str]| {
        agents.set(name, move |stream, agent_id| {
            let mut report = report(agent_id, 100.0);
            report["source"] = json!(source);
            report["gpu_uuids"] = json!(uuids);
            report["agent_version"] = json!("0.2.0");
            respond(stream, 200, "", &report.to_string());
        });
        system.register(name, &agents.url(name));
        system.wait_for_pings(name, 1)
    };
    let simulated = reporting("simulated", "simulated", &["GPU-0"]);
    assert_eq!(simulated["status"], "unreachable");
    let error = simulated["last_error"].as_str().unwrap();
    assert!(error.contains("--allow-simulated"), "{error}");
    let first = reporting("first", "nvml", &["GPU-1", "GPU-2"]);
    assert_eq!(first["gpu_uuids"], json!(["GPU-1", "GPU-2"]));
    assert_eq!(
        (&first["source"], &first["agent_version"]),
        (&json!("nvml"), &json!("0.2.0"))
    );
    assert_eq!(first["warnings"], json!([]));
    let second = reporting("second", "nvml", &["GPU-2"]);
    let warning = second["warnings"][0].as_str().unwrap();
    assert_eq!(warning, "its GPU GPU-2 is reported by agent first, too");
    system.ping("first");
    assert_eq!(
        system.agent("first")["warnings"].as_array().unwrap().len(),
        1
    );
    assert!(system.log().contains(warning), "{}", system.log());
}

#[test]
fn who_comes_back_has_the_past_unless_it_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &SELDOM);
    system.with_agent("a", &agents);
    agents.set_uptime("a", 12.0);
    system.ping("a");
    let remove = |path: &str| {
        let (status, _) = system.call("DELETE", path, &Value::Null);
        status
    };
    assert_eq!(remove("/ping-system/agents/a"), 200);
    assert_eq!(remove("/ping-system/agents/a"), 404);
    let again = system.register("a", &agents.url("a"));
    assert_eq!(
        (&again["total_pings"], &again["consecutive_poor_uptime"]),
        (&json!(2), &json!(1))
    );
    assert!(system.history("a").len() >= 2);
    assert_eq!(remove("/ping-system/agents/a?forget=true"), 200);
    let new = system.register("a", &agents.url("a"));
    assert_eq!(new["total_pings"], 0);
    assert_eq!(new["status"], "unknown");
}
