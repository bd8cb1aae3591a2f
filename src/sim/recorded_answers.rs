//! The answers of real gateways and orchestrators that the mock can give (`tests/fixtures/gateway` and `live-runner`).

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use futures_util::{StreamExt, stream};
use serde::Deserialize;

/// An answer that a gateway or an orchestrator, or a proxy in front of it, gave.
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
    ($folder:literal: $($name:literal,)*) => {
        &[$(($name, include_str!(concat!("../../tests/fixtures/", $folder, "/", $name, ".json")))),*]
    };
}

/// Names and texts of files.
type Files = &'static [(&'static str, &'static str)];

const OF_GATEWAYS: Files = files!["gateway":
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

/// Answers to jobs; the folder has others, too.
const OF_LIVE_RUNNERS: Files = files!["live-runner":
    "challenge",
    "challenge-without-payer",
    "clear-http-to-tls",
    "money-ran-out",
    "no-capacity",
    "no-capacity-newer",
    "payment-replayed",
    "persistent-runner",
    "proxy-502",
    "runner-not-found",
    "runner-unavailable-newer",
    "stream",
    "stream-error-event",
    "success",
    "success-empty-body",
    "worker-402",
    "worker-404",
    "worker-429",
    "worker-500",
    "worker-503-own-words",
    "worker-closes",
    "worker-gone-newer",
    "worker-refuses",
    "worker-resets",
    "wrong-path-at-the-node",
];

/// Whose answers they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordedSet {
    Gateway,
    LiveRunner,
}

impl RecordedSet {
    fn files(self) -> Files {
        match self {
            Self::Gateway => OF_GATEWAYS,
            Self::LiveRunner => OF_LIVE_RUNNERS,
        }
    }
}

/// The index of a recorded answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordedIndex(RecordedSet, usize);

impl RecordedIndex {
    /// The answer of this name.
    #[must_use]
    pub(crate) fn named(set: RecordedSet, name: &str) -> Option<Self> {
        let index = set.files().iter().position(|(known, _)| *known == name);
        index.map(|index| Self(set, index))
    }

    /// The name of each answer.
    pub(crate) fn names(set: RecordedSet) -> impl Iterator<Item = &'static str> {
        set.files().iter().map(|(name, _)| *name)
    }

    pub(crate) fn answer(self) -> RecordedAnswer {
        let Self(set, index) = self;
        let (_, json) = set.files()[index];
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
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        for (set, folder) in [
            (RecordedSet::Gateway, "gateway"),
            (RecordedSet::LiveRunner, "live-runner"),
        ] {
            let files = std::fs::read_dir(fixtures.join(folder)).unwrap();
            let files = files.map(|file| file.unwrap().path());
            // Those that mean something for a job.
            let files = files.filter(|file| {
                let text = std::fs::read_to_string(file).unwrap();
                text.contains("\"outcome\"")
            });
            let stem =
                |file: std::path::PathBuf| file.file_stem().unwrap().to_str().unwrap().to_owned();
            let mut names: Vec<String> = files.map(stem).collect();
            names.sort();
            assert_eq!(names, RecordedIndex::names(set).collect::<Vec<_>>());
            for name in names {
                let recorded = RecordedIndex::named(set, &name).unwrap();
                let response = recorded.answer().into_response();
                assert!(response.status().as_u16() >= 200, "{name}");
            }
        }
    }
}
