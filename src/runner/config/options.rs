//! The job runner's options, each declared once: its long name is the flag, `UPTIME_RUNNER_<NAME>` in the
//! environment and, with underscores, the key in the file ([`super::layers`]); its help, default and
//! check stand beside it.

use std::path::PathBuf;

use clap::Args;
use clap::builder::ArgPredicate;

use super::shard::Shard;
use crate::money::UnitPrice;
use crate::option_values::{BaseRate, Budget, Count, HttpUrl, ListenAddress, OutputFormat, Whole};
use crate::runner::events::require::Requirement;
use crate::runner::rate::allocation::Split;
use crate::runner::rate::policy::Policy;
use crate::units::Span;

/// Each agent's rate at full uptime.
pub(super) const DEFAULT_RATE: &str = "60";

/// All of them, in the order of the help.
#[derive(Debug, Args)]
pub(super) struct RunnerOptions {
    #[command(flatten, next_help_heading = "Jobs")]
    pub(super) agents: AgentsOptions,
    #[command(flatten, next_help_heading = "Jobs")]
    pub(super) rate: RateOptions,
    #[command(flatten, next_help_heading = "Jobs")]
    pub(super) jobs: JobsOptions,
    #[command(flatten, next_help_heading = "Money")]
    pub(super) money: MoneyOptions,
    #[command(flatten, next_help_heading = "Where")]
    pub(super) endpoints: EndpointOptions,
    #[command(flatten, next_help_heading = "Uptime")]
    pub(super) uptime: UptimeOptions,
    #[command(flatten, next_help_heading = "End")]
    pub(super) end: EndOptions,
    #[command(flatten, next_help_heading = "Output")]
    pub(super) output: OutputOptions,
}

/// Whom to follow.
#[derive(Debug, Args)]
pub(super) struct AgentsOptions {
    /// Agent to follow; may be repeated
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub(super) agent: Option<Vec<String>>,

    /// Follow all agents that the ping system lists, including new ones
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) all_agents: Option<bool>,

    /// Follow only the agents that fall to this one of N runners, K from 1
    #[arg(long, value_name = "K/N")]
    pub(super) shard: Option<Shard>,
}

/// How many jobs.
#[derive(Debug, Args)]
pub(super) struct RateOptions {
    /// Base jobs per minute for each agent at full uptime, 1 to 6000000
    // No default beside a total: the two exclude each other.
    #[arg(
        long,
        value_name = "N",
        default_value = DEFAULT_RATE,
        default_value_if("total_rate", ArgPredicate::IsPresent, None)
    )]
    pub(super) rate: Option<BaseRate>,

    /// Jobs per minute at full uptime that all agents share, in place of a rate for each
    #[arg(long, value_name = "N")]
    pub(super) total_rate: Option<BaseRate>,

    /// How they share it: equal, uptime (in proportion to it), or performance (success share ×
    /// uptime ÷ median latency of the last jobs) [default: equal]
    // Its default is that of `Split`: without a total there is none to share, and no default.
    #[arg(long, value_name = "HOW")]
    pub(super) split: Option<Split>,

    /// Give what a punished agent loses of a total to agents that have earned more
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) redistribute: Option<bool>,
}

/// What they ask for, and how many at once.
#[derive(Debug, Args)]
pub(super) struct JobsOptions {
    /// What to ask for, chosen at random for each job: gpu-check, text-to-image, prompt-enhance, or
    /// what the file defines [default: gpu-check and what the file defines]
    #[arg(long, value_name = "C", num_args = 1..)]
    pub(super) capabilities: Option<Vec<String>>,

    /// Longest wait for one job's answer [default: as long as a gateway may take for the job]
    #[arg(long, value_name = "T")]
    pub(super) timeout: Option<Span>,

    /// Jobs waiting for an answer at once, over all agents
    #[arg(long, value_name = "N", default_value = "1000")]
    pub(super) max_in_flight: Count,

    /// After N consecutive jobs that nobody was paid for, send the agent only one every 10 s until one succeeds
    #[arg(long, value_name = "N")]
    pub(super) pause_after: Option<Count>,

    /// Makes the choice of capability and payload repeatable [default: from the clock]
    #[arg(long, value_name = "N")]
    pub(super) random_seed: Option<Whole>,
}

/// What they may cost.
#[derive(Debug, Args)]
pub(super) struct MoneyOptions {
    /// What a second of compute costs, in wei; a job is charged for each second begun. Of a live runner: what a job costs
    #[arg(long, value_name = "WEI")]
    pub(super) price: Option<UnitPrice>,

    /// Send no job that could make the run cost more than this, by the price
    #[arg(long, value_name = "WEI")]
    pub(super) budget_wei: Option<Budget>,
}

/// Where ping system and gateway are, and how they are reached.
#[derive(Debug, Args)]
pub(super) struct EndpointOptions {
    /// Ping system
    #[arg(long, value_name = "URL", default_value = "http://localhost:8000")]
    pub(super) ping_url: HttpUrl,

    /// Gateway, or the proxy before it; may be repeated: the first that accepts connections gets the jobs
    #[arg(long, value_name = "URL", default_value = "http://localhost:8088")]
    pub(super) gateway_url: Vec<HttpUrl>,

    /// What stands before /process/request/…; empty for a gateway without proxy
    #[arg(long, value_name = "PATH", default_value = "/gateway")]
    pub(super) gateway_prefix: String,

    /// File with the bearer token for the ping system (or the token itself in
    /// UPTIME_RUNNER_PING_TOKEN)
    #[arg(long, value_name = "FILE")]
    pub(super) ping_token_file: Option<PathBuf>,

    /// File with the bearer token for the gateway (or the token itself in
    /// UPTIME_RUNNER_GATEWAY_TOKEN)
    #[arg(long, value_name = "FILE")]
    pub(super) gateway_token_file: Option<PathBuf>,

    /// Further root certificate for https, beside the system's
    #[arg(long, value_name = "PEM")]
    pub(super) ca_file: Option<PathBuf>,

    /// Accept any certificate of the orchestrators of live runners: anybody in between can read and answer the jobs
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) insecure_orchestrators: Option<bool>,
}

/// How the uptime is asked for, and what it earns.
#[derive(Debug, Args)]
pub(super) struct UptimeOptions {
    /// How often to ask for uptime
    #[arg(long, value_name = "T", default_value = "30s")]
    pub(super) uptime_interval: Span,

    /// How much history counts
    #[arg(long, value_name = "T", default_value = "1h")]
    pub(super) uptime_window: Span,

    /// How the rate follows from the uptime: tiers:UPTIME=SHARE,…, linear:FROM..TO (nothing at one
    /// uptime, all at the other) or proportional:POWER; behind it recover_after=T, how long more must
    /// have been earned before the rate rises, and probe_rate=N, jobs per minute that are always sent
    #[arg(long, value_name = "POLICY", default_value_t)]
    pub(super) policy: Policy,

    /// How long the last known uptime may be used without a newer one; after that the rate is 0
    /// until there is one
    #[arg(long, value_name = "T", default_value = "5m")]
    pub(super) stale_after: Span,
}

/// When the run ends, and what must hold then.
#[derive(Debug, Args)]
pub(super) struct EndOptions {
    /// Stop after this time
    #[arg(long, value_name = "T")]
    pub(super) duration: Option<Span>,

    /// Stop after N jobs are sent and answered
    #[arg(long, value_name = "N")]
    pub(super) max_jobs: Option<Count>,

    /// What must hold at the end, for use in CI; may be repeated: success_rate>=99, p99<=2s,
    /// jobs>=100, dropped<=0
    #[arg(long, value_name = "EXPR", value_delimiter = ',')]
    pub(super) require: Option<Vec<Requirement>>,
}

/// What is printed, recorded and served.
#[derive(Debug, Args)]
pub(super) struct OutputOptions {
    /// text or json
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(super) output: OutputFormat,

    /// Jobs between statistics blocks; 0 for none
    #[arg(long, value_name = "N", default_value = "50")]
    pub(super) stats_every: Whole,

    /// Keep every job, poll and change of rate in this file of SQLite
    #[arg(long, value_name = "FILE")]
    pub(super) record: Option<PathBuf>,

    /// How long that file keeps the records of a run
    #[arg(long, value_name = "T", default_value = "400d")]
    pub(super) record_keep: Span,

    /// Serve Prometheus metrics at /metrics of this address; beyond loopback needs a token, or --allow-unauthenticated
    #[arg(long, value_name = "ADDR")]
    pub(super) metrics_listen: Option<ListenAddress>,

    /// File with the bearer token for the metrics (or the token itself in UPTIME_RUNNER_METRICS_TOKEN)
    #[arg(long, value_name = "FILE")]
    pub(super) metrics_token_file: Option<PathBuf>,

    /// Certificate in PEM form: the metrics are served over TLS
    #[arg(long, value_name = "PEM")]
    pub(super) tls_cert: Option<PathBuf>,

    /// The certificate's key in PEM form
    #[arg(long, value_name = "PEM")]
    pub(super) tls_key: Option<PathBuf>,

    /// Serve metrics beyond loopback without a token
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) allow_unauthenticated: Option<bool>,
}
