//! `check`: asks all that the runner depends on, and says what works, what does not and what to do.

mod live_runners;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;
use reqwest::header::AUTHORIZATION;
use reqwest::{Client, Response, Url};
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::net::client::{read_body, root_cause};
use crate::net::endpoint::with_path;
use crate::option_values::OutputFormat;
use crate::runner::Exit;
use crate::runner::agents::destinations::job_url;
use crate::runner::agents::setup::{client, ping_system};
use crate::runner::config::RunnerConfig;
use crate::runner::uptime::client::{PingSystem, PollError, UptimeSource};
use crate::terminal;
use crate::text::foreign;
use crate::wire::agent::is_agent_id;
use crate::wire::gateway_probe::{Probed, probed};
use crate::wire::ping_system::ListedAgent;

/// The longest wait for a connection.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How much of an answer is looked at.
const MAX_PROBED_BYTES: usize = 64 << 10;

/// How many other agents are named, and how much is shown of what a ping system lists.
const NAMED_IDS: usize = 5;
const MAX_SHOWN_CHARS: usize = 200;

/// How often, and after which pauses, it is looked for an agent's first ping.
const FIRST_PING_LOOKS: u32 = 30;
const FIRST_PING_PAUSE: Duration = Duration::from_millis(100);

/// How something is.
#[derive(Debug, Serialize)]
struct Finding {
    status: Status,
    finding: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Works,
    /// Cannot be told from here, and need not be.
    Unseen,
    Fails,
}

impl Finding {
    fn works(finding: String) -> Self {
        let status = Status::Works;
        Self { status, finding }
    }

    fn unseen(finding: String) -> Self {
        let status = Status::Unseen;
        Self { status, finding }
    }

    fn fails(finding: String) -> Self {
        let status = Status::Fails;
        Self { status, finding }
    }

    fn line(&self) -> String {
        let mark = match self.status {
            Status::Works => "✅",
            Status::Unseen => "➖",
            Status::Fails => "❌",
        };
        format!("{mark} {}\n", self.finding)
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
            findings.push(Finding::works(format!(
                "ping system at {}: {} agents registered",
                system.url,
                agents.len()
            )));
            let listed = agents.keys().filter(|id| config.agents.all && is_agent_id(id));
            let listed = listed.filter(|id| config.agents.is_ours(id));
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
        Err(error) => findings.push(Finding::fails(format!(
            "ping system: {error}. Start it (uptime-runner ping-system), or name another (--ping-url)"
        ))),
    }
    if config.uses_gateway() {
        findings.extend(gateway(&config, &client).await);
    }
    let agents = &config.agents.configured;
    findings.extend(live_runners::check(&config, agents).await);
    for agent in agents {
        for orchestrator in &agent.orchestrators {
            findings.push(self::orchestrator(&agent.id, orchestrator).await);
        }
    }

    let failed = findings
        .iter()
        .filter(|finding| finding.status == Status::Fails)
        .count();
    let lines = match config.output.format {
        OutputFormat::Json => {
            json!({ "event": "check", "format": 1, "ok": failed == 0, "findings": findings })
                .to_string()
                + "\n"
        }
        OutputFormat::Text => findings.iter().map(Finding::line).collect(),
    };
    terminal::print(lines.as_bytes())?;
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
                return Finding::fails(format!(
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
                Finding::works(what)
            } else {
                Finding::fails(format!("{what}. Is its GPU up?"))
            }
        }
        Err(PollError::NotListed { url, .. }) => {
            let known = agents.keys().take(NAMED_IDS);
            let known: Vec<String> = known.map(|id| foreign(id, MAX_SHOWN_CHARS)).collect();
            let known = if known.is_empty() {
                "no agent is".to_owned()
            } else {
                format!("{} are", known.join(", "))
            };
            Finding::fails(format!(
                "{agent_id}: not registered, {known}. Start it with --register-at, or register it: curl {url}/register \
                 -d '{{\"agent_id\": \"{agent_id}\", \"agent_url\": \"http://…:8001\"}}'"
            ))
        }
        Err(error) => Finding::fails(format!("{agent_id}: {error}")),
    }
}

/// The agent itself, which only the ping system has to reach.
async fn agent(client: &Client, agent_id: &str, url: &str) -> Finding {
    let shown = foreign(url, MAX_SHOWN_CHARS);
    let Ok(base) = url.parse::<Url>() else {
        return Finding::fails(format!(
            "{agent_id}: registered with the invalid address '{shown}'. Register it again"
        ));
    };
    let request = client.get(with_path(&base, "agent/health")).send();
    let unseen = match timeout(TIMEOUT, request).await {
        Ok(Ok(answer)) if answer.status().is_success() => {
            return Finding::works(format!("{agent_id} itself at {shown}: answers"));
        }
        Ok(Ok(answer)) => format!("status {}", answer.status()),
        Ok(Err(error)) => root_cause(&error),
        Err(_) => "no answer in 5s".to_owned(),
    };
    Finding::unseen(format!(
        "{agent_id} itself at {shown}: cannot be reached from here ({unseen}); only the ping system has to"
    ))
}

/// What answers where the jobs of each capability go. A job costs money, so none is sent.
async fn gateway(config: &RunnerConfig, client: &Client) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    let capabilities = &config.gateway.capabilities;
    let asked = config
        .gateway
        .urls()
        .flat_map(|url| capabilities.iter().map(move |c| (url, c)));
    for (url, capability) in asked {
        let mut request = client.post(job_url(url, capability)).timeout(TIMEOUT);
        request = request.headers(capability.headers.clone());
        if let Some(token) = &config.gateway.endpoint.token {
            request = request.header(AUTHORIZATION, token.header());
        }
        let finding = match request.send().await {
            Ok(answer) => answered(config, url, client, answer).await,
            Err(error) => unreachable_gateway(url, &error),
        };
        // Most are alike.
        if !findings
            .iter()
            .any(|known| known.finding == finding.finding)
        {
            findings.push(finding);
        }
    }
    findings
}

async fn answered(config: &RunnerConfig, url: &Url, client: &Client, answer: Response) -> Finding {
    let status = answer.status().as_u16();
    let body = read_body(answer, MAX_PROBED_BYTES)
        .await
        .unwrap_or_default();
    let advice = match probed(status, &body) {
        Probed::Gateway => {
            return Finding::works(format!(
                "gateway at {url}: a gateway answers (no job was sent)"
            ));
        }
        Probed::Orchestrator => {
            "an orchestrator answers, not a gateway. Name the gateway's address (--gateway-url)"
                .to_owned()
        }
        Probed::NoSuchPath => {
            let right = right_prefix(url, client).await;
            let right = right.unwrap_or_else(|| {
                "Is this the node's port for HTTP (-httpAddr), not the one of its command line (-cliAddr)?".to_owned()
            });
            format!("404 page not found: a node answers, but has no such path. {right}")
        }
        Probed::NeedsTls => {
            "speaks TLS, and was asked in clear text. Name it by https:// (--gateway-url)"
                .to_owned()
        }
        Probed::TokenRefused => format!(
            "status {status}: {} (--gateway-token-file)",
            if config.gateway.endpoint.token.is_some() {
                "the token is refused. Name another one"
            } else {
                "a token is asked for. Name one"
            }
        ),
        Probed::GatewayDown => format!(
            "status {status}: a proxy answers, but the gateway behind it does not. Start the gateway"
        ),
        Probed::SomethingElse => format!(
            "status {status}: something else answers, not a gateway. Name the gateway's address (--gateway-url), or the \
             proxy's prefix (--gateway-prefix)"
        ),
    };
    Finding::fails(format!("gateway at {url}: {advice}"))
}

/// The prefix at which a gateway answers, if the usual ones do.
async fn right_prefix(url: &Url, client: &Client) -> Option<String> {
    let mut base = url.clone();
    for prefix in ["", "/gateway"] {
        base.set_path(prefix);
        let request = client
            .post(with_path(&base, "process/request/x"))
            .timeout(TIMEOUT);
        let Ok(answer) = request.send().await else {
            continue;
        };
        let status = answer.status().as_u16();
        let body = read_body(answer, MAX_PROBED_BYTES)
            .await
            .unwrap_or_default();
        if probed(status, &body) == Probed::Gateway {
            return Some(format!(
                "With --gateway-prefix '{prefix}' a gateway answers"
            ));
        }
    }
    None
}

fn unreachable_gateway(url: &Url, error: &reqwest::Error) -> Finding {
    let why = root_cause(error);
    let is_clear = ["InvalidContentType", "corrupt message", "handshake eof"];
    let advice = if is_clear.iter().any(|sign| why.contains(sign)) {
        "it speaks clear text. Name it by http:// (--gateway-url)"
    } else if why.contains("not valid for name") {
        "Name the gateway as its certificate does (--gateway-url)"
    } else if why.contains("certificate expired") {
        "Renew its certificate, or set this machine's clock"
    } else if why.contains("certificate") {
        "its certificate is not trusted. Give the root that signed it, or the certificate itself (--ca-file)"
    } else if error.is_timeout() {
        "no answer in 5s. Is it the right address (--gateway-url)?"
    } else {
        "Start it, or name another (--gateway-url)"
    };
    Finding::fails(format!("gateway at {url}: {why}. {advice}"))
}

/// Whether an orchestrator accepts connections. Nothing is sent to it, and only the gateway has to reach it.
async fn orchestrator(agent_id: &str, address: &str) -> Finding {
    let about = format!("{agent_id}'s orchestrator {address}");
    let Some((host, port)) = address.parse::<Url>().ok().and_then(|url| {
        let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
        Some((host, url.port_or_known_default()?))
    }) else {
        return Finding::fails(format!(
            "{about}: has no host and port. Write it as in the gateway's list"
        ));
    };
    match timeout(TIMEOUT, TcpStream::connect((host, port))).await {
        Ok(Ok(_)) => Finding::works(format!("{about}: accepts connections (nothing was sent)")),
        Ok(Err(error)) => Finding::unseen(format!(
            "{about}: cannot be reached from here ({error}); only the gateway has to"
        )),
        Err(_) => Finding::unseen(format!(
            "{about}: cannot be reached from here (no connection in 5s); only the gateway has to"
        )),
    }
}
