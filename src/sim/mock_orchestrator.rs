//! An orchestrator with live runners, in go-livepeer's words.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::header::HOST;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use fastrand::Rng;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::mock_gateway::{Cut, gateways_error};
use super::recorded_answers::{RecordedIndex, RecordedSet};
use super::script::{FailureShare, Latency};
use crate::wire::live_runner::JOB_ID_HEADER;

/// What is listed if `--capacity` does not say.
const CAPACITY: u32 = 1000;

/// A way in which a live runner's job fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunnerFailure {
    /// The worker's own HTTP status.
    Status(u16),
    /// No answer, ever.
    Hang,
    /// The connection ends before the answer is complete.
    Reset,
    /// The worker is gone: this job gets a 502, and then the runner is listed no more.
    WorkerGone,
    /// As a real orchestrator or worker answered.
    Recorded(RecordedIndex),
}

impl FromStr for RunnerFailure {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let status = || text.parse().ok().filter(|s| (300..600).contains(s));
        match text {
            "hang" => Ok(Self::Hang),
            "reset" => Ok(Self::Reset),
            "worker-gone" => Ok(Self::WorkerGone),
            other => match (
                RecordedIndex::named(RecordedSet::LiveRunner, other),
                status(),
            ) {
                (Some(recorded), _) => Ok(Self::Recorded(recorded)),
                (None, Some(status)) => Ok(Self::Status(status)),
                (None, None) => {
                    let recorded: Vec<&str> =
                        RecordedIndex::names(RecordedSet::LiveRunner).collect();
                    Err(format!(
                        "a status from 300 to 599, hang, reset, worker-gone, or a recorded answer: {}",
                        recorded.join(", ")
                    ))
                }
            },
        }
    }
}

/// The mock's orchestrator.
#[derive(Debug)]
pub(super) struct MockOrchestrator {
    latency: Latency,
    capacity: u32,
    failures: Vec<FailureShare<RunnerFailure>>,
    /// By label.
    runners: Mutex<HashMap<String, Runner>>,
    rng: Mutex<Rng>,
}

#[derive(Debug, Default)]
struct Runner {
    in_use: u32,
    is_gone: bool,
}

/// A job's place at a runner. It is free again when the job has ended or its client has gone.
struct Place {
    orchestrator: Arc<MockOrchestrator>,
    label: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(runner) = self.orchestrator.runners.lock().get_mut(&self.label) {
            runner.in_use -= 1;
        }
    }
}

/// Why a job has no place.
enum NoPlace {
    NotFound,
    Full,
}

impl MockOrchestrator {
    /// With a runner for each label.
    pub(super) fn new(
        labels: impl Iterator<Item = String>,
        latency: Latency,
        capacity: Option<NonZeroU32>,
        failures: Vec<FailureShare<RunnerFailure>>,
    ) -> Self {
        Self {
            latency,
            capacity: capacity.map_or(CAPACITY, NonZeroU32::get),
            failures,
            runners: Mutex::new(labels.map(|label| (label, Runner::default())).collect()),
            rng: Mutex::new(Rng::new()),
        }
    }

    pub(super) fn routes(self) -> Router {
        Router::new()
            .route("/discovery", get(discovery))
            .route("/apps/{label}/app/{*route}", post(job))
            .with_state(Arc::new(self))
    }

    fn take_place(self: &Arc<Self>, label: &str) -> Result<Place, NoPlace> {
        let mut runners = self.runners.lock();
        let runner = runners.get_mut(label).filter(|runner| !runner.is_gone);
        let runner = runner.ok_or(NoPlace::NotFound)?;
        if runner.in_use >= self.capacity {
            return Err(NoPlace::Full);
        }
        runner.in_use += 1;
        Ok(Place {
            orchestrator: Arc::clone(self),
            label: label.to_owned(),
        })
    }

    fn draw(&self) -> (Duration, Option<RunnerFailure>) {
        let mut rng = self.rng.lock();
        (
            self.latency.draw(&mut rng),
            FailureShare::draw(&self.failures, &mut rng),
        )
    }
}

async fn discovery(
    State(orchestrator): State<Arc<MockOrchestrator>>,
    headers: HeaderMap,
) -> Json<Value> {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let address = format!("http://{}", host.unwrap_or_default());
    let runners = orchestrator.runners.lock();
    let there = runners.iter().filter(|(_, runner)| !runner.is_gone);
    let sorted: BTreeMap<&String, &Runner> = there.collect();
    let capacity = orchestrator.capacity;
    let listed = sorted.into_iter().map(|(label, runner)| {
        json!({
            "url": format!("{address}/apps/{label}/app"),
            "app": "mock/app",
            "mode": "single-shot",
            "capacity": capacity,
            "capacity_used": runner.in_use,
            "capacity_available": capacity - runner.in_use,
        })
    });
    let listed: Vec<Value> = listed.collect();
    Json(json!([{ "address": address, "runners": listed }]))
}

async fn job(
    State(orchestrator): State<Arc<MockOrchestrator>>,
    Path((label, route)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let _place = match orchestrator.take_place(&label) {
        Ok(place) => place,
        Err(NoPlace::NotFound) => return recorded("runner-not-found"),
        Err(NoPlace::Full) => return recorded("no-capacity"),
    };
    let (latency, failure) = orchestrator.draw();
    // Even a timer of zero length would wait for the next millisecond.
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    match failure {
        None => {
            let id = headers.get(JOB_ID_HEADER).and_then(|id| id.to_str().ok());
            let answer = json!({
                "status": "success", "job_id": id, "route": route, "body_bytes": body.len(),
            });
            Json(answer).into_response()
        }
        Some(RunnerFailure::Status(status)) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let answer = json!({ "error": "the mock fails this job on purpose" });
            (status, Json(answer)).into_response()
        }
        Some(RunnerFailure::Hang) => std::future::pending().await,
        Some(RunnerFailure::Reset) => Body::new(Cut::default()).into_response(),
        Some(RunnerFailure::WorkerGone) => {
            if let Some(runner) = orchestrator.runners.lock().get_mut(&label) {
                runner.is_gone = true;
            }
            recorded("worker-refuses")
        }
        Some(RunnerFailure::Recorded(recorded)) => recorded.answer().into_response(),
    }
}

/// What an orchestrator answered.
fn recorded(name: &str) -> Response {
    RecordedIndex::named(RecordedSet::LiveRunner, name).map_or_else(
        || gateways_error(StatusCode::NOT_FOUND, "404 page not found"),
        |recorded| recorded.answer().into_response(),
    )
}
