//! Options by flag, variable and file.

use std::fmt::Debug;

use super::*;
use crate::mutation::mutated;
use crate::net::credentials::Token;
use proptest::prelude::*;

const WHOLE: &str = r#"
rate = 60
uptime_interval = "10s"
max_in_flight = 100
require = ["p99<=2s"]

[[agents]]
id = "agent-001"
orchestrators = ["https://orch-1.example:8935"]

[capabilities.upscale]
route = "upscale"
timeout_seconds = 60
weight = 2
headers = { X-Tenant = "a" }
payload = { image_url = "https://img.example/1.png", seed = "{seed}", at = "{timestamp}" }
expect = { "/status" = "success" }
"#;

/// What most options need beside them.
const A: &[&str] = &["--agent=a"];
const TOTAL: &[&str] = &["--agent=a", "--total-rate=9"];

fn command() -> Command {
    RunnerArgs::augment_args(Command::new("uptime-runner"))
}

/// What a command line, an environment and a file amount to.
fn resolved(
    flags: &[String],
    variables: &[(String, String)],
    file: &str,
) -> anyhow::Result<RunnerConfig> {
    let environment = |name: &str| -> Option<OsString> {
        let set = variables.iter().find(|(variable, _)| variable == name);
        set.map(|(_, value)| value.into())
    };
    let mut arguments: Vec<OsString> = vec!["uptime-runner".into()];
    arguments.extend(flags.iter().map(Into::into));
    let typed = command().try_get_matches_from(&arguments)?;
    let file = ConfigFile::parse("x.toml".to_owned(), file.to_owned())?;
    let layers = Layers::of(&command(), &typed, environment, file)?;
    arguments.extend(layers.flags().cloned());
    let matches = layers.prepare(command()).try_get_matches_from(arguments)?;
    let mut args = RunnerArgs::from_arg_matches(&matches)?;
    args.add_file(layers);
    args.resolve()
}

/// An option, a value that is not its default, and what that makes of a configuration.
struct Sample {
    option: &'static str,
    value: String,
    /// What else must be set.
    with: &'static [&'static str],
    get: fn(&RunnerConfig) -> String,
    expected: &'static str,
}

fn sample(
    option: &'static str,
    value: impl Into<String>,
    with: &'static [&'static str],
    get: fn(&RunnerConfig) -> String,
    expected: &'static str,
) -> Sample {
    Sample {
        option,
        value: value.into(),
        with,
        get,
        expected,
    }
}

fn debug(value: &impl Debug) -> String {
    format!("{value:?}")
}

fn ids(config: &RunnerConfig) -> String {
    let ids = config.agents.configured.iter().map(|agent| &*agent.id);
    ids.collect::<Vec<_>>().join(" ")
}

/// The token is not shown by `Debug`.
fn token(endpoint: &Endpoint) -> String {
    let authorization = endpoint.token.as_ref().map(Token::header);
    authorization.map_or_else(String::new, |header| header.to_str().unwrap().to_owned())
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn samples(folder: &Path) -> Vec<Sample> {
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let root = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = file("own.pem", &root.cert.pem());
    let key = file("own.key", &root.signing_key.serialize_pem());
    // Samples are made once; what goes with them lives as long as the test.
    let with = |option: &str| -> &'static [&'static str] {
        let option: &'static str = option.to_owned().leak();
        vec!["--agent=a", "--metrics-listen=127.0.0.1:74", option].leak()
    };
    let with_key = with(&format!("--tls-key={key}"));
    let with_certificate = with(&format!("--tls-cert={certificate}"));
    let is_tls = |c: &RunnerConfig| {
        let metrics = c.output.metrics.as_ref();
        debug(&metrics.is_some_and(|metrics| metrics.server.tls.is_some()))
    };

    vec![
        sample("tls-cert", certificate, with_key, is_tls, "true"),
        sample("tls-key", key, with_certificate, is_tls, "true"),
        sample(
            "metrics-token-file",
            file("metrics", "m3trics"),
            &["--agent=a", "--metrics-listen=127.0.0.1:74"],
            |c| {
                let metrics = c.output.metrics.as_ref();
                let token = metrics.and_then(|metrics| metrics.token.as_ref());
                token.map_or_else(String::new, |token| {
                    token.header().to_str().unwrap().to_owned()
                })
            },
            "Bearer m3trics",
        ),
        sample(
            "allow-unauthenticated",
            "true",
            &["--agent=a", "--metrics-listen=0.0.0.0:74"],
            |c| debug(&c.output.metrics.is_some()),
            "true",
        ),
        sample("agent", "a", &[], ids, "a"),
        sample("all-agents", "true", &[], |c| debug(&c.agents.all), "true"),
        sample(
            "shard",
            "2/3",
            A,
            |c| debug(&c.agents.shard),
            "Some(Shard { this: 2, all: 3 })",
        ),
        sample("rate", "61", A, |c| debug(&c.rate.base.get()), "61"),
        sample(
            "total-rate",
            "62",
            A,
            |c| debug(&c.rate.sharing),
            "Total { rate: JobsPerMinute(62), split: Equal, redistribute: false }",
        ),
        sample(
            "split",
            "uptime",
            TOTAL,
            |c| debug(&c.rate.sharing),
            "Total { rate: JobsPerMinute(9), split: Uptime, redistribute: false }",
        ),
        sample(
            "redistribute",
            "true",
            TOTAL,
            |c| debug(&c.rate.sharing),
            "Total { rate: JobsPerMinute(9), split: Equal, redistribute: true }",
        ),
        sample(
            "timeout",
            "7s",
            A,
            |c| debug(&c.gateway.timeout),
            "Some(7s)",
        ),
        sample(
            "max-in-flight",
            "63",
            A,
            |c| debug(&c.limits.max_in_flight),
            "63",
        ),
        sample(
            "random-seed",
            "64",
            A,
            |c| debug(&c.gateway.random_seed),
            "Some(64)",
        ),
        sample(
            "price",
            "65",
            A,
            |c| {
                c.limits
                    .price
                    .as_ref()
                    .map_or(String::new(), ToString::to_string)
            },
            "65",
        ),
        sample(
            "budget-wei",
            "66",
            &["--agent=a", "--price=1"],
            |c| {
                c.limits
                    .budget
                    .as_ref()
                    .map_or(String::new(), ToString::to_string)
            },
            "66",
        ),
        sample(
            "ping-url",
            "http://ping:1",
            A,
            |c| c.ping.endpoint.url.to_string(),
            "http://ping:1/",
        ),
        sample(
            "gateway-url",
            "http://gateway:2",
            A,
            |c| c.gateway.endpoint.url.to_string(),
            "http://gateway:2/gateway",
        ),
        sample(
            "gateway-prefix",
            "/there",
            A,
            |c| c.gateway.endpoint.url.to_string(),
            "http://localhost:8088/there",
        ),
        sample(
            "ping-token-file",
            file("ping", "p1ng"),
            A,
            |c| token(&c.ping.endpoint),
            "Bearer p1ng",
        ),
        sample(
            "gateway-token-file",
            file("gateway", "g4te"),
            A,
            |c| token(&c.gateway.endpoint),
            "Bearer g4te",
        ),
        sample(
            "ca-file",
            file("root.pem", &root.cert.pem()),
            A,
            |c| debug(&c.extra_roots.len()),
            "1",
        ),
        sample(
            "uptime-interval",
            "67s",
            A,
            |c| debug(&c.ping.interval),
            "67s",
        ),
        sample("uptime-window", "68s", A, |c| debug(&c.ping.window), "68s"),
        sample(
            "policy",
            "linear:90..99",
            A,
            |c| c.rate.policy.to_string(),
            "linear:90..99",
        ),
        sample(
            "stale-after",
            "69s",
            A,
            |c| debug(&c.ping.stale_after),
            "69s",
        ),
        sample(
            "duration",
            "70s",
            A,
            |c| debug(&c.limits.duration),
            "Some(70s)",
        ),
        sample(
            "max-jobs",
            "71",
            A,
            |c| debug(&c.limits.max_jobs),
            "Some(71)",
        ),
        sample(
            "require",
            "jobs>=72",
            A,
            |c| debug(&c.output.requirements),
            "[Requirement { text: \"jobs>=72\", figure: Jobs, comparison: AtLeast, threshold: 72.0 }]",
        ),
        sample("output", "json", A, |c| debug(&c.output.format), "Json"),
        sample(
            "stats-every",
            "73",
            A,
            |c| debug(&c.output.stats_every),
            "73",
        ),
        sample(
            "record",
            "r.db",
            A,
            |c| debug(&c.record.file),
            "Some(\"r.db\")",
        ),
        sample(
            "pause-after",
            "5",
            A,
            |c| debug(&c.limits.pause_after),
            "Some(5)",
        ),
        sample(
            "insecure-orchestrators",
            "true",
            A,
            |c| debug(&c.insecure_orchestrators),
            "true",
        ),
        sample("record-keep", "7d", A, |c| debug(&c.record.keep), "604800s"),
        sample(
            "metrics-listen",
            "127.0.0.1:74",
            A,
            |c| debug(&c.output.metrics.as_ref().map(|metrics| metrics.listen)),
            "Some(127.0.0.1:74)",
        ),
        sample(
            "capabilities",
            "prompt-enhance",
            A,
            |c| c.gateway.capabilities.iter().map(|c| &*c.name).collect(),
            "prompt-enhance",
        ),
    ]
}

#[test]
fn each_option_is_set_by_flag_variable_and_file() {
    let folder = tempfile::tempdir().unwrap();
    let samples = samples(folder.path());
    for option in command().get_arguments() {
        let long = option.get_long().unwrap();
        let is_sampled = samples.iter().any(|sample| sample.option == long);
        assert!(is_sampled || long == "config", "no sample of --{long}");
    }
    for Sample {
        option,
        value,
        with,
        get,
        expected,
    } in samples
    {
        let with: Vec<String> = with.iter().map(|&flag| flag.to_owned()).collect();
        let name = option.replace('-', "_");
        let flag = [&with[..], &[format!("--{option}={value}")]].concat();
        let variable = [(
            format!("UPTIME_RUNNER_{}", name.to_uppercase()),
            value.clone(),
        )];
        let quote = if ["true", "false"].contains(&&*value) {
            ""
        } else {
            "'"
        };
        let file = match option {
            // Its key in the file names or defines them.
            "capabilities" => format!("{name} = ['{value}']"),
            _ => format!("{name} = {quote}{value}{quote}"),
        };
        if let Ok(default) = resolved(&with, &[], "") {
            assert_ne!(get(&default), expected, "--{option} by default");
        }
        for config in [
            resolved(&flag, &[], ""),
            resolved(&with, &variable, ""),
            resolved(&with, &[], &file),
        ] {
            assert_eq!(get(&config.unwrap()), expected, "--{option}");
        }
    }
}

#[test]
fn the_help_tells_the_defaults() {
    let help = command().term_width(10_000).render_help().to_string();
    let a = "--agent=a".to_owned();
    let by_default = resolved(std::slice::from_ref(&a), &[], "").unwrap();
    let mut told = 0;
    for option in command().get_arguments() {
        let long = option.get_long().unwrap();
        let mut lines = help.lines();
        let line = lines.find(|line| {
            let rest = line.trim_start().strip_prefix(&format!("--{long}"));
            rest.is_some_and(|rest| rest.starts_with([' ', '[']))
        });
        let Some((_, default)) = line.unwrap().split_once("[default: ") else {
            assert!(option.get_default_values().is_empty(), "--{long}");
            continue;
        };
        told += 1;
        let default = default.trim_end_matches(']');
        // What no value of the option can say, or what only counts beside another option.
        if ["capabilities", "timeout", "random-seed", "split"].contains(&long) {
            continue;
        }
        let flags = [a.clone(), format!("--{long}={default}")];
        let told = resolved(&flags, &[], "").unwrap();
        assert_eq!(debug(&told), debug(&by_default), "--{long}");
    }
    assert_eq!(told, 16);
}

#[test]
fn a_token_in_the_environment_beats_a_token_file_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token");
    std::fs::write(&path, "t0ken").unwrap();
    let file = format!("agent = 'a'\nping_token_file = '{}'", path.display());
    let variable = ("UPTIME_RUNNER_PING_TOKEN".to_owned(), "other".to_owned());
    let without = resolved(&[], &[], &file).unwrap();
    assert_eq!(token(&without.ping.endpoint), "Bearer t0ken");
    // The token itself is read from the process's own environment, which has none here.
    let with = resolved(&[], &[variable], &file).unwrap();
    assert_eq!(token(&with.ping.endpoint), "");
}

#[test]
fn names_in_the_file_may_hold_commas() {
    let config = resolved(&[], &[], "agent = ['a,b', 'c']").unwrap();
    assert_eq!(ids(&config), "a,b c");
    let variable = ("UPTIME_RUNNER_AGENT".to_owned(), "a,b".to_owned());
    assert_eq!(ids(&resolved(&[], &[variable], "").unwrap()), "a b");
}

#[test]
fn what_is_wrong_with_variable_or_file_is_told_with_its_place() {
    let error = |variables: &[(&str, &str)], file: &str| {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        let variables: Vec<_> = variables.iter().map(owned).collect();
        let flags = ["--agent=a".to_owned(), "--rate=5".to_owned()];
        resolved(&flags, &variables, file).unwrap_err().to_string()
    };
    // Also where a flag overrides it.
    assert_eq!(
        error(&[("UPTIME_RUNNER_RATE", "0")], ""),
        "UPTIME_RUNNER_RATE='0': expected whole jobs per minute from 1 to 6000000"
    );
    assert_eq!(
        error(&[("UPTIME_RUNNER_ALL_AGENTS", "yes")], ""),
        "UPTIME_RUNNER_ALL_AGENTS='yes': expected true or false"
    );
    assert_eq!(
        error(&[], "\nrate = 0\n"),
        "--config x.toml line 2: rate = 0: expected whole jobs per minute from 1 to 6000000"
    );
    assert_eq!(
        error(&[], "require = ['jobs>=1',\n'jobs']\n")
            .split(": expected")
            .next(),
        Some("--config x.toml line 2: require = 'jobs': 'jobs' is not a requirement")
    );
    for (file, expected) in [
        ("rate = true", "rate = true: expected text or a number"),
        ("rate = []", "rate = []: expected text or a number"),
        ("agent = 1979-05-27", "expected text or an array of texts"),
        ("all_agents = 'true'", "expected true or false"),
        (
            "config = 'x'",
            "unknown key `config`: expected one of `agent`, ",
        ),
    ] {
        let error = error(&[], file);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn headers_and_expectations_are_checked_at_the_start() {
    let define = |lines: &str| {
        let file = format!("[capabilities.upscale]\n{lines}");
        let flags = ["--agent=a".to_owned(), "--capabilities=upscale".to_owned()];
        resolved(&flags, &[], &file)
    };
    let config =
        define("headers = { x-tenant = 'secret' }\nexpect = { '/n' = 1, '' = {} }").unwrap();
    let capability = &config.gateway.capabilities[0];
    assert_eq!(capability.headers["X-Tenant"], "secret");
    assert!(!capability.expect.is_empty());
    assert!(!debug(&config).contains("secret"));
    for (lines, expected) in [
        (
            "headers = { Livepeer = 'x' }",
            "headers has 'Livepeer', which the runner sets itself",
        ),
        ("headers = { authorization = 'x' }", "--gateway-token-file"),
        (
            "headers = { 'a b' = 'x' }",
            "headers has 'a b': expected a header's name",
        ),
        (
            r#"headers = { a = "x\ny" }"#,
            "the value of 'a' has line breaks",
        ),
        ("headers = { x-a = 'x', X-A = 'y' }", "twice"),
        (
            "expect = { status = 'ok' }",
            "'status': expected a JSON pointer such as /status",
        ),
    ] {
        let error = format!("{:#}", define(lines).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn variables_that_are_no_options_are_refused() {
    let check = |name: &str| layers::check_variables(&command(), [name.into()].into_iter());
    for known in [
        "UPTIME_RUNNER_RATE",
        "UPTIME_RUNNER_CONFIG",
        GATEWAY_TOKEN,
        "PATH",
    ] {
        check(known).unwrap();
    }
    let error = check("UPTIME_RUNNER_RAET").unwrap_err().to_string();
    assert!(error.starts_with("UPTIME_RUNNER_RAET: unknown"), "{error}");
}

/// Only jobs that nobody else's orchestrator could have failed say something of an agent.
#[test]
fn an_agent_is_tied_where_no_other_shares_its_orchestrators() {
    let file = "
        [[agents]]
        id = 'alone'
        orchestrators = ['HTTPS://One.example:8935/', 'https://two.example:8935']
        [[agents]]
        id = 'shares'
        orchestrators = ['https://three.example:8935', 'https://four.example:8935']
        [[agents]]
        id = 'shares too'
        orchestrators = ['https://four.example:8935']
        [[agents]]
        id = 'free'
    ";
    let config = resolved(&[], &[], file).unwrap();
    // A gateway compares bytes.
    assert_eq!(
        config.agents.configured[0].orchestrators,
        ["HTTPS://One.example:8935/", "https://two.example:8935"]
    );
    let tied = config.agents.configured.iter().map(|agent| agent.is_tied);
    assert_eq!(tied.collect::<Vec<_>>(), [true, false, false, false]);
}

#[test]
fn an_agent_with_a_live_runner_of_its_own_is_tied_to_it() {
    let fingerprint = format!("sha256:{}", "ab".repeat(32));
    let file = format!(
        "
        [[agents]]
        id = 'alone'
        runner = 'https://orch:8935/apps/alone/app'
        orchestrator_fingerprint = '{fingerprint}'
        [[agents]]
        id = 'shares'
        runner = 'http://orch/apps/x/app/'
        [[agents]]
        id = 'shares too'
        runner = 'http://orch:80/apps/x/app'
    "
    );
    let config = resolved(&[], &[], &file).unwrap();
    let [alone, shares, shares_too] = &config.agents.configured[..] else {
        panic!("three agents")
    };
    let runner = alone.runner.as_ref().unwrap();
    assert_eq!(runner.fingerprint.unwrap().to_string(), fingerprint);
    assert!(alone.is_tied && !shares.is_tied && !shares_too.is_tied);
    assert!(!config.uses_gateway());
    let capability = &config.gateway.capabilities[0];
    assert_eq!(config.timeout(alone, capability), Duration::from_secs(65));
}

#[test]
fn a_live_runner_that_cannot_be_is_told_with_its_agent() {
    let url = "runner = 'https://orch/apps/a/app'";
    for (lines, expected) in [
        (
            "runner = 'https://orch/apps/a'",
            "expected https://ORCHESTRATOR/apps/LABEL/app",
        ),
        (
            "runner = 'https://orch/apps//app'",
            "expected https://ORCHESTRATOR/apps/LABEL/app",
        ),
        ("runner = 'ftp://orch/apps/a/app'", "expected http://HOST"),
        (
            &format!("{url}\norchestrators = ['https://orch']"),
            "expected one of them",
        ),
        (
            &format!("{url}\norchestrator_fingerprint = 'ab'"),
            "64 hexadecimal digits",
        ),
        (
            &format!("orchestrator_fingerprint = 'sha256:{}'", "ab".repeat(32)),
            "[[agents]] 'a': orchestrator_fingerprint is that of a live runner's",
        ),
        (
            &format!(
                "runner = 'http://orch/apps/a/app'\norchestrator_fingerprint = 'sha256:{}'",
                "ab".repeat(32)
            ),
            "expected an https address",
        ),
    ] {
        let file = format!("[[agents]]\nid = 'a'\n{lines}");
        let error = ConfigFile::parse("x.toml".to_owned(), file.clone()).err();
        let error = error.unwrap_or_else(|| resolved(&[], &[], &file).unwrap_err());
        let error = format!("{error:#}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_sample_is_right() {
    assert_eq!(ids(&resolved(&[], &[], WHOLE).unwrap()), "agent-001");
}

proptest! {
    #[test]
    fn nearly_right_files_are_read_or_refused(text in mutated(&[WHOLE])) {
        match resolved(&[], &[], &String::from_utf8_lossy(&text)) {
            Ok(config) => prop_assert!(!config.agents.configured.is_empty()),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
