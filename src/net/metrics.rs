//! The `/metrics` route, in Prometheus' text format.

use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::server::error;

/// Serves the text that `text` returns at `/metrics`, in Prometheus' text format.
pub(crate) fn metrics_routes<F>(text: F) -> Router
where
    F: Fn() -> prometheus::Result<String> + Send + Sync + 'static,
{
    let text = Arc::new(text);
    let metrics = get(move || {
        let text = Arc::clone(&text);
        async move { metrics_answer(text()) }
    });
    Router::new().route("/metrics", metrics)
}

/// An answer in Prometheus' text format.
#[must_use]
pub(crate) fn metrics_answer(text: prometheus::Result<String>) -> Response {
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(wrong) => error(StatusCode::INTERNAL_SERVER_ERROR, &wrong.to_string()),
    }
}
