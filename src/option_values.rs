//! Values of options, each with an error that says what is accepted.

use std::borrow::Cow;
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZeroU64;
use std::str::FromStr;

use url::Url;

use crate::money::Wei;
use crate::units::JobsPerMinute;

/// How results are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OutputFormat {
    #[default]
    Text,
    /// One object a line.
    Json,
}

impl FromStr for OutputFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("expected text or json"),
        }
    }
}

/// The base rate, from 1 to [`JobsPerMinute::MAX`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct BaseRate(pub(crate) JobsPerMinute);

impl FromStr for BaseRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let jobs = text
            .trim()
            .parse()
            .ok()
            .filter(|&n| n > 0 && n <= JobsPerMinute::MAX.get());
        jobs.map(|jobs| Self(JobsPerMinute::new(jobs)))
            .ok_or_else(|| {
                format!(
                    "expected whole jobs per minute from 1 to {}",
                    JobsPerMinute::MAX
                )
            })
    }
}

/// An amount of wei that may be spent, over 0.
#[derive(Debug, Clone)]
pub(crate) struct Budget(pub(crate) Wei);

impl FromStr for Budget {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let budget = text.parse().ok();
        budget
            .filter(|budget: &Wei| !budget.is_negative() && !budget.is_zero())
            .map(Self)
            .ok_or("expected a whole number of wei over 0, of at most 256 bits")
    }
}

/// A whole number over 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count(pub(crate) NonZeroU64);

impl FromStr for Count {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.trim()
            .parse()
            .map(Self)
            .map_err(|_| "expected a whole number over 0")
    }
}

/// A whole number from 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Whole(pub(crate) u64);

impl FromStr for Whole {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.trim()
            .parse()
            .map(Self)
            .map_err(|_| "expected a whole number from 0")
    }
}

/// An http or https URL with a host, and without credentials, query or fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HttpUrl(pub(crate) Url);

/// A value as errors may show it: what stands before an `@` can be a password.
pub(crate) fn without_credentials(value: &str) -> Cow<'_, str> {
    match value.rsplit_once('@') {
        Some((_, rest)) => format!("…@{rest}").into(),
        None => value.into(),
    }
}

impl FromStr for HttpUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected http://HOST[:PORT] or https://HOST[:PORT], with or without a path";
        let url = Url::parse(text.trim()).map_err(|error| format!("{error}; {expected}"))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(expected.to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(
                "credentials do not belong in an address, give them as a token file".into(),
            );
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("{expected}, but no ? or #"));
        }
        Ok(Self(url))
    }
}

/// An orchestrator's address as it was written, which is an http or https URL: a gateway compares it byte for byte with its
/// own list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OrchestratorAddress(pub(crate) String);

impl FromStr for OrchestratorAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let HttpUrl(_) = text.parse()?;
        Ok(Self(text.trim().to_owned()))
    }
}

/// The address of a live runner: that of its orchestrator, and the path that this gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunnerUrl(pub(crate) Url);

impl FromStr for RunnerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let HttpUrl(url) = text.parse()?;
        let path = url.path().trim_end_matches('/');
        let label = path.strip_suffix("/app").and_then(|path| {
            let (_, label) = path.rsplit_once("/apps/")?;
            Some(label)
        });
        if label.is_none_or(|label| label.is_empty() || label.contains('/')) {
            return Err("expected https://ORCHESTRATOR/apps/LABEL/app".to_owned());
        }
        Ok(Self(url))
    }
}

/// An address to listen at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ListenAddress(pub SocketAddr);

impl FromStr for ListenAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut addresses = text.trim().to_socket_addrs().into_iter().flatten();
        addresses
            .next()
            .map(Self)
            .ok_or("expected ADDRESS:PORT, such as 127.0.0.1:9100")
    }
}

/// The weight of a capability in the random choice, over 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight(pub(crate) f64);

impl FromStr for Weight {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let weight = text.parse().ok().filter(|&w: &f64| w > 0.0 && w <= 1e9);
        weight
            .map(Self)
            .ok_or("expected a weight over 0, up to 1e9")
    }
}
