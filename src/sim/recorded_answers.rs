//! The answers of real gateways that the mock can give (`tests/fixtures/gateway`).

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use futures_util::{StreamExt, stream};
use serde::Deserialize;

/// An answer that a gateway, or a proxy in front of it, gave.
#[derive(Debug, Deserialize)]
pub(crate) struct RecordedAnswer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
    then: Option<Then>,
}

/// What the connection does after the body.
#[derive(Debug, Deserialize)]
struct Then {
    /// Sent without end.
    repeat: String,
}

macro_rules! files {
    ($($name:literal,)*) => {
        &[$(($name, include_str!(concat!("../../tests/fixtures/gateway/", $name, ".json")))),*]
    };
}

const FILES: &[(&str, &str)] = files![
    "all-orchestrators-failed",
    "header-not-base64",
    "insufficient-balance",
    "method-not-allowed",
    "no-livepeer-header",
    "no-orchestrators-found",
    "orchestrator-in-place-of-gateway",
    "orchestrator-lost-mid-body",
    "parameters-not-object",
    "proxy-401",
    "proxy-404",
    "proxy-404-with-security-headers",
    "proxy-429-retry-after",
    "proxy-502",
    "proxy-503-retry-after",
    "proxy-522",
    "request-not-json",
    "stream",
    "stream-cut",
    "stream-done-by-two",
    "stream-error-event",
    "stream-out-of-funds",
    "stream-worker-500",
    "success",
    "success-empty-body",
    "success-negative-balance",
    "success-price-zero",
    "success-under-an-alias",
    "timeout-fraction",
    "timeout-missing",
    "worker-400-looks-like-balance",
    "worker-400-looks-like-parse",
    "worker-404",
    "worker-429",
    "wrong-path-at-the-node",
];

/// The index of a recorded answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordedIndex(usize);

impl RecordedIndex {
    /// The answer of this name.
    #[must_use]
    pub(crate) fn named(name: &str) -> Option<Self> {
        FILES.iter().position(|(known, _)| *known == name).map(Self)
    }

    /// The name of each answer.
    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        FILES.iter().map(|(name, _)| *name)
    }

    pub(crate) fn answer(self) -> RecordedAnswer {
        let (_, json) = FILES[self.0];
        serde_json::from_str(json).expect("each file holds a recorded answer, which a test reads")
    }
}

impl RecordedAnswer {
    pub(crate) fn into_response(self) -> Response {
        let body = match self.then {
            None => Body::from(self.body),
            Some(Then { repeat }) => {
                let (first, rest) = (Bytes::from(self.body), Bytes::from(repeat.repeat(64)));
                let rest = stream::repeat(rest);
                let pieces = stream::once(std::future::ready(first)).chain(rest);
                Body::from_stream(pieces.map(Ok::<_, Infallible>))
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(self.status).expect("a recorded status");
        for (name, value) in self.headers {
            let name = HeaderName::try_from(name).expect("a recorded name");
            let value = HeaderValue::try_from(value).expect("a recorded value");
            // The server computes it.
            if name != CONTENT_LENGTH {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn each_recorded_answer_can_be_given() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gateway");
        let files = std::fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().path());
        let stem =
            |file: std::path::PathBuf| file.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut names: Vec<String> = files.map(stem).collect();
        names.sort();
        assert_eq!(names, RecordedIndex::names().collect::<Vec<_>>());
        for name in names {
            let response = RecordedIndex::named(&name)
                .unwrap()
                .answer()
                .into_response();
            assert!(response.status().as_u16() >= 200, "{name}");
        }
    }
}
