//! What `check` finds, and that nothing of it reaches an orchestrator.

use crate::support::recorded::Recorded;
use crate::support::{PingSystem, RawServer, binary, free_port, respond};
use serde_json::Value;

/// The lines of a check of this gateway, and the exit status.
fn check(gateway: &str, arguments: &[&str]) -> (String, Option<i32>) {
    let pings = PingSystem::start(99.5);
    let mut command = binary();
    command.args(["check", "--agent", "agent-001", "--ping-url", &pings.url()]);
    command.args(["--gateway-url", gateway]).args(arguments);
    let output = command.output().unwrap();
    (
        String::from_utf8(output.stdout).unwrap(),
        output.status.code(),
    )
}

/// A server that gives a recorded answer.
fn recorded(name: &str) -> RawServer {
    let recorded = Recorded::read(&format!("gateway/{name}.json"));
    RawServer::start(move |stream, _| {
        let headers = recorded.headers.iter();
        let headers = headers.filter(|(name, _)| *name != "Content-Length");
        let headers: Vec<String> = headers.map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        respond(stream, recorded.status, &headers.concat(), &recorded.body);
    })
}

#[test]
fn who_answers_in_the_gateways_place_is_told_with_the_remedy() {
    for (answer, works, told) in [
        (
            "no-livepeer-header",
            true,
            "a gateway answers (no job was sent)",
        ),
        (
            "orchestrator-in-place-of-gateway",
            false,
            "an orchestrator answers, not a gateway",
        ),
        ("wrong-path-at-the-node", false, "-httpAddr"),
        ("proxy-401", false, "a token is asked for"),
        (
            "proxy-502",
            false,
            "a proxy answers, but the gateway behind it does not",
        ),
        ("proxy-522", false, "Start the gateway"),
        ("proxy-404", false, "--gateway-prefix"),
        ("proxy-404-with-security-headers", false, "--gateway-prefix"),
        ("success", false, "something else answers"),
    ] {
        let server = recorded(answer);
        let (said, code) = check(&server.url(), &[]);
        assert!(said.contains(told), "{answer}: {said}");
        assert_eq!(code, Some(i32::from(!works)), "{answer}: {said}");
        for (head, _) in server.requests.lock().unwrap().iter() {
            assert!(head.starts_with("POST "), "{head}");
            assert!(
                !head.to_ascii_lowercase().contains("\r\nlivepeer:"),
                "{head}"
            );
        }
    }
}

#[test]
fn a_wrong_prefix_is_told_with_the_right_one() {
    let server = RawServer::start(|stream, head| {
        let name = if head.starts_with("POST /process/request/") {
            "no-livepeer-header"
        } else {
            "wrong-path-at-the-node"
        };
        let recorded = Recorded::read(&format!("gateway/{name}.json"));
        respond(stream, recorded.status, "", &recorded.body);
    });
    let (said, code) = check(&server.url(), &[]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("With --gateway-prefix '' a gateway answers"),
        "{said}"
    );
    let (said, code) = check(&server.url(), &["--gateway-prefix", ""]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn tls_on_a_clear_port_and_nobody_are_told_apart() {
    let clear = recorded("no-livepeer-header");
    let (said, code) = check(&clear.url().replace("http:", "https:"), &[]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("it speaks clear text. Name it by http://"),
        "{said}"
    );
    let (said, code) = check(&format!("http://127.0.0.1:{}", free_port()), &[]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("Connection refused") && said.contains("Start it"),
        "{said}"
    );
}

#[test]
fn a_check_as_json_is_one_object() {
    let server = recorded("proxy-502");
    let (said, code) = check(&server.url(), &["--output", "json"]);
    assert_eq!(code, Some(1));
    let [line] = said.lines().collect::<Vec<_>>()[..] else {
        panic!("{said}")
    };
    let check: Value = serde_json::from_str(line).unwrap();
    assert_eq!(
        (&check["event"], &check["ok"]),
        (&"check".into(), &false.into())
    );
    let findings = check["findings"].as_array().unwrap();
    let of = |status: &str| findings.iter().filter(|f| f["status"] == status).count();
    assert_eq!((of("fails"), of("works") > 1), (1, true), "{findings:?}");
}

#[test]
fn orchestrators_are_connected_to_and_sent_nothing() {
    let gateway = recorded("no-livepeer-header");
    let orchestrator = RawServer::start(|stream, _| respond(stream, 200, "", ""));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    let config = format!(
        "[[agents]]\nid = 'agent-001'\norchestrators = ['{}', 'http://127.0.0.1:{}']\n",
        orchestrator.url(),
        free_port()
    );
    std::fs::write(&file, config).unwrap();
    let pings = PingSystem::start(99.5);
    let mut command = binary();
    command.args([
        "check",
        "--ping-url",
        &pings.url(),
        "--gateway-url",
        &gateway.url(),
    ]);
    let output = command.arg("--config").arg(&file).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.contains("accepts connections (nothing was sent)"),
        "{said}"
    );
    assert!(said.contains("➖ agent-001's orchestrator"), "{said}");
    assert!(orchestrator.requests.lock().unwrap().is_empty());
}

/// The lines of a check of an agent whose orchestrator lists this, and the exit status.
fn check_runner(list: &str, more: &str) -> (String, Option<i32>) {
    let list = list.to_owned();
    let server = RawServer::start(move |stream, _| respond(stream, 200, "", &list));
    let pings = PingSystem::start(99.5);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    let runner = format!("runner = '{}/apps/agent-001/app'", server.url());
    std::fs::write(
        &file,
        format!("[[agents]]\nid = 'agent-001'\n{runner}\n{more}"),
    )
    .unwrap();
    let mut command = binary();
    command.args(["check", "--ping-url", &pings.url(), "--config"]);
    let output = command.arg(&file).output().unwrap();
    // Nothing but the list is asked for.
    for (head, _) in server.requests.lock().unwrap().iter() {
        assert!(head.starts_with("GET /discovery HTTP/1.1\r\n"), "{head}");
    }
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!said.contains("gateway"), "{said}");
    (said, output.status.code())
}

#[test]
fn a_live_runner_is_looked_up_in_its_orchestrators_list() {
    let recorded = Recorded::read("live-runner/discovery.json").body;
    let with = |from: &str, to: &str| {
        assert!(recorded.contains(from));
        recorded.replace(from, to)
    };
    for (list, more, told, code) in [
        (
            recorded.clone(),
            "price = 33333333333",
            "listed, 1 of 2 places in use, 33333333333 wei per job; where its",
            0,
        ),
        (
            recorded.clone(),
            "price = 7",
            "33333333333 wei per job (--price or the file says 7)",
            0,
        ),
        (
            with("agent-001/app", "agent-003/app"),
            "",
            "not listed, https://orch-a.example:8935/apps/agent-003/app, https",
            1,
        ),
        (
            with("single-shot", "persistent"),
            "",
            "takes no single jobs",
            1,
        ),
        (
            with("\"fixed\"", "\"seconds\""),
            "",
            "costs 33333333333 wei per second",
            1,
        ),
        ("[]".to_owned(), "", "not listed, no runner is. Is its", 1),
        (
            "{}".to_owned(),
            "",
            "Is it an orchestrator with live runners",
            1,
        ),
    ] {
        let (said, status) = check_runner(&list, more);
        assert!(said.contains(told), "{told}: {said}");
        assert_eq!(status, Some(code), "{said}");
    }
}
