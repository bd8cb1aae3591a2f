//! The whole system at work on loopback, with nothing else needed: four real agents with simulated GPUs,
//! a real ping system and the real job runner, against a mock gateway.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use futures_util::future::{Either, try_join_all};
use serde_json::json;
use tokio::net::TcpListener;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;
use url::Url;

use super::mock::Mock;
use super::script::UptimeScript;
use crate::agent::checkpoint::CheckpointFile;
use crate::agent::probe::simulated::{GpuScript, SimState};
use crate::agent::probe::source::GpuSource;
use crate::agent::tracker::TrackerConfig;
use crate::agent::{self, AgentConfig};
use crate::net;
use crate::net::endpoint::with_path;
use crate::net::server::ServerSettings;
use crate::ping_system::api::Tokens;
use crate::ping_system::client::AgentCredentials;
use crate::ping_system::evaluate::PingPolicy;
use crate::ping_system::interval::IntervalRules;
use crate::ping_system::store::sqlite::Location;
use crate::ping_system::{self, Database, PingSystemConfig};
use crate::runner::config::{AgentSettings, RunnerAddress, RunnerConfig};
use crate::runner::{self, Exit};
use crate::shutdown::Shutdown;
use crate::units::{JobsPerMinute, Span};

/// The agent whose story is told.
const AGENT: &str = "agent-001";

/// The other agents: one in each tier below the first.
const STEADY: [SteadyAgent; 3] = [
    SteadyAgent {
        id: "agent-002",
        up: 0.98,
        pings_per_loss: 2.0,
    },
    SteadyAgent {
        id: "agent-003",
        up: 0.92,
        pings_per_loss: 1.0,
    },
    SteadyAgent {
        id: "agent-004",
        up: 0.85,
        pings_per_loss: 1.0,
    },
];

/// An agent whose GPU is lost for a moment again and again, so that its uptime stays the same.
struct SteadyAgent {
    id: &'static str,
    /// The share of the time in which it has its GPU.
    up: f64,
    /// How many pings there are for each loss: a short loss is not measured exactly.
    pings_per_loss: f64,
}

/// The time between two pings, as a share of the demo.
const PING_INTERVAL: f64 = 1.0 / 60.0;

/// How much history counts, as a share of the demo.
const WINDOW: f64 = 16.0 / 60.0;

/// The first GPU's script, in shares of the demo. Lost three times within the window, its uptime falls
/// to about 96, 92 and 85 %; then these times leave the window again, one by one.
const STEPS: [(SimState, f64); 7] = [
    (SimState::Up, 17.0 / 60.0),
    (SimState::Lost, 0.62 / 60.0),
    (SimState::Up, 6.0 / 60.0),
    (SimState::Lost, 0.67 / 60.0),
    (SimState::Up, 5.0 / 60.0),
    (SimState::Lost, 1.3 / 60.0),
    // Far beyond the end.
    (SimState::Up, 1000.0),
];

/// Jobs that full uptime would earn each agent over the whole demo.
const JOBS: f64 = 120.0;

/// `uptime-runner demo`.
#[derive(Debug, clap::Args)]
pub struct DemoOptions {
    /// How long it takes
    #[arg(long, value_name = "T", default_value = "1m")]
    duration: Span,
    /// Send the jobs to live runners, as the node stack after go-livepeer serves them, in place of a BYOC gateway
    #[arg(long)]
    live_runners: bool,
}

/// Runs all parts of the system against each other.
///
/// # Errors
/// As [`runner::run`], or when no port is free or no temporary folder can be made.
pub async fn run(options: &DemoOptions, shutdown: &Shutdown) -> anyhow::Result<Exit> {
    let duration = options.duration.get();
    let folder = tempfile::Builder::new()
        .prefix("uptime-runner-demo-")
        .tempdir()
        .context("no temporary folder can be made")?;
    // The other parts go on until the runner has ended.
    let others = Shutdown::default();
    let mock = Mock {
        listen: ([127, 0, 0, 1], 0).into(),
        agents: runner_labels()?,
        capacity: None,
        latency: "45ms±10".parse().map_err(anyhow::Error::msg)?,
        failures: vec!["500:2%".parse().map_err(anyhow::Error::msg)?],
        runner_failures: vec!["500:2%".parse().map_err(anyhow::Error::msg)?],
    };
    let (gateway, gateway_address) = mock.bind().await?;
    let (at_ping_system, ping_url) = listen().await?;
    let mut agents = Vec::new();
    for (id, script) in scripts(duration) {
        let (listener, url) = listen().await?;
        agents.push((
            listener,
            url,
            agent_config(id, script, folder.path(), duration),
        ));
    }

    let mut config = RunnerConfig::for_agent(AGENT)?;
    let steady = STEADY.iter().map(|agent| AgentSettings::named(agent.id));
    config.agents.configured.extend(steady);
    config.ping.endpoint.url = ping_url.clone();
    let gateway_url = format!("http://{gateway_address}").parse();
    let gateway_url: Url = gateway_url.context("an address is a valid host")?;
    config.gateway.endpoint.url = with_path(&gateway_url, "gateway");
    if options.live_runners {
        for agent in &mut config.agents.configured {
            agent.runner = Some(RunnerAddress {
                url: with_path(&gateway_url, &format!("apps/{}/app", agent.id)),
                fingerprint: None,
            });
            agent.is_tied = true;
        }
    }
    config.limits.duration = Some(duration);
    config.rate.base = base_rate(duration);
    config.ping.window = duration.mul_f64(WINDOW);
    // One poll a second in a demo of a minute, in case the event stream fails.
    config.ping.interval = (duration / 60).max(Duration::from_millis(20));
    writeln!(
        io::stdout(),
        "demo: four agents, one in each tier; within {duration:?} {AGENT} loses its GPU three times for a moment\n\
         demo: full uptime earns each of them {} jobs/min\n\
         demo: the ping system's dashboard is at {ping_url} until the end\n",
        config.rate.base
    )
    .context("standard output cannot be written")?;

    let mut urls = Vec::new();
    let mut running = Vec::new();
    for (listener, url, agent_config) in agents {
        let id = agent_config.rules.agent_id.clone();
        let agent = agent::run_at(listener, agent_config, &others);
        // What the steady agents lose all the time would fill the log.
        running.push(if id == AGENT {
            Either::Left(agent)
        } else {
            Either::Right(agent.with_subscriber(NoSubscriber::new()))
        });
        urls.push((id, url));
    }
    let parts = async {
        tokio::try_join!(
            try_join_all(running),
            ping_system::run_at(
                at_ping_system,
                ping_system_config(folder.path(), duration),
                &others
            ),
            async { Ok(gateway.serve(others.at_once.clone()).await?) },
        )
    };
    let story = async {
        for (id, url) in &urls {
            register(&ping_url, id, url).await?;
        }
        let ended = runner::run(config, shutdown).await;
        others.gently.cancel();
        others.at_once.cancel();
        ended
    };
    let (_, ended) = tokio::try_join!(parts, story)?;
    Ok(ended)
}

/// The live runners of all agents. Their uptimes are those that the real ping system tells.
fn runner_labels() -> anyhow::Result<BTreeMap<String, UptimeScript>> {
    let uptime: UptimeScript = "100".parse().map_err(anyhow::Error::msg)?;
    let ids = STEADY.iter().map(|agent| agent.id).chain([AGENT]);
    Ok(ids.map(|id| (id.to_owned(), uptime.clone())).collect())
}

async fn listen() -> anyhow::Result<(TcpListener, Url)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))
        .await
        .context("no port is free")?;
    let url = format!("http://{}", listener.local_addr()?).parse();
    Ok((listener, url.context("an address is a valid host")?))
}

/// What happens to each agent's GPU.
fn scripts(duration: Duration) -> impl Iterator<Item = (&'static str, GpuScript)> {
    let story = STEPS.map(|(state, share)| (state, duration.mul_f64(share)));
    let steady = STEADY.iter().map(move |agent| {
        let cycle = duration.mul_f64(PING_INTERVAL * agent.pings_per_loss);
        let lost = cycle.mul_f64(1.0 - agent.up);
        // The first ping, which only asks for a GPU, comes before the first loss.
        let (before, after) = (cycle.mul_f64(0.3), cycle.mul_f64(agent.up - 0.3));
        let steps = [
            (SimState::Up, before),
            (SimState::Lost, lost),
            (SimState::Up, after),
        ];
        (agent.id, GpuScript::new(steps.into()))
    });
    std::iter::once((AGENT, GpuScript::new(story.into()))).chain(steady)
}

fn agent_config(id: &str, script: GpuScript, folder: &Path, duration: Duration) -> AgentConfig {
    AgentConfig {
        rules: TrackerConfig {
            source: "simulated",
            agent_id: id.to_owned(),
            check_interval: (duration / 6000).max(Duration::from_millis(2)),
            max_transitions: 1000,
            require_gpus: None,
        },
        gpu: GpuSource::Simulated(script, Instant::now()),
        listen: ([127, 0, 0, 1], 0).into(),
        token: None,
        registration: None,
        ready_also: None,
        extra_roots: Vec::new(),
        server: ServerSettings::default(),
        checkpoint: CheckpointFile::new(folder.join(format!("{id}.json")), id.to_owned()),
        checkpoint_every: 1000,
    }
}

fn ping_system_config(folder: &Path, duration: Duration) -> PingSystemConfig {
    let base = duration
        .mul_f64(PING_INTERVAL)
        .max(Duration::from_millis(50));
    PingSystemConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        database: Database::Sqlite(Location::File(folder.join("ping-system.db"))),
        rules: PingPolicy {
            interval: IntervalRules {
                base,
                max: 2 * base,
                ..IntervalRules::default()
            },
            ..PingPolicy::default()
        },
        retries: 1,
        allow_simulated: true,
        references: Vec::new(),
        response_timeout: Duration::from_secs(10),
        max_concurrent: 100,
        retention: Duration::from_hours(24),
        tokens: Tokens::default(),
        server: ServerSettings::default(),
        extra_roots: Vec::new(),
        agent_tokens: AgentCredentials::default(),
        allowed: Vec::new(),
    }
}

/// Registers an agent, as its deployer does.
async fn register(ping_url: &Url, id: &str, agent_url: &Url) -> anyhow::Result<()> {
    let form = json!({
        "agent_id": id,
        "agent_url": agent_url.as_str(),
        "capabilities": ["gpu-check"],
        "metadata": { "gpu": "simulated" },
    });
    let client = net::client::new(false, Vec::new())?;
    let answer = client
        .post(with_path(ping_url, "ping-system/agents/register"))
        .body(form.to_string())
        .send()
        .await
        .map_err(|error| anyhow!("{ping_url}: {}", net::client::root_cause(&error)))?;
    let status = answer.status();
    ensure!(
        status.is_success(),
        "{ping_url}: status {status} at the registration"
    );
    Ok(())
}

/// The same number of jobs however long the demo is, but at least one a second.
fn base_rate(duration: Duration) -> JobsPerMinute {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped"
    )]
    let jobs = (JOBS * 60.0 / duration.as_secs_f64()).clamp(60.0, 60_000.0) as u32;
    JobsPerMinute::new(jobs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::rate::policy::Policy;
    use crate::units::Percent;

    #[test]
    fn the_story_leads_through_each_tier_and_back() {
        let mut lost = Vec::new();
        let mut at = 0.0;
        for (state, share) in STEPS {
            if state == SimState::Lost {
                lost.push((at, at + share));
            }
            at += share;
        }
        let rate_at = |now: f64| {
            let down: f64 = lost
                .iter()
                .map(|(from, until)| (until.min(now) - from.max(now - WINDOW)).max(0.0))
                .sum();
            let uptime = Percent::new((1.0 - down / WINDOW.min(now)) * 100.0).unwrap();
            Policy::default()
                .rate(JobsPerMinute::new(100), uptime)
                .get()
        };
        let mut rates: Vec<u32> = (1..=1000).map(|n| rate_at(f64::from(n) / 1000.0)).collect();
        rates.dedup();
        assert_eq!(rates, [100, 50, 10, 0, 10, 50, 100]);
    }
}
