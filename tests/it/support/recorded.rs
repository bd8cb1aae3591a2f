//! Answers that real servers gave, served again by wiremock. `tests/fixtures` holds them: status, headers,
//! body and delay. What follows a body (`then`) no HTTP server can play: those answers need a fake of
//! their own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use wiremock::ResponseTemplate;

#[derive(Debug, Deserialize)]
pub(crate) struct Recorded {
    /// What a gateway's answer means.
    #[serde(default)]
    pub outcome: String,
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
    #[serde(default)]
    pub delay_ms: u64,
    /// What the connection does after the body.
    pub then: Option<Value>,
}

impl Recorded {
    /// One file of `tests/fixtures`, such as `agent/uptime.json`.
    pub(crate) fn read(name: &str) -> Self {
        let path = folder("").join(name);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// All files of a folder of `tests/fixtures`, by name.
    pub(crate) fn all(of: &str) -> BTreeMap<String, Self> {
        let files = std::fs::read_dir(folder(of)).unwrap();
        let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let all: BTreeMap<_, _> = files
            .map(|file| (file.clone(), Self::read(&format!("{of}/{file}"))))
            .collect();
        assert!(!all.is_empty(), "{of}");
        all
    }

    pub(crate) fn response(&self) -> ResponseTemplate {
        // Its length is that of the body, and is not sent twice.
        let headers = self.headers.iter();
        let headers = headers.filter(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
        let template = headers.fold(
            ResponseTemplate::new(self.status),
            |template, (name, value)| template.append_header(name.as_str(), value.as_str()),
        );
        template
            .set_body_bytes(self.body.as_bytes())
            .set_delay(Duration::from_millis(self.delay_ms))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let header = headers.find(|(known, _)| known.eq_ignore_ascii_case(name));
        header.map(|(_, value)| value.as_str())
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a body of JSON")
    }
}

fn folder(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(of)
}
