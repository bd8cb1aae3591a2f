//! The answers that real gateways gave, and what becomes of their meaning when they are changed a little.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::job_stream::{JobStream, StreamState};
use super::outcome::{AnswerHead, Outcome, of_answer};

#[derive(Debug, Clone, Deserialize)]
struct Recorded {
    outcome: String,
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
    then: Option<Value>,
}

impl Recorded {
    fn all() -> BTreeMap<String, Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gateway");
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap());
        let read = |file: std::fs::DirEntry| {
            let text = std::fs::read_to_string(file.path()).unwrap();
            let name = file.file_name().into_string().unwrap();
            (name, serde_json::from_str(&text).unwrap())
        };
        let all: BTreeMap<_, _> = files.map(read).collect();
        assert!(all.len() >= 35);
        all
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn is_stream(&self) -> bool {
        self.status == 200 && self.header("Content-Type") == Some("text/event-stream")
    }

    /// Whether the gateway itself spoke, and not with a success.
    fn is_gateways_refusal(&self) -> bool {
        self.status != 200 && self.header("X-Content-Type-Options").is_some()
    }

    fn meaning(&self) -> Outcome {
        if self.is_stream() {
            return self.meaning_of_stream();
        }
        let head = AnswerHead {
            status: self.status,
            content_type: self.header("Content-Type"),
            has_nosniff: self.header("X-Content-Type-Options") == Some("nosniff"),
            has_retry_after: self.header("Retry-After").is_some(),
            has_orchestrator: self.header("X-Orchestrator-Url").is_some(),
        };
        of_answer(head, self.body.as_bytes())
    }

    fn meaning_of_stream(&self) -> Outcome {
        let mut stream = JobStream::default();
        let mut state = stream.push(self.body.as_bytes());
        if let Some(then) = self.then.as_ref().filter(|_| state == StreamState::GoesOn) {
            state = stream.push(then["repeat"].as_str().unwrap().repeat(200).as_bytes());
        }
        match (stream.failure(), state) {
            (Some((outcome, _)), _) => outcome,
            (None, StreamState::Done) => Outcome::Success,
            (None, _) => Outcome::Transport,
        }
    }

    fn without(&self, header: &str) -> Self {
        let mut changed = self.clone();
        assert!(changed.headers.remove(header).is_some());
        changed
    }

    fn with_body(&self, body: &str) -> Self {
        Self {
            body: body.to_owned(),
            ..self.clone()
        }
    }
}

#[test]
fn each_recorded_answer_means_what_was_recorded_with_it() {
    for (name, recorded) in Recorded::all() {
        assert_eq!(recorded.meaning().name(), recorded.outcome, "{name}");
    }
}

#[test]
fn without_one_of_its_headers_a_proxy_spoke() {
    for (name, recorded) in Recorded::all() {
        for header in recorded.headers.keys() {
            let meaning = recorded.without(header).meaning();
            let expected = match (&**header, recorded.meaning()) {
                ("Content-Type" | "X-Content-Type-Options", _)
                    if recorded.is_gateways_refusal() =>
                {
                    Outcome::BadGateway
                }
                ("Retry-After", _) => Outcome::BadGateway,
                ("X-Orchestrator-Url", Outcome::Success) if recorded.body.is_empty() => {
                    Outcome::NoOrchestrator
                }
                // A stream under another name is a body like others.
                ("Content-Type", _) if recorded.is_stream() => Outcome::Success,
                (_, unchanged) => unchanged,
            };
            assert_eq!(meaning, expected, "{name} without {header}");
        }
    }
}

#[test]
fn a_refusal_is_known_by_its_exact_beginning() {
    const REFUSALS: [Outcome; 3] = [Outcome::NoSupply, Outcome::Unpaid, Outcome::Rejected];
    let mut seen = 0;
    for (name, recorded) in Recorded::all() {
        let meaning = recorded.meaning();
        if !recorded.is_gateways_refusal() || !REFUSALS.contains(&meaning) {
            continue;
        }
        seen += 1;
        let body = &recorded.body;
        let longer = recorded.with_body(&format!("{body} and more"));
        assert_eq!(longer.meaning(), meaning, "{name}");
        for changed in [
            body.to_lowercase(),
            body.to_uppercase(),
            format!(" {body}"),
            body[1..].to_owned(),
            String::new(),
        ] {
            let changed = recorded.with_body(&changed);
            assert_eq!(changed.meaning(), Outcome::HttpError, "{name}: {changed:?}");
        }
        // However short it is cut, it is either still the refusal or the worker's own words.
        let meanings = (0..body.len()).map(|end| recorded.with_body(&body[..end]).meaning());
        let meanings: Vec<Outcome> = meanings.collect();
        assert!(
            meanings.is_sorted_by_key(|&outcome| outcome == meaning),
            "{name}"
        );
        let others = meanings.iter().filter(|&&outcome| outcome != meaning);
        assert!(others.clone().count() > 20, "{name}: {meanings:?}");
        assert!(
            others.into_iter().all(|&other| other == Outcome::HttpError),
            "{name}"
        );
    }
    assert!(seen >= 7, "{seen}");
}

#[test]
fn a_stream_that_is_cut_anywhere_did_not_end() {
    for (name, recorded) in Recorded::all() {
        if !recorded.is_stream() {
            continue;
        }
        let meaning = recorded.meaning();
        let end = recorded.body.find("data: [DONE]\n");
        for cut in 0..end.map_or(0, |end| end + "data: [DONE]".len()) {
            let cut = recorded.with_body(&recorded.body[..cut]).meaning();
            assert!(
                cut == Outcome::Transport || cut == meaning && cut != Outcome::Success,
                "{name}"
            );
        }
        for other in [
            "data: [done]\n",
            " data: [DONE]\n",
            "data:[DONE]\n",
            ": data: [DONE]\n",
        ] {
            let changed = recorded.body.replace("data: [DONE]\n", other);
            let expected = if meaning == Outcome::Success {
                Outcome::Transport
            } else {
                meaning
            };
            assert_eq!(
                recorded.with_body(&changed).meaning(),
                expected,
                "{name}: {other:?}"
            );
        }
    }
}
