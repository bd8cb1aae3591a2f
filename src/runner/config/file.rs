//! The tables of the TOML file, and how single values in them are read.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use toml::Spanned;

use crate::money::UnitPrice;
use crate::net::fingerprint::Fingerprint;
use crate::option_values::{BaseRate, Budget, OrchestratorAddress, RunnerUrl, Weight};
use crate::wire::agent::AgentId;
use crate::wire::expectation::JsonPointer;

/// `[[agents]]` in the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AgentTable {
    #[serde(deserialize_with = "required_scalar")]
    pub(super) id: AgentId,
    #[serde(default, deserialize_with = "one_or_many")]
    pub(super) orchestrators: Option<Vec<OrchestratorAddress>>,
    #[serde(default, deserialize_with = "scalar")]
    pub(super) runner: Option<RunnerUrl>,
    #[serde(default, deserialize_with = "scalar")]
    pub(super) orchestrator_fingerprint: Option<Fingerprint>,
    #[serde(default, deserialize_with = "scalar")]
    pub(super) rate: Option<BaseRate>,
    pub(super) capabilities: Option<Vec<String>>,
    #[serde(default, deserialize_with = "scalar")]
    pub(super) price: Option<UnitPrice>,
    #[serde(default, deserialize_with = "scalar")]
    pub(super) budget_wei: Option<Budget>,
}

/// `capabilities` in the file: names to choose from, or tables that define them.
#[derive(Debug, Default)]
pub(super) enum FileCapabilities {
    #[default]
    Silent,
    Names(Vec<Spanned<String>>),
    Tables(BTreeMap<String, CapabilityEntry>),
}

/// `[capabilities.NAME]` in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct CapabilityEntry {
    pub(super) route: Option<String>,
    pub(super) capability: Option<String>,
    pub(super) run: Option<String>,
    pub(super) timeout_seconds: Option<NonZeroU32>,
    #[serde(deserialize_with = "scalar")]
    pub(super) weight: Option<Weight>,
    pub(super) headers: Option<BTreeMap<String, String>>,
    pub(super) payload: Option<Map<String, Value>>,
    pub(super) expect: Option<BTreeMap<JsonPointer, Value>>,
}

/// The tables of a file; its other keys are options ([`super::layers`]).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FileTables {
    pub(super) agents: Option<Vec<AgentTable>>,
    pub(super) capabilities: FileCapabilities,
}

/// A file's name and text, from which lines are computed.
#[derive(Debug, Default)]
pub(super) struct FileText {
    pub(super) name: String,
    pub(super) text: String,
}

impl FileText {
    /// The line of a byte offset, from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        self.text
            .as_bytes()
            .iter()
            .take(offset)
            .filter(|&&byte| byte == b'\n')
            .count()
            + 1
    }
}

/// A value that is text or a number, parsed as a flag's value is.
pub(super) fn scalar<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    required_scalar(deserializer).map(Some)
}

pub(super) fn required_scalar<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let text = deserializer.deserialize_any(ScalarVisitor)?;
    text.parse()
        .map_err(|error| de::Error::custom(format!("'{text}': {error}")))
}

pub(super) fn one_or_many<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    struct Texts;
    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("text or an array of texts")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<String>, A::Error> {
            let mut texts = Vec::new();
            while let Some(text) = items.next_element()? {
                texts.push(text);
            }
            Ok(texts)
        }
    }
    let texts = deserializer.deserialize_any(Texts)?;
    let parsed = texts.iter().map(|text| {
        text.parse()
            .map_err(|error| de::Error::custom(format!("'{text}': {error}")))
    });
    parsed.collect::<Result<_, _>>().map(Some)
}

struct ScalarVisitor;

impl Visitor<'_> for ScalarVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a number")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_i128<E: de::Error>(self, number: i128) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<String, E> {
        Ok(number.to_string())
    }
}

impl<'de> Deserialize<'de> for FileCapabilities {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NamesOrTables;
        impl<'de> Visitor<'de> for NamesOrTables {
            type Value = FileCapabilities;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of names, or tables such as [capabilities.upscale]")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = items.next_element()? {
                    names.push(name);
                }
                Ok(FileCapabilities::Names(names))
            }

            fn visit_map<A: MapAccess<'de>>(self, tables: A) -> Result<Self::Value, A::Error> {
                Deserialize::deserialize(de::value::MapAccessDeserializer::new(tables))
                    .map(FileCapabilities::Tables)
            }
        }
        deserializer.deserialize_any(NamesOrTables)
    }
}
