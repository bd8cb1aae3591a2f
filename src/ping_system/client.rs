//! Pings one agent (`.github/docs/protocol.md` section 2.1).

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use reqwest::header::{AUTHORIZATION, DATE, HeaderValue};
use reqwest::{Client, Response, StatusCode};
use tokio::time::Instant;
use url::Url;

use super::address_policy::AddressPolicy;
use super::evaluate::PingAttempt;
use super::store::{AgentRecord, whole_micros};
use super::stretch::{self, MeasuredStretch};
use crate::net;
use crate::net::client::{read_body, root_cause};
use crate::net::endpoint::with_path;
use crate::units::saturating_sub;
use crate::wire::agent::{MAX_REPORT_BYTES, Reported, read_report};
use crate::wire::ping_system::served::Agent;

/// The longest failure reason that is stored.
const MAX_REASON_CHARS: usize = 200;

#[derive(Debug)]
pub(crate) struct AgentClient {
    client: Client,
    address_policy: AddressPolicy,
    authorization: Option<HeaderValue>,
    timeout: Duration,
}

impl AgentClient {
    /// A client for agents whose address `address_policy` allows. Each ping takes at most `timeout` and
    /// carries `authorization`.
    ///
    /// # Errors
    /// When the client cannot be set up.
    pub(crate) fn new(
        address_policy: AddressPolicy,
        authorization: Option<HeaderValue>,
        timeout: Duration,
    ) -> reqwest::Result<Self> {
        let build = |with_tls| {
            net::client::builder(with_tls, Vec::new())
                .dns_resolver(address_policy.clone())
                // Pings are so rare that agents close idle connections in between, and a ping on a
                // connection that is being closed would look like an unreachable agent.
                .pool_max_idle_per_host(0)
                .connect_timeout(timeout)
                .build()
        };
        let client = build(true).or_else(|error| {
            tracing::warn!(
                "the system's root certificates cannot be loaded, agents at https cannot be asked: {}",
                root_cause(&error)
            );
            build(false)
        })?;
        Ok(Self {
            client,
            address_policy,
            authorization,
            timeout,
        })
    }

    /// Pings an agent for its uptime since it last answered, which is as long ago as was measured.
    pub(crate) async fn ask(&self, known: &AgentRecord, measured: MeasuredStretch) -> PingAttempt {
        let at = whole_micros(Utc::now());
        let begun = Instant::now();
        let stretch = known.unanswered_since().map(|since| Stretch {
            since,
            length: stretch::length(since, at, measured.since_unanswered(known)),
        });
        let answer = tokio::time::timeout(self.timeout, self.report(&known.agent, stretch))
            .await
            .unwrap_or_else(|_| {
                Err(format!(
                    "no whole answer in {}s",
                    self.timeout.as_secs_f64()
                ))
            });
        PingAttempt {
            at,
            took: begun.elapsed(),
            measured,
            answer: answer.map_err(|reason| one_line(&reason)),
        }
    }

    async fn get(&self, route: &Url, stretch: Option<Stretch>) -> Result<Response, String> {
        let mut url = route.clone();
        if let Some(Stretch { since, length }) = stretch {
            let since = since.to_rfc3339_opts(SecondsFormat::AutoSi, true);
            url.query_pairs_mut()
                .append_pair("seconds", &length.as_secs_f64().to_string())
                .append_pair("since", &since);
        }
        let mut request = self.client.get(url);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        request.send().await.map_err(|error| {
            let what = if error.is_connect() {
                "no connection: "
            } else {
                ""
            };
            format!("{what}{}", root_cause(&error))
        })
    }

    async fn report(&self, agent: &Agent, stretch: Option<Stretch>) -> Result<Reported, String> {
        let base = Url::parse(&agent.agent_url).map_err(|error| error.to_string())?;
        // The policy may have changed since the registration.
        self.address_policy
            .check(&base)
            .map_err(|why| why.to_string())?;
        let route = with_path(&base, "agent/uptime-since-last-ping");
        let answer = self.get(&route, stretch).await?;
        let now_there = date_of(&answer);
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
        read(self.get(&route, again).await?, agent).await
    }
}

/// The time that a ping asks about.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    /// For agents of releases up to 0.1.0, which do not know `seconds`.
    since: DateTime<Utc>,
    length: Duration,
}

async fn read(answer: Response, agent: &Agent) -> Result<Reported, String> {
    match answer.status() {
        StatusCode::OK => {}
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            return Err(format!("status {status}: check --agent-token-file"));
        }
        status if status.is_redirection() => {
            return Err(format!("status {status}: redirects are not followed"));
        }
        status => return Err(format!("status {status}, expected 200")),
    }
    let body = read_body(answer, MAX_REPORT_BYTES)
        .await
        .map_err(|error| error.to_string())?;
    read_report(&body, &agent.agent_id).map_err(|error| error.to_string())
}

/// The `Date` of an answer, by the agent's clock.
fn date_of(response: &Response) -> Option<DateTime<Utc>> {
    let date = response.headers().get(DATE)?.to_str().ok()?;
    let date = DateTime::parse_from_rfc2822(date).ok()?;
    Some(date.to_utc())
}

fn one_line(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX_REASON_CHARS).collect()
}
