//! Who may do what at a ping system: the tokens of the API, of registering agents, and those that agents are shown.

use std::path::{Path, PathBuf};

use crate::support::agents::Agents;
use crate::support::ping_system::PingSystemProcess;
use crate::support::wait_until;
use serde_json::{Value, json};

const SELDOM: [&str; 2] = ["--base-interval", "1h"];

struct Guarded {
    folder: tempfile::TempDir,
    system: PingSystemProcess,
}

impl Guarded {
    /// With the tokens `w` and `r`, and these of agents.
    fn start(register: &str, agents: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).unwrap();
        };
        write("write", "w");
        write("read", "r");
        write("register", register);
        write("agents", agents);
        let options = [
            "--token-file",
            "write",
            "--read-token-file",
            "read",
            "--register-tokens",
            "register",
            "--agent-tokens",
            "agents",
        ];
        let options = [&SELDOM[..], &options].concat();
        let system = PingSystemProcess::start(folder.path(), &options);
        Self { folder, system }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The status of a request that shows this token.
    fn status(&self, method: &str, path: &str, token: &str, body: &Value) -> u16 {
        let headers =
            format!("authorization: Bearer {token}\r\ncontent-type: application/json\r\n");
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.system.request(method, path, &headers, &body).0
    }

    fn get(&self, path: &str, token: &str) -> u16 {
        self.status("GET", path, token, &Value::Null)
    }

    fn register(&self, id: &str, url: &str, token: &str) -> u16 {
        let body = json!({ "agent_id": id, "agent_url": url });
        self.status("POST", "/ping-system/agents/register", token, &body)
    }
}

#[test]
fn an_agent_registers_itself_where_it_is_and_nobody_else() {
    let agents = Agents::start();
    let guarded = Guarded::start(
        "agent-001 one\nagent two second 10.0.0.0/8\nagent-003 third 127.0.0.0/8\n",
        "",
    );
    let here = agents.url("agent-001");
    // Without a network, where it calls from.
    assert_eq!(guarded.register("agent-001", &here, "one"), 200);
    let by_name = here.replace("127.0.0.1", "localhost");
    assert_eq!(guarded.register("agent-003", &by_name, "third"), 200);
    for (id, url, token, status) in [
        ("agent-002", &*here, "one", 403),
        ("agent-003", &here, "one", 403),
        ("agent-001", "http://10.1.2.3:8001", "one", 403),
        ("agent-001", "http://no-such-name.invalid:8001", "one", 403),
        ("agent-001", &here, "on", 401),
        ("agent-001", &here, "r", 401),
        ("agent two", "http://10.1.2.3:8001", "second", 200),
        ("agent two", &here, "second", 403),
        ("agent-004", &here, "w", 200),
    ] {
        assert_eq!(
            guarded.register(id, url, token),
            status,
            "{id} at {url} by {token}"
        );
    }
    // What it may not change, and read.
    for (method, path, status) in [
        ("DELETE", "/ping-system/agents/agent-001", 401),
        ("DELETE", "/ping-system/agents/agent-003", 401),
        ("POST", "/ping-system/agents/agent-001/ping", 401),
        ("GET", "/ping-system/agents/agent-001", 200),
        ("GET", "/ping-system/agents/agent-001/history", 200),
        ("GET", "/ping-system/agents/agent-003", 401),
        ("GET", "/ping-system/agents/agent-003/history", 401),
        ("GET", "/ping-system/agents", 401),
        ("GET", "/ping-system/dashboard", 401),
        ("GET", "/metrics", 401),
        ("GET", "/health", 200),
        ("GET", "/", 200),
    ] {
        let answered = guarded.status(method, path, "one", &Value::Null);
        assert_eq!(answered, status, "{method} {path}");
    }
    for token in ["w", "r"] {
        assert_eq!(guarded.get("/ping-system/agents/agent-003", token), 200);
        assert_eq!(guarded.get("/metrics", token), 200);
    }
    let log = guarded.system.log();
    for secret in ["one", "second", "third"] {
        assert!(!log.contains(&format!("Bearer {secret}")), "{log}");
    }
}

/// Whole or not at all: a ping system reads it at any moment.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[test]
fn tokens_are_replaced_without_a_restart() {
    let agents = Agents::start();
    let guarded = Guarded::start("agent-001 one\n", "agent-001 shown-first\n");
    let here = agents.url("agent-001");
    assert_eq!(guarded.register("agent-001", &here, "one"), 200);
    guarded.status(
        "POST",
        "/ping-system/agents/agent-001/ping",
        "w",
        &Value::Null,
    );
    replace(&guarded.file("write"), "w2\n");
    replace(&guarded.file("register"), "agent-001 two\n");
    replace(&guarded.file("agents"), "agent-001 shown-second\n");
    wait_until("the new tokens", || {
        let registered = guarded.register("agent-001", &here, "two") == 200;
        let written = guarded.register("agent-001", &here, "w2") == 200;
        (registered && written).then_some(())
    });
    for old in ["one", "w"] {
        assert_eq!(guarded.register("agent-001", &here, old), 401, "{old}");
    }
    let shown = |token: &str| {
        let header = format!("authorization: bearer {token}\r\n");
        let asked = agents.asked("agent-001").into_iter();
        asked
            .filter(|head| head.to_ascii_lowercase().contains(&header))
            .count()
    };
    assert!(shown("shown-first") > 0);
    wait_until("the agent's new token", || {
        guarded.status(
            "POST",
            "/ping-system/agents/agent-001/ping",
            "w2",
            &Value::Null,
        );
        (shown("shown-second") > 0).then_some(())
    });
    // A file that is bad changes nothing.
    replace(&guarded.file("write"), "two words");
    wait_until("the warning", || {
        guarded.register("agent-001", &here, "w2");
        guarded
            .system
            .log()
            .contains("cannot be used")
            .then_some(())
    });
    assert_eq!(guarded.register("agent-001", &here, "w2"), 200);
}

/// A wrong token waits, and a right one does not.
#[test]
fn wrong_tokens_are_answered_late() {
    let guarded = Guarded::start("agent-001 one\n", "");
    let begun = std::time::Instant::now();
    for _ in 0..3 {
        assert_eq!(guarded.get("/metrics", "wrong"), 401);
    }
    assert!(begun.elapsed() >= std::time::Duration::from_millis(750));
}
