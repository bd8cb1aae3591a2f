//! A gateway that takes and refuses jobs as go-livepeer does, in its words.

use std::collections::HashMap;
use std::io;
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
const MAX_BOOKS: usize = 10_000;
const PRICE_WEI: i64 = 1_000_000_000_000;

/// The mock's gateway.
#[derive(Debug)]
pub(super) struct MockGateway {
    latency: Latency,
    failures: Vec<FailureShare>,
    /// By orchestrator and capability.
    balances_wei: Mutex<HashMap<(String, String), i64>>,
    rng: Mutex<Rng>,
}

impl MockGateway {
    pub(super) fn new(latency: Latency, failures: Vec<FailureShare>) -> Self {
        Self {
            latency,
            failures,
            balances_wei: Mutex::default(),
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
    let (latency, failure) = gateway.draw();
    // Even a timer of zero length would wait for the next millisecond.
    if !latency.is_zero() {
        tokio::time::sleep(latency).await;
    }
    match failure {
        None => success(&gateway, job, &route, body.len()),
        Some(failure) => fail(failure, &job).await,
    }
}

fn success(gateway: &MockGateway, job: JobRequest, route: &str, body_bytes: usize) -> Response {
    let body = json!({
        "status": "success", "job_id": job.id, "route": route, "body_bytes": body_bytes,
    });
    let orchestrator = job.orchestrator.unwrap_or_else(|| ORCHESTRATOR.to_owned());
    let book = (orchestrator.clone(), job.capability);
    let headers = [
        (ORCHESTRATOR_HEADER, orchestrator),
        (BALANCE_HEADER, gateway.pay(book).to_string()),
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
