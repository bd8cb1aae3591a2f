//! Our servers among hostile clients: pages in somebody's browser, and connections that do nothing good.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::ping_system::PingSystemProcess;
use crate::support::served::Served;
use crate::support::{PATIENCE, binary, good_gateway, wait_until};
use serde_json::json;

/// A server of each kind, and a path of it that answers without a token.
fn servers(folder: &Path) -> Vec<(Served, &'static str)> {
    let spawn = |arguments: &[&str]| {
        let mut command = binary();
        command.args(arguments).current_dir(folder);
        Served::spawn(command)
    };
    vec![
        (
            spawn(&["ping-system", "--listen", "127.0.0.1:0"]),
            "/ping-system/agents",
        ),
        (
            spawn(&[
                "agent",
                "--agent-id",
                "a",
                "--listen",
                "127.0.0.1:0",
                "--gpu",
                "simulated:up 1h",
            ]),
            "/agent/uptime-since-last-ping",
        ),
    ]
}

/// The status of a request with these headers, `Host` included.
fn status(address: &str, method: &str, path: &str, headers: &str, body: &str) -> u16 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_name_that_leads_here_by_accident_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (server, path) in servers(folder.path()) {
        for (host, expected) in [
            ("host: localhost\r\n", 200),
            ("host: 127.0.0.1:8000\r\n", 200),
            ("host: rebound.evil.example:8000\r\n", 403),
            ("host: localhost.evil.example\r\n", 403),
        ] {
            let got = status(&server.address, "GET", path, host, "");
            assert_eq!(got, expected, "{path} {host}");
        }
    }
    // Where a proxy passes another name on.
    let options = ["--allowed-hosts", "ping.example"];
    let system = PingSystemProcess::start(folder.path(), &options);
    for (host, expected) in [("ping.example", 200), ("other.example", 403)] {
        let host = format!("host: {host}\r\n");
        let got = status(&system.address, "GET", "/health", &host, "");
        assert_eq!(got, expected, "{host}");
    }
}

#[test]
fn no_page_of_another_origin_can_write() {
    let folder = tempfile::tempdir().unwrap();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    let body = json!({ "agent_id": "a", "agent_url": "http://127.0.0.1:9" }).to_string();
    let register = |headers: &str| {
        let headers = format!("host: localhost\r\n{headers}");
        let path = "/ping-system/agents/register";
        status(&system.address, "POST", path, &headers, &body)
    };
    let json = "content-type: application/json\r\n";
    let simple = "content-type: text/plain\r\n";
    for (headers, expected) in [
        // A page may send these without being asked first.
        (format!("origin: https://evil.example\r\n{simple}"), 403),
        (format!("origin: null\r\n{simple}"), 403),
        (format!("sec-fetch-site: cross-site\r\n{simple}"), 403),
        (format!("sec-fetch-site: same-site\r\n{json}"), 403),
        (format!("origin: http://localhost:1\r\n{json}"), 403),
        (format!("origin: http://localhost\r\n{simple}"), 415),
        (format!("sec-fetch-site: same-origin\r\n{simple}"), 415),
        ("sec-fetch-site: none\r\n".to_owned(), 415),
    ] {
        assert_eq!(register(&headers), expected, "{headers}");
    }
    assert_eq!(system.ask("/ping-system/agents")["count"], 0);
    for headers in [
        String::new(),
        simple.to_owned(),
        format!("origin: http://localhost\r\nsec-fetch-site: same-origin\r\n{json}"),
    ] {
        assert_eq!(register(&headers), 200, "{headers}");
    }
    let evil = "host: localhost\r\norigin: https://evil.example\r\n";
    for (method, path) in [
        ("DELETE", "/ping-system/agents/a"),
        ("POST", "/ping-system/agents/a/ping"),
    ] {
        assert_eq!(
            status(&system.address, method, path, evil, ""),
            403,
            "{path}"
        );
    }
    assert_eq!(system.ask("/ping-system/agents")["count"], 1);
    // The agent's windows are begun by a GET.
    drop(system);
    let (agent, path) = servers(folder.path()).remove(1);
    let from_page = "host: localhost\r\nsec-fetch-site: cross-site\r\n";
    assert_eq!(status(&agent.address, "GET", path, from_page, ""), 403);
    let report = agent.ask(path);
    assert_eq!(report["first_ping"], true, "{report}");
}

#[test]
fn the_dashboard_runs_its_own_script_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let system = PingSystemProcess::start(folder.path(), &[]);
    let mut stream = TcpStream::connect(&system.address).unwrap();
    write!(
        stream,
        "GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("script-src 'sha256-"), "{head}");
    assert!(
        head.contains("frame-ancestors 'none'") && !head.contains("unsafe"),
        "{head}"
    );
    for handler in [
        " onclick=",
        " onload=",
        " onerror=",
        "javascript:",
        " style=",
    ] {
        assert!(!body.contains(handler), "{handler}");
    }
}

/// What a hostile connection does.
fn hostile(address: &str, kind: usize, path: &str) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    let _ = match kind % 4 {
        // It asks again and again, and reads nothing.
        0 => {
            stream.set_nonblocking(true).ok()?;
            let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
            stream.write(request.repeat(500).as_bytes()).map(|_| ())
        }
        1 => stream.write_all(b"GET / HTTP/1.1\r\nHost: local"),
        2 => Ok(()),
        _ => stream.write_all(b"POST /ping-system/agents/register HTTP/1.1\r\nhost: localhost\r\ncontent-length: 60000\r\n\r\n{"),
    };
    Some(stream)
}

fn resident_megabytes(process: &Served) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}

/// The metrics of a runner are served as the others are.
fn runner(folder: &Path) -> Served {
    let mut command = binary();
    command.args(["--agent", "a", "--ping-url", "http://127.0.0.1:9"]);
    command.args([
        "--gateway-url",
        "http://127.0.0.1:9",
        "--metrics-listen",
        "127.0.0.1:0",
    ]);
    command.current_dir(folder);
    command.stdout(std::process::Stdio::null());
    Served::spawn_saying(command, "metrics at http://", "/metrics")
}

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
fn two_thousand_hostile_connections_shut_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = servers(folder.path());
    for n in 0..200 {
        let body = json!({
            "agent_id": format!("agent-{n}"), "agent_url": "http://127.0.0.1:9", "metadata": { "x": "y".repeat(3000) },
        });
        let (server, _) = &all[0];
        let body = body.to_string();
        let (status, _) = server.request("POST", "/ping-system/agents/register", "", &body);
        assert_eq!(status, 200);
    }
    all.push((runner(folder.path()), "/metrics"));
    for (server, path) in &all {
        let address = server.address.as_str();
        let connections: Vec<_> = (0..2000)
            .filter_map(|n| hostile(address, n, path))
            .collect();
        assert_eq!(connections.len(), 2000);
        for _ in 0..3 {
            let begun = Instant::now();
            let (status, _) = server.request("GET", path, "", "");
            assert_eq!(status, 200, "{path}");
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(2), "{path}: {took:?}");
        }
        let resident = resident_megabytes(server);
        assert!(resident < 200, "{path}: {resident} MB");
        drop(connections);
    }
}

fn new_certificate(folder: &Path, name: &str) -> String {
    let names = ["localhost", "127.0.0.1"].map(str::to_owned);
    let own = rcgen::generate_simple_self_signed(names).unwrap();
    let write = |extension: &str, text: &str| {
        let new = folder.join(format!("{name}.new"));
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, folder.join(format!("{name}.{extension}"))).unwrap();
    };
    write("key", &own.signing_key.serialize_pem());
    write("pem", &own.cert.pem());
    own.cert.pem()
}

/// A deployment of our own parts, each of which speaks TLS with a certificate that only its peers are told of.
#[test]
fn all_parts_speak_tls_to_each_other() {
    let folder = tempfile::tempdir().unwrap();
    new_certificate(folder.path(), "own");
    let start = |arguments: &[&str]| {
        let mut command = binary();
        command.args(arguments);
        command.args(["--listen", "127.0.0.1:0", "--ca-file", "own.pem"]);
        command.args(["--tls-cert", "own.pem", "--tls-key", "own.key"]);
        command.current_dir(folder.path());
        Served::spawn_saying(command, "answers at https://", "\n")
    };
    let system = start(&["ping-system", "--allow-simulated"]);
    let url = format!("https://{}", system.address);
    let agent = ["agent", "--agent-id", "a", "--gpu", "simulated:up 1h"];
    let _agent = start(&[&agent[..], &["--register-at", &url]].concat());
    let gateway = good_gateway();
    let mut runner = binary();
    runner.args(["--agent", "a", "--ping-url", &url, "--ca-file", "own.pem"]);
    runner.args(["--gateway-url", &gateway.url(), "--gateway-prefix", ""]);
    runner.args(["--uptime-interval", "100ms", "--max-jobs", "1"]);
    let output = runner.current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Certificates may be replaced while a server runs.
#[test]
#[cfg_attr(no_curl, ignore = "needs curl")]
fn servers_speak_tls_and_take_new_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let trusted = |name: &str, pem: &str| std::fs::write(folder.path().join(name), pem).unwrap();
    trusted("first.pem", &new_certificate(folder.path(), "own"));
    let mut command = binary();
    command.args([
        "ping-system",
        "--listen",
        "127.0.0.1:0",
        "--tls-cert",
        "own.pem",
    ]);
    command
        .args(["--tls-key", "own.key"])
        .current_dir(folder.path());
    let system = Served::spawn_saying(command, "answers at https://", "\n");
    let (_, port) = system.address.rsplit_once(':').unwrap();
    let health = |root: &str| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "20", "--cacert", root]);
        curl.arg(format!("https://localhost:{port}/health"))
            .current_dir(folder.path());
        curl.output().unwrap().status.success()
    };
    assert!(health("first.pem"));
    trusted("second.pem", &new_certificate(folder.path(), "own"));
    wait_until("the new certificate", || health("second.pem").then_some(()));
    assert!(!health("first.pem"));
    for arguments in [
        &["--tls-cert", "own.pem"][..],
        &["--tls-key", "own.key"],
        &["--tls-cert", "own.key", "--tls-key", "own.pem"],
        &["--tls-cert", "missing", "--tls-key", "own.key"],
    ] {
        let mut command = binary();
        command
            .args(["ping-system", "--listen", "127.0.0.1:0"])
            .args(arguments);
        let output = command.current_dir(folder.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("--tls-"), "{said}");
    }
}

/// What is written is its owner's, and not written through somebody else's link.
#[test]
fn files_are_private_and_links_are_not_followed() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mode = |name: &str| std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o777;
    let run = |arguments: &[&str]| {
        // With the usual umask others could read what is created.
        let mut command = Command::new("sh");
        let program = assert_cmd::cargo::cargo_bin!("uptime-runner");
        command
            .args(["-c", "umask 022; exec \"$0\" \"$@\""])
            .arg(program);
        command.args(arguments).current_dir(folder.path());
        command
    };
    let system = Served::spawn(run(&["ping-system", "--listen", "127.0.0.1:0"]));
    let agent = [
        "agent",
        "--agent-id",
        "a",
        "--listen",
        "127.0.0.1:0",
        "--gpu",
        "simulated:up 1h",
    ];
    symlink(at("stolen"), at("uptime-agent-a.json.new")).unwrap();
    symlink(at("stolen"), at("uptime-agent-a.json.watched.new")).unwrap();
    let mut agent = Served::spawn(run(&[&agent[..], &["--check-interval", "50ms"]].concat()));
    wait_until("a checkpoint", || {
        at("uptime-agent-a.json").exists().then_some(())
    });
    agent.kill();
    let recorded = |file: &str| {
        let mut command = run(&["--agent", "a", "--gateway-url", "http://127.0.0.1:9"]);
        command.args(["--ping-url", &format!("http://{}", system.address)]);
        command.args(["--duration", "100ms", "--record", file]);
        command.output().unwrap()
    };
    recorded("runs.db");
    for file in [
        "ping-system.db",
        "ping-system.db.lock",
        "uptime-agent-a.json",
        "runs.db",
    ] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
    symlink(at("stolen"), at("dangling.db")).unwrap();
    symlink(at("runs.db"), at("link.db")).unwrap();
    for link in ["dangling.db", "link.db"] {
        let output = recorded(link);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("is a symbolic link"), "{said}");
        let database = format!("sqlite:{link}");
        let output = run(&[
            "ping-system",
            "--listen",
            "127.0.0.1:0",
            "--database",
            &database,
        ])
        .output();
        let said = String::from_utf8(output.unwrap().stderr).unwrap();
        assert!(said.contains("is a symbolic link"), "{said}");
    }
    assert!(!at("stolen").exists());
}
