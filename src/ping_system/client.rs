//! Pings one agent (`.github/docs/protocol.md` section 2.1).

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Response, StatusCode};
use rustls::pki_types::CertificateDer;
use tokio::time::Instant;
use url::Url;

use super::address_policy::{self, AddressPolicy};
use super::agent_tokens::AgentTokens;
use super::clock::PingClock;
use super::store::AgentRecord;
use super::stretch::{self, BootInstant, MeasuredStretch};
use crate::net;
use crate::net::client::{BodyError, date_of, read_body, root_cause};
use crate::net::credentials::Token;
use crate::net::endpoint::with_path;
use crate::text::foreign;
use crate::units::{saturating_add, saturating_sub};
use crate::wire::agent::{MAX_REPORT_BYTES, Reported, read_report};
use crate::wire::ping_system::served::Agent;

/// The longest failure reason that is stored.
const MAX_REASON_CHARS: usize = 200;

/// One request to an agent.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// When it began.
    pub(crate) at: DateTime<Utc>,
    /// The same by the boot clock.
    pub(crate) began: BootInstant,
    /// How long it took.
    pub(crate) took: Duration,
    /// How far the agent's clock is ahead of ours; `None` without an answer that tells.
    pub(crate) clock_offset_seconds: Option<f64>,
    pub(crate) answer: Result<Reported, AttemptFailure>,
}

/// Why there is no valid answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AttemptFailure {
    pub(crate) kind: FailureKind,
    /// One line, for people.
    pub(crate) reason: String,
}

/// Where an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// Our own address rules forbid the request.
    OwnRules,
    /// The agent refused our token.
    TokenRefused,
    /// The agent answered, but not validly.
    InvalidAnswer,
    /// There was no whole answer in time.
    NoAnswer,
}

impl FailureKind {
    fn with(self, reason: &dyn fmt::Display) -> AttemptFailure {
        AttemptFailure {
            kind: self,
            reason: foreign(&reason.to_string(), MAX_REASON_CHARS),
        }
    }
}

#[derive(Debug)]
pub(crate) struct AgentClient {
    client: Client,
    address_policy: AddressPolicy,
    tokens: AgentCredentials,
    timeout: Duration,
}

/// What agents are shown.
#[derive(Debug, Clone, Default)]
pub struct AgentCredentials {
    /// All that have no token of their own.
    pub common: Option<Token>,
    pub(crate) own: Option<AgentTokens>,
}

impl AgentCredentials {
    fn header(&self, agent_id: &str) -> Option<HeaderValue> {
        let own = self.own.as_ref().and_then(|own| own.header(agent_id));
        own.or_else(|| self.common.as_ref().map(Token::header))
    }
}

impl AgentClient {
    /// A client for agents whose address `address_policy` allows. Each ping takes at most `timeout` and
    /// carries one of `tokens`. `extra_roots` are trusted beside the system's.
    ///
    /// # Errors
    /// When the client cannot be set up.
    pub(crate) fn new(
        address_policy: AddressPolicy,
        tokens: AgentCredentials,
        extra_roots: &[CertificateDer<'static>],
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let build = |with_tls| -> anyhow::Result<_> {
            let builder = net::client::builder(with_tls, extra_roots.to_vec())?
                .dns_resolver(address_policy.clone())
                // Pings are so rare that agents close idle connections in between, and a ping on a
                // connection that is being closed would look like an unreachable agent.
                .pool_max_idle_per_host(0)
                .connect_timeout(timeout);
            Ok(builder.build()?)
        };
        let client = build(true).or_else(|error| {
            tracing::warn!(
                "the system's root certificates cannot be loaded, agents at https cannot be asked: {error:#}"
            );
            build(false)
        })?;
        Ok(Self {
            client,
            address_policy,
            tokens,
            timeout,
        })
    }

    /// Pings an agent for its uptime since it last answered.
    pub(crate) async fn ask(&self, known: &AgentRecord, clock: &PingClock) -> Attempt {
        let at = clock.now();
        let began = BootInstant::now();
        let start = Instant::now();
        let measured = MeasuredStretch::until(known, began).since_unanswered(known);
        let stretch = known.unanswered_since().map(|since| Stretch {
            since,
            length: stretch::length(since, at, measured),
        });
        let mut told = None;
        let report = self.report(&known.agent, stretch, &mut told);
        let answer = tokio::time::timeout(self.timeout, report)
            .await
            .unwrap_or_else(|_| {
                let seconds = self.timeout.as_secs_f64();
                Err(FailureKind::NoAnswer.with(&format!("no whole answer in {seconds}s")))
            });
        let clock_offset_seconds = told.map(|Told { date, after }| {
            // The date is cut to whole seconds.
            let date = date + TimeDelta::milliseconds(500);
            let here = saturating_add(at, after / 2);
            ((date - here).as_seconds_f64() * 10.0).round() / 10.0
        });
        Attempt {
            at,
            began,
            took: start.elapsed(),
            clock_offset_seconds,
            answer,
        }
    }

    async fn get(
        &self,
        agent_id: &str,
        route: &Url,
        stretch: Option<Stretch>,
    ) -> Result<Response, AttemptFailure> {
        let mut url = route.clone();
        if let Some(Stretch { since, length }) = stretch {
            let since = since.to_rfc3339_opts(SecondsFormat::AutoSi, true);
            url.query_pairs_mut()
                .append_pair("seconds", &length.as_secs_f64().to_string())
                .append_pair("since", &since);
        }
        let mut request = self.client.get(url);
        if let Some(token) = self.tokens.header(agent_id) {
            request = request.header(AUTHORIZATION, token);
        }
        request.send().await.map_err(|error| {
            let what = if error.is_connect() {
                "no connection: "
            } else {
                ""
            };
            let kind = if address_policy::is_refusal(&error) {
                FailureKind::OwnRules
            } else {
                FailureKind::NoAnswer
            };
            kind.with(&format!("{what}{}", root_cause(&error)))
        })
    }

    /// What the agent reports; `told` is set as soon as its answer begins.
    async fn report(
        &self,
        agent: &Agent,
        stretch: Option<Stretch>,
        told: &mut Option<Told>,
    ) -> Result<Reported, AttemptFailure> {
        let base = Url::parse(&agent.agent_url)
            .map_err(|error| FailureKind::InvalidAnswer.with(&error))?;
        // The policy may have changed since the registration.
        self.address_policy
            .check(&base)
            .map_err(|refused| FailureKind::OwnRules.with(&refused))?;
        let route = with_path(&base, "agent/uptime-since-last-ping");
        let start = Instant::now();
        let answer = self.get(&agent.agent_id, &route, stretch).await?;
        let now_there = date_of(&answer);
        *told = now_there.map(|date| Told {
            date,
            after: start.elapsed(),
        });
        let Some(Stretch { length, .. }) = stretch else {
            return read(answer, agent).await;
        };
        if answer.status() != StatusCode::BAD_REQUEST {
            let reported = read(answer, agent).await?;
            if reported.window_seconds != Some(0.0) || length.is_zero() {
                return Ok(reported);
            }
        }
        // An agent of a release up to 0.1.0 knows only `since`, and by its clock that time is still to come. Then it is
        // asked for as much time before its own now.
        let again = now_there.map(|now| Stretch {
            since: saturating_sub(now, length),
            length,
        });
        read(self.get(&agent.agent_id, &route, again).await?, agent).await
    }
}

/// The time that a ping asks about.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    /// For agents of releases up to 0.1.0, which do not know `seconds`.
    since: DateTime<Utc>,
    length: Duration,
}

/// When an agent answered, by its own clock.
#[derive(Debug, Clone, Copy)]
struct Told {
    date: DateTime<Utc>,
    /// How long after the request.
    after: Duration,
}

async fn read(answer: Response, agent: &Agent) -> Result<Reported, AttemptFailure> {
    use FailureKind::{InvalidAnswer, NoAnswer, TokenRefused};
    match answer.status() {
        StatusCode::OK => {}
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            return Err(TokenRefused.with(&format!("status {status}: check --agent-token-file")));
        }
        status if status.is_redirection() => {
            let reason = format!("status {status}: redirects are not followed");
            return Err(InvalidAnswer.with(&reason));
        }
        status => return Err(InvalidAnswer.with(&format!("status {status}, expected 200"))),
    }
    let body = read_body(answer, MAX_REPORT_BYTES)
        .await
        .map_err(|error| match error {
            BodyError::Lost(_) => NoAnswer.with(&error),
            BodyError::TooLong(_) => InvalidAnswer.with(&error),
        })?;
    read_report(&body, &agent.agent_id).map_err(|error| InvalidAnswer.with(&error))
}
