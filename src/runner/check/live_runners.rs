//! Whether the live runners can do jobs: what their orchestrators list, and which certificates they show. No job is sent.

use std::collections::BTreeMap;

use super::Finding;
use crate::net::fingerprint::Fingerprint;
use crate::net::tls::shown_certificate;
use crate::runner::agents::destinations::orchestrator;
use crate::runner::config::{AgentSettings, RunnerAddress, RunnerConfig};
use crate::runner::send::live_runner::{DiscoveryError, Orchestrator};
use crate::text::foreign;
use crate::wire::live_runner::{ListedPrice, ListedRunner, listed_path, orchestrator_of};

/// The most other runners that are named.
const NAMED: usize = 5;
/// How much of an address is shown.
const MAX_SHOWN_CHARS: usize = 200;

/// Checks the runners of these agents, each orchestrator once.
pub(super) async fn check(config: &RunnerConfig, agents: &[AgentSettings]) -> Vec<Finding> {
    let mut by_orchestrator: BTreeMap<_, Vec<(&AgentSettings, &RunnerAddress)>> = BTreeMap::new();
    for agent in agents {
        if let Some(runner) = &agent.runner {
            let key = (orchestrator_of(&runner.url), runner.fingerprint);
            by_orchestrator
                .entry(key)
                .or_default()
                .push((agent, runner));
        }
    }
    let mut findings = Vec::new();
    for runners in by_orchestrator.values() {
        let Some((_, address)) = runners.first() else {
            continue;
        };
        match orchestrator(config, address) {
            Ok(orchestrator) => {
                findings.extend(check_one(config, &orchestrator, address, runners).await);
            }
            Err(error) => findings.push(Finding::fails(format!("{}: {error:#}", address.url))),
        }
    }
    findings
}

async fn check_one(
    config: &RunnerConfig,
    orchestrator: &Orchestrator,
    address: &RunnerAddress,
    runners: &[(&AgentSettings, &RunnerAddress)],
) -> Vec<Finding> {
    let about = format!("orchestrator at {}", orchestrator.url());
    let shown = if address.url.scheme() == "https" {
        shown_certificate(orchestrator.url()).await
    } else {
        None
    };
    let listed = match orchestrator.discover().await {
        Ok(listed) => listed,
        Err(error) => {
            let advice = advice(&error, shown);
            return vec![Finding::fails(format!("{about}: {error}. {advice}"))];
        }
    };
    let certificate = certificate(config, address, shown);
    let mut findings = vec![Finding::works(format!(
        "{about}: lists {} live runners{certificate}",
        listed.len()
    ))];
    findings.extend(
        runners
            .iter()
            .map(|(agent, runner)| check_runner(config, agent, runner, &listed)),
    );
    findings
}

/// How the certificate was accepted, and how to pin it.
fn certificate(
    config: &RunnerConfig,
    address: &RunnerAddress,
    shown: Option<Fingerprint>,
) -> String {
    let Some(shown) = shown else {
        return String::new();
    };
    if address.fingerprint.is_some() {
        return "; its certificate is the one that is pinned".to_owned();
    }
    let how = if config.insecure_orchestrators {
        "not verified (--insecure-orchestrators)"
    } else {
        "trusted"
    };
    format!(
        "; its certificate is {how}, to pin it: orchestrator_fingerprint = \"{shown}\" in [[agents]]"
    )
}

fn advice(error: &DiscoveryError, shown: Option<Fingerprint>) -> String {
    match error {
        DiscoveryError::NeedsTls => "Write the runner's address with https://".to_owned(),
        DiscoveryError::Lost(why) if why.contains("certificate") => {
            let pin = shown.map_or_else(String::new, |shown| {
                format!(
                    "If {shown} is its fingerprint, pin it: orchestrator_fingerprint = \"{shown}\" in [[agents]]. Or give "
                )
            });
            let pin = if pin.is_empty() {
                "Give ".to_owned()
            } else {
                pin
            };
            format!("{pin}the certificate or its root (--ca-file)")
        }
        DiscoveryError::Lost(why) if speaks_clear_text(why) => {
            "It speaks clear text: write the runner's address with http://".to_owned()
        }
        DiscoveryError::Lost(_) | DiscoveryError::TimedOut => {
            "Is it the right address, and does the orchestrator run?".to_owned()
        }
        DiscoveryError::Status(_) | DiscoveryError::NoList(_) => {
            "Is it an orchestrator with live runners (go-livepeer from 0.9 on)?".to_owned()
        }
    }
}

fn speaks_clear_text(why: &str) -> bool {
    ["InvalidContentType", "corrupt message", "handshake eof"]
        .iter()
        .any(|sign| why.contains(sign))
}

fn check_runner(
    config: &RunnerConfig,
    agent: &AgentSettings,
    runner: &RunnerAddress,
    listed: &[ListedRunner],
) -> Finding {
    let about = format!("{}'s runner {}", agent.id, runner.url);
    let path = listed_path(runner.url.as_str());
    let known = listed
        .iter()
        .find(|listed| listed_path(&listed.url) == path);
    let Some(known) = known else {
        let others = listed.iter().take(NAMED);
        let others: Vec<String> = others
            .map(|other| foreign(&other.url, MAX_SHOWN_CHARS))
            .collect();
        let others = if others.is_empty() {
            "no runner is".to_owned()
        } else {
            format!("{} are", others.join(", "))
        };
        return Finding::fails(format!(
            "{about}: not listed, {others}. Is its worker healthy, and the label right?"
        ));
    };
    if !known.is_single_shot {
        return Finding::fails(format!(
            "{about}: takes no single jobs. Register it with \"mode\": \"single-shot\""
        ));
    }
    let price = known.price.as_ref();
    if let Some(price) = price.filter(|price| price.is_metered()) {
        return Finding::fails(format!(
            "{about}: costs {price}: no single job can be paid so. Give it a price for each job (\"unit\": \"fixed\")"
        ));
    }
    let places = match (known.in_use, known.capacity) {
        (Some(in_use), Some(capacity)) => format!(", {in_use} of {capacity} places in use"),
        _ => String::new(),
    };
    let price = price.map_or_else(String::new, |price| told_price(config, agent, price));
    Finding::works(format!("{about}: listed{places}{price}"))
}

/// What the orchestrator asks, and whether that is what the configuration says.
fn told_price(config: &RunnerConfig, agent: &AgentSettings, listed: &ListedPrice) -> String {
    let configured = config.price(agent).map(|price| price.unit.to_string());
    let differs = match configured {
        Some(configured) if listed.wei() != Some(&configured) => {
            format!(" (--price or the file says {configured})")
        }
        _ => String::new(),
    };
    format!(
        ", {listed}{differs}; where its orchestrator is on a chain jobs are unpaid, since no tickets are signed"
    )
}
