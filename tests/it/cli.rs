//! No wrong input starts sending, and its one message says what would be accepted.

use std::process::Output;

use crate::support::{PingSystem, Runner, binary, good_gateway};

/// Ends with status 2, nothing on standard output, and one message that holds these words.
fn refused(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.matches("error: ").count(), 1, "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "'{word}' in: {stderr}");
    }
}

#[test]
fn bad_options_are_refused_before_anything_is_sent() {
    let pings = PingSystem::start(99.5);
    let gateway = good_gateway();
    for (arguments, words) in [
        ("", vec!["--agent ID", "[[agents]]"]),
        ("--agent=", vec!["--agent", "ID"]),
        ("--agent a --agent a", vec!["'a'", "twice"]),
        ("--agent a --rate 0", vec!["--rate", "'0'", "1 to 6000000"]),
        ("--agent a --rate 6000001", vec!["--rate", "1 to 6000000"]),
        (
            "--agent a --rate -5",
            vec!["--rate", "'-5'", "1 to 6000000"],
        ),
        ("--agent a --rate 1.5", vec!["--rate", "whole"]),
        (
            "--agent a --capabilities gpu-check,nope",
            vec!["--capabilities", "'nope'", "text-to-image"],
        ),
        (
            "--agent a --capabilities gpu-check gpu-check",
            vec!["'gpu-check'", "twice"],
        ),
        (
            "--agent a --ping-url localhost:8000",
            vec!["--ping-url", "http://HOST"],
        ),
        (
            "--agent a --gateway-url http://",
            vec!["--gateway-url", "http://HOST"],
        ),
        (
            "--agent a --gateway-url ftp://host",
            vec!["--gateway-url", "http://HOST"],
        ),
        (
            "--agent a --gateway-url http://host/?x=1",
            vec!["--gateway-url", "no ?"],
        ),
        (
            "--agent a --timeout 0",
            vec!["--timeout", "over 0", "500ms"],
        ),
        (
            "--agent a --uptime-interval soon",
            vec!["--uptime-interval", "'soon'", "2m"],
        ),
        (
            "--agent a --max-in-flight 0",
            vec!["--max-in-flight", "over 0"],
        ),
        (
            "--agent a --max-in-flight 999999999999",
            vec!["--max-in-flight", "open files", "hard limit"],
        ),
        ("--agent a --max-jobs 0", vec!["--max-jobs", "over 0"]),
        ("--agent a --output xml", vec!["--output", "text or json"]),
        (
            "--agent a --require p99=2",
            vec!["--require", "p99<=2s", "success_rate"],
        ),
        (
            "--agent a --metrics-listen nonsense",
            vec!["--metrics-listen", "127.0.0.1:9100"],
        ),
        (
            "--agent a --ping-token-file /nonexistent",
            vec!["--ping-token-file", "/nonexistent"],
        ),
        ("--agent a --ca-file /dev/null", vec!["--ca-file", "PEM"]),
        ("--config /nonexistent", vec!["--config", "/nonexistent"]),
        ("--agnet a", vec!["--agnet", "--agent"]),
        ("frobnicate", vec!["frobnicate"]),
        ("--agent a demo", vec!["demo", "--agent"]),
        ("demo --duration 0", vec!["--duration", "over 0"]),
        (
            "mock --fail 500:60% --fail empty:60%",
            vec!["--fail", "120 %"],
        ),
        ("mock --uptime 101@0s", vec!["--uptime", "0 to 100"]),
    ] {
        let output = binary()
            .env("UPTIME_RUNNER_DURATION", "1s")
            .args(arguments.split_whitespace())
            .output()
            .unwrap();
        refused(&output, &words);
    }
    assert!(pings.server.requests.lock().unwrap().is_empty());
    assert!(gateway.requests.lock().unwrap().is_empty());
}

#[test]
fn an_address_with_credentials_is_refused_without_showing_them() {
    let address = "127.0.0.1:9";
    let credentials = format!("http://user:s3cret@{address}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    std::fs::write(&file, format!("gateway_url = '{credentials}'\n")).unwrap();
    let (mut flag, mut variable, mut key) = (binary(), binary(), binary());
    flag.args(["--gateway-url", &credentials]);
    variable.env("UPTIME_RUNNER_GATEWAY_URL", &credentials);
    key.arg("--config").arg(&file);
    for (command, name) in [
        (&mut flag, "--gateway-url"),
        (&mut variable, "UPTIME_RUNNER_GATEWAY_URL"),
        (&mut key, "gateway_url"),
    ] {
        let output = command.args(["--agent", "a"]).output().unwrap();
        refused(&output, &[name, address, "token file"]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!told.contains("s3cret"), "{told}");
    }
}

#[test]
fn a_bad_file_is_refused_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.toml");
    for (text, words) in [
        (
            "rate = 60\ntiemout = 5\n",
            vec!["line 2", "tiemout", "`timeout`"],
        ),
        ("\n\nrate = 0\n", vec!["line 3", "1 to 6000000"]),
        ("rate = true\n", vec!["line 1", "text or a number"]),
        ("ping_url = \"localhost\"\n", vec!["line 1", "http://HOST"]),
        (
            "capabilities = [\"gpu-check\",\n\"nope\"]\n",
            vec!["line 2", "'nope'", "text-to-image"],
        ),
        (
            "[[agents]]\nid = \"a\"\nurl = \"x\"\n",
            vec!["line 3", "url", "orchestrators"],
        ),
        (
            "[[agents]]\nid = \"a\"\norchestrators = [\"x:1\"]\n",
            vec!["line 3", "http://HOST"],
        ),
        (
            "[capabilities.x]\ntimeout_seconds = 0\n",
            vec!["line 2", "nonzero"],
        ),
        ("[capabilities.x]\nweight = 0\n", vec!["line 2", "over 0"]),
        (
            "[capabilities.x]\ncolour = 1\n",
            vec!["line 2", "colour", "payload"],
        ),
        ("[capabilities.\"a b\"]\n", vec!["a b", "without spaces"]),
        ("rate = \n", vec!["line 1"]),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = binary()
            .args(["--agent", "a", "--config"])
            .arg(&file)
            .output()
            .unwrap();
        let mut all = vec!["bad.toml"];
        all.extend(words);
        refused(&output, &all);
    }
}

/// Each variable of agent and ping system reaches its option: a bad value is refused in the option's name.
#[test]
fn variables_of_agent_and_ping_system_are_options() {
    let agent = [
        ("AGENT_ID", "..", "--agent-id"),
        ("AGENT_LISTEN", "nowhere", "--listen"),
        ("AGENT_GPU_CHECK_INTERVAL_SECONDS", "0", "--check-interval"),
        ("AGENT_MAX_HISTORY_SIZE", "0", "--max-history"),
        ("AGENT_CHECKPOINT_INTERVAL", "0", "--checkpoint-every"),
        ("AGENT_GPU", "none", "--gpu"),
        ("AGENT_REQUIRE_GPUS", "0", "--require-gpus"),
        ("AGENT_TOKEN_FILE", "/nonexistent", "--token-file"),
        ("AGENT_TOKEN", "two words", "AGENT_TOKEN"),
    ];
    let ping_system = [
        ("PING_LISTEN", "nowhere", "--listen"),
        ("PING_DATABASE", "mysql://host/db", "--database"),
        (
            "PING_BASE_INTERVAL_MINUTES",
            "0",
            "PING_BASE_INTERVAL_MINUTES",
        ),
        ("PING_UPTIME_THRESHOLD", "101", "--uptime-threshold"),
        (
            "PING_ESCALATION_MULTIPLIER",
            "0.5",
            "--escalation-multiplier",
        ),
        ("PING_MAX_INTERVAL_HOURS", "soon", "PING_MAX_INTERVAL_HOURS"),
        ("PING_RECOVERY_THRESHOLD_PINGS", "0", "--recovery-threshold"),
        (
            "PING_FIRST_PING_GRACE_PERIOD",
            "maybe",
            "--first-ping-grace",
        ),
        (
            "PING_RESPONSE_TIMEOUT_SECONDS",
            "-1",
            "PING_RESPONSE_TIMEOUT_SECONDS",
        ),
        ("PING_MAX_CONCURRENT_AGENTS", "0", "--max-concurrent"),
        ("PING_RETENTION", "0", "--retention"),
        ("PING_TOKEN_FILE", "/nonexistent", "--token-file"),
        ("PING_READ_TOKEN_FILE", "/nonexistent", "--read-token-file"),
        (
            "PING_AGENT_TOKEN_FILE",
            "/nonexistent",
            "--agent-token-file",
        ),
        ("PING_TOKEN", "two words", "PING_TOKEN"),
        ("PING_READ_TOKEN", "two words", "PING_READ_TOKEN"),
        ("PING_AGENT_TOKEN", "two words", "PING_AGENT_TOKEN"),
        ("PING_ALLOW_AGENTS", "everywhere", "--allow-agents"),
    ];
    for (command, variables) in [("agent", &agent[..]), ("ping-system", &ping_system)] {
        for (variable, value, named) in variables {
            let mut refused_here = binary();
            refused_here.arg(command);
            if command == "agent" && *variable != "AGENT_ID" {
                refused_here.args(["--agent-id", "a"]);
            }
            let output = refused_here.env(variable, value).output().unwrap();
            refused(&output, &[named]);
        }
    }
    // A bare number has the unit of its variable; a flag beats it.
    let output = binary()
        .args(["ping-system", "--max-interval", "10m"])
        .env("PING_BASE_INTERVAL_MINUTES", "15")
        .output()
        .unwrap();
    refused(&output, &["--base-interval 900s", "--max-interval 600s"]);
}

#[test]
fn tokens_are_never_shown() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, "s3cret token\n").unwrap();
    let output = binary()
        .args(["--agent", "a", "--gateway-token-file"])
        .arg(&file)
        .output()
        .unwrap();
    refused(&output, &["--gateway-token-file", "without spaces"]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("s3cret"));
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runner.toml");
    std::fs::write(
        &file,
        "agent = \"from-file\"\nrate = 61\nuptime_interval = 0.05\n",
    )
    .unwrap();
    let base_rate = |flag: Option<&str>, variable: Option<&str>, with_file: bool| {
        let nobody = crate::support::RawServer::start(|_, _| {});
        let mut command = binary();
        command.args([
            "--output",
            "json",
            "--duration",
            "50ms",
            "--ping-url",
            &nobody.url(),
        ]);
        if let Some(flag) = flag {
            command.args(["--rate", flag]);
        }
        if let Some(variable) = variable {
            command.env("UPTIME_RUNNER_RATE", variable);
        }
        if with_file {
            command.arg("--config").arg(&file);
        } else {
            command.env("UPTIME_RUNNER_AGENT", "from-environment");
        }
        let finished = Runner::spawn(command).finish();
        // No uptime was known.
        assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
        let started = finished.of_kind("started")[0];
        let agent = if with_file {
            "from-file"
        } else {
            "from-environment"
        };
        assert_eq!(started["agents"][0], agent);
        started["base_rate"].as_u64().unwrap()
    };
    assert_eq!(base_rate(Some("63"), Some("62"), true), 63);
    assert_eq!(base_rate(None, Some("62"), true), 62);
    assert_eq!(base_rate(None, None, true), 61);
    assert_eq!(base_rate(None, None, false), 60);
}

#[test]
fn help_names_every_option() {
    for (name, arguments) in [
        ("runner", vec!["--help"]),
        ("agent", vec!["agent", "--help"]),
        ("ping_system", vec!["ping-system", "--help"]),
        ("mock", vec!["mock", "--help"]),
        ("demo", vec!["demo", "--help"]),
    ] {
        let output = binary()
            .env("COLUMNS", "100")
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success());
        insta::assert_snapshot!(
            format!("help_{name}"),
            String::from_utf8(output.stdout).unwrap()
        );
    }
}

/// A file that never ends, or never opens, must not hang the start.
#[test]
fn a_token_file_is_a_small_regular_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let fifo = std::process::Command::new("mkfifo")
        .arg(at("fifo"))
        .status();
    assert!(fifo.unwrap().success());
    std::os::unix::fs::symlink("/dev/zero", at("zero")).unwrap();
    std::fs::write(at("empty"), " \n").unwrap();
    std::fs::write(at("binary"), [0xff, 0xfe]).unwrap();
    std::fs::write(at("two"), "one two").unwrap();
    std::fs::write(at("lines"), "one\ntwo\n").unwrap();
    std::fs::write(at("nul"), "a\0b").unwrap();
    std::fs::write(at("large"), "x".repeat(5000)).unwrap();
    std::fs::write(at("good"), "s3cret\n").unwrap();
    std::os::unix::fs::symlink(at("good"), at("link")).unwrap();
    let start = |name: &str| {
        let mut command = crate::support::binary();
        command.args(["check", "--agent", "a", "--ping-url", "http://127.0.0.1:9"]);
        command.args(["--gateway-url", "http://127.0.0.1:9", "--ping-token-file"]);
        let output = command.arg(at(name)).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    for bad in [
        "fifo", "zero", "empty", "binary", "two", "lines", "nul", "large", ".", "missing",
    ] {
        let (code, said) = start(bad);
        assert_eq!(code, Some(2), "{bad}: {said}");
        assert!(said.contains("--ping-token-file"), "{bad}: {said}");
    }
    for good in ["good", "link"] {
        let (code, said) = start(good);
        assert_eq!(code, Some(1), "{good}: {said}");
        assert!(!said.contains("s3cret"), "{said}");
    }
}
