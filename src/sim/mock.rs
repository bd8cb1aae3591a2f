//! A ping system and a gateway on one port, driven by scripts.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::anyhow;
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
use super::script::{FailureShare, Latency, UptimeScript};
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
    /// Agent that the ping system knows; may be repeated
    #[arg(long = "agent", value_name = "ID", default_value = "agent-001")]
    agents: Vec<String>,
    /// Uptime of the agents from given times on, such as 99.5@0s,96.2@30s,85@1m
    #[arg(long, value_name = "SCRIPT", default_value = "99.5")]
    uptime: UptimeScript,
    /// How long the gateway takes for a job, such as 45ms±10
    #[arg(long, value_name = "T", default_value = "45ms±10")]
    latency: Latency,
    /// Share of jobs that fail, such as 500:2%; may be repeated. Beside statuses there are empty
    /// (200 without a body), no-supply, unpaid, hang and reset
    #[arg(long = "fail", value_name = "KIND:SHARE")]
    failures: Vec<FailureShare>,
}

impl MockOptions {
    /// Checks what depends on several options.
    ///
    /// # Errors
    /// Shares of failures over 100 %.
    pub fn resolve(self) -> anyhow::Result<Mock> {
        let all: f64 = self.failures.iter().map(|each| each.share.get()).sum();
        if all > 100.0 {
            return Err(anyhow!(
                "--fail: the shares add up to {all} %, expected at most 100 %"
            ));
        }
        let ListenAddress(listen) = self.listen;
        let Self {
            agents,
            uptime,
            latency,
            failures,
            ..
        } = self;
        Ok(Mock {
            listen,
            agents,
            uptime,
            latency,
            failures,
        })
    }
}

/// The mock's behaviour.
#[derive(Debug)]
pub struct Mock {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The agents that the ping system lists.
    pub agents: Vec<String>,
    /// Their uptime.
    pub uptime: UptimeScript,
    /// The latency of the gateway's answers.
    pub latency: Latency,
    /// How often and how jobs fail.
    pub failures: Vec<FailureShare>,
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
    let agent = listening
        .mock
        .agents
        .first()
        .map_or("agent-001", String::as_str);
    tracing::info!("the mock answers at http://{address}");
    // The mock goes on if standard output is closed.
    let _ = write!(
        io::stdout(),
        "mock ping system and gateway at http://{address}, until Ctrl-C; in another terminal:\n  \
         uptime-runner --agent {agent} --ping-url http://{address} --gateway-url http://{address}\n",
    );
    listening.serve(shutdown.gently.clone()).await?;
    Ok(Exit::Completed(Vec::new()))
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
            agents: ids,
            uptime,
            latency,
            failures,
            ..
        } = self.mock;
        let state = Arc::new(Playing {
            agents: ids,
            uptime,
            started: Instant::now(),
        });
        let router = Router::new()
            .route("/ping-system/agents", get(agents))
            .route("/ping-system/agents/{agent_id}/history", get(history))
            .with_state(state)
            .merge(MockGateway::new(latency, failures).routes())
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
    agents: Vec<String>,
    uptime: UptimeScript,
    started: Instant,
}

impl Playing {
    fn uptime(&self) -> Percent {
        self.uptime.at(self.started.elapsed())
    }
}

fn error(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}

fn minutes_ago(minutes: u32) -> String {
    (Utc::now() - TimeDelta::minutes(minutes.into())).to_rfc3339_opts(SecondsFormat::Millis, true)
}

async fn agents(State(playing): State<Arc<Playing>>) -> Json<Value> {
    let uptime = playing.uptime();
    let agents: Vec<Value> = playing.agents.iter().map(|id| {
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
    if !playing.agents.contains(&agent_id) {
        return error(StatusCode::NOT_FOUND, "no such agent");
    }
    let pings: Vec<Value> = (0..PINGS.unsigned_abs())
        .rev()
        .map(|back| {
            json!({
                "timestamp": minutes_ago(back * PING_INTERVAL_MINUTES),
                "success": true,
                "uptime_percent": playing.uptime(),
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
