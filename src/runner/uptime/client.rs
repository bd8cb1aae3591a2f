//! Polls a ping system for an agent's uptime, and subscribes to its events (`.github/docs/protocol.md` section 1).

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::Instant;

use super::estimate::{AgentSnapshot, ServerTime, newest_in_history, newest_in_list, newest_time};
use super::outage::OutageLog;
use crate::clock::AgeClock;
use crate::net::client::{BodyError, date_of, read_body, root_cause};
use crate::net::credentials::Token;
use crate::wire::event_stream::{EventReader, ServerSentEvent};
use crate::wire::ping_system::{
    HistoryPing, InvalidAnswer, ListedAgent, MAX_BODY_BYTES, read_agent, read_agents, read_event,
    read_history,
};

/// The sizes of pages. A ping system that does not know pages answers with the whole list.
const AGENTS_PER_PAGE: &str = "1000";
const PINGS_PER_PAGE: &str = "2000";
/// How long a list of agents is reused: thousands of agents are in one list.
const LIST_LIFETIME: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);
/// Clocks that differ by more are warned about.
const MAX_CLOCK_DIFFERENCE: TimeDelta = TimeDelta::seconds(5);
/// A stream that is silent for this long is considered lost; ours sends something every ten seconds.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(30);

/// A source of agents' uptimes: a ping system, or a test's stand-in.
pub(crate) trait UptimeSource: Send + Sync + 'static {
    /// New pings of one agent.
    type Events: PingEvents;

    /// Polls the current state of an agent.
    fn poll(&self, agent_id: &str)
    -> impl Future<Output = Result<AgentSnapshot, PollError>> + Send;

    /// The clock by which it tells how old its answers are.
    fn clock(&self) -> &AgeClock;

    /// Subscribes to an agent's new pings.
    fn listen(
        &self,
        agent_id: &str,
    ) -> impl Future<Output = Result<Self::Events, PollError>> + Send;
}

/// What an event stream says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum StreamMessage {
    /// A new ping, and its agent's state after it.
    Ping(Box<(ListedAgent, HistoryPing)>),
    /// Pings may have been missed.
    Resync,
}

/// New pings as they come.
pub(crate) trait PingEvents: Send {
    /// The next message; an error ends the stream.
    fn next(&mut self) -> impl Future<Output = Result<StreamMessage, PollError>> + Send;
}

/// Why a poll failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum PollError {
    /// The connection failed or was lost.
    #[error("{url}: {cause}")]
    Transport {
        /// The URL that was requested.
        url: String,
        cause: String,
    },
    /// No complete answer in time.
    #[error("{url}: no whole answer in {}s", .waited.as_secs_f64())]
    Timeout {
        /// The URL that was requested.
        url: String,
        /// The timeout.
        waited: Duration,
    },
    /// A status other than 200.
    #[error("{url}: status {status}, expected 200{hint}")]
    Status {
        /// The URL that was requested.
        url: String,
        status: StatusCode,
        /// What the operator can try.
        hint: String,
    },
    /// A body that is longer than any honest answer.
    #[error("{0}: answer over {mib} MiB", mib = MAX_BODY_BYTES >> 20)]
    TooLong(String),
    /// A body that cannot be used.
    #[error("{url}: {error}")]
    Invalid {
        /// The URL that was requested.
        url: String,
        /// What is wrong with the answer.
        error: InvalidAnswer,
    },
    /// The ping system has no event stream.
    #[error("{0}: no stream of events")]
    StreamUnsupported(String),
    /// An event stream that ended, or fell silent.
    #[error("{url}: {what}")]
    StreamLost {
        /// The URL of the stream.
        url: String,
        what: String,
    },
    /// The ping system does not know the agent.
    #[error("{url}: no agent '{agent_id}' among the {listed} listed")]
    NotListed {
        /// The URL that was requested.
        url: String,
        /// The agent that is missing.
        agent_id: String,
        /// How many agents are listed.
        listed: usize,
    },
}

/// A ping system.
#[derive(Debug)]
pub(crate) struct PingSystem {
    /// Must not follow redirects.
    pub client: Client,
    /// The base URL, to which `/ping-system/…` is appended.
    pub url: Url,
    /// The `Authorization` header, if reading needs one.
    pub token: Option<Token>,
    /// How much history counts.
    pub window: Duration,
    /// The longest wait for an answer.
    pub timeout: Duration,
    /// Bounds concurrent polls: a runner may follow thousands of agents.
    pub permits: Semaphore,
    /// The latest list of agents, and when its request began.
    pub cached_list: Mutex<Option<(Instant, CachedList)>>,
    pub clock: AgeClock,
    pub outages: OutageLog,
    /// Whether the clocks of ping system and runner differ, which was warned about.
    pub clocks_differ: AtomicBool,
}

/// The listed agents by name, or why there is no list.
pub(crate) type CachedList = Result<Arc<BTreeMap<String, ListedAgent>>, PollError>;

/// An answer, and when it was given by the ping system's clock.
struct Dated<T> {
    content: T,
    date: Option<DateTime<Utc>>,
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

    fn request(&self, url: &Url) -> RequestBuilder {
        let request = self.client.get(url.clone());
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, token.header()),
            None => request,
        }
    }

    async fn get(&self, url: &Url) -> Result<Dated<Vec<u8>>, PollError> {
        let request = self.request(url);
        let exchange = async {
            let transport = |error: reqwest::Error| PollError::Transport {
                url: url.to_string(),
                cause: root_cause(&error),
            };
            let response = request.send().await.map_err(transport)?;
            if response.status() != StatusCode::OK {
                let hint = hint(&response);
                return Err(PollError::Status {
                    url: url.to_string(),
                    status: response.status(),
                    hint,
                });
            }
            let date = date_of(&response);
            let body = read_body(response, MAX_BODY_BYTES).await;
            let content = body.map_err(|error| match error {
                BodyError::Lost(error) => transport(error),
                BodyError::TooLong(_) => PollError::TooLong(url.to_string()),
            })?;
            Ok(Dated { content, date })
        };
        tokio::time::timeout(self.timeout, exchange)
            .await
            .map_err(|_| PollError::Timeout {
                url: url.to_string(),
                waited: self.timeout,
            })?
    }

    /// All agents, as of now or of a moment ago.
    ///
    /// # Errors
    /// When the request fails or its answer cannot be used.
    pub(crate) async fn agents(&self) -> CachedList {
        // Held during the request: concurrent callers wait for the same answer.
        let mut last = self.cached_list.lock().await;
        let shared = LIST_LIFETIME.min(self.timeout / 2);
        if let Some((began, fetch_list)) = &*last
            && began.elapsed() < shared
        {
            return fetch_list.clone();
        }
        let began = Instant::now();
        let fetch_list = self.fetch_list().await;
        *last = Some((began, fetch_list.clone()));
        fetch_list
    }

    async fn fetch_list(&self) -> CachedList {
        let mut by_name = BTreeMap::new();
        let mut next: Option<String> = None;
        loop {
            let mut url = self.address(&[]);
            url.query_pairs_mut()
                .append_pair("limit", AGENTS_PER_PAGE)
                .append_pair("metadata", "false")
                .extend_pairs(next.iter().map(|after| ("after", after)));
            let page = self.read(url, read_agents).await?.content;
            let known = by_name.len();
            for agent in page.items {
                by_name.entry(agent.agent_id.clone()).or_insert(agent);
            }
            next = page.next;
            // A page that brings nothing new would be followed by itself for ever.
            if next.is_none() || by_name.len() == known {
                return Ok(Arc::new(by_name));
            }
        }
    }

    /// The agent, by itself or out of the list where the ping system has nothing but that.
    async fn agent(&self, agent_id: &str) -> Result<Dated<ListedAgent>, PollError> {
        let read = |body: &[u8]| read_agent(body, agent_id);
        match self.read(self.address(&[agent_id]), read).await {
            Err(PollError::Status {
                status: StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED,
                ..
            }) => {}
            answer => return answer,
        }
        let agents = self.agents().await?;
        let listed = agents.get(agent_id).cloned();
        // The list may be older than the history, which is read next and has a date of its own.
        let undated = |content| Dated {
            content,
            date: None,
        };
        listed.map(undated).ok_or_else(|| PollError::NotListed {
            url: self.address(&[]).into(),
            agent_id: agent_id.to_owned(),
            listed: agents.len(),
        })
    }

    async fn history(
        &self,
        agent_id: &str,
        span: Duration,
    ) -> Result<Dated<Vec<HistoryPing>>, PollError> {
        let hours = span.as_nanos().div_ceil(HOUR.as_nanos()).max(1);
        let mut pings: Vec<HistoryPing> = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let mut url = self.address(&[agent_id, "history"]);
            url.query_pairs_mut()
                .append_pair("hours", &hours.to_string())
                .append_pair("limit", PINGS_PER_PAGE)
                .extend_pairs(next.iter().map(|after| ("after", after)));
            let answer = self.read(url, |body| read_history(body, agent_id));
            let Dated {
                content: page,
                date,
            } = answer.await?;
            let newest = pings.last().map(|ping| ping.timestamp);
            let is_new = page.items.last().map(|ping| ping.timestamp) > newest;
            pings.extend(page.items);
            next = page.next;
            // As for the list of agents.
            if next.is_none() || !is_new {
                return Ok(Dated {
                    content: pings,
                    date,
                });
            }
        }
    }

    async fn read<T>(
        &self,
        url: Url,
        read: impl FnOnce(&[u8]) -> Result<T, InvalidAnswer>,
    ) -> Result<Dated<T>, PollError> {
        let Dated {
            content: body,
            date,
        } = self.get(&url).await?;
        let content = read(&body).map_err(|error| PollError::Invalid {
            url: url.into(),
            error,
        })?;
        Ok(Dated { content, date })
    }

    /// The ping system's time after an answer that tells of `newest`. The runner's own clock takes its place only if the
    /// answer tells no time at all.
    fn server_time(&self, newest: Option<DateTime<Utc>>) -> ServerTime {
        let wall = self.clock.wall();
        let told = newest.unwrap_or(wall);
        let differ = (told - wall).abs() > MAX_CLOCK_DIFFERENCE;
        if differ != self.clocks_differ.swap(differ, Ordering::Relaxed) && differ {
            tracing::warn!(
                "the clock here says {wall:.0?} and the ping system {told:.0?}: uptimes follow the ping system's"
            );
        }
        ServerTime {
            told,
            told_at: self.clock.now(),
        }
    }

    /// Requests a longer history if the known one has no ping that could count.
    async fn older(
        &self,
        agent: &ListedAgent,
        history: &[HistoryPing],
    ) -> Result<Option<Dated<Vec<HistoryPing>>>, PollError> {
        if newest_in_list(agent).is_some() || newest_in_history(history).is_some() {
            return Ok(None);
        }
        // A ping counts for as long as its own interval, so no older one can matter.
        let Some(minutes) = agent.ping_interval_minutes else {
            return Ok(None);
        };
        let Ok(interval) = Duration::try_from_secs_f64(minutes * 60.0) else {
            return Ok(None);
        };
        let span = interval.saturating_add(HOUR);
        self.history(&agent.agent_id, span).await.map(Some)
    }
}

impl PollError {
    /// Whether the ping system itself gave no answer, so that it is the same for all agents.
    pub(crate) fn is_outage(&self) -> bool {
        match self {
            Self::Transport { .. }
            | Self::Timeout { .. }
            | Self::Status { .. }
            | Self::StreamUnsupported(_)
            | Self::StreamLost { .. } => true,
            Self::TooLong(_) | Self::Invalid { .. } | Self::NotListed { .. } => false,
        }
    }
}

impl UptimeSource for PingSystem {
    type Events = PingStream;

    async fn poll(&self, agent_id: &str) -> Result<AgentSnapshot, PollError> {
        let agent = self.agent(agent_id).await?;
        // The wait for a permit does not count towards the timeout.
        let _permit = self.permits.acquire().await;
        let mut history = self.history(agent_id, self.window).await?;
        if let Some(older) = self.older(&agent.content, &history.content).await? {
            history = older;
        }
        let newest = newest_time(&agent.content, &history.content);
        let dates = [agent.date, history.date, newest];
        Ok(AgentSnapshot {
            time: self.server_time(dates.into_iter().flatten().max()),
            agent: agent.content,
            history: history.content,
        })
    }

    fn clock(&self) -> &AgeClock {
        &self.clock
    }

    async fn listen(&self, agent_id: &str) -> Result<PingStream, PollError> {
        let url = self.address(&[agent_id, "events"]);
        let request = self.request(&url).header(ACCEPT, EVENT_STREAM).send();
        let response = tokio::time::timeout(self.timeout, request)
            .await
            .map_err(|_| PollError::Timeout {
                url: url.to_string(),
                waited: self.timeout,
            })?
            .map_err(|error| PollError::Transport {
                url: url.to_string(),
                cause: root_cause(&error),
            })?;
        let is_stream = response.headers().get(CONTENT_TYPE).is_some_and(|kind| {
            kind.as_bytes()
                .to_ascii_lowercase()
                .starts_with(EVENT_STREAM.as_bytes())
        });
        match response.status() {
            StatusCode::OK if is_stream => Ok(PingStream {
                agent_id: agent_id.to_owned(),
                url: url.into(),
                response,
                reader: EventReader::default(),
                events: VecDeque::new(),
            }),
            // A temporary failure; any other status means that it has no event stream.
            status @ (StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) => {
                let what = format!("status {status}");
                Err(PollError::StreamLost {
                    url: url.into(),
                    what,
                })
            }
            _ => Err(PollError::StreamUnsupported(url.into())),
        }
    }
}

const EVENT_STREAM: &str = "text/event-stream";

/// A ping system's stream of one agent's new pings.
#[derive(Debug)]
pub(crate) struct PingStream {
    agent_id: String,
    url: String,
    response: Response,
    reader: EventReader,
    events: VecDeque<ServerSentEvent>,
}

impl PingStream {
    fn lost(&self, what: &str) -> PollError {
        PollError::StreamLost {
            url: self.url.clone(),
            what: what.to_owned(),
        }
    }
}

impl PingEvents for PingStream {
    async fn next(&mut self) -> Result<StreamMessage, PollError> {
        loop {
            while let Some(event) = self.events.pop_front() {
                match event.kind.as_str() {
                    "ping" => {
                        let ping = read_event(event.data.as_bytes(), &self.agent_id);
                        let invalid = |error| PollError::Invalid {
                            url: self.url.clone(),
                            error,
                        };
                        return Ok(StreamMessage::Ping(Box::new(ping.map_err(invalid)?)));
                    }
                    "resync" => return Ok(StreamMessage::Resync),
                    _ => {}
                }
            }
            let piece = tokio::time::timeout(HEARTBEAT_TIMEOUT, self.response.chunk())
                .await
                .map_err(|_| self.lost("no sign of life for 30s"))?
                .map_err(|error| self.lost(&root_cause(&error)))?
                .ok_or_else(|| self.lost("the stream ended"))?;
            let events = self.reader.push(&piece);
            self.events
                .extend(events.map_err(|error| self.lost(&error.to_string()))?);
        }
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
