//! A ping system and a gateway on one port, driven by scripts. As a gateway it takes and
//! refuses jobs as go-livepeer does, in its words.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::anyhow;
use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, Request, State};
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, serve::ListenerExt};
use chrono::{SecondsFormat, TimeDelta, Utc};
use fastrand::Rng;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::job_request::{self, JobRequest};
use super::script::{Failure, FailureShare, Latency, UptimeScript};
use crate::net;
use crate::option_values::ListenAddress;
use crate::runner::Exit;
use crate::shutdown::Shutdown;
use crate::units::Percent;
use crate::wire::gateway::{BALANCE_HEADER, JOB_HEADER, METADATA_HEADER, ORCHESTRATOR_HEADER};

const PING_INTERVAL_MINUTES: u32 = 15;
/// How many pings of the last hour the mock's agents have.
const PINGS: i32 = 4;
const ORCHESTRATOR: &str = "https://orchestrator.mock.example:8935";
const BALANCE_WEI: i64 = 1_000_000_000_000_000_000;
const MAX_BOOKS: usize = 10_000;
const PRICE_WEI: i64 = 1_000_000_000_000;

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
        let state = Arc::new(Playing {
            started: Instant::now(),
            balances_wei: Mutex::default(),
            rng: Mutex::new(Rng::new()),
            mock: self.mock,
        });
        let router = Router::new()
            .route("/ping-system/agents", get(agents))
            .route("/ping-system/agents/{agent_id}/history", get(history))
            .route("/process/request/{*route}", post(job))
            .route("/gateway/process/request/{*route}", post(job))
            .fallback(async || gateways_error(StatusCode::NOT_FOUND, "404 page not found"))
            .method_not_allowed_fallback(async || {
                gateways_error(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed")
            })
            .layer(middleware::from_fn(redirect_double_slashes))
            .with_state(state);
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
    mock: Mock,
    started: Instant,
    /// By orchestrator and capability.
    balances_wei: Mutex<HashMap<(String, String), i64>>,
    rng: Mutex<Rng>,
}

impl Playing {
    /// Takes the price of a job from a book, and tells what is left.
    fn pay(&self, book: (String, String)) -> i64 {
        let mut balances = self.balances_wei.lock();
        // What clients make up must not fill the memory.
        if balances.len() >= MAX_BOOKS {
            balances.clear();
        }
        let balance = balances.entry(book).or_insert(BALANCE_WEI);
        *balance -= PRICE_WEI;
        *balance
    }

    fn uptime(&self) -> Percent {
        self.mock.uptime.at(self.started.elapsed())
    }

    fn draw(&self) -> (Duration, Option<Failure>) {
        let mut rng = self.rng.lock();
        (
            self.mock.latency.draw(&mut rng),
            FailureShare::draw(&self.mock.failures, &mut rng),
        )
    }
}

fn error(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}

/// Redirects as Go's `ServeMux` does, which turns a POST into a GET.
async fn redirect_double_slashes(request: Request, next: Next) -> Response {
    let mut path = request.uri().path().to_owned();
    if !path.contains("//") {
        return next.run(request).await;
    }
    while path.contains("//") {
        path = path.replace("//", "/");
    }
    Redirect::permanent(&path).into_response()
}

fn minutes_ago(minutes: u32) -> String {
    (Utc::now() - TimeDelta::minutes(minutes.into())).to_rfc3339_opts(SecondsFormat::Millis, true)
}

async fn agents(State(playing): State<Arc<Playing>>) -> Json<Value> {
    let uptime = playing.uptime();
    let agents: Vec<Value> = playing.mock.agents.iter().map(|id| {
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
    if !playing.mock.agents.contains(&agent_id) {
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

async fn job(
    State(playing): State<Arc<Playing>>,
    Path(route): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    // Of several the gateway reads the first, and an empty one where there is none.
    let header = headers
        .get(JOB_HEADER)
        .map_or(&b""[..], |value| value.as_bytes());
    let job = match job_request::read(header) {
        Ok(job) => job,
        Err(wrong) => return gateways_error(StatusCode::BAD_REQUEST, &wrong),
    };
    let (latency, failure) = playing.draw();
    // Even a timer of zero length would wait for the next millisecond.
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    match failure {
        None => success(&playing, job, &route, body.len()),
        Some(failure) => fail(failure, &job).await,
    }
}

fn success(playing: &Playing, job: JobRequest, route: &str, body_bytes: usize) -> Response {
    let body = json!({
        "status": "success", "job_id": job.id, "route": route, "body_bytes": body_bytes,
    });
    let orchestrator = job.orchestrator.unwrap_or_else(|| ORCHESTRATOR.to_owned());
    let book = (orchestrator.clone(), job.capability);
    let headers = [
        (ORCHESTRATOR_HEADER, orchestrator),
        (BALANCE_HEADER, playing.pay(book).to_string()),
        (METADATA_HEADER, String::new()),
    ];
    // As text, whatever the worker called it.
    (headers, body.to_string()).into_response()
}

/// As go-livepeer's `http.Error` writes it.
fn gateways_error(status: StatusCode, text: &str) -> Response {
    let headers = [
        (CONTENT_TYPE, "text/plain; charset=utf-8"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, format!("{text}\n")).into_response()
}

async fn fail(failure: Failure, job: &JobRequest) -> Response {
    match failure {
        Failure::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            gateways_error(status, "the mock fails this job on purpose")
        }
        Failure::Empty => StatusCode::OK.into_response(),
        Failure::NoSupply => {
            let text = format!("No orchestrators found for capability {}", job.capability);
            gateways_error(StatusCode::BAD_REQUEST, &text)
        }
        Failure::Unpaid => {
            gateways_error(StatusCode::BAD_REQUEST, "Insufficient balance for request")
        }
        Failure::Hang => std::future::pending().await,
        Failure::Reset => Body::new(Cut { begun: false }).into_response(),
    }
}

/// A body that breaks off after its first bytes.
struct Cut {
    begun: bool,
}

impl HttpBody for Cut {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, io::Error>>> {
        let piece = if self.begun {
            Err(io::ErrorKind::ConnectionReset.into())
        } else {
            Ok(http_body::Frame::data(Bytes::from_static(b"{\"status\":")))
        };
        self.begun = true;
        Poll::Ready(Some(piece))
    }
}
