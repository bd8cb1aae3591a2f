//! What lies under `.github/deploy`, as far as it can be checked without deploying it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::agents::Agents;
use crate::support::ping_system::PingSystemProcess;
use crate::support::{Runner, get, good_gateway};
use rustix::process::Signal;
use serde_json::Value;

fn github() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".github")
}

fn deploy() -> PathBuf {
    github().join("deploy")
}

fn check(command: &mut Command) {
    let output = command.output().expect("the checker is installed");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{command:?}: {said}");
}

#[test]
#[cfg_attr(no_systemd_analyze, ignore = "needs systemd-analyze (package systemd)")]
fn units_are_valid_and_in_a_sandbox() {
    let folder = tempfile::tempdir().unwrap();
    for unit in std::fs::read_dir(deploy().join("systemd")).unwrap() {
        let unit = unit.unwrap().path();
        let text = std::fs::read_to_string(&unit).unwrap();
        // The program must be there to be found valid.
        let here = text.replace("/usr/local/bin/uptime-runner", "/bin/true");
        assert_ne!(here, text);
        let here_as = folder.path().join(unit.file_name().unwrap());
        std::fs::write(&here_as, here).unwrap();
        check(
            Command::new("systemd-analyze")
                .args(["verify", "--man=no"])
                .arg(&here_as),
        );
        check(
            Command::new("systemd-analyze")
                .args(["security", "--offline=true", "--threshold=20"])
                .arg(&here_as),
        );
    }
}

#[test]
#[cfg_attr(no_promtool, ignore = "needs promtool (package prometheus)")]
fn prometheus_takes_the_configuration_and_the_alerts_do_what_they_say() {
    let folder = deploy().join("prometheus");
    let promtool = |arguments: &[&str]| {
        check(
            Command::new("promtool")
                .args(arguments)
                .current_dir(&folder),
        );
    };
    promtool(&["test", "rules", "alerts.test.yml"]);
    // The token must be there for the configuration to be found valid.
    let here = tempfile::tempdir().unwrap();
    let token = here.path().join("read_token");
    std::fs::write(&token, "token").unwrap();
    let text = std::fs::read_to_string(folder.join("prometheus.yml")).unwrap();
    let with_token = text.replace("/run/secrets/read_token", token.to_str().unwrap());
    assert_ne!(with_token, text);
    let configuration = here.path().join("prometheus.yml");
    std::fs::write(&configuration, with_token).unwrap();
    std::fs::copy(folder.join("alerts.yml"), here.path().join("alerts.yml")).unwrap();
    promtool(&["check", "config", configuration.to_str().unwrap()]);
}

#[test]
#[cfg_attr(no_kubernetes_validate, ignore = "needs kubernetes-validate (PyPI)")]
fn kubernetes_knows_every_field_of_the_manifests() {
    check(
        Command::new("kubernetes-validate")
            .arg("--strict")
            .args(yaml_in(&deploy().join("kubernetes"))),
    );
}

#[test]
#[cfg_attr(no_check_jsonschema, ignore = "needs check-jsonschema (PyPI)")]
fn compose_and_workflows_follow_their_schemas() {
    let compose = [deploy().join("compose.yaml")];
    let workflows = yaml_in(&github().join("workflows"));
    for (schema, files) in [
        ("compose-spec", &compose[..]),
        ("github-workflows", &workflows),
    ] {
        check(
            Command::new("check-jsonschema")
                .args(["--builtin-schema", &format!("vendor.{schema}")])
                .args(files),
        );
    }
}

fn yaml_in(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap();
    let files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    assert!(!files.is_empty(), "{}", folder.display());
    files
}

#[test]
#[cfg_attr(no_yamllint, ignore = "needs yamllint (package yamllint)")]
fn all_yaml_is_well_formed() {
    let rules = "{extends: relaxed, rules: {line-length: disable}}";
    check(
        Command::new("yamllint")
            .args(["--strict", "-d", rules])
            .arg(github()),
    );
}

/// All names of our metrics in a text.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = words.filter(|word| {
        word.starts_with("uptime_runner_") || word.starts_with("uptime_ping_system_")
    });
    ours.map(|name| name.trim_end_matches("_bucket").to_owned())
        .collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let agents = Agents::start();
    let system = PingSystemProcess::start(folder.path(), &["--base-interval", "1h"]);
    system.with_agent("agent-001", &agents);
    let gateway = good_gateway();
    let metrics = ["--metrics-listen", "127.0.0.1:0"];
    let mut runner = Runner::start(&system.url(), &gateway.url(), &metrics);
    let address = runner.wait_for_log("metrics at ");
    runner.wait_for_event("job");
    let told = [get(&address), system.ask_with("/metrics", "").1].concat();
    runner.signal(Signal::INT);
    let told: BTreeSet<String> = told
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .map(str::to_owned)
        .collect();
    for file in ["prometheus/alerts.yml", "grafana-dashboard.json"] {
        let text = std::fs::read_to_string(deploy().join(file)).unwrap();
        if file.contains("json") {
            let dashboard: Value = serde_json::from_str(&text).unwrap();
            assert!(dashboard["panels"].as_array().unwrap().len() > 5);
        }
        for name in metrics_in(&text) {
            assert!(told.contains(&name), "{file}: {name} is none of {told:?}");
        }
    }
}
