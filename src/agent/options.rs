//! The agent's options (`.github/docs/operations.md`).

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::AgentConfig;
use super::checkpoint::CheckpointFile;
use super::registration::RegistrationConfig;
use super::tracker::TrackerConfig;
use crate::agent::probe::simulated::GpuScript;
use crate::agent::probe::source::GpuSource;
use crate::net::browsers::AllowedHosts;
use crate::net::credentials::{check_exposure, roots, token, warn_of_clear_text};
use crate::net::server::ServerSettings;
use crate::net::server_tls::ServerTls;
use crate::option_values::{Count, HttpUrl, ListenAddress};
use crate::units::Span;
use crate::wire::agent::AgentId;

/// `uptime-runner agent`.
#[derive(Debug, clap::Args)]
pub struct AgentOptions {
    /// Who this agent is
    #[arg(long, value_name = "ID", env = "AGENT_ID")]
    agent_id: AgentId,
    /// Where it answers; beyond loopback needs a token, or --allow-unauthenticated
    #[arg(
        long,
        value_name = "ADDR",
        env = "AGENT_LISTEN",
        default_value = "127.0.0.1:8001"
    )]
    listen: ListenAddress,
    /// Time between checks
    #[arg(
        long,
        value_name = "T",
        env = "AGENT_GPU_CHECK_INTERVAL_SECONDS",
        default_value = "5s"
    )]
    check_interval: Span,
    /// Transitions between up and down that are kept; the oldest are folded into a sum
    #[arg(
        long,
        value_name = "N",
        env = "AGENT_MAX_HISTORY_SIZE",
        default_value = "10000"
    )]
    max_history: Count,
    /// What survives a restart [default: uptime-agent-ID.json]
    #[arg(long, value_name = "FILE", env = "AGENT_CHECKPOINT_FILE")]
    checkpoint: Option<PathBuf>,
    /// Checks between two checkpoints; each change of state makes one, too
    #[arg(
        long,
        value_name = "N",
        env = "AGENT_CHECKPOINT_INTERVAL",
        default_value = "100"
    )]
    checkpoint_every: Count,
    /// nvml, or simulated:SCRIPT such as 'simulated:up 50s, lost 10s, hang 5s, none 3s', repeated
    #[arg(long, value_name = "GPU", env = "AGENT_GPU", default_value = "nvml")]
    gpu: Gpu,
    /// NVIDIA's management library [default: the system's]
    #[arg(long, value_name = "PATH", env = "AGENT_NVML_LIBRARY")]
    nvml_library: Option<PathBuf>,
    /// GPUs that must be healthy [default: those seen at the start, at least 1]
    #[arg(long, value_name = "N", env = "AGENT_REQUIRE_GPUS")]
    require_gpus: Option<Count>,
    /// Health of the application that uses the GPUs: /agent/ready answers 200 only while this does, too
    #[arg(long, value_name = "URL", env = "AGENT_READY_ALSO")]
    ready_also: Option<HttpUrl>,
    /// File with the bearer token that requests must carry (or the token itself in AGENT_TOKEN)
    #[arg(long, value_name = "FILE", env = "AGENT_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Ping system at which the agent registers itself
    #[arg(long, value_name = "URL", env = "AGENT_REGISTER_AT")]
    register_at: Option<HttpUrl>,
    /// Where that ping system reaches the agent [default: the address listened on]
    #[arg(long, value_name = "URL", env = "AGENT_ADVERTISE")]
    advertise: Option<HttpUrl>,
    /// File with the bearer token for that (or the token itself in AGENT_REGISTER_TOKEN)
    #[arg(long, value_name = "FILE", env = "AGENT_REGISTER_TOKEN_FILE")]
    register_token_file: Option<PathBuf>,
    /// Further root certificate for https, beside the system's: of --register-at and --ready-also
    #[arg(long, value_name = "PEM", env = "AGENT_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// Certificate in PEM form: the server speaks TLS. Reloaded when it changes
    #[arg(long, value_name = "PEM", env = "AGENT_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key in PEM form
    #[arg(long, value_name = "PEM", env = "AGENT_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Name by which requests may call the server, beside localhost and IP addresses; may be repeated [default: any, on
    /// loopback without a token none]
    #[arg(long, value_name = "NAME", env = "AGENT_ALLOWED_HOSTS", value_delimiter = ',', num_args = 1..)]
    allowed_hosts: Vec<String>,
    /// Connections of one address at once: proxies and NAT share one
    #[arg(
        long,
        value_name = "N",
        env = "AGENT_MAX_CONNECTIONS_PER_ADDRESS",
        default_value = "1024"
    )]
    max_connections_per_address: Count,
    /// Answer beyond loopback without a token
    #[arg(long)]
    allow_unauthenticated: bool,
}

#[derive(Debug, Clone)]
enum Gpu {
    Nvml,
    Simulated(GpuScript),
}

impl FromStr for Gpu {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "nvml" => Ok(Self::Nvml),
            Some(("simulated", script)) => script.parse().map(Self::Simulated),
            _ => Err("expected nvml, or simulated: and a script".to_owned()),
        }
    }
}

impl AgentOptions {
    /// Checks what no single option tells.
    ///
    /// # Errors
    /// Bad input, in a message that names the option and what would be accepted.
    pub fn resolve(self) -> anyhow::Result<AgentConfig> {
        let own_token = token("--token-file", self.token_file, "AGENT_TOKEN")?;
        let ListenAddress(listen) = self.listen;
        check_exposure(
            listen,
            own_token.is_some() || self.allow_unauthenticated,
            "--token-file, AGENT_TOKEN",
        )?;
        let count = |Count(n): Count| usize::try_from(n.get()).unwrap_or(usize::MAX);
        let server = ServerSettings {
            hosts: AllowedHosts::new(self.allowed_hosts, listen, own_token.is_some()),
            tls: ServerTls::from_files(self.tls_cert, self.tls_key)?,
            max_connections_per_address: count(self.max_connections_per_address),
        };
        server.warn_of_clear_text("--listen", listen, own_token.is_some());
        let AgentId(agent_id) = self.agent_id;
        let checkpoint = match self.checkpoint {
            Some(path) => CheckpointFile::new(path, agent_id.clone()),
            None => CheckpointFile::by_default(agent_id.clone()),
        };
        let checkpoint = checkpoint.lock().context("--checkpoint")?;
        let register_token = token(
            "--register-token-file",
            self.register_token_file,
            "AGENT_REGISTER_TOKEN",
        )?;
        let advertise = self.advertise.map(|HttpUrl(url)| url);
        ensure!(
            self.register_at.is_some() || advertise.is_none(),
            "--advertise (AGENT_ADVERTISE) needs --register-at: where the agent registers itself"
        );
        ensure!(
            self.register_at.is_none() || advertise.is_some() || !listen.ip().is_unspecified(),
            "--register-at needs --advertise where --listen is {listen}: the URL at which the ping system reaches the agent"
        );
        if let (Some(HttpUrl(url)), Some(_)) = (&self.register_at, &register_token) {
            warn_of_clear_text("--register-at", url);
        }
        let registration = self
            .register_at
            .map(|HttpUrl(ping_system)| RegistrationConfig {
                ping_system,
                advertise,
                token: register_token,
            });
        let gpu = match self.gpu {
            Gpu::Nvml => GpuSource::Nvml(self.nvml_library),
            Gpu::Simulated(script) => GpuSource::Simulated(script, Instant::now()),
        };
        Ok(AgentConfig {
            listen,
            registration,
            extra_roots: self.ca_file.as_deref().map_or(Ok(Vec::new()), roots)?,
            ready_also: self.ready_also.map(|HttpUrl(url)| url),
            token: own_token,
            server,
            checkpoint,
            checkpoint_every: self.checkpoint_every.0.get(),
            rules: TrackerConfig {
                agent_id,
                check_interval: at_most(
                    "--check-interval",
                    self.check_interval.get(),
                    MAX_CHECK_INTERVAL,
                ),
                max_transitions: at_least("--max-history", count(self.max_history), MIN_HISTORY),
                require_gpus: self.require_gpus.map(count),
                source: gpu.name(),
            },
            gpu,
        })
    }
}

/// An outage that is shorter than the time between two checks may not be seen.
const MAX_CHECK_INTERVAL: Duration = Duration::from_mins(1);
/// With fewer, what is compacted would matter.
const MIN_HISTORY: usize = 1000;

// Releases up to 0.1.0 took other values, too.
fn at_most(option: &str, value: Duration, most: Duration) -> Duration {
    if value > most {
        tracing::warn!("{option} {value:?} is over {most:?}: {most:?} is used");
    }
    value.min(most)
}

fn at_least(option: &str, value: usize, least: usize) -> usize {
    if value < least {
        tracing::warn!("{option} {value} is under {least}: {least} is used");
    }
    value.max(least)
}
