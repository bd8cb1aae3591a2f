//! The job runner's options, and what is checked of them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;

use super::RunnerConfig;
use super::checks::{agents, agents_capabilities, capabilities, prices, sharing};
use super::file::{AgentEntry, FileCapabilities, Source, one_or_many, scalar};
use super::shard::Shard;
use crate::money::WeiPerSecond;
use crate::net::credentials::{bearer, roots, token_in};
use crate::net::endpoint::{Endpoint, with_path};
use crate::open_files;
use crate::option_values::{BaseRate, Budget, Count, HttpUrl, ListenAddress, OutputFormat, Whole};
use crate::runner::events::require::Requirement;
use crate::runner::rate::allocation::Split;
use crate::runner::rate::policy::Policy;
use crate::units::{JobsPerMinute, Span};

const PING_TOKEN: &str = "UPTIME_RUNNER_PING_TOKEN";
const GATEWAY_TOKEN: &str = "UPTIME_RUNNER_GATEWAY_TOKEN";

/// Agents of `--all-agents` for whose streams of pings there is room, where the limits allow it.
const LISTENED_TO: usize = 1000;

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

    /// Follow whoever the ping system lists, newcomers included
    #[arg(
        long,
        value_name = "BOOL",
        env = "UPTIME_RUNNER_ALL_AGENTS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Jobs"
    )]
    pub all_agents: Option<bool>,

    /// Follow only the agents that fall to this one of N runners, K from 1
    #[arg(
        long,
        value_name = "K/N",
        env = "UPTIME_RUNNER_SHARD",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub shard: Option<Shard>,

    /// Base jobs per minute for each agent at full uptime, 1 to 6000000 [default: 60]
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_RATE",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub rate: Option<BaseRate>,

    /// Jobs per minute at full uptime that all agents share, in place of a rate for each
    #[arg(
        long,
        value_name = "N",
        env = "UPTIME_RUNNER_TOTAL_RATE",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub total_rate: Option<BaseRate>,

    /// How they share it: equal, uptime (in proportion to it), or performance (success share ×
    /// uptime ÷ median latency of the last jobs) [default: equal]
    #[arg(
        long,
        value_name = "HOW",
        env = "UPTIME_RUNNER_SPLIT",
        help_heading = "Jobs"
    )]
    #[serde(deserialize_with = "scalar")]
    pub split: Option<Split>,

    /// Give what a punished agent loses of a total to agents that have earned more
    #[arg(
        long,
        value_name = "BOOL",
        env = "UPTIME_RUNNER_REDISTRIBUTE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Jobs"
    )]
    pub redistribute: Option<bool>,

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

    /// What a second of compute costs, in wei; a job is charged for each second begun
    #[arg(
        long,
        value_name = "WEI",
        env = "UPTIME_RUNNER_PRICE",
        help_heading = "Money"
    )]
    #[serde(deserialize_with = "scalar")]
    pub price: Option<WeiPerSecond>,

    /// Send no job that could make the run cost more than this, by the price
    #[arg(
        long,
        value_name = "WEI",
        env = "UPTIME_RUNNER_BUDGET_WEI",
        help_heading = "Money"
    )]
    #[serde(deserialize_with = "scalar")]
    pub budget_wei: Option<Budget>,

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

    /// How the rate follows from the uptime: tiers:UPTIME=SHARE,…, linear:FROM..TO (nothing at one
    /// uptime, all at the other) or proportional:POWER; behind it recover_after=T, how long more must
    /// have been earned before the rate rises, and probe_rate=N, jobs per minute that are always sent
    /// [default: tiers:99=100,95=50,90=10]
    #[arg(
        long,
        value_name = "POLICY",
        env = "UPTIME_RUNNER_POLICY",
        help_heading = "Uptime"
    )]
    #[serde(deserialize_with = "scalar")]
    pub policy: Option<Policy>,

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

    /// Keep every job, poll and change of rate in this file of SQLite
    #[arg(
        long,
        value_name = "FILE",
        env = "UPTIME_RUNNER_RECORD",
        help_heading = "Output"
    )]
    pub record: Option<PathBuf>,

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

impl RunnerOptions {
    /// The defaults for one agent.
    #[must_use]
    pub fn for_agent(id: &str) -> Self {
        Self {
            agent: Some(vec![id.to_owned()]),
            ..Self::default()
        }
    }

    /// Reads `file`, whose options count where these are silent, and checks everything.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the file's line and what would be accepted.
    pub fn resolve_with_file(self, file: &Path) -> anyhow::Result<RunnerConfig> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("--config {name}: cannot be read"))?;
        self.resolve_with_text(name, text)
    }

    fn resolve_with_text(self, name: String, text: String) -> anyhow::Result<RunnerConfig> {
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
            all_agents: self.all_agents.or(file.all_agents),
            shard: self.shard.or(file.shard),
            total_rate: self.total_rate.or(file.total_rate),
            split: self.split.or(file.split),
            redistribute: self.redistribute.or(file.redistribute),
            price: self.price.or(file.price),
            budget_wei: self.budget_wei.or(file.budget_wei),
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
            policy: self.policy.or(file.policy),
            stale_after: self.stale_after.or(file.stale_after),
            duration: self.duration.or(file.duration),
            max_jobs: self.max_jobs.or(file.max_jobs),
            require: self.require.or(file.require),
            output: self.output.or(file.output),
            stats_every: self.stats_every.or(file.stats_every),
            record: self.record.or(file.record),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            agents: file.agents,
            file_capabilities: file.file_capabilities,
        }
    }

    fn checked(self, source: &Source) -> anyhow::Result<RunnerConfig> {
        let all_agents = self.all_agents.unwrap_or(false);
        let mut agents = agents(self.agent, all_agents, self.agents, source)?;
        let redistribute = self.redistribute.unwrap_or(false);
        let sharing = sharing(
            self.total_rate,
            self.split,
            redistribute,
            self.rate,
            &agents,
        )?;
        let capabilities = capabilities(self.capabilities, self.file_capabilities, source)?;
        agents_capabilities(&agents, &capabilities, source)?;
        if let Some(shard) = self.shard {
            agents.retain(|agent| shard.holds(&agent.id));
        }
        let max_in_flight = self.max_in_flight.map_or(1000, |Count(n)| n.get());
        let max_in_flight = usize::try_from(max_in_flight).unwrap_or(usize::MAX);
        // One that polls and one that listens, for each agent.
        let allow =
            |agents: usize| open_files::allow("--max-in-flight", max_in_flight, 2 * agents as u64);
        if all_agents {
            // How many there will be is not known; whoever cannot be listened to is asked.
            allow(LISTENED_TO).or_else(|_| allow(agents.len()))?;
        } else {
            allow(agents.len())?;
        }
        let seconds = Duration::from_secs;
        let span = |option: Option<Span>, default| option.map_or(default, Span::get);
        let url = |option: Option<HttpUrl>, default: &str| {
            option.map_or_else(|| default.parse().map_err(anyhow::Error::msg), Ok)
        };
        let HttpUrl(ping_url) = url(self.ping_url, "http://localhost:8000")?;
        let HttpUrl(gateway_url) = url(self.gateway_url, "http://localhost:8088")?;
        let prefix = self.gateway_prefix.unwrap_or_else(|| "/gateway".to_owned());
        let config = RunnerConfig {
            agents,
            all_agents,
            shard: self.shard,
            sharing,
            price: self.price,
            budget: self.budget_wei.map(|Budget(budget)| budget),
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
            policy: self.policy.unwrap_or_default(),
            stale_after: span(self.stale_after, seconds(300)),
            timeout: self.timeout.map(Span::get),
            max_in_flight,
            duration: self.duration.map(Span::get),
            max_jobs: self.max_jobs.map(|Count(n)| n.get()),
            output: self.output.unwrap_or_default(),
            stats_every: self.stats_every.map_or(50, |Whole(n)| n),
            random_seed: self.random_seed.map(|Whole(n)| n),
            requirements: self.require.unwrap_or_default(),
            record: self.record,
            metrics_listen: self.metrics_listen.map(|ListenAddress(address)| address),
        };
        prices(&config)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    const WHOLE: &str = r#"
rate = 60
uptime_interval = "10s"
max_in_flight = 100
require = ["p99<=2s"]

[[agents]]
id = "agent-001"
orchestrators = ["https://orch-1.example:8935"]

[capabilities.upscale]
route = "upscale"
timeout_seconds = 60
weight = 2
payload = { image_url = "https://img.example/1.png", seed = "{seed}", at = "{timestamp}" }
"#;

    #[test]
    fn the_sample_is_right() {
        let config = RunnerOptions::default().resolve_with_text("x".to_owned(), WHOLE.to_owned());
        assert_eq!(config.unwrap().agents[0].id, "agent-001");
    }

    proptest! {
        #[test]
        fn nearly_right_files_are_read_or_refused(text in mutated(&[WHOLE])) {
            let text = String::from_utf8_lossy(&text).into_owned();
            match RunnerOptions::default().resolve_with_text("x.toml".to_owned(), text) {
                Ok(config) => prop_assert!(!config.agents.is_empty()),
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }
}
