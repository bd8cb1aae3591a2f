//! A ping system, a gateway and an orchestrator with live runners on one port, driven by scripts.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use anyhow::{anyhow, ensure};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, serve::ListenerExt};
use chrono::{SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::mock_gateway::{self, MockGateway};
use super::mock_orchestrator::{MockOrchestrator, RunnerFailure};
use super::script::{FailureShare, Latency, ScriptedAgent, UptimeScript};
use crate::net;
use crate::option_values::ListenAddress;
use crate::runner::Exit;
use crate::shutdown::Shutdown;
use crate::units::Percent;

const PING_INTERVAL_MINUTES: u32 = 15;
/// How many pings of the last hour the mock's agents have.
const PINGS: i32 = 4;

/// `uptime-runner mock`.
#[derive(Debug, clap::Args)]
pub struct MockOptions {
    /// Where both are reached
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8888")]
    listen: ListenAddress,
    /// Agent that the ping system knows, with its uptime if it has one of its own, such as
    /// agent-001=99.5@0s,85@30s; may be repeated
    #[arg(
        long = "agent",
        value_name = "ID[=SCRIPT]",
        default_value = "agent-001"
    )]
    agents: Vec<ScriptedAgent>,
    /// Uptime of the other agents from given times on, such as 99.5@0s,96.2@30s,85@1m
    #[arg(long, value_name = "SCRIPT", default_value = "99.5")]
    uptime: UptimeScript,
    /// How long the gateway takes for a job, such as 45ms±10
    #[arg(long, value_name = "T", default_value = "45ms±10")]
    latency: Latency,
    /// How many jobs an orchestrator does at once for a capability; more of them find no orchestrator. A job whose
    /// client goes away keeps its place. Also how many a live runner does at once [default there: 1000]
    #[arg(long, value_name = "N")]
    capacity: Option<NonZeroU32>,
    /// Share of jobs that fail, such as 500:2%; may be repeated. Beside statuses there are empty
    /// (200 without a body), no-supply, unpaid, hang, reset, worker-gone (one empty 200, then no-supply for ever), and
    /// what real gateways and proxies answered: the names of the files in tests/fixtures/gateway, such as
    /// proxy-502 or stream-cut
    #[arg(long = "fail", value_name = "KIND:SHARE")]
    failures: Vec<FailureShare>,
    /// The same of live runners' jobs: statuses (the worker's own), hang, reset, worker-gone (one 502, then the runner is
    /// listed no more), and what real orchestrators and workers answered: the names of the files in
    /// tests/fixtures/live-runner, such as no-capacity
    #[arg(long = "fail-runner", value_name = "KIND:SHARE")]
    runner_failures: Vec<FailureShare<RunnerFailure>>,
}

impl MockOptions {
    /// Checks what depends on several options.
    ///
    /// # Errors
    /// Shares of failures over 100 %, an agent that is named twice.
    pub fn resolve(self) -> anyhow::Result<Mock> {
        let of_gateway = self.failures.iter().map(|each| each.share);
        let of_runners = self.runner_failures.iter().map(|each| each.share);
        at_most_all("--fail", of_gateway)?;
        at_most_all("--fail-runner", of_runners)?;
        let ListenAddress(listen) = self.listen;
        let mut agents = BTreeMap::new();
        for ScriptedAgent { id, uptime } in self.agents {
            let uptime = uptime.unwrap_or_else(|| self.uptime.clone());
            if agents.insert(id.clone(), uptime).is_some() {
                return Err(anyhow!("--agent: '{id}' is named twice, expected once"));
            }
        }
        Ok(Mock {
            listen,
            agents,
            latency: self.latency,
            capacity: self.capacity,
            failures: self.failures,
            runner_failures: self.runner_failures,
        })
    }
}

fn at_most_all(option: &str, shares: impl Iterator<Item = Percent>) -> anyhow::Result<()> {
    let all: f64 = shares.map(Percent::get).sum();
    ensure!(
        all <= 100.0,
        "{option}: the shares add up to {all} %, expected at most 100 %"
    );
    Ok(())
}

/// The mock's behaviour.
#[derive(Debug)]
pub struct Mock {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The agents that the ping system lists, and their uptimes.
    pub agents: BTreeMap<String, UptimeScript>,
    /// The latency of the gateway's answers.
    pub latency: Latency,
    /// How many jobs each orchestrator does at once for each capability.
    pub capacity: Option<NonZeroU32>,
    /// How often and how jobs fail.
    pub failures: Vec<FailureShare>,
    pub runner_failures: Vec<FailureShare<RunnerFailure>>,
}

/// A mock with an open listener.
#[derive(Debug)]
pub struct MockServer {
    listener: TcpListener,
    mock: Mock,
}

/// Serves both until the first signal.
///
/// # Errors
/// When it cannot listen.
pub async fn run(mock: Mock, shutdown: &Shutdown) -> anyhow::Result<Exit> {
    let (listening, address) = mock.bind().await?;
    let agents = match listening.mock.agents.keys().next() {
        Some(agent) if listening.mock.agents.len() == 1 => format!("--agent {agent}"),
        _ => "--all-agents".to_owned(),
    };
    tracing::info!("the mock answers at http://{address}");
    // The mock goes on if standard output is closed.
    let _ = write!(
        io::stdout(),
        "mock ping system and gateway at http://{address}, until Ctrl-C; in another terminal:\n  \
         uptime-runner {agents} --ping-url http://{address} --gateway-url http://{address}\n\
         or, for live runners, with a file in which each agent has\n  \
         runner = \"http://{address}/apps/ID/app\"\n",
    );
    listening.serve(shutdown.gently.clone()).await?;
    Ok(Exit::Completed)
}

impl Mock {
    /// Binds the listener, and returns its address with the server.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(self) -> anyhow::Result<(MockServer, SocketAddr)> {
        let listener = net::server::listen("--listen", self.listen).await?;
        let address = listener.local_addr()?;
        Ok((
            MockServer {
                listener,
                mock: self,
            },
            address,
        ))
    }
}

impl MockServer {
    /// Serves until `stop`.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, stop: CancellationToken) -> io::Result<()> {
        let Mock {
            agents: scripts,
            latency,
            capacity,
            failures,
            runner_failures,
            ..
        } = self.mock;
        let labels = scripts.keys().cloned();
        let orchestrator = MockOrchestrator::new(labels, latency, capacity, runner_failures);
        let state = Arc::new(Playing {
            agents: scripts,
            started: Instant::now(),
        });
        let router = Router::new()
            .route("/ping-system/agents", get(agents))
            .route("/ping-system/agents/{agent_id}/history", get(history))
            .with_state(state)
            .merge(orchestrator.routes())
            .merge(MockGateway::new(latency, capacity, failures).routes())
            .layer(middleware::from_fn(mock_gateway::redirect_double_slashes));
        let listener = self.listener.tap_io(|connection| {
            // Without TCP_NODELAY answers are only slower, so a failure is ignored.
            let _ = connection.set_nodelay(true);
        });
        tokio::select! {
            served = axum::serve(listener, router) => served,
            () = stop.cancelled() => Ok(()),
        }
    }
}

struct Playing {
    agents: BTreeMap<String, UptimeScript>,
    started: Instant,
}

fn error(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}

fn minutes_ago(minutes: u32) -> String {
    (Utc::now() - TimeDelta::minutes(minutes.into())).to_rfc3339_opts(SecondsFormat::Millis, true)
}

async fn agents(State(playing): State<Arc<Playing>>) -> Json<Value> {
    let agents: Vec<Value> = playing.agents.iter().map(|(id, script)| {
        let uptime = script.at(playing.started.elapsed());
        json!({
            "agent_id": id,
            "agent_url": "http://127.0.0.1:8001",
            "capabilities": ["gpu-check", "text-to-image", "prompt-enhance"],
            "metadata": {},
            "status": "active",
            "registered_at": minutes_ago(60),
            "last_ping_at": minutes_ago(0),
            "next_ping_at": (Utc::now() + TimeDelta::minutes(PING_INTERVAL_MINUTES.into())).to_rfc3339_opts(SecondsFormat::Millis, true),
            "total_pings": PINGS,
            "consecutive_poor_uptime": i32::from(uptime.get() < 99.0),
            "ping_interval_minutes": PING_INTERVAL_MINUTES,
            "last_uptime_percent": uptime,
        })
    }).collect();
    Json(json!({ "count": agents.len(), "agents": agents }))
}

/// All pings of the last hour say what the script says now, so that a new step shows at once.
async fn history(State(playing): State<Arc<Playing>>, Path(agent_id): Path<String>) -> Response {
    let Some(script) = playing.agents.get(&agent_id) else {
        return error(StatusCode::NOT_FOUND, "no such agent");
    };
    let uptime = script.at(playing.started.elapsed());
    let pings: Vec<Value> = (0..PINGS.unsigned_abs())
        .rev()
        .map(|back| {
            json!({
                "timestamp": minutes_ago(back * PING_INTERVAL_MINUTES),
                "success": true,
                "uptime_percent": uptime,
                "window_seconds": PING_INTERVAL_MINUTES * 60,
                "gpu_available": true,
                "first_ping": false,
                "response_time_ms": 12.5,
                "error": null,
            })
        })
        .collect();
    Json(json!({ "agent_id": agent_id, "hours": 1, "count": pings.len(), "pings": pings }))
        .into_response()
}
