//! What a capability requires of the answers to its jobs (`.github/docs/protocol.md` section 3.2).

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::Deserialize;
use serde_json::{Number, Value};

/// The longest answer that is compared with an expectation.
pub const MAX_EXPECTED_BYTES: usize = 1 << 20;
/// The longest value that is shown.
const SHOWN_CHARS: usize = 40;

/// A JSON pointer (RFC 6901): `/images/0/url`, or empty for the whole document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct JsonPointer(String);

impl FromStr for JsonPointer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let has_root = text.is_empty() || text.starts_with('/');
        let mut escaped = text.split('~').skip(1);
        if has_root && escaped.all(|rest| rest.starts_with(['0', '1'])) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "'{text}': expected a JSON pointer such as /status or /images/0, in which ~0 stands for ~ and ~1 for /"
            ))
        }
    }
}

impl TryFrom<String> for JsonPointer {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// The values that an answer must hold; nothing is required by default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Expectation(BTreeMap<JsonPointer, Value>);

/// The body of a successful answer, as far as an expectation needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedBody<'a> {
    Whole(&'a [u8]),
    /// Longer than [`MAX_EXPECTED_BYTES`].
    TooLong,
}

impl<'a> ExpectedBody<'a> {
    /// A body of which at least [`MAX_EXPECTED_BYTES`] and one more were kept, if it has as many.
    #[must_use]
    pub fn cut(start: &'a [u8]) -> Self {
        if start.len() > MAX_EXPECTED_BYTES {
            Self::TooLong
        } else {
            Self::Whole(start)
        }
    }
}

impl Expectation {
    #[must_use]
    pub fn new(values: BTreeMap<JsonPointer, Value>) -> Self {
        Self(values)
    }

    /// Whether every answer meets it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first way in which a body differs from what is required.
    ///
    /// # Errors
    /// The difference, as one line.
    pub fn check(&self, body: ExpectedBody<'_>) -> Result<(), String> {
        if self.is_empty() {
            return Ok(());
        }
        let body = match body {
            ExpectedBody::Whole([]) => return Err("the answer is empty".to_owned()),
            ExpectedBody::Whole(body) => body,
            ExpectedBody::TooLong => {
                let mib = MAX_EXPECTED_BYTES >> 20;
                return Err(format!(
                    "the answer is longer than {mib} MiB, more than `expect` looks at"
                ));
            }
        };
        let answer: Value = serde_json::from_slice(body)
            .map_err(|error| format!("the answer is not JSON: {error}"))?;
        self.0
            .iter()
            .try_for_each(|(JsonPointer(pointer), wanted)| {
                let found = answer.pointer(pointer);
                if found.is_some_and(|found| are_equal(found, wanted)) {
                    return Ok(());
                }
                let found = found.map_or("missing".to_owned(), shown);
                Err(format!("{pointer} is {found}: expected {}", shown(wanted)))
            })
    }
}

/// Equality of JSON, to which 1 and 1.0 are the same number.
fn are_equal(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => {
            left == right || (is_float(left) || is_float(right)) && left.as_f64() == right.as_f64()
        }
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(l, r)| are_equal(l, r))
        }
        (Value::Object(left), Value::Object(right)) => {
            let has = |(key, l)| right.get(key).is_some_and(|r| are_equal(l, r));
            left.len() == right.len() && left.iter().all(has)
        }
        _ => left == right,
    }
}

fn is_float(number: &Number) -> bool {
    !number.is_i64() && !number.is_u64()
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(expected: &Value, body: &str) -> Result<(), String> {
        let values = expected.as_object().unwrap().iter();
        let values = values.map(|(pointer, value)| (pointer.parse().unwrap(), value.clone()));
        Expectation::new(values.collect()).check(ExpectedBody::Whole(body.as_bytes()))
    }

    #[test]
    fn what_is_required_must_be_there() {
        let status = json!({ "/status": "success" });
        assert_eq!(check(&status, r#"{"status": "success", "x": 1}"#), Ok(()));
        for (expected, body, difference) in [
            (
                &status,
                r#"{"status": "failed"}"#,
                r#"/status is "failed": expected "success""#,
            ),
            (&status, "{}", r#"/status is missing: expected "success""#),
            (&status, "", "the answer is empty"),
            (
                &status,
                "<html>",
                "the answer is not JSON: expected value at line 1 column 1",
            ),
            (
                &json!({ "/images/1/n": 2 }),
                r#"{"images": [{"n": 2}, {"n": "2"}]}"#,
                r#"/images/1/n is "2": expected 2"#,
            ),
            (
                &json!({ "/a~1b": null }),
                r#"{"a/b": 0}"#,
                "/a~1b is 0: expected null",
            ),
        ] {
            assert_eq!(check(expected, body), Err(difference.to_owned()));
        }
        let long = format!(r#"{{"status": "{}"}}"#, "é".repeat(100));
        let shown = check(&status, &long).unwrap_err();
        assert!(shown.contains("éé…: expected"), "{shown}");
    }

    #[test]
    fn numbers_are_equal_by_value() {
        let one = json!({ "": [1, 2.5, { "x": 18_446_744_073_709_551_615_u64 }] });
        assert_eq!(
            check(&one, r#"[1.0, 25e-1, {"x": 18446744073709551615}]"#),
            Ok(())
        );
        assert!(check(&one, r#"[1, 2.5, {"x": 18446744073709551614}]"#).is_err());
        assert!(check(&one, r#"[1, 2.5, {"x": 1, "y": 2}]"#).is_err());
    }

    #[test]
    fn nothing_is_required_of_what_is_not_looked_at() {
        assert_eq!(Expectation::default().check(ExpectedBody::TooLong), Ok(()));
        let any = Expectation::new([("/a".parse().unwrap(), json!(1))].into());
        assert!(any.check(ExpectedBody::TooLong).is_err());
    }

    #[test]
    fn a_pointer_begins_with_a_slash() {
        for good in ["", "/", "/a/0", "/a~0b~1c"] {
            assert!(good.parse::<JsonPointer>().is_ok(), "{good}");
        }
        for bad in ["a", "$.a", "/a~", "/a~2"] {
            assert!(bad.parse::<JsonPointer>().is_err(), "{bad}");
        }
    }
}
