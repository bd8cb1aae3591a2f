//! Options from flags, environment and the TOML file to one checked value. Flag beats environment
//! beats file beats default (CONTRACT.md section 1).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use reqwest::Certificate;
use reqwest::header::HeaderValue;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use toml::Spanned;
use url::Url;

use crate::runner::capability::{self, Capability};
use crate::runner::open_files;
use crate::runner::require::Requirement;
use crate::units::{JobsPerMinute, Span};

/// Everything that a run of the job runner needs, checked.
#[derive(Debug, Clone)]
pub struct RunnerConfig {
    /// Whom to follow; at least one, each once.
    pub agents: Vec<AgentConfig>,
    /// Each agent's rate at full uptime.
    pub base_rate: JobsPerMinute,
    /// What to ask for; at least one.
    pub capabilities: Vec<Capability>,
    /// The ping system.
    pub ping: Endpoint,
    /// The gateway, prefix included.
    pub gateway: Endpoint,
    /// Further roots for https.
    pub extra_roots: Vec<Certificate>,
    /// How often to ask for the uptime.
    pub uptime_interval: Duration,
    /// How much history counts.
    pub uptime_window: Duration,
    /// How long the last known uptime may be acted on.
    pub stale_after: Duration,
    /// The longest wait for one job's answer, in place of the capability's own.
    pub timeout: Option<Duration>,
    /// The bound on jobs waiting for an answer.
    pub max_in_flight: usize,
    /// When to stop.
    pub duration: Option<Duration>,
    /// After how many jobs to stop.
    pub max_jobs: Option<u64>,
    /// The form of the results.
    pub output: OutputFormat,
    /// Jobs between blocks of statistics; 0 for none.
    pub stats_every: u64,
    /// What makes the random choices repeatable.
    pub random_seed: Option<u64>,
    /// What must hold at the end.
    pub requirements: Vec<Requirement>,
    /// Where metrics are served.
    pub metrics_listen: Option<SocketAddr>,
}

impl RunnerConfig {
    /// The defaults of CONTRACT.md section 1 for one agent.
    ///
    /// # Errors
    /// As [`RunnerOptions::resolve`].
    pub fn for_agent(id: &str) -> anyhow::Result<Self> {
        RunnerOptions {
            agent: Some(vec![id.to_owned()]),
            ..RunnerOptions::default()
        }
        .resolve()
    }
}

/// An agent to follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentConfig {
    /// Its name.
    pub id: String,
    /// Who may do its jobs; empty for anybody.
    pub orchestrators: Vec<String>,
}

/// A program that is asked over HTTP.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its address, to whose path more is added.
    pub url: Url,
    /// The bearer token, marked as sensitive so that it is never shown.
    pub authorization: Option<HeaderValue>,
}

/// How results are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OutputFormat {
    /// For people.
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
pub struct BaseRate(JobsPerMinute);

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

/// A whole number over 0.
#[derive(Debug, Clone, Copy)]
pub struct Count(NonZeroU64);

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
pub struct Whole(u64);

impl FromStr for Whole {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.trim()
            .parse()
            .map(Self)
            .map_err(|_| "expected a whole number from 0")
    }
}

/// An http or https address with a host, and without what does not belong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpUrl(Url);

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

/// An address to listen at.
#[derive(Debug, Clone, Copy)]
pub struct ListenAddress(pub SocketAddr);

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

/// The job runner's options as they are written, each in two places: as a flag or environment
/// variable, and in the file.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunnerOptions {
    /// Agent to follow; may be repeated
    #[arg(
        long,
        value_name = "ID",
        env = "UPTIME_RUNNER_AGENT",
        value_delimiter = ',',
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "one_or_many")]
    pub agent: Option<Vec<String>>,

    /// Base jobs per minute for each agent at full uptime, 1 to 6000000 [default: 60]
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_RATE",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub rate: Option<BaseRate>,

    /// What to ask for, chosen at random for each job: gpu-check, text-to-image, prompt-enhance, or
    /// what the file defines [default: gpu-check and what the file defines]
    #[arg(long, value_name = "C", env = "UPTIME_RUNNER_CAPABILITIES", num_args = 1.., help_heading = "Jobs")]
    #[serde(skip)]
    pub capabilities: Option<Vec<String>>,

    /// Longest wait for one job's answer [default: the job's timeout_seconds + 10 s]
    #[arg(
        long,
        value_name = "T",
        env = "UPTIME_RUNNER_TIMEOUT",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub timeout: Option<Span>,

    /// Jobs waiting for an answer at once, over all agents [default: 1000]
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_MAX_IN_FLIGHT",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub max_in_flight: Option<Count>,

    /// Makes the choice of capability and payload repeatable [default: from the clock]
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_RANDOM_SEED",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub random_seed: Option<Whole>,

    /// Ping system [default: http://localhost:8000]
    #[arg(
        long,
        value_name = "URL",
        env = "UPTIME_RUNNER_PING_URL",
        help_heading = "Where"
    )]
    #[serde(deserialize_with = "scalar")]
    pub ping_url: Option<HttpUrl>,

    /// Gateway, or the proxy before it [default: http://localhost:8088]
    #[arg(
        long,
        value_name = "URL",
        env = "UPTIME_RUNNER_GATEWAY_URL",
        help_heading = "Where"
    )]
    #[serde(deserialize_with = "scalar")]
    pub gateway_url: Option<HttpUrl>,

    /// What stands before /process/request/…; empty for a gateway without proxy [default: /gateway]
    #[arg(
        long,
        value_name = "PATH",
        env = "UPTIME_RUNNER_GATEWAY_PREFIX",
        help_heading = "Where"
    )]
    #[serde(deserialize_with = "scalar")]
    pub gateway_prefix: Option<String>,

    /// File with the bearer token for the ping system (or the token itself in
    /// UPTIME_RUNNER_PING_TOKEN)
    #[arg(
        long,
        value_name = "FILE",
        env = "UPTIME_RUNNER_PING_TOKEN_FILE",
        help_heading = "Where"
    )]
    pub ping_token_file: Option<PathBuf>,

    /// File with the bearer token for the gateway (or the token itself in
    /// UPTIME_RUNNER_GATEWAY_TOKEN)
    #[arg(
        long,
        value_name = "FILE",
        env = "UPTIME_RUNNER_GATEWAY_TOKEN_FILE",
        help_heading = "Where"
    )]
    pub gateway_token_file: Option<PathBuf>,

    /// Further root certificate for https, beside the system's
    #[arg(
        long,
        value_name = "PEM",
        env = "UPTIME_RUNNER_CA_FILE",
        help_heading = "Where"
    )]
    pub ca_file: Option<PathBuf>,

    /// How often to ask for uptime [default: 30s]
    #[arg(
        long,
        value_name = "T",
        env = "UPTIME_RUNNER_UPTIME_INTERVAL",
        help_heading = "Uptime"
    )]
    #[serde(deserialize_with = "scalar")]
    pub uptime_interval: Option<Span>,

    /// How much history counts [default: 1h]
    #[arg(
        long,
        value_name = "T",
        env = "UPTIME_RUNNER_UPTIME_WINDOW",
        help_heading = "Uptime"
    )]
    #[serde(deserialize_with = "scalar")]
    pub uptime_window: Option<Span>,

    /// How long the last known uptime may be acted on when no newer one can be had; then the rate
    /// is 0 until it can [default: 5m]
    #[arg(
        long,
        value_name = "T",
        env = "UPTIME_RUNNER_STALE_AFTER",
        help_heading = "Uptime"
    )]
    #[serde(deserialize_with = "scalar")]
    pub stale_after: Option<Span>,

    /// Stop after this time
    #[arg(
        long,
        value_name = "T",
        env = "UPTIME_RUNNER_DURATION",
        help_heading = "End"
    )]
    #[serde(deserialize_with = "scalar")]
    pub duration: Option<Span>,

    /// Stop after N jobs are sent and answered
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_MAX_JOBS",
        help_heading = "End"
    )]
    #[serde(deserialize_with = "scalar")]
    pub max_jobs: Option<Count>,

    /// What must hold at the end, for use in CI; may be repeated: success_rate>=99, p99<=2s,
    /// jobs>=100, dropped<=0
    #[arg(
        long,
        value_name = "EXPR",
        env = "UPTIME_RUNNER_REQUIRE",
        value_delimiter = ',',
        help_heading = "End"
    )]
    #[serde(deserialize_with = "one_or_many")]
    pub require: Option<Vec<Requirement>>,

    /// text or json [default: text]
    #[arg(
        long,
        value_name = "FORMAT",
        env = "UPTIME_RUNNER_OUTPUT",
        help_heading = "Output"
    )]
    #[serde(deserialize_with = "scalar")]
    pub output: Option<OutputFormat>,

    /// Jobs between statistics blocks; 0 for none [default: 50]
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_STATS_EVERY",
        help_heading = "Output"
    )]
    #[serde(deserialize_with = "scalar")]
    pub stats_every: Option<Whole>,

    /// Serve Prometheus metrics at /metrics of this address
    #[arg(
        long,
        value_name = "ADDR",
        env = "UPTIME_RUNNER_METRICS_LISTEN",
        help_heading = "Output"
    )]
    #[serde(deserialize_with = "scalar")]
    pub metrics_listen: Option<ListenAddress>,

    #[arg(skip)]
    agents: Option<Vec<AgentEntry>>,
    #[arg(skip)]
    #[serde(rename = "capabilities")]
    file_capabilities: FileCapabilities,
}

/// `[[agents]]` in the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct AgentEntry {
    #[serde(deserialize_with = "required_scalar")]
    id: AgentId,
    #[serde(default, deserialize_with = "one_or_many")]
    orchestrators: Option<Vec<HttpUrl>>,
}

/// A name that can stand in a path and on a line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct AgentId(String);

impl FromStr for AgentId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = text.trim();
        let usable = !id.is_empty() && id.len() <= 256 && id != "." && id != "..";
        if usable && !id.contains(char::is_control) {
            Ok(Self(id.to_owned()))
        } else {
            Err("expected an agent's ID: up to 256 bytes, no control characters, not . or ..")
        }
    }
}

/// `capabilities` in the file: names to choose from, or tables that define them.
#[derive(Debug, Default)]
enum FileCapabilities {
    #[default]
    Silent,
    Names(Vec<Spanned<String>>),
    Tables(BTreeMap<String, CapabilityEntry>),
}

/// `[capabilities.NAME]` in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CapabilityEntry {
    route: Option<String>,
    capability: Option<String>,
    run: Option<String>,
    timeout_seconds: Option<NonZeroU32>,
    #[serde(deserialize_with = "scalar")]
    weight: Option<Weight>,
    payload: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Copy)]
struct Weight(f64);

impl FromStr for Weight {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let weight = text.parse().ok().filter(|&w: &f64| w > 0.0 && w <= 1e9);
        weight
            .map(Self)
            .ok_or("expected a weight over 0, up to 1e9")
    }
}

/// A file's options and what is needed to tell where in it something stands.
#[derive(Debug, Default)]
struct Source {
    name: String,
    text: String,
}

impl Source {
    fn line(&self, offset: usize) -> usize {
        self.text
            .as_bytes()
            .iter()
            .take(offset)
            .filter(|&&byte| byte == b'\n')
            .count()
            + 1
    }
}

impl RunnerOptions {
    /// Reads `file`, whose options count where these are silent, and checks everything.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the file's line and what would be accepted.
    pub fn resolve_with_file(self, file: &Path) -> anyhow::Result<RunnerConfig> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("--config {name}: cannot be read"))?;
        let options: Self = toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!("--config {name}: {}", error.to_string().trim_end())
        })?;
        self.or(options).checked(&Source { name, text })
    }

    /// Fills in the defaults and checks everything.
    ///
    /// # Errors
    /// Bad input, in a message that names the option and what would be accepted.
    pub fn resolve(self) -> anyhow::Result<RunnerConfig> {
        self.checked(&Source::default())
    }

    fn or(self, file: Self) -> Self {
        Self {
            agent: self.agent.or(file.agent),
            rate: self.rate.or(file.rate),
            capabilities: self.capabilities,
            timeout: self.timeout.or(file.timeout),
            max_in_flight: self.max_in_flight.or(file.max_in_flight),
            random_seed: self.random_seed.or(file.random_seed),
            ping_url: self.ping_url.or(file.ping_url),
            gateway_url: self.gateway_url.or(file.gateway_url),
            gateway_prefix: self.gateway_prefix.or(file.gateway_prefix),
            // A token in the environment beats a file's token file.
            ping_token_file: self.ping_token_file.or(file
                .ping_token_file
                .filter(|_| token_in(PING_TOKEN).is_none())),
            gateway_token_file: self.gateway_token_file.or(file
                .gateway_token_file
                .filter(|_| token_in(GATEWAY_TOKEN).is_none())),
            ca_file: self.ca_file.or(file.ca_file),
            uptime_interval: self.uptime_interval.or(file.uptime_interval),
            uptime_window: self.uptime_window.or(file.uptime_window),
            stale_after: self.stale_after.or(file.stale_after),
            duration: self.duration.or(file.duration),
            max_jobs: self.max_jobs.or(file.max_jobs),
            require: self.require.or(file.require),
            output: self.output.or(file.output),
            stats_every: self.stats_every.or(file.stats_every),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            agents: file.agents,
            file_capabilities: file.file_capabilities,
        }
    }

    fn checked(self, source: &Source) -> anyhow::Result<RunnerConfig> {
        let agents = agents(self.agent, self.agents, source)?;
        let capabilities = capabilities(self.capabilities, self.file_capabilities, source)?;
        let max_in_flight = self.max_in_flight.map_or(1000, |Count(n)| n.get());
        let max_in_flight = usize::try_from(max_in_flight).unwrap_or(usize::MAX);
        open_files::allow(max_in_flight, agents.len())?;
        let seconds = Duration::from_secs;
        let span = |option: Option<Span>, default| option.map_or(default, Span::get);
        let url = |option: Option<HttpUrl>, default: &str| {
            option.map_or_else(|| default.parse().map_err(anyhow::Error::msg), Ok)
        };
        let HttpUrl(ping_url) = url(self.ping_url, "http://localhost:8000")?;
        let HttpUrl(gateway_url) = url(self.gateway_url, "http://localhost:8088")?;
        let prefix = self.gateway_prefix.unwrap_or_else(|| "/gateway".to_owned());
        Ok(RunnerConfig {
            agents,
            base_rate: self
                .rate
                .map_or(JobsPerMinute::new(60), |BaseRate(rate)| rate),
            capabilities,
            ping: Endpoint {
                url: ping_url,
                authorization: bearer("--ping-token-file", self.ping_token_file, PING_TOKEN)?,
            },
            gateway: Endpoint {
                url: with_path(&gateway_url, &prefix),
                authorization: bearer(
                    "--gateway-token-file",
                    self.gateway_token_file,
                    GATEWAY_TOKEN,
                )?,
            },
            extra_roots: self.ca_file.as_deref().map_or(Ok(Vec::new()), roots)?,
            uptime_interval: span(self.uptime_interval, seconds(30)),
            uptime_window: span(self.uptime_window, seconds(3600)),
            stale_after: span(self.stale_after, seconds(300)),
            timeout: self.timeout.map(Span::get),
            max_in_flight,
            duration: self.duration.map(Span::get),
            max_jobs: self.max_jobs.map(|Count(n)| n.get()),
            output: self.output.unwrap_or_default(),
            stats_every: self.stats_every.map_or(50, |Whole(n)| n),
            random_seed: self.random_seed.map(|Whole(n)| n),
            requirements: self.require.unwrap_or_default(),
            metrics_listen: self.metrics_listen.map(|ListenAddress(address)| address),
        })
    }
}

/// `base` with `path` added by exactly one slash: a gateway redirects what has two of them, or none
/// at the end.
#[must_use]
pub fn with_path(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    let before = base.path().trim_end_matches('/');
    let slash = if path.trim_matches('/').is_empty() {
        ""
    } else {
        "/"
    };
    let after = path.trim_start_matches('/');
    url.set_path(&format!(
        "{before}{slash}{}",
        if slash.is_empty() { "" } else { after }
    ));
    url
}

fn agents(
    flags: Option<Vec<String>>,
    entries: Option<Vec<AgentEntry>>,
    source: &Source,
) -> anyhow::Result<Vec<AgentConfig>> {
    let entries = entries.unwrap_or_default();
    let ids = match flags {
        Some(flags) => flags
            .iter()
            .map(|id| {
                id.parse()
                    .map_err(|error| anyhow::anyhow!("--agent '{id}': {error}"))
            })
            .collect::<anyhow::Result<Vec<AgentId>>>()?,
        None => entries.iter().map(|entry| entry.id.clone()).collect(),
    };
    ensure!(
        !ids.is_empty(),
        "no agent to follow: expected --agent ID, or [[agents]] with an id in the file that --config names"
    );
    let mut agents: Vec<AgentConfig> = Vec::with_capacity(ids.len());
    for AgentId(id) in ids {
        ensure!(
            agents.iter().all(|agent| agent.id != id),
            "agent '{id}' is named twice by --agent or in {}: expected each once",
            if source.name.is_empty() {
                "the file"
            } else {
                &source.name
            },
        );
        let entry = entries.iter().find(|entry| entry.id.0 == id);
        let orchestrators = entry
            .and_then(|entry| entry.orchestrators.clone())
            .unwrap_or_default();
        agents.push(AgentConfig {
            id,
            // Without the slash that parsing adds, as operators write it and nodes announce it.
            orchestrators: orchestrators
                .iter()
                .map(|HttpUrl(url)| url.as_str().trim_end_matches('/').to_owned())
                .collect(),
        });
    }
    Ok(agents)
}

fn capabilities(
    flags: Option<Vec<String>>,
    file: FileCapabilities,
    source: &Source,
) -> anyhow::Result<Vec<Capability>> {
    let mut known = Capability::built_in();
    let mut wanted: Vec<(String, String)> = vec![];
    match file {
        FileCapabilities::Silent => {}
        FileCapabilities::Names(names) => {
            for name in names {
                let place = format!("{} line {}", source.name, source.line(name.span().start));
                wanted.push((name.into_inner(), place));
            }
        }
        FileCapabilities::Tables(tables) => {
            wanted.push((capability::DEFAULT.to_owned(), String::new()));
            for (name, entry) in tables {
                define(&mut known, &name, entry)
                    .with_context(|| format!("{}: [capabilities.{name}]", source.name))?;
                if name != capability::DEFAULT {
                    wanted.push((name, String::new()));
                }
            }
        }
    }
    if let Some(flags) = flags {
        let names = flags
            .iter()
            .flat_map(|flag| flag.split([',', ' ', '\t', '\n']));
        let names = names.filter(|name| !name.is_empty());
        wanted = names
            .map(|name| (name.to_owned(), "--capabilities".to_owned()))
            .collect();
        ensure!(
            !wanted.is_empty(),
            "--capabilities: expected at least one name"
        );
    }
    if wanted.is_empty() {
        wanted.push((capability::DEFAULT.to_owned(), String::new()));
    }
    let mut chosen: Vec<Capability> = Vec::with_capacity(wanted.len());
    for (name, place) in wanted {
        let Some(capability) = known.iter().find(|capability| capability.name == name) else {
            let names: Vec<&str> = known.iter().map(|c| c.name.as_str()).collect();
            bail!(
                "{place}: unknown capability '{name}': expected one of {}",
                names.join(", ")
            );
        };
        ensure!(
            !chosen.contains(capability),
            "{place}: capability '{name}' is named twice: expected each once; weight = 2 in the file's [capabilities.{name}] makes it twice as frequent"
        );
        chosen.push(capability.clone());
    }
    Ok(chosen)
}

fn define(known: &mut Vec<Capability>, name: &str, entry: CapabilityEntry) -> anyhow::Result<()> {
    ensure!(
        !name.is_empty()
            && !name.contains(|c: char| c == ',' || c.is_whitespace() || c.is_control()),
        "expected a name without spaces and commas"
    );
    let index = known
        .iter()
        .position(|capability| capability.name == name)
        .unwrap_or_else(|| {
            known.push(Capability::named(name));
            known.len() - 1
        });
    let capability = &mut known[index];
    let text = |key: &str, new: Option<String>, slot: &mut String| -> anyhow::Result<()> {
        if let Some(new) = new {
            ensure!(!new.trim().is_empty(), "{key} is empty: expected a name");
            *slot = new;
        }
        Ok(())
    };
    text("route", entry.route, &mut capability.route)?;
    text("capability", entry.capability, &mut capability.capability)?;
    text("run", entry.run, &mut capability.run)?;
    if let Some(seconds) = entry.timeout_seconds {
        capability.timeout_seconds = seconds.get();
    }
    if let Some(Weight(weight)) = entry.weight {
        capability.weight = weight;
    }
    if let Some(payload) = entry.payload {
        capability.payload = payload;
    }
    Ok(())
}

const PING_TOKEN: &str = "UPTIME_RUNNER_PING_TOKEN";
const GATEWAY_TOKEN: &str = "UPTIME_RUNNER_GATEWAY_TOKEN";

fn token_in(variable: &str) -> Option<String> {
    std::env::var(variable)
        .ok()
        .filter(|token| !token.trim().is_empty())
}

/// The header that proves who we are; what is wrong with a token is told without it.
fn bearer(
    option: &str,
    file: Option<PathBuf>,
    variable: &str,
) -> anyhow::Result<Option<HeaderValue>> {
    let (source, token) = match file {
        Some(file) => {
            let source = format!("{option} {}", file.display());
            let token = std::fs::read_to_string(&file)
                .with_context(|| format!("{source}: cannot be read"))?;
            (source, token)
        }
        None => match token_in(variable) {
            Some(token) => (variable.to_owned(), token),
            None => return Ok(None),
        },
    };
    let token = token.trim();
    ensure!(!token.is_empty(), "{source}: is empty, expected a token");
    ensure!(
        token.bytes().all(|byte| byte.is_ascii_graphic()),
        "{source}: expected one token of visible ASCII characters without spaces"
    );
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
        .with_context(|| format!("{source}: expected visible ASCII characters"))?;
    header.set_sensitive(true);
    Ok(Some(header))
}

fn roots(file: &Path) -> anyhow::Result<Vec<Certificate>> {
    let source = format!("--ca-file {}", file.display());
    let pem = std::fs::read(file).with_context(|| format!("{source}: cannot be read"))?;
    let roots = Certificate::from_pem_bundle(&pem)
        .with_context(|| format!("{source}: expected certificates in PEM form"))?;
    ensure!(
        !roots.is_empty(),
        "{source}: holds no certificate, expected some in PEM form"
    );
    Ok(roots)
}

/// A value that flags and file write alike: text, or a number.
fn scalar<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    required_scalar(deserializer).map(Some)
}

fn required_scalar<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let text = deserializer.deserialize_any(ScalarVisitor)?;
    text.parse()
        .map_err(|error| de::Error::custom(format!("'{text}': {error}")))
}

fn one_or_many<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
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
