//! A job header, read as go-livepeer's gateway reads it: what it takes, what it refuses, and its words.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

/// What the mock needs of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobRequest {
    /// Whatever the client calls it; the gateway gives one to a job without.
    pub(super) id: String,
    pub(super) capability: String,
    /// The first of the orchestrators that may do it.
    pub(super) orchestrator: Option<String>,
}

/// Reads the value of a request's first `Livepeer` header, empty where it has none.
///
/// # Errors
/// The text of the gateway's answer, whose status is 400. Only its beginning is exactly the gateway's; a broken JSON is
/// explained in our parser's words.
pub(super) fn read(value: &[u8]) -> Result<JobRequest, String> {
    let of_job = |error: String| format!("Unable to parse job request, err={error}");
    let json = STANDARD
        .decode(value)
        .map_err(|_| of_job("ErrorSegEncoding".to_owned()))?;
    let job: GoObject = parse(&json, "byoc.JobRequest").map_err(of_job)?;
    let text = |name| job.text(name).map_err(of_job);
    let (id, capability) = (text("id")?, text("capability")?);
    let (request, parameters) = (text("request")?, text("parameters")?);
    let seconds = job.get("timeout_seconds").cloned().unwrap_or(0.into());
    match seconds.as_i64() {
        Some(0) => {
            let missing = "no timeout_seconds set with request, timeout_seconds is required";
            return Err(of_job(missing.to_owned()));
        }
        // Negative ones are taken.
        Some(_) => {}
        None => return Err(of_job(wrong_type(&seconds, "timeout_seconds", "int"))),
    }
    parse(request.as_bytes(), "byoc.JobRequestDetails")
        .map_err(|error| format!("Unable to unmarshal job request err={error}"))?;
    let parameters: GoObject = parse(parameters.as_bytes(), "byoc.JobParameters")
        .map_err(|error| format!("Unable to unmarshal job parameters err={error}"))?;
    let orchestrators = parameters.get("orchestrators").cloned().unwrap_or_default();
    let orchestrator = orchestrators["include"][0].as_str().map(str::to_owned);
    Ok(JobRequest {
        id,
        capability,
        orchestrator,
    })
}

/// An object as Go reads it: keys in any case, null as if it were not there.
#[derive(Debug, Default)]
struct GoObject(Map<String, Value>);

impl GoObject {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn text(&self, name: &str) -> Result<String, String> {
        match self.get(name) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(wrong_type(other, name, "string")),
        }
    }
}

fn parse(json: &[u8], go_type: &str) -> Result<GoObject, String> {
    let value = serde_json::from_slice(json).map_err(|error| {
        if error.is_eof() {
            "unexpected end of JSON input".to_owned()
        } else {
            error.to_string()
        }
    });
    match value? {
        Value::Object(object) => {
            let keys = object.into_iter();
            let keys = keys.map(|(key, value)| (key.to_ascii_lowercase(), value));
            Ok(GoObject(keys.collect()))
        }
        Value::Null => Ok(GoObject::default()),
        other => Err(format!(
            "json: cannot unmarshal {} into Go value of type {go_type}",
            kind(&other)
        )),
    }
}

fn wrong_type(value: &Value, field: &str, go_type: &str) -> String {
    let number = value.as_number().map(|number| format!(" {number}"));
    format!(
        "json: cannot unmarshal {}{} into Go struct field JobRequest.{field} of type {go_type}",
        kind(value),
        number.filter(|_| go_type == "int").unwrap_or_default()
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use crate::wire::gateway::JobHeader;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn of(json: &str) -> Result<JobRequest, String> {
        read(STANDARD.encode(json).as_bytes())
    }

    #[test]
    fn what_the_runner_sends_is_read() {
        let id = Uuid::from_u128(7);
        let header = JobHeader {
            id,
            request: r#"{"run":"agent-net"}"#.into(),
            parameters: r#"{"orchestrators":{"include":["https://orch/"]}}"#.into(),
            capability: "agent-net".into(),
            timeout_seconds: 60,
        };
        let expected = JobRequest {
            id: id.to_string(),
            capability: "agent-net".to_owned(),
            orchestrator: Some("https://orch/".to_owned()),
        };
        assert_eq!(read(header.encode().as_bytes()), Ok(expected));
    }

    #[test]
    fn what_a_gateway_takes_is_taken() {
        for json in [
            // As the public Python testers send it.
            r#"{"request": "{\"run\": \"x\"}", "parameters": "{}", "capability": "x", "timeout_seconds": 30}"#,
            r#"{"id": "job-1", "request": "{}", "parameters": "{}", "capability": "x", "timeout_seconds": 30}"#,
            r#"{"ID": null, "Request": "null", "PARAMETERS": "null", "capability": "x", "Timeout_Seconds": -5}"#,
        ] {
            let job = of(json).unwrap();
            assert_eq!((&*job.capability, job.orchestrator), ("x", None), "{json}");
        }
    }

    /// The texts of `tests/fixtures/gateway`.
    #[test]
    fn what_a_gateway_refuses_is_refused_in_its_words() {
        let job = |request: &str, parameters: &str, seconds: &str| {
            let [request, parameters] = [request, parameters].map(Value::from);
            of(&format!(
                r#"{{"request": {request}, "parameters": {parameters}, "timeout_seconds": {seconds}}}"#
            ))
            .unwrap_err()
        };
        let parse = "Unable to parse job request, err=";
        assert_eq!(read(b"%%%"), Err(format!("{parse}ErrorSegEncoding")));
        let end = "unexpected end of JSON input";
        assert_eq!(read(b""), Err(format!("{parse}{end}")));
        assert_eq!(
            job("{}", "{}", "0"),
            format!("{parse}no timeout_seconds set with request, timeout_seconds is required")
        );
        assert_eq!(
            job("{}", "{}", "5.5"),
            format!(
                "{parse}json: cannot unmarshal number 5.5 into Go struct field JobRequest.timeout_seconds of type int"
            )
        );
        assert_eq!(
            job("", "{}", "5"),
            format!("Unable to unmarshal job request err={end}")
        );
        assert_eq!(
            job("{}", "[]", "5"),
            "Unable to unmarshal job parameters err=json: cannot unmarshal array into Go value of type byoc.JobParameters"
        );
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused(value in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&value);
        }

        #[test]
        fn nearly_right_headers_are_read_or_refused(json in mutated(&[
            r#"{"id":"4f33dcc5-f472-4147-97f4-5909909de4f0","request":"{\"run\": \"agent-net\"}","parameters":"{}","capability":"agent-net","timeout_seconds":30}"#,
        ])) {
            let _ = read(STANDARD.encode(json).as_bytes());
        }
    }
}
