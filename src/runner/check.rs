//! `check`: asks all that the runner depends on, and says what works, what does not and what to do.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;
use reqwest::{Client, Url};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::Exit;
use super::agents::setup::{client, ping_system};
use super::config::RunnerConfig;
use crate::net::client::root_cause;
use crate::net::endpoint::with_path;
use crate::runner::uptime::client::{PingSystem, PollError, UptimeSource};
use crate::terminal;
use crate::wire::ping_system::ListedAgent;

/// The longest wait for a connection.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How often, and after which pauses, it is looked for an agent's first ping.
const FIRST_PING_LOOKS: u32 = 30;
const FIRST_PING_PAUSE: Duration = Duration::from_millis(100);

/// How something is.
enum Finding {
    Works(String),
    /// Cannot be told from here, and need not be.
    Unseen(String),
    Fails(String),
}

impl Finding {
    fn line(&self) -> String {
        match self {
            Self::Works(what) => format!("✅ {what}\n"),
            Self::Unseen(what) => format!("➖ {what}\n"),
            Self::Fails(what) => format!("❌ {what}\n"),
        }
    }
}

/// Checks everything and prints what was found.
///
/// # Errors
/// When something does not work, so that the exit status is 1.
pub async fn run(config: RunnerConfig) -> anyhow::Result<Exit> {
    let client = client(&config)?;
    let system = ping_system(&config, client.clone());
    let mut findings = Vec::new();
    match system.agents().await {
        Ok(agents) => {
            findings.push(Finding::Works(format!(
                "ping system at {}: {} agents registered",
                system.url,
                agents.len()
            )));
            let listed = agents.keys().filter(|id| config.agents.all && config.agents.is_ours(id));
            let listed = listed.map(|id| config.agents.agent(id));
            let wanted = config.agents.at_start().iter().cloned().chain(listed);
            for wanted in wanted {
                let known = agents.get(&wanted.id);
                findings.push(uptime(&config, &system, &wanted.id, &agents).await);
                if let Some(url) = known.and_then(|agent| agent.agent_url.as_deref()) {
                    findings.push(agent(&client, &wanted.id, url).await);
                }
            }
        }
        Err(error) => findings.push(Finding::Fails(format!(
            "ping system: {error}. Start it (uptime-runner ping-system), or name another (--ping-url)"
        ))),
    }
    findings.push(gateway(&config.gateway.endpoint.url).await);

    let lines = findings.iter().map(Finding::line);
    terminal::print(lines.collect::<String>().as_bytes())?;
    let failed = findings
        .iter()
        .filter(|finding| matches!(finding, Finding::Fails(_)))
        .count();
    if failed > 0 {
        bail!("{failed} of {} checks failed", findings.len());
    }
    Ok(Exit::Completed)
}

/// What the agent's uptime is, and what it earns.
async fn uptime(
    config: &RunnerConfig,
    system: &PingSystem,
    agent_id: &str,
    agents: &BTreeMap<String, ListedAgent>,
) -> Finding {
    let mut answer = system.poll(agent_id).await;
    // The first ping of an agent that was registered a moment ago may be under way.
    for _ in 0..FIRST_PING_LOOKS {
        if !answer
            .as_ref()
            .is_ok_and(|snapshot| snapshot.agent.total_pings == Some(0))
        {
            break;
        }
        sleep(FIRST_PING_PAUSE).await;
        answer = system.poll(agent_id).await;
    }
    match answer {
        Ok(snapshot) => {
            let estimate = snapshot.estimate(system.clock.now(), config.ping.window);
            let Some(uptime) = estimate.uptime else {
                return Finding::Fails(format!(
                    "{agent_id}: registered, but no ping covers now: no job would be sent. \
                     Is the ping system asking it? Its dashboard and log tell"
                ));
            };
            let base_rate = config.base_rate(&config.agents.agent(agent_id));
            let rate = config.rate.policy.rate(base_rate, uptime);
            let what = format!(
                "{agent_id}: uptime {} % of {} pings, which earns {rate} of {base_rate} jobs/min",
                uptime.floored(2),
                estimate.pings
            );
            if rate.get() > 0 {
                Finding::Works(what)
            } else {
                Finding::Fails(format!("{what}. Is its GPU up?"))
            }
        }
        Err(PollError::NotListed { url, .. }) => {
            let known: Vec<&str> = agents.keys().map(String::as_str).take(5).collect();
            let known = if known.is_empty() {
                "no agent is".to_owned()
            } else {
                format!("{} are", known.join(", "))
            };
            Finding::Fails(format!(
                "{agent_id}: not registered, {known}. Start it with --register-at, or register it: curl {url}/register \
                 -d '{{\"agent_id\": \"{agent_id}\", \"agent_url\": \"http://…:8001\"}}'"
            ))
        }
        Err(error) => Finding::Fails(format!("{agent_id}: {error}")),
    }
}

/// The agent itself, which only the ping system has to reach.
async fn agent(client: &Client, agent_id: &str, url: &str) -> Finding {
    let Ok(base) = url.parse::<Url>() else {
        return Finding::Fails(format!(
            "{agent_id}: registered with the invalid address '{}'. Register it again",
            url.escape_debug()
        ));
    };
    let request = client.get(with_path(&base, "agent/health")).send();
    let unseen = match timeout(TIMEOUT, request).await {
        Ok(Ok(answer)) if answer.status().is_success() => {
            return Finding::Works(format!("{agent_id} itself at {url}: answers"));
        }
        Ok(Ok(answer)) => format!("status {}", answer.status()),
        Ok(Err(error)) => root_cause(&error),
        Err(_) => "no answer in 5s".to_owned(),
    };
    Finding::Unseen(format!(
        "{agent_id} itself at {url}: cannot be reached from here ({unseen}); only the ping system has to"
    ))
}

/// Whether somebody listens where jobs go; a job costs money, so none is sent.
async fn gateway(url: &Url) -> Finding {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let port = url.port_or_known_default().unwrap_or_default();
    let why = match timeout(TIMEOUT, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => {
            return Finding::Works(format!(
                "gateway at {url}: takes connections (no job was sent)"
            ));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no connection in 5s".to_owned(),
    };
    Finding::Fails(format!(
        "gateway at {url}: {why}. Start it, or name another (--gateway-url)"
    ))
}
