//! From options, environment and TOML file to one checked [`RunnerConfig`].

mod checks;
mod file;
mod layers;
mod options;
pub(crate) mod shard;
#[cfg(test)]
mod tests;
mod warnings;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{ArgMatches, Args, Command, FromArgMatches};
use rustls::pki_types::CertificateDer;
use url::Url;

use self::checks::{agents, agents_capabilities, capabilities, prices, record, sharing};
use self::file::{FileTables, FileText};
use self::layers::{GATEWAY_TOKEN, METRICS_TOKEN, PING_TOKEN};
use self::options::{DEFAULT_RATE, EndpointOptions, OutputOptions, RunnerOptions};
use self::shard::Shard;
use crate::money::{UnitPrice, Wei};
use crate::net::browsers::AllowedHosts;
use crate::net::credentials::{Token, roots, token, warn_of_clear_text};
use crate::net::endpoint::{Endpoint, with_path};
use crate::net::fingerprint::Fingerprint;
use crate::net::server::ServerSettings;
use crate::net::server_tls::ServerTls;
use crate::open_files;
use crate::option_values::{BaseRate, Budget, Count, HttpUrl, ListenAddress, OutputFormat, Whole};
use crate::runner::events::require::Requirement;
use crate::runner::rate::controller::Sharing;
use crate::runner::rate::policy::Policy;
use crate::runner::send::capability::Capability;
use crate::units::{JobsPerMinute, Span};
use crate::wire::charge::{ChargedPer, Price};
use crate::wire::gateway::same_orchestrator_form;

/// Agents of `--all-agents` for whose streams of pings there is room, where the limits allow it.
const LISTENED_TO: usize = 1000;

/// The checked configuration of a run.
#[derive(Debug, Clone)]
pub struct RunnerConfig {
    /// Which agents to follow.
    pub agents: AgentsConfig,
    /// Where and how uptimes are asked for.
    pub ping: PingConfig,
    /// Where and which jobs are sent.
    pub gateway: GatewayConfig,
    pub rate: RateConfig,
    /// What bounds them.
    pub limits: LimitsConfig,
    /// What is printed and served.
    pub output: OutputConfig,
    /// What is recorded.
    pub record: RecordConfig,
    /// Further roots for https.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// Whether any certificate of the orchestrators of live runners is accepted.
    pub insecure_orchestrators: bool,
}

/// Which agents to follow.
#[derive(Debug, Clone)]
pub struct AgentsConfig {
    /// No id twice; empty if all fall to other shards. With `all`, how to follow these if they are
    /// listed.
    pub configured: Vec<AgentSettings>,
    /// Whether every agent that the ping system lists is followed.
    pub all: bool,
    /// This runner's part of the agents, if several runners share them.
    pub shard: Option<Shard>,
}

/// Where and how uptimes are asked for.
#[derive(Debug, Clone)]
pub struct PingConfig {
    /// The ping system.
    pub endpoint: Endpoint,
    /// The time between two polls.
    pub interval: Duration,
    /// How much history counts.
    pub window: Duration,
    /// How long the last known uptime may be used without a newer one.
    pub stale_after: Duration,
}

/// Where and which jobs are sent.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// The gateway, prefix included.
    pub endpoint: Endpoint,
    /// Where jobs go if that accepts no connection, in this order, prefix included.
    pub further_urls: Vec<Url>,
    /// At least one.
    pub capabilities: Vec<Capability>,
    /// The timeout of all jobs, instead of the capability's own.
    pub timeout: Option<Duration>,
    /// The seed of the random choices; random for `None`.
    pub random_seed: Option<u64>,
}

/// How many jobs are sent.
#[derive(Debug, Clone)]
pub struct RateConfig {
    /// How the rate follows from the uptime.
    pub policy: Policy,
    /// Each agent's rate at full uptime.
    pub base: JobsPerMinute,
    /// Whether each agent has its own, or all share one.
    pub sharing: Sharing,
}

/// The limits of a run.
#[derive(Debug, Clone)]
pub struct LimitsConfig {
    /// The limit on jobs that await their answers.
    pub max_in_flight: usize,
    /// When to stop.
    pub duration: Option<Duration>,
    /// After how many jobs to stop.
    pub max_jobs: Option<u64>,
    /// After how many jobs in a row that were never charged an agent's jobs pause.
    pub pause_after: Option<u64>,
    /// The price for agents without a price of their own: of a second of compute, or of a job of a live runner.
    pub price: Option<UnitPrice>,
    /// The budget of all agents together.
    pub budget: Option<Wei>,
}

/// What is printed and served.
#[derive(Debug, Clone)]
pub struct OutputConfig {
    /// The form of the results.
    pub format: OutputFormat,
    /// Jobs between blocks of statistics; 0 for none.
    pub stats_every: u64,
    /// `--require`.
    pub requirements: Vec<Requirement>,
    /// Where metrics are served, and how.
    pub metrics: Option<MetricsConfig>,
}

/// Where metrics are served, and how.
#[derive(Debug, Clone)]
pub struct MetricsConfig {
    pub listen: SocketAddr,
    /// What requests must show.
    pub token: Option<Token>,
    pub server: ServerSettings,
}

/// What is recorded.
#[derive(Debug, Clone)]
pub struct RecordConfig {
    /// `--record`.
    pub file: Option<PathBuf>,
    /// How long the records of a run are kept.
    pub keep: Duration,
}

impl RunnerConfig {
    /// The defaults for one agent.
    ///
    /// # Errors
    /// An id that cannot be one, or a token variable that cannot be used.
    pub fn for_agent(id: &str) -> anyhow::Result<Self> {
        let command = RunnerArgs::augment_args(Command::new("uptime-runner"));
        let matches = command.try_get_matches_from(["uptime-runner", "--agent", id])?;
        RunnerArgs::from_arg_matches(&matches)?.resolve()
    }

    /// What an agent's jobs cost, if it is known.
    #[must_use]
    pub fn price(&self, agent: &AgentSettings) -> Option<Price> {
        let unit = agent.price.as_ref().or(self.limits.price.as_ref())?;
        Some(Price {
            unit: unit.clone(),
            per: match agent.runner {
                Some(_) => ChargedPer::Job,
                None => ChargedPer::Second,
            },
        })
    }

    /// An agent's own rate at full uptime.
    #[must_use]
    pub fn base_rate(&self, agent: &AgentSettings) -> JobsPerMinute {
        agent.base_rate.unwrap_or(self.rate.base)
    }

    /// The longest wait for the answer to an agent's job.
    #[must_use]
    pub fn timeout(&self, agent: &AgentSettings, capability: &Capability) -> Duration {
        self.gateway.timeout.unwrap_or_else(|| match agent.runner {
            Some(_) => capability.default_runner_timeout(),
            None => capability.default_timeout(agent.orchestrators_tried()),
        })
    }

    /// Whether any agent's jobs go to the gateway.
    #[must_use]
    pub fn uses_gateway(&self) -> bool {
        let mut agents = self.agents.configured.iter();
        self.agents.all || agents.any(|agent| agent.runner.is_none())
    }

    /// The longest wait for the answer to any agent's job.
    #[must_use]
    pub fn longest_timeout(&self) -> Duration {
        let untied = AgentSettings::default();
        let agents = self.agents.configured.iter();
        let agents = agents.chain(self.agents.all.then_some(&untied));
        let timeouts = agents.flat_map(|agent| {
            let capabilities = self.gateway.capabilities.iter();
            capabilities.map(|capability| self.timeout(agent, capability))
        });
        timeouts.max().unwrap_or_default()
    }

    /// Whether spending is bounded.
    #[must_use]
    pub fn has_budgets(&self) -> bool {
        let mut agents = self.agents.configured.iter();
        self.limits.budget.is_some() || agents.any(|agent| agent.budget.is_some())
    }
}

impl GatewayConfig {
    /// The gateway's addresses in the order in which they are preferred.
    pub fn urls(&self) -> impl Iterator<Item = &Url> {
        std::iter::once(&self.endpoint.url).chain(&self.further_urls)
    }
}

impl AgentSettings {
    /// How many orchestrators a gateway is expected to try at most for one of its jobs: a tied job names one.
    #[must_use]
    pub fn orchestrators_tried(&self) -> u32 {
        if self.orchestrators.is_empty() { 2 } else { 1 }
    }
}

impl AgentsConfig {
    /// The agents to follow from the start.
    #[must_use]
    pub fn at_start(&self) -> &[AgentSettings] {
        if self.all { &[] } else { &self.configured }
    }

    /// The settings of an agent that is listed.
    #[must_use]
    pub fn agent(&self, id: &str) -> AgentSettings {
        let configured = self.configured.iter().find(|agent| agent.id == id);
        configured
            .cloned()
            .unwrap_or_else(|| AgentSettings::named(id))
    }

    /// Whether an agent falls to this runner's shard.
    #[must_use]
    pub fn is_ours(&self, id: &str) -> bool {
        self.shard.is_none_or(|shard| shard.holds(id))
    }
}

/// How an agent is followed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentSettings {
    pub id: String,
    /// The orchestrators that may do its jobs; any if this is empty.
    pub orchestrators: Vec<String>,
    /// The live runner that does its jobs, in place of a gateway.
    pub runner: Option<RunnerAddress>,
    /// Its rate at full uptime, instead of the common one.
    pub base_rate: Option<JobsPerMinute>,
    /// Its capabilities, instead of all.
    pub capabilities: Option<Vec<String>>,
    /// Its price, instead of the common one.
    pub price: Option<UnitPrice>,
    /// Its own budget.
    pub budget: Option<Wei>,
    /// Whether no other agent shares one of its orchestrators, or its live runner, so that what becomes of its jobs says
    /// something of it.
    pub is_tied: bool,
}

/// Where a live runner is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunnerAddress {
    pub url: Url,
    /// The certificate that its orchestrator shows.
    pub fingerprint: Option<Fingerprint>,
}

impl AgentSettings {
    /// Who may do its jobs and can be named: each in one form, by which it is known again.
    pub fn destinations(&self) -> impl Iterator<Item = String> + '_ {
        let runner = self.runner.as_ref().map(|runner| runner.url.as_str());
        let orchestrators = self.orchestrators.iter().map(String::as_str);
        orchestrators.chain(runner).map(same_orchestrator_form)
    }

    /// The same, as the operator wrote them: each of its jobs names one.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        match &self.runner {
            Some(runner) => vec![runner.url.to_string()],
            None => self.orchestrators.clone(),
        }
    }

    /// One that is followed on the common terms.
    #[must_use]
    pub fn named(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            ..Self::default()
        }
    }

    /// Whether it has this capability.
    #[must_use]
    pub fn does(&self, capability: &str) -> bool {
        let names = self.capabilities.as_ref();
        names.is_none_or(|names| names.iter().any(|name| name == capability))
    }
}

/// The job runner's command line.
#[derive(Debug, Args)]
pub struct RunnerArgs {
    /// TOML file with any of these options, further capabilities and agents
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: RunnerOptions,
    #[arg(skip)]
    file: ConfigFile,
}

/// The tables of the file of `--config`.
#[derive(Debug, Default)]
pub(crate) struct ConfigFile {
    source: FileText,
    tables: FileTables,
}

impl ConfigFile {
    fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("--config {name}: cannot be read"))?;
        Self::parse(name, text)
    }

    fn parse(name: String, text: String) -> anyhow::Result<Self> {
        let tables = toml::from_str(&text).map_err(|error| {
            anyhow::anyhow!("--config {name}: {}", error.to_string().trim_end())
        })?;
        let source = FileText { name, text };
        Ok(Self { source, tables })
    }
}

/// The options that environment and file add to a command line.
#[derive(Debug)]
pub struct Layers {
    environment: Vec<OsString>,
    from_file: Vec<OsString>,
    file: ConfigFile,
}

impl Layers {
    /// Reads both for the command line `typed` of `command`, which is the runner's or has its options.
    ///
    /// # Errors
    /// Bad input, in a message that names the variable or the file's line.
    pub fn read(command: &Command, typed: &ArgMatches) -> anyhow::Result<Self> {
        let environment = |name: &str| std::env::var_os(name);
        layers::check_variables(command, std::env::vars_os().map(|(name, _)| name))?;
        let file = match layers::config_file(typed, environment) {
            Some(file) => ConfigFile::read(Path::new(&file))?,
            None => ConfigFile::default(),
        };
        Self::of(command, typed, environment, file)
    }

    fn of(
        command: &Command,
        typed: &ArgMatches,
        environment: impl Fn(&str) -> Option<OsString> + Copy,
        file: ConfigFile,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            environment: layers::environment_flags(command, typed, environment)?,
            from_file: layers::file_flags(command, typed, &file.source, environment)?,
            file,
        })
    }

    /// The flags to be appended to the command line.
    pub fn flags(&self) -> impl Iterator<Item = &OsString> {
        self.environment.iter().chain(&self.from_file)
    }

    /// The command that reads a command line with [`Self::flags`].
    #[must_use]
    pub fn prepare(&self, command: Command) -> Command {
        layers::without_delimiters(command, &self.from_file)
    }
}

impl RunnerArgs {
    /// What only the file holds goes with the options that were read with its flags.
    pub fn add_file(&mut self, layers: Layers) {
        self.file = layers.file;
    }

    /// Checks everything.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the file's line and what would be accepted.
    pub fn resolve(self) -> anyhow::Result<RunnerConfig> {
        let ConfigFile { source, tables } = self.file;
        let RunnerOptions {
            agents: whom,
            rate,
            jobs,
            money,
            endpoints,
            uptime,
            end,
            mut output,
        } = self.options;
        let all = whom.all_agents.unwrap_or(false);
        let mut configured = agents(whom.agent, all, tables.agents, &source)?;
        let sharing = sharing(&rate, &configured)?;
        let capabilities = capabilities(jobs.capabilities, tables.capabilities, &source)?;
        agents_capabilities(&configured, &capabilities, &source)?;
        if let Some(shard) = whom.shard {
            configured.retain(|agent| shard.holds(&agent.id));
        }
        let Count(max_in_flight) = jobs.max_in_flight;
        let max_in_flight = usize::try_from(max_in_flight.get()).unwrap_or(usize::MAX);
        let pause_after = jobs.pause_after.map(|Count(jobs)| jobs.get());
        allow_open_files(max_in_flight, configured.len(), all)?;
        let insecure_orchestrators = endpoints.insecure_orchestrators.unwrap_or(false);
        let extra_roots = endpoints.ca_file.as_deref().map_or(Ok(Vec::new()), roots)?;
        let (ping_system, gateway, further_urls) = resolve_endpoints(endpoints)?;
        let metrics = metrics(&mut output)?;
        let base = rate.rate.map_or_else(|| DEFAULT_RATE.parse(), Ok);
        let BaseRate(base) = base.map_err(anyhow::Error::msg)?;
        let config = RunnerConfig {
            agents: AgentsConfig {
                configured,
                all,
                shard: whom.shard,
            },
            ping: PingConfig {
                endpoint: ping_system,
                interval: uptime.uptime_interval.get(),
                window: uptime.uptime_window.get(),
                stale_after: uptime.stale_after.get(),
            },
            gateway: GatewayConfig {
                endpoint: gateway,
                further_urls,
                capabilities,
                timeout: jobs.timeout.map(Span::get),
                random_seed: jobs.random_seed.map(|Whole(seed)| seed),
            },
            rate: RateConfig {
                policy: uptime.policy,
                base,
                sharing,
            },
            limits: LimitsConfig {
                max_in_flight,
                duration: end.duration.map(Span::get),
                max_jobs: end.max_jobs.map(|Count(jobs)| jobs.get()),
                pause_after,
                price: money.price,
                budget: money.budget_wei.map(|Budget(budget)| budget),
            },
            output: OutputConfig {
                format: output.output,
                stats_every: output.stats_every.0,
                requirements: end.require.unwrap_or_default(),
                metrics,
            },
            record: RecordConfig {
                file: output.record,
                keep: output.record_keep.get(),
            },
            extra_roots,
            insecure_orchestrators,
        };
        prices(&config)?;
        record(&config.record)?;
        Ok(config)
    }
}

/// The server of the metrics, if there is one.
fn metrics(output: &mut OutputOptions) -> anyhow::Result<Option<MetricsConfig>> {
    let token = token(
        "--metrics-token-file",
        output.metrics_token_file.take(),
        METRICS_TOKEN,
    )?;
    let tls = ServerTls::from_files(output.tls_cert.take(), output.tls_key.take())?;
    let Some(ListenAddress(listen)) = output.metrics_listen else {
        return Ok(None);
    };
    let is_open = output.allow_unauthenticated.unwrap_or(false);
    ensure!(
        is_open || token.is_some() || listen.ip().is_loopback(),
        "--metrics-listen {listen}: everybody who reaches it could ask: expected a token (--metrics-token-file, {METRICS_TOKEN}), an address such as 127.0.0.1, or --allow-unauthenticated"
    );
    let server = ServerSettings {
        hosts: AllowedHosts::new(Vec::new(), listen, token.is_some()),
        tls,
        ..ServerSettings::default()
    };
    server.warn_of_clear_text("--metrics-listen", listen, token.is_some());
    Ok(Some(MetricsConfig {
        listen,
        token,
        server,
    }))
}

/// Ping system and gateway.
fn resolve_endpoints(options: EndpointOptions) -> anyhow::Result<(Endpoint, Endpoint, Vec<Url>)> {
    let HttpUrl(ping_url) = options.ping_url;
    let urls = options.gateway_url.into_iter();
    let mut urls = urls.map(|HttpUrl(url)| with_path(&url, &options.gateway_prefix));
    let ping_system = Endpoint {
        url: ping_url,
        token: token("--ping-token-file", options.ping_token_file, PING_TOKEN)?,
    };
    let gateway = Endpoint {
        url: urls
            .next()
            .context("--gateway-url: expected at least one")?,
        token: token(
            "--gateway-token-file",
            options.gateway_token_file,
            GATEWAY_TOKEN,
        )?,
    };
    let further: Vec<Url> = urls.collect();
    if ping_system.token.is_some() {
        warn_of_clear_text("--ping-url", &ping_system.url);
    }
    if gateway.token.is_some() {
        for url in further.iter().chain([&gateway.url]) {
            warn_of_clear_text("--gateway-url", url);
        }
    }
    Ok((ping_system, gateway, further))
}

/// One connection that polls and one that listens, for each agent, beside those of jobs.
fn allow_open_files(max_in_flight: usize, agents: usize, all: bool) -> anyhow::Result<()> {
    let allow =
        |agents: usize| open_files::allow("--max-in-flight", max_in_flight, 2 * agents as u64);
    if all {
        // Their number is not known; agents beyond it are polled instead of listened to.
        allow(LISTENED_TO).or_else(|_| allow(agents))?;
    } else {
        allow(agents)?;
    }
    Ok(())
}
