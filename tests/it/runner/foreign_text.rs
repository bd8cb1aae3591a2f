//! What hostile servers say reaches no terminal, log, JSON or record as they would like it.

use std::path::Path;
use std::process::Output;

use crate::support::records::rows;
use crate::support::{OWN, PingSystem, RawServer, binary, respond};
use serde_json::json;

/// A colour, a cleared screen, a NUL, other lines, marks of direction and of zero width, a C1 control.
const EVIL: &str = "\u{1b}[31mred\u{1b}[2J \0 a\r\nforged line\u{2028}x \u{202e}desrever\u{2066} \u{200b}\u{9b}31m";

/// Whether a byte stream could do more than show text on lines that we wrote.
fn assert_safe(name: &str, bytes: &[u8]) {
    let text = String::from_utf8(bytes.to_vec()).unwrap_or_else(|_| panic!("{name}: no UTF-8"));
    let bad = |c: char| {
        c.is_control() && c != '\n'
            || "\u{2028}\u{2029}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}\u{200b}\u{200e}\u{200f}\u{feff}".contains(c)
    };
    assert!(!text.contains(bad), "{name}: {}", text.escape_debug());
    let forged = text.lines().find(|line| line.starts_with("forged"));
    assert_eq!(forged, None, "{name}");
}

fn assert_output_safe(name: &str, output: &Output) {
    assert_safe(name, &output.stdout);
    assert_safe(name, &output.stderr);
}

#[test]
fn a_gateways_text_is_shown_with_its_marks_escaped() {
    let pings = PingSystem::start(99.5);
    let folder = tempfile::tempdir().unwrap();
    let answers: [(u16, &str, String); 4] = [
        (400, OWN, EVIL.to_owned()),
        (502, "", EVIL.to_owned()),
        (
            200,
            "content-type: text/event-stream\r\n",
            format!("data: {}\n\ndata: [DONE]\n", json!({ "error": EVIL })),
        ),
        (500, OWN, EVIL.repeat(10_000)),
    ];
    for (n, (status, headers, body)) in answers.into_iter().enumerate() {
        let gateway = RawServer::start(move |stream, _| respond(stream, status, headers, &body));
        let record = folder.path().join(format!("{n}.db"));
        for format in ["text", "json"] {
            let mut command = binary();
            command.args([
                "--agent",
                "agent-001",
                "--ping-url",
                &pings.url(),
                "--rate",
                "6000",
            ]);
            command.args([
                "--gateway-url",
                &gateway.url(),
                "--max-jobs",
                "2",
                "--output",
                format,
            ]);
            let output = command.arg("--record").arg(&record).output().unwrap();
            assert_output_safe(&format!("{status} as {format}"), &output);
        }
        for row in rows(&record, "SELECT error FROM jobs") {
            let error = row[0].as_str().unwrap();
            assert!(error.contains("red"), "{error}");
            assert!(error.chars().count() <= 200, "{error}");
            assert_safe("record", error.as_bytes());
        }
    }
}

/// All agents of a ping system that lists this.
fn run_with(list: &str, arguments: &[&str]) -> Output {
    let list = list.to_owned();
    let server = RawServer::start(move |stream, _| respond(stream, 200, "", &list));
    let mut command = binary();
    command.args(arguments);
    command.args([
        "--ping-url",
        &server.url(),
        "--gateway-url",
        "http://127.0.0.1:9",
    ]);
    command.output().unwrap()
}

#[test]
fn what_a_ping_system_lists_cannot_forge_lines() {
    let agent = |id: &str, url: &str| json!({ "agent_id": id, "agent_url": url, "status": EVIL, "metadata": { EVIL: EVIL } });
    let long = format!("http://{}/", "x".repeat(1 << 20));
    for list in [
        json!({ "agents": [agent(EVIL, "http://x"), agent("a\0b", "http://x")], "count": 2 }),
        json!({ "agents": [agent("agent-001", EVIL), agent("agent-002", &long)], "count": 2 }),
        json!({ "agents": [{ "agent_id": "agent-001", EVIL: EVIL, "total_pings": EVIL }] }),
        json!({ EVIL: EVIL }),
        json!({ "error": EVIL }),
        json!(EVIL),
    ] {
        let list = list.to_string();
        for arguments in [
            &["check", "--all-agents"][..],
            &["check", "--all-agents", "--output", "json"],
            &["check", "--agent", "agent-009"],
            &["--all-agents", "--duration", "300ms"],
            &["--all-agents", "--duration", "300ms", "--output", "json"],
        ] {
            let output = run_with(&list, arguments);
            assert_output_safe(&format!("{arguments:?} {list:.60?}"), &output);
            let told = output.stdout.len() + output.stderr.len();
            assert!(told < 20_000, "{told} bytes: {arguments:?}");
        }
    }
}

#[test]
fn an_orchestrators_list_cannot_forge_lines() {
    let list = json!([{ "runners": [{
        "url": format!("https://x/apps/{EVIL}/app"), "mode": EVIL, "capacity": EVIL,
        "price_info": { "price": 7, "currency": EVIL, "unit": EVIL },
    }, {
        "url": "https://x/apps/agent-001/app", "mode": EVIL, "capacity": 1, "capacity_used": 0,
        "price_info": { "price": 7, "currency": EVIL, "unit": EVIL },
    }] }]);
    let list = list.to_string();
    let orchestrator = RawServer::start(move |stream, _| respond(stream, 200, "", &list));
    let pings = PingSystem::start(99.5);
    let folder = tempfile::tempdir().unwrap();
    let check = |agent: &str, first: &[&str]| {
        let file = folder.path().join("runner.toml");
        let runner = format!("{}/apps/{agent}/app", orchestrator.url());
        std::fs::write(
            &file,
            format!("[[agents]]\nid = 'agent-001'\nrunner = '{runner}'\n"),
        )
        .unwrap();
        let mut command = binary();
        command.args(first).args(["--ping-url", &pings.url()]);
        command
            .arg("--config")
            .arg(Path::new(&file))
            .output()
            .unwrap()
    };
    for (agent, arguments) in [
        ("agent-001", &["check"][..]),
        ("agent-002", &["check"]),
        ("agent-001", &["--max-jobs", "2", "--rate", "600"]),
        (
            "agent-001",
            &["--max-jobs", "2", "--rate", "600", "--output", "json"],
        ),
    ] {
        assert_output_safe(&format!("{arguments:?}"), &check(agent, arguments));
    }
}
