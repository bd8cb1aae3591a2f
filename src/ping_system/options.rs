//! The ping system's options (`.github/docs/operations.md`).

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};

use super::address_policy::Network;
use super::agent_tokens::{AgentTokens, RegisterTokens};
use super::api::Tokens;
use super::client::AgentCredentials;
use super::evaluate::PingPolicy;
use super::interval::IntervalRules;
use super::store::postgres::PostgresOptions;
use super::store::sqlite::Location;
use super::{Database, PingSystemConfig};
use crate::net::browsers::AllowedHosts;
use crate::net::credentials::{check_exposure, roots, token};
use crate::net::server::{MAX_CONNECTIONS, ServerSettings};
use crate::net::server_tls::ServerTls;
use crate::open_files;
use crate::option_values::{Count, ListenAddress};
use crate::units::{Percent, Span};

const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const SECOND: Duration = Duration::from_secs(1);

/// `uptime-runner ping-system`.
#[derive(Debug, clap::Args)]
pub struct PingSystemOptions {
    /// Where it answers; beyond loopback needs a token, or --allow-unauthenticated
    #[arg(
        long,
        value_name = "ADDR",
        env = "PING_LISTEN",
        default_value = "127.0.0.1:8000"
    )]
    listen: ListenAddress,
    /// What it remembers in: sqlite:PATH, or postgres://… (with a password rather in PING_DATABASE)
    #[arg(
        long,
        value_name = "URL",
        env = "PING_DATABASE",
        default_value = "sqlite:ping-system.db",
        hide_env_values = true
    )]
    database: String,
    /// Time between pings of an agent with good uptime [env: PING_BASE_INTERVAL_MINUTES=]
    #[arg(long, value_name = "T", default_value = "15m")]
    base_interval: Span,
    /// Uptime at or over this many percent is good
    #[arg(
        long,
        value_name = "P",
        env = "PING_UPTIME_THRESHOLD",
        default_value = "99.0"
    )]
    uptime_threshold: Threshold,
    /// How much longer each poor ping makes the interval
    #[arg(
        long,
        value_name = "X",
        env = "PING_ESCALATION_MULTIPLIER",
        default_value = "2.0"
    )]
    escalation_multiplier: Multiplier,
    /// The longest time between pings [env: PING_MAX_INTERVAL_HOURS=]
    #[arg(long, value_name = "T", default_value = "24h")]
    max_interval: Span,
    /// Good pings in a row that make all poor ones good
    #[arg(
        long,
        value_name = "N",
        env = "PING_RECOVERY_THRESHOLD_PINGS",
        default_value = "3"
    )]
    recovery_threshold: Count,
    /// Whether an agent's first ping asks only whether a GPU is there: true or false
    #[arg(
        long,
        value_name = "BOOL",
        env = "PING_FIRST_PING_GRACE_PERIOD",
        default_value = "true"
    )]
    first_ping_grace: Switch,
    /// The longest wait for an agent's answer [env: PING_RESPONSE_TIMEOUT_SECONDS=]
    #[arg(long, value_name = "T", default_value = "10s")]
    response_timeout: Span,
    /// How often a failed ping is retried before it counts
    #[arg(long, value_name = "N", env = "PING_RETRIES", default_value = "1",
        value_parser = clap::value_parser!(u32).range(..=MAX_RETRIES))]
    retries: u32,
    /// Address that answers whenever the ping system's own network works: while none does, failures are not the
    /// agents'. May be repeated
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "PING_REFERENCE",
        value_delimiter = ',',
        num_args = 1..
    )]
    reference: Vec<HostAndPort>,
    /// Agents that are asked at once
    #[arg(
        long,
        value_name = "N",
        env = "PING_MAX_CONCURRENT_AGENTS",
        default_value = "100"
    )]
    max_concurrent: Count,
    /// How long pings are kept
    #[arg(long, value_name = "T", env = "PING_RETENTION", default_value = "90d")]
    retention: Span,
    /// File with the bearer token for the calls that change something (or the token itself in PING_TOKEN)
    #[arg(long, value_name = "FILE", env = "PING_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// File with the bearer token for the calls that only read (or the token itself in PING_READ_TOKEN)
    #[arg(long, value_name = "FILE", env = "PING_READ_TOKEN_FILE")]
    read_token_file: Option<PathBuf>,
    /// File with the bearer token that agents are shown (or the token itself in PING_AGENT_TOKEN)
    #[arg(long, value_name = "FILE", env = "PING_AGENT_TOKEN_FILE")]
    agent_token_file: Option<PathBuf>,
    /// File of lines ID TOKEN [CIDR]: each agent may register itself with its token, at an address in the CIDR or the one
    /// that it calls from, and read its own record
    #[arg(long, value_name = "FILE", env = "PING_REGISTER_TOKENS")]
    register_tokens: Option<PathBuf>,
    /// File of lines ID TOKEN: the bearer token that each agent is shown in place of the common one
    #[arg(long, value_name = "FILE", env = "PING_AGENT_TOKENS")]
    agent_tokens: Option<PathBuf>,
    /// Networks that agents may be in, such as 10.0.0.0/8; may be repeated [default: any]
    #[arg(
        long,
        value_name = "CIDR",
        env = "PING_ALLOW_AGENTS",
        value_delimiter = ',',
        num_args = 1..
    )]
    allow_agents: Vec<Network>,
    /// Let agents simulate their GPUs; otherwise their pings fail
    #[arg(long, env = "PING_ALLOW_SIMULATED", value_parser = clap::builder::FalseyValueParser::new())]
    allow_simulated: bool,
    /// Further root certificate for agents at https, beside the system's, and for PostgreSQL where its URL has no sslrootcert
    #[arg(long, value_name = "PEM", env = "PING_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// Certificate in PEM form: the server speaks TLS. Reloaded when it changes
    #[arg(long, value_name = "PEM", env = "PING_TLS_CERT")]
    tls_cert: Option<PathBuf>,
    /// The certificate's key in PEM form
    #[arg(long, value_name = "PEM", env = "PING_TLS_KEY")]
    tls_key: Option<PathBuf>,
    /// Name by which requests may call the server, beside localhost and IP addresses; may be repeated [default: any, on
    /// loopback without a token none]
    #[arg(long, value_name = "NAME", env = "PING_ALLOWED_HOSTS", value_delimiter = ',', num_args = 1..)]
    allowed_hosts: Vec<String>,
    /// Connections of one address at once: proxies and NAT share one
    #[arg(
        long,
        value_name = "N",
        env = "PING_MAX_CONNECTIONS_PER_ADDRESS",
        default_value = "1024"
    )]
    max_connections_per_address: Count,
    /// Answer beyond loopback without a token
    #[arg(long)]
    allow_unauthenticated: bool,
}

impl PingSystemOptions {
    /// Checks what no single option tells.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the variable and what would be accepted.
    pub fn resolve(self) -> anyhow::Result<PingSystemConfig> {
        let ListenAddress(listen) = self.listen;
        let tokens = Tokens {
            write: token("--token-file", self.token_file, "PING_TOKEN")?,
            read: token("--read-token-file", self.read_token_file, "PING_READ_TOKEN")?,
            register: tokens_of(
                "--register-tokens",
                self.register_tokens,
                RegisterTokens::open,
            )?,
        };
        ensure!(
            tokens.register.is_none() || tokens.write.is_some(),
            "--register-tokens (PING_REGISTER_TOKENS): without --token-file (PING_TOKEN) anybody may register any agent: expected both"
        );
        let own_tokens = tokens_of("--agent-tokens", self.agent_tokens, AgentTokens::open)?;
        check_exposure(
            listen,
            tokens.write.is_some() || self.allow_unauthenticated,
            "--token-file, PING_TOKEN",
        )?;
        // The write token reads, too, but reading would be open to everybody.
        check_exposure(
            listen,
            tokens.read.is_some() || self.allow_unauthenticated,
            "--read-token-file, PING_READ_TOKEN",
        )?;
        let agent_token = token(
            "--agent-token-file",
            self.agent_token_file,
            "PING_AGENT_TOKEN",
        )?;
        ensure!(
            (agent_token.is_none() && own_tokens.is_none()) || tokens.write.is_some(),
            "--agent-token-file (PING_AGENT_TOKEN): anybody who may register an agent is shown that token: expected --token-file (PING_TOKEN) with it"
        );
        let Count(max_per_address) = self.max_connections_per_address;
        let has_tokens = tokens.write.is_some() || tokens.read.is_some();
        let server = ServerSettings {
            hosts: AllowedHosts::new(self.allowed_hosts, listen, has_tokens),
            tls: ServerTls::from_files(self.tls_cert, self.tls_key)?,
            max_connections_per_address: usize::try_from(max_per_address.get())
                .unwrap_or(usize::MAX),
        };
        server.warn_of_clear_text("--listen", listen, has_tokens);
        let base = self.base_interval.get();
        let max = self.max_interval.get();
        ensure!(
            base <= max,
            "--base-interval {base:?} (PING_BASE_INTERVAL_MINUTES) is over --max-interval {max:?} (PING_MAX_INTERVAL_HOURS): expected at most that"
        );
        let Count(recovery_pings) = self.recovery_threshold;
        let Count(max_concurrent) = self.max_concurrent;
        let max_concurrent = usize::try_from(max_concurrent.get())
            .unwrap_or(usize::MAX)
            .min(MOST_CONCURRENT);
        // For want of a file an agent that is well would seem not to answer.
        open_files::allow(
            "--max-concurrent",
            max_concurrent,
            MAX_CONNECTIONS as u64 + DATABASE_FILES,
        )?;
        Ok(PingSystemConfig {
            listen,
            database: database(&self.database, self.ca_file.as_deref())?,
            rules: PingPolicy {
                interval: IntervalRules {
                    base,
                    threshold: self.uptime_threshold.0,
                    multiplier: self.escalation_multiplier.0,
                    max,
                    recovery_pings: u32::try_from(recovery_pings.get()).unwrap_or(u32::MAX),
                },
                first_ping_grace: self.first_ping_grace.0,
            },
            response_timeout: self.response_timeout.get(),
            retries: self.retries,
            allow_simulated: self.allow_simulated,
            references: self
                .reference
                .into_iter()
                .map(|reference| reference.0)
                .collect(),
            max_concurrent,
            retention: self.retention.get(),
            tokens,
            server,
            extra_roots: self.ca_file.as_deref().map_or(Ok(Vec::new()), roots)?,
            agent_tokens: AgentCredentials {
                common: agent_token,
                own: own_tokens,
            },
            allowed: self.allow_agents.into_iter().map(|net| net.0).collect(),
        })
    }
}

fn tokens_of<T>(
    option: &str,
    file: Option<PathBuf>,
    open: fn(PathBuf) -> anyhow::Result<T>,
) -> anyhow::Result<Option<T>> {
    let Some(file) = file else { return Ok(None) };
    let place = format!("{option} {}", file.display());
    open(file).map(Some).context(place)
}

/// More retries would only keep an agent's ping from being stored.
const MAX_RETRIES: i64 = 10;

/// What the database's connections hold.
const DATABASE_FILES: u64 = 40;

/// More agents at once than there are ports to ask them from.
const MOST_CONCURRENT: usize = 65_536;

/// The options whose variable names the unit of a bare number.
const UNIT_VARIABLES: [(&str, &str, Duration); 3] = [
    ("base_interval", "PING_BASE_INTERVAL_MINUTES", MINUTE),
    ("max_interval", "PING_MAX_INTERVAL_HOURS", HOUR),
    ("response_timeout", "PING_RESPONSE_TIMEOUT_SECONDS", SECOND),
];

/// What these variables are set to: they take the place of their options' defaults.
#[derive(Debug)]
pub(crate) struct UnitVariables(Vec<(&'static str, String)>);

impl UnitVariables {
    /// Reads them.
    ///
    /// # Errors
    /// One that is no length of time, in a message that names it.
    pub(crate) fn read() -> anyhow::Result<Self> {
        let mut values = Vec::new();
        for (option, variable, unit) in UNIT_VARIABLES {
            let Ok(text) = std::env::var(variable) else {
                continue;
            };
            let span = in_unit(&text, unit).with_context(|| {
                format!(
                    "{variable}='{}': expected a number over 0, as in 0.5, or a length of time, as in 90s",
                    text.escape_debug()
                )
            })?;
            values.push((option, span.get().as_secs_f64().to_string()));
        }
        Ok(Self(values))
    }

    /// The command with these defaults.
    #[must_use]
    pub(crate) fn prepare(&self, command: clap::Command) -> clap::Command {
        self.0.iter().fold(command, |command, (option, value)| {
            command.mut_arg(option, |arg| arg.default_value(value.clone()))
        })
    }
}

fn in_unit(text: &str, unit: Duration) -> Option<Span> {
    match text.trim().parse::<f64>() {
        Ok(number) => (number * unit.as_secs_f64()).to_string().parse().ok(),
        Err(_) => text.parse().ok(),
    }
}

/// The URL may hold a password: no error shows any of it.
fn database(text: &str, ca_file: Option<&Path>) -> anyhow::Result<Database> {
    let text = text.trim();
    let database = if let Some(location) = text.strip_prefix("sqlite:") {
        Location::parse(location).map(Database::Sqlite)
    } else if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        PostgresOptions::parse(text, ca_file).map(Database::Postgres)
    } else {
        Err(anyhow!(
            "expected sqlite:PATH or postgres://[USER@]HOST[:PORT][,HOST[:PORT]…]/DATABASE"
        ))
    };
    database.context("--database (PING_DATABASE)")
}

/// Where something listens: a name or an address, and a port.
#[derive(Debug, Clone)]
struct HostAndPort(String);

impl FromStr for HostAndPort {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let is_host_and_port = text.rsplit_once(':').is_some_and(|(host, port)| {
            let is_host = !host.is_empty()
                && (!host.contains(':') || host.starts_with('[') && host.ends_with(']'))
                && !host.contains(['/', '@', ' ']);
            is_host && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if is_host_and_port {
            Ok(Self(text.to_owned()))
        } else {
            Err("expected HOST:PORT, such as one.one.one.one:443 or [2606:4700::1111]:443")
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Threshold(Percent);

impl FromStr for Threshold {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let percent = text.trim().parse().ok().and_then(|p| Percent::new(p).ok());
        percent
            .map(Self)
            .ok_or("expected a percentage from 0 to 100")
    }
}

#[derive(Debug, Clone, Copy)]
struct Multiplier(f64);

impl FromStr for Multiplier {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let multiplier = text.trim().parse().ok();
        multiplier
            .filter(|&x: &f64| x >= 1.0 && x.is_finite())
            .map(Self)
            .ok_or("expected a number from 1")
    }
}

#[derive(Debug, Clone, Copy)]
struct Switch(bool);

impl FromStr for Switch {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim().to_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(Self(true)),
            "false" | "0" | "no" | "off" => Ok(Self(false)),
            _ => Err("expected true or false"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_numbers_have_the_unit_of_their_variable() {
        for (text, unit, seconds) in [
            ("15", MINUTE, 900.0),
            ("0.5", MINUTE, 30.0),
            ("24", HOUR, 86400.0),
            (" 1.5 ", HOUR, 5400.0),
            ("2.5", SECOND, 2.5),
            ("90s", MINUTE, 90.0),
        ] {
            let span = in_unit(text, unit).unwrap().get();
            assert_eq!(span.as_secs_f64(), seconds, "{text}");
        }
        for bad in ["", "0", "-1", "nan", "inf", "1e300", "soon", "1 2"] {
            assert!(in_unit(bad, MINUTE).is_none(), "{bad}");
        }
    }

    #[test]
    fn references_are_hosts_with_ports() {
        for good in ["1.1.1.1:443", "[::1]:53", "dns.example:853", " a:1 "] {
            assert!(good.parse::<HostAndPort>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            ":1",
            "a:0",
            "a:99999",
            "::1:53",
            "http://a:1",
            "a:b",
        ] {
            assert!(bad.parse::<HostAndPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn databases_are_told_apart_by_their_scheme() {
        let read = |text: &str| database(text, None);
        assert!(matches!(read("sqlite:a.db"), Ok(Database::Sqlite(_))));
        assert!(matches!(
            read("postgresql://u:secret@localhost:5432/db"),
            Ok(Database::Postgres(_))
        ));
        for bad in [
            "",
            "a.db",
            "sqlite:",
            "sqlite://",
            "sqlite:?x",
            "mysql://host/db",
            "postgres:host",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
