//! Payloads with placeholders, split into pieces once, so that a job only joins them.

use serde_json::Value;
use uuid::Uuid;

/// One of these replaces `{prompt}`.
const PROMPTS: [&str; 8] = [
    "A lighthouse on a cliff in a storm, oil painting",
    "A red fox in fresh snow, photograph, soft morning light",
    "The inside of a clockwork city, isometric drawing",
    "An astronaut tending a garden on the moon",
    "A bowl of ramen, studio light, high detail",
    "A quiet library in a hollow tree, watercolour",
    "A sailing boat under the aurora borealis",
    "A street market in the rain at night, neon reflections",
];

/// A JSON value in which placeholders stand for values of the job. A placeholder that is the whole
/// string becomes its value with its type; inside a longer string, text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Json(String),
    Value(Placeholder),
    /// Inside a JSON string.
    Text(Placeholder),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Placeholder {
    AgentId,
    JobId,
    Seed,
    Timestamp,
    Prompt,
}

impl Placeholder {
    const ALL: [(&str, Self); 5] = [
        ("{agent_id}", Self::AgentId),
        ("{job_id}", Self::JobId),
        ("{seed}", Self::Seed),
        ("{timestamp}", Self::Timestamp),
        ("{prompt}", Self::Prompt),
    ];
}

/// The values of the placeholders in one job.
#[derive(Debug)]
pub struct PlaceholderValues<'a> {
    /// Whose job it is.
    pub agent_id: &'a str,
    /// Its name in the nodes' logs.
    pub job_id: Uuid,
    /// A random number, from which the prompt follows.
    pub seed: u32,
    /// Seconds since 1970.
    pub timestamp: f64,
}

impl PlaceholderValues<'_> {
    fn json(&self, placeholder: Placeholder) -> String {
        match placeholder {
            Placeholder::AgentId => quoted(self.agent_id),
            Placeholder::JobId => format!("\"{}\"", self.job_id),
            Placeholder::Seed => self.seed.to_string(),
            Placeholder::Timestamp => self.timestamp.to_string(),
            Placeholder::Prompt => quoted(PROMPTS[self.seed as usize % PROMPTS.len()]),
        }
    }
}

/// Text as a JSON string.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// JSON without the quotes of a string.
fn unquoted(json: &str) -> &str {
    json.strip_prefix('"')
        .and_then(|json| json.strip_suffix('"'))
        .unwrap_or(json)
}

impl Template {
    /// Splits a value at its placeholders.
    #[must_use]
    pub(crate) fn new(value: &Value) -> Self {
        let mut template = Self(Vec::new());
        template.add(value);
        template
    }

    /// The value with its placeholders filled, as JSON.
    #[must_use]
    pub(crate) fn fill(&self, values: &PlaceholderValues) -> Vec<u8> {
        let mut json = Vec::with_capacity(256);
        for piece in &self.0 {
            match piece {
                Piece::Json(text) => json.extend_from_slice(text.as_bytes()),
                Piece::Value(of) => json.extend_from_slice(values.json(*of).as_bytes()),
                Piece::Text(of) => json.extend_from_slice(unquoted(&values.json(*of)).as_bytes()),
            }
        }
        json
    }

    fn add(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.add_text(text),
            Value::Array(items) => {
                self.add_json("[");
                for (index, item) in items.iter().enumerate() {
                    self.add_json(if index > 0 { "," } else { "" });
                    self.add(item);
                }
                self.add_json("]");
            }
            Value::Object(fields) => {
                self.add_json("{");
                for (index, (key, field)) in fields.iter().enumerate() {
                    self.add_json(if index > 0 { "," } else { "" });
                    self.add_json(&quoted(key));
                    self.add_json(":");
                    self.add(field);
                }
                self.add_json("}");
            }
            other => self.add_json(&other.to_string()),
        }
    }

    fn add_text(&mut self, text: &str) {
        if let Some((_, whole)) = Placeholder::ALL.iter().find(|(name, _)| *name == text) {
            self.0.push(Piece::Value(*whole));
            return;
        }
        self.add_json("\"");
        let mut rest = text;
        while !rest.is_empty() {
            let found = Placeholder::ALL
                .iter()
                .filter_map(|&(name, of)| Some((rest.find(name)?, name, of)))
                .min_by_key(|(at, ..)| *at);
            let plain = found.map_or(rest, |(at, ..)| &rest[..at]);
            self.add_json(unquoted(&quoted(plain)));
            rest = &rest[plain.len()..];
            if let Some((_, name, of)) = found {
                self.0.push(Piece::Text(of));
                rest = &rest[name.len()..];
            }
        }
        self.add_json("\"");
    }

    fn add_json(&mut self, json: &str) {
        match self.0.last_mut() {
            Some(Piece::Json(last)) => last.push_str(json),
            _ => self.0.push(Piece::Json(json.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn filled(value: &Value, agent_id: &str) -> Value {
        let values = PlaceholderValues {
            agent_id,
            job_id: Uuid::from_u128(7),
            seed: 42,
            timestamp: 1_767_225_600.25,
        };
        serde_json::from_slice(&Template::new(value).fill(&values)).unwrap()
    }

    #[test]
    fn a_placeholder_alone_keeps_its_type_and_inside_text_is_text() {
        assert_eq!(
            filled(
                &json!({
                    "agent": "{agent_id}", "seed": "{seed}", "at": "{timestamp}",
                    "job": "{job_id}", "name": "{agent_id}-{seed}.png",
                    "list": ["{seed}", 1, {"x": "{seed}"}], "{seed}": null,
                    "other": "{unknown} { \" {seed", "flag": true,
                }),
                "agent-001"
            ),
            json!({
                "agent": "agent-001", "seed": 42, "at": 1_767_225_600.25,
                "job": "00000000-0000-0000-0000-000000000007", "name": "agent-001-42.png",
                "list": [42, 1, {"x": 42}], "{seed}": null,
                "other": "{unknown} { \" {seed", "flag": true,
            })
        );
    }

    #[test]
    fn a_value_that_looks_like_a_placeholder_is_not_filled_again() {
        assert_eq!(
            filled(&json!("a {agent_id}"), "\"{seed}\\"),
            json!("a \"{seed}\\")
        );
        assert_eq!(
            filled(&json!("{agent_id}"), "\"{seed}\\"),
            json!("\"{seed}\\")
        );
    }

    proptest! {
        #[test]
        fn what_has_no_placeholder_stays_what_it_is(text in ".{0,40}", key in ".{0,10}") {
            let value = json!({ key: [text.replace('{', "("), null, 1.5] });
            prop_assert_eq!(filled(&value, "x"), value);
        }
    }
}
