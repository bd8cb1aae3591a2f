//! Asks a ping system for an agent's uptime (CONTRACT.md section 2).

use std::future::Future;
use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::header::{AUTHORIZATION, HeaderValue, LOCATION};
use reqwest::{Client, Response, StatusCode, Url};

use super::uptime::{
    Reading, Standing, mean_in_window, newest_if_covering, newest_in_history, newest_in_list,
};
use crate::http_client::{BodyError, read_body, root_cause};
use crate::units::Percent;
use crate::wire::ping_system::{
    Agent, InvalidAnswer, MAX_BODY_BYTES, Ping, read_agents, read_history,
};

const HOUR: Duration = Duration::from_hours(1);

/// Who knows agents' uptimes: a ping system, or a test's stand-in.
pub trait AskUptime: Send + Sync + 'static {
    /// Asks for an agent's uptime now.
    fn ask(&self, agent_id: &str) -> impl Future<Output = Result<Reading, AskError>> + Send;
}

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No connection, or one that was lost.
    #[error("{url}: {cause}")]
    Transport {
        /// What was asked.
        url: String,
        /// What happened.
        cause: String,
    },
    /// No whole answer in time.
    #[error("{url}: no whole answer in {}s", .waited.as_secs_f64())]
    Timeout {
        /// What was asked.
        url: String,
        /// For how long.
        waited: Duration,
    },
    /// Another status than 200.
    #[error("{url}: status {status}, expected 200{hint}")]
    Status {
        /// What was asked.
        url: String,
        /// What came.
        status: StatusCode,
        /// What may help.
        hint: String,
    },
    /// A body that is longer than any honest answer.
    #[error("{0}: answer over {mib} MiB", mib = MAX_BODY_BYTES >> 20)]
    TooLong(String),
    /// A body that cannot be used.
    #[error("{url}: {error}")]
    Invalid {
        /// What was asked.
        url: String,
        /// What is wrong with the answer.
        error: InvalidAnswer,
    },
    /// The ping system does not know the agent.
    #[error("{url}: no agent '{agent_id}' among the {listed} listed")]
    NotListed {
        /// What was asked.
        url: String,
        /// Who is missing.
        agent_id: String,
        /// How many are there.
        listed: usize,
    },
}

/// A ping system.
#[derive(Debug)]
pub struct PingSystem {
    /// Reaches it; must not follow redirects.
    pub client: Client,
    /// What `/ping-system/…` is added to.
    pub url: Url,
    /// Proof that we may read.
    pub authorization: Option<HeaderValue>,
    /// How much history counts.
    pub window: Duration,
    /// The longest wait for an answer.
    pub patience: Duration,
}

impl PingSystem {
    fn address(&self, path: &[&str]) -> Url {
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments
                .pop_if_empty()
                .push("ping-system")
                .push("agents")
                .extend(path);
        }
        url
    }

    async fn get(&self, url: &Url) -> Result<Vec<u8>, AskError> {
        let mut request = self.client.get(url.clone());
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        let exchange = async {
            let transport = |error: reqwest::Error| AskError::Transport {
                url: url.to_string(),
                cause: root_cause(&error),
            };
            let response = request.send().await.map_err(transport)?;
            if response.status() != StatusCode::OK {
                let hint = hint(&response);
                return Err(AskError::Status {
                    url: url.to_string(),
                    status: response.status(),
                    hint,
                });
            }
            read_body(response, MAX_BODY_BYTES)
                .await
                .map_err(|error| match error {
                    BodyError::Lost(error) => transport(error),
                    BodyError::TooLong(_) => AskError::TooLong(url.to_string()),
                })
        };
        tokio::time::timeout(self.patience, exchange)
            .await
            .map_err(|_| AskError::Timeout {
                url: url.to_string(),
                waited: self.patience,
            })?
    }

    async fn agent(&self, agent_id: &str) -> Result<Agent, AskError> {
        let url = self.address(&[]);
        let body = self.get(&url).await?;
        let agents = match read_agents(&body) {
            Ok(agents) => agents,
            Err(error) => {
                return Err(AskError::Invalid {
                    url: url.into(),
                    error,
                });
            }
        };
        let listed = agents.len();
        agents
            .into_iter()
            .find(|agent| agent.agent_id == agent_id)
            .ok_or_else(|| AskError::NotListed {
                url: url.into(),
                agent_id: agent_id.to_owned(),
                listed,
            })
    }

    async fn history(&self, agent_id: &str, span: Duration) -> Result<Vec<Ping>, AskError> {
        let mut url = self.address(&[agent_id, "history"]);
        let hours = span.as_nanos().div_ceil(HOUR.as_nanos()).max(1);
        url.set_query(Some(&format!("hours={hours}")));
        let body = self.get(&url).await?;
        read_history(&body, agent_id).map_err(|error| AskError::Invalid {
            url: url.into(),
            error,
        })
    }

    /// The newest ping where the window holds none.
    async fn newest(
        &self,
        agent: &Agent,
        history: &[Ping],
    ) -> Result<Option<(Percent, DateTime<Utc>)>, AskError> {
        if let Some(newest) = newest_in_list(agent).or_else(|| newest_in_history(history)) {
            return Ok(Some(newest));
        }
        // A ping counts for as long as its own interval, so no older one can matter.
        let Some(minutes) = agent.ping_interval_minutes else {
            return Ok(None);
        };
        let Ok(interval) = Duration::try_from_secs_f64(minutes * 60.0) else {
            return Ok(None);
        };
        let longer = self
            .history(&agent.agent_id, interval.saturating_add(HOUR))
            .await?;
        Ok(newest_in_history(&longer))
    }
}

impl AskUptime for PingSystem {
    async fn ask(&self, agent_id: &str) -> Result<Reading, AskError> {
        let agent = self.agent(agent_id).await?;
        let history = self.history(agent_id, self.window).await?;
        let (mean, pings) = mean_in_window(&history, Utc::now(), self.window);
        let uptime = match mean {
            Some(mean) => Some(mean),
            None => newest_if_covering(
                self.newest(&agent, &history).await?,
                agent.ping_interval_minutes,
                Utc::now(),
            ),
        };
        Ok(Reading {
            uptime,
            pings,
            standing: Standing::from(&agent),
        })
    }
}

/// What an operator may try after this answer.
fn hint(response: &Response) -> String {
    let status = response.status();
    if status.is_redirection() {
        let location = response
            .headers()
            .get(LOCATION)
            .and_then(|l| l.to_str().ok());
        let to = location.map(|l| format!(" (redirected to {})", l.escape_debug()));
        return format!(
            "{}: redirects are not followed, check --ping-url",
            to.unwrap_or_default()
        );
    }
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ": check --ping-token-file".to_owned(),
        StatusCode::NOT_FOUND => ": is --ping-url that of a ping system?".to_owned(),
        _ => String::new(),
    }
}
