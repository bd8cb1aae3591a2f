//! The agent's routes (`.github/docs/protocol.md` section 2.1). All answer from what the last check found: none
//! waits for a driver.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use chrono::{DateTime, Utc};
use prometheus::{Gauge, GaugeVec, IntGauge, Opts, Registry, TextEncoder};
use serde::Deserialize;
use serde_json::json;

use super::application::ApplicationHealth;
use super::monitor::AgentState;
use super::tracker::RequestedWindow;
use crate::net::browsers::is_of_another_page;
use crate::net::credentials::Token;
use crate::net::metrics::metrics_answer;
use crate::net::server::{error, errors_as_json, guard};
use crate::wire::agent::{GpuHealth, GpuStatus};

const HOUR: Duration = Duration::from_hours(1);

/// All routes; all but `/agent/health` and `/agent/ready` require the token, if there is one.
pub(crate) fn routes(
    shared: Arc<AgentState>,
    application: Option<Arc<ApplicationHealth>>,
    agent_id: String,
    token: Option<Token>,
) -> Router {
    let guarded = Router::new()
        .route("/agent/uptime-since-last-ping", get(uptime))
        .route("/agent/gpu-status", get(gpu_status))
        .route("/metrics", get(metrics))
        .with_state(Arc::clone(&shared));
    let of_ready = Arc::clone(&shared);
    let ready = get(async move || ready(&of_ready, application.as_deref()));
    let health = get(async move || health(&shared, &agent_id));
    let routes = guard(guarded, token.into_iter().collect())
        .route("/agent/health", health)
        .route("/agent/ready", ready)
        .fallback(async || error(StatusCode::NOT_FOUND, "no such path"));
    errors_as_json(routes)
}

/// Whether the agent itself works; not whether its GPUs do.
fn health(shared: &AgentState, agent_id: &str) -> Response {
    let (tracker, now) = shared.tracker();
    if tracker.is_probing(now) {
        return Json(json!({ "status": "ok", "agent_id": agent_id })).into_response();
    }
    let answer = json!({
        "status": "unavailable", "agent_id": agent_id,
        "error": "the driver has not answered a probe for 10 minutes",
    });
    (StatusCode::SERVICE_UNAVAILABLE, Json(answer)).into_response()
}

/// Whether a job could be done now: what an orchestrator asks before it sends jobs to a live runner.
fn ready(shared: &AgentState, application: Option<&ApplicationHealth>) -> Response {
    let of_gpus = {
        let (tracker, now) = shared.tracker();
        (!tracker.is_up(now)).then(|| tracker.gpu_status(now).status)
    };
    let problem = of_gpus.or_else(|| application?.problem());
    match problem {
        None => Json(json!({ "status": "ready" })).into_response(),
        Some(problem) => {
            let answer = json!({ "status": "not ready", "error": problem });
            (StatusCode::SERVICE_UNAVAILABLE, Json(answer)).into_response()
        }
    }
}

#[derive(Deserialize)]
struct UptimeQuery {
    seconds: Option<String>,
    since: Option<String>,
    peek: Option<bool>,
}

impl UptimeQuery {
    /// `seconds` comes before `since`, which ping systems send along for agents of releases up to 0.1.0.
    fn window(&self) -> Result<RequestedWindow, String> {
        if let Some(text) = &self.seconds {
            return Ok(RequestedWindow::Last(parse_seconds(text)?));
        }
        if let Some(text) = &self.since {
            return Ok(RequestedWindow::Since(parse_since(text)?));
        }
        Ok(if self.peek.unwrap_or(false) {
            RequestedWindow::Peek
        } else {
            RequestedWindow::SinceLastPing
        })
    }
}

async fn uptime(
    State(shared): State<Arc<AgentState>>,
    Query(query): Query<UptimeQuery>,
    headers: HeaderMap,
) -> Response {
    let window = match query.window() {
        Ok(window) => window,
        Err(wrong) => return error(StatusCode::BAD_REQUEST, &wrong),
    };
    // It begins a window, though it is a GET.
    if window == RequestedWindow::SinceLastPing && is_of_another_page(&headers) {
        return error(
            StatusCode::FORBIDDEN,
            "a page of another origin may not begin a window",
        );
    }
    let report = {
        let (mut tracker, now) = shared.tracker();
        tracker.report(now, window)
    };
    match report {
        Ok(report) => {
            if window == RequestedWindow::SinceLastPing {
                shared.window_begun.notify_one();
            }
            Json(report).into_response()
        }
        Err(wrong) => error(StatusCode::BAD_REQUEST, &wrong.to_string()),
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok();
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| {
        format!(
            "seconds={}: expected a number from 0, such as 912.4",
            text.escape_debug()
        )
    })
}

/// A plus sign that was not escaped arrives as a space.
fn parse_since(text: &str) -> Result<DateTime<Utc>, String> {
    let parsed = DateTime::parse_from_rfc3339(&text.replace(' ', "+"));
    parsed.map(|since| since.to_utc()).map_err(|_| {
        format!(
            "since={}: expected RFC 3339, such as 2026-01-01T00:00:00Z",
            text.escape_debug()
        )
    })
}

async fn gpu_status(State(shared): State<Arc<AgentState>>) -> Json<GpuStatus> {
    let (tracker, now) = shared.tracker();
    Json(tracker.gpu_status(now))
}

async fn metrics(State(shared): State<Arc<AgentState>>) -> Response {
    metrics_answer(metrics_text(&shared))
}

#[expect(
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    reason = "counts of GPUs and checks"
)]
fn metrics_text(shared: &AgentState) -> prometheus::Result<String> {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str| -> prometheus::Result<Gauge> {
        let gauge = Gauge::new(name, help)?;
        registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    };
    let (status, hour, up) = {
        let (tracker, now) = shared.tracker();
        (
            tracker.gpu_status(now),
            tracker.window(HOUR, now),
            tracker.is_up(now),
        )
    };
    gauge("uptime_agent_up", "1 while enough GPUs are healthy.")?.set(f64::from(u8::from(up)));
    let healthy = IntGauge::new("uptime_agent_gpus_healthy", "GPUs that are well.")?;
    registry.register(Box::new(healthy.clone()))?;
    healthy.set(status.gpu_count as i64);
    gauge(
        "uptime_agent_uptime_1h_percent",
        "Uptime over the last hour.",
    )?
    .set(hour.uptime().get());
    gauge("uptime_agent_checks_1h", "Checks in the last hour.")?.set(hour.checks_total as f64);
    let by_device = GaugeVec::new(
        Opts::new(
            "uptime_agent_gpu_health",
            "1 for a GPU that is well; health says why not.",
        ),
        &["gpu", "health"],
    )?;
    registry.register(Box::new(by_device.clone()))?;
    for (index, device) in &status.devices {
        let ok = f64::from(u8::from(device.health == GpuHealth::Ok));
        by_device
            .with_label_values(&[&index.to_string(), &device.health.to_string()])
            .set(ok);
    }
    TextEncoder::new().encode_to_string(&registry.gather())
}
