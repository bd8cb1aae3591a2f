//! A gateway that takes and refuses jobs as go-livepeer does, in its words.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Path, Request, State};
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::post;
use fastrand::Rng;
use parking_lot::Mutex;
use serde_json::json;

use super::job_request::{self, JobRequest};
use super::script::{Failure, FailureShare, Latency};
use crate::wire::gateway::{BALANCE_HEADER, JOB_HEADER, METADATA_HEADER, ORCHESTRATOR_HEADER};

const ORCHESTRATOR: &str = "https://orchestrator.mock.example:8935";
const BALANCE_WEI: i64 = 1_000_000_000_000_000_000;
const MAX_WORKERS: usize = 10_000;
const PRICE_WEI: i64 = 1_000_000_000_000;

/// The mock's gateway.
#[derive(Debug)]
pub(super) struct MockGateway {
    latency: Latency,
    capacity: Option<NonZeroU32>,
    failures: Vec<FailureShare>,
    /// By orchestrator and capability.
    workers: Mutex<HashMap<WorkerKey, Worker>>,
    rng: Mutex<Rng>,
}

type WorkerKey = (String, String);

/// What an orchestrator knows of a capability.
#[derive(Debug)]
struct Worker {
    balance_wei: i64,
    /// Jobs under way, and those whose client went away.
    in_use: u32,
    is_gone: bool,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            balance_wei: BALANCE_WEI,
            in_use: 0,
            is_gone: false,
        }
    }
}

impl MockGateway {
    pub(super) fn new(
        latency: Latency,
        capacity: Option<NonZeroU32>,
        failures: Vec<FailureShare>,
    ) -> Self {
        Self {
            latency,
            capacity,
            failures,
            workers: Mutex::default(),
            rng: Mutex::new(Rng::new()),
        }
    }

    /// Its routes, with and without a proxy's prefix, and its answers to everything else.
    pub(super) fn routes(self) -> Router {
        Router::new()
            .route("/process/request/{*route}", post(job))
            .route("/gateway/process/request/{*route}", post(job))
            .fallback(async || gateways_error(StatusCode::NOT_FOUND, "404 page not found"))
            .method_not_allowed_fallback(async || {
                gateways_error(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed")
            })
            .with_state(Arc::new(self))
    }

    fn worker<T>(&self, key: &WorkerKey, change: impl FnOnce(&mut Worker) -> T) -> T {
        let mut workers = self.workers.lock();
        // What clients make up must not fill the memory.
        if workers.len() >= MAX_WORKERS {
            workers.clear();
        }
        change(workers.entry(key.clone()).or_default())
    }

    /// Whether an orchestrator takes a job, which then has a place there.
    fn take_place(&self, key: &WorkerKey) -> bool {
        self.worker(key, |worker| {
            let is_full = self.capacity.is_some_and(|n| worker.in_use >= n.get());
            let is_taken = !worker.is_gone && !is_full;
            worker.in_use += u32::from(is_taken);
            is_taken
        })
    }

    fn free_place(&self, key: &WorkerKey) {
        self.worker(key, |worker| {
            worker.in_use = worker.in_use.saturating_sub(1);
        });
    }

    /// Takes the price of a job from a balance, and tells what is left.
    fn pay(&self, key: &WorkerKey) -> i64 {
        self.worker(key, |worker| {
            worker.balance_wei -= PRICE_WEI;
            worker.balance_wei
        })
    }

    fn draw(&self) -> (Duration, Option<Failure>) {
        let mut rng = self.rng.lock();
        (
            self.latency.draw(&mut rng),
            FailureShare::draw(&self.failures, &mut rng),
        )
    }
}

/// Redirects as Go's `ServeMux` does, which turns a POST into a GET.
pub(super) async fn redirect_double_slashes(request: Request, next: Next) -> Response {
    let mut path = request.uri().path().to_owned();
    if !path.contains("//") {
        return next.run(request).await;
    }
    while path.contains("//") {
        path = path.replace("//", "/");
    }
    Redirect::permanent(&path).into_response()
}

async fn job(
    State(gateway): State<Arc<MockGateway>>,
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
    let orchestrator = job.orchestrator.as_deref().unwrap_or(ORCHESTRATOR);
    let worker = (orchestrator.to_owned(), job.capability.clone());
    if !gateway.take_place(&worker) {
        return no_supply(&job);
    }
    let (latency, failure) = gateway.draw();
    // Even a timer of zero length would wait for the next millisecond.
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    let answer = match failure {
        None => success(&gateway, &job, &worker, &route, body.len()),
        Some(failure) => fail(failure, &gateway, &job, &worker).await,
    };
    // Not on drop: as at an orchestrator, a job whose client goes away keeps its place.
    gateway.free_place(&worker);
    answer
}

fn success(
    gateway: &MockGateway,
    job: &JobRequest,
    worker: &WorkerKey,
    route: &str,
    body_bytes: usize,
) -> Response {
    let body = json!({
        "status": "success", "job_id": job.id, "route": route, "body_bytes": body_bytes,
    });
    let (orchestrator, _) = worker;
    let headers = [
        (ORCHESTRATOR_HEADER, orchestrator.clone()),
        (BALANCE_HEADER, gateway.pay(worker).to_string()),
        (METADATA_HEADER, String::new()),
    ];
    // As text, whatever the worker called it.
    (headers, body.to_string()).into_response()
}

fn no_supply(job: &JobRequest) -> Response {
    let text = format!("No orchestrators found for capability {}", job.capability);
    gateways_error(StatusCode::BAD_REQUEST, &text)
}

/// As go-livepeer's `http.Error` writes it.
pub(super) fn gateways_error(status: StatusCode, text: &str) -> Response {
    let headers = [
        (CONTENT_TYPE, "text/plain; charset=utf-8"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, format!("{text}\n")).into_response()
}

async fn fail(
    failure: Failure,
    gateway: &MockGateway,
    job: &JobRequest,
    worker: &WorkerKey,
) -> Response {
    match failure {
        Failure::Status(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            gateways_error(status, "the mock fails this job on purpose")
        }
        Failure::Empty => StatusCode::OK.into_response(),
        Failure::NoSupply => no_supply(job),
        Failure::Unpaid => {
            gateways_error(StatusCode::BAD_REQUEST, "Insufficient balance for request")
        }
        Failure::Hang => std::future::pending().await,
        Failure::WorkerGone => {
            gateway.worker(worker, |worker| worker.is_gone = true);
            StatusCode::OK.into_response()
        }
        Failure::Recorded(recorded) => recorded.answer().into_response(),
        Failure::Reset => Body::new(Cut::default()).into_response(),
    }
}

/// A body that breaks off after its first bytes.
#[derive(Default)]
pub(super) struct Cut {
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
