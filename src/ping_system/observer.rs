//! Tells what an agent failed from what the ping system could not see itself (`.github/docs/protocol.md` section 1.1).

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::client::{AttemptFailure, FailureKind};
use super::mass_failure::{Before, Blame, MassFailure, PERIOD};
use super::store::AgentRecord;
use crate::clock::since_boot;

/// How often the process shows that it runs.
const TICK: Duration = Duration::from_millis(250);
/// A process whose ticks lie so far apart stood still.
const STALL: Duration = Duration::from_secs(1);
/// How long the answer of the references is believed.
const REFERENCE_LIFETIME: Duration = Duration::from_secs(1);
const REFERENCE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why agents could not be observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Obstacle {
    ProcessStopped,
    AddressRules,
    TokenRefused,
    ReferenceUnreachable,
    MassFailure,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProcessStopped => "the ping system's own process stood still",
            Self::AddressRules => "the ping system may not call this address (--allow-agents)",
            Self::TokenRefused => {
                "several agents refuse the ping system's token (--agent-token-file)"
            }
            Self::ReferenceUnreachable => "the ping system reaches no --reference either",
            Self::MassFailure => "most agents fail at once: the ping system's own network is down",
        })
    }
}

/// What a failed attempt says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Judgment {
    /// The agent failed.
    Observed,
    Unobserved {
        obstacle: Obstacle,
        /// Whether failures that were stored within the last minute are unobserved as well.
        also_earlier: bool,
    },
}

/// What hinders the ping system, as `/health` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Hindrance {
    obstacle: Obstacle,
    reason: String,
    since: DateTime<Utc>,
    /// Pings that said nothing for this reason.
    pings: u64,
}

#[derive(Debug)]
struct Episode {
    since: DateTime<Utc>,
    last_at: Duration,
    pings: u64,
}

/// Judges failed attempts.
#[derive(Debug)]
pub(crate) struct Observer {
    stall: StallDetector,
    references: References,
    mass: Mutex<MassFailure>,
    /// When each agent refused the token last, as far as that is within a minute.
    refusals: Mutex<HashMap<i64, Duration>>,
    episodes: Mutex<HashMap<Obstacle, Episode>>,
}

impl Observer {
    /// With addresses, `HOST:PORT`, that can be connected to whenever the network works.
    pub(crate) fn new(references: Vec<String>) -> Self {
        Self {
            stall: StallDetector::new(since_boot()),
            references: References {
                addresses: references,
                last: tokio::sync::Mutex::new(None),
            },
            mass: Mutex::default(),
            refusals: Mutex::default(),
            episodes: Mutex::default(),
        }
    }

    pub(crate) fn has_references(&self) -> bool {
        !self.references.addresses.is_empty()
    }

    /// Watches the process itself, until `stop`.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.stall.tick(since_boot());
        }
    }

    /// An agent answered, validly or not.
    pub(crate) fn reached(&self, known: &AgentRecord) {
        self.mass
            .lock()
            .reached(known.key, Before::of(known.agent.status), since_boot());
    }

    /// What the failure of an attempt that began at `began` says.
    pub(crate) async fn judge(
        &self,
        known: &AgentRecord,
        failure: &AttemptFailure,
        began: Duration,
    ) -> Judgment {
        let unobserved = |obstacle, also_earlier| Judgment::Unobserved {
            obstacle,
            also_earlier,
        };
        match failure.kind {
            FailureKind::OwnRules => unobserved(Obstacle::AddressRules, false),
            FailureKind::TokenRefused => {
                self.reached(known);
                if self.others_refuse(known.key) {
                    unobserved(Obstacle::TokenRefused, true)
                } else {
                    Judgment::Observed
                }
            }
            FailureKind::InvalidAnswer => {
                self.reached(known);
                Judgment::Observed
            }
            FailureKind::NoAnswer if self.stall.stood_still(began, since_boot()) => {
                unobserved(Obstacle::ProcessStopped, false)
            }
            FailureKind::NoAnswer => match self.references.any_answers().await {
                Some(true) => {
                    self.mass.lock().clear(since_boot());
                    Judgment::Observed
                }
                Some(false) => unobserved(Obstacle::ReferenceUnreachable, false),
                None => {
                    let mut mass = self.mass.lock();
                    match mass.failed(
                        known.key,
                        Before::of(known.agent.status),
                        began,
                        since_boot(),
                    ) {
                        Blame::Agent => Judgment::Observed,
                        Blame::Network { begins } => unobserved(Obstacle::MassFailure, begins),
                    }
                }
            },
        }
    }

    /// Whether another agent than this one, which just has, refused the token within the last minute.
    fn others_refuse(&self, agent_key: i64) -> bool {
        let now = since_boot();
        let mut refusals = self.refusals.lock();
        refusals.retain(|_, at| now.saturating_sub(*at) <= PERIOD);
        refusals.insert(agent_key, now);
        refusals.len() > 1
    }

    /// A ping was unobserved at `wall`.
    pub(crate) fn hindered(&self, obstacle: Obstacle, wall: DateTime<Utc>) {
        let now = since_boot();
        let mut episodes = self.episodes.lock();
        let episode = episodes.entry(obstacle).or_insert_with(|| {
            tracing::warn!("agents are not observed: {obstacle}; their pings say nothing");
            Episode {
                since: wall,
                last_at: now,
                pings: 0,
            }
        });
        episode.last_at = now;
        episode.pings += 1;
    }

    /// What hinders the ping system now: episodes end when nothing has happened for a minute.
    pub(crate) fn hindrances(&self) -> Vec<Hindrance> {
        let now = since_boot();
        let mass_is_active = self.mass.lock().is_active(now);
        let mut episodes = self.episodes.lock();
        episodes.retain(|obstacle, episode| {
            let goes_on = now.saturating_sub(episode.last_at) <= PERIOD
                && (*obstacle != Obstacle::MassFailure || mass_is_active);
            if !goes_on {
                tracing::info!(
                    pings = episode.pings,
                    "agents are observed again, after: {obstacle}"
                );
            }
            goes_on
        });
        let mut hindrances: Vec<Hindrance> = episodes
            .iter()
            .map(|(obstacle, episode)| Hindrance {
                obstacle: *obstacle,
                reason: obstacle.to_string(),
                since: episode.since,
                pings: episode.pings,
            })
            .collect();
        hindrances.sort_by_key(|hindrance| hindrance.since);
        hindrances
    }
}

/// Notices when the process did not run: it was stopped, starved, or suspended with its machine.
#[derive(Debug)]
struct StallDetector {
    last_tick_ms: AtomicU64,
    /// When the last stall ended; 0 before the first one.
    stalled_until_ms: AtomicU64,
}

impl StallDetector {
    fn new(now: Duration) -> Self {
        Self {
            last_tick_ms: AtomicU64::new(millis(now)),
            stalled_until_ms: AtomicU64::new(0),
        }
    }

    fn tick(&self, now: Duration) {
        let now = millis(now);
        let last = self.last_tick_ms.swap(now, Ordering::Relaxed);
        if now.saturating_sub(last) > millis(STALL) {
            self.stalled_until_ms.store(now, Ordering::Relaxed);
        }
    }

    /// Whether the process stood still at some time from `began` to `now`.
    fn stood_still(&self, began: Duration, now: Duration) -> bool {
        // A stall that just ended may be noticed here before the next tick.
        self.stalled_until_ms.load(Ordering::Relaxed) > millis(began)
            || millis(now).saturating_sub(self.last_tick_ms.load(Ordering::Relaxed)) > millis(STALL)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Addresses that answer whenever the network works.
#[derive(Debug)]
struct References {
    addresses: Vec<String>,
    /// The last result, and when it was known. Locked while they are asked: all failures share one answer.
    last: tokio::sync::Mutex<Option<(Duration, bool)>>,
}

impl References {
    /// Whether one of them can be connected to; `None` if there are none.
    async fn any_answers(&self) -> Option<bool> {
        if self.addresses.is_empty() {
            return None;
        }
        let mut last = self.last.lock().await;
        if let Some((at, answers)) = *last
            && since_boot().saturating_sub(at) < REFERENCE_LIFETIME
        {
            return Some(answers);
        }
        let connections = self
            .addresses
            .iter()
            .map(|address| Box::pin(async move { TcpStream::connect(address).await }));
        let any = futures_util::future::select_ok(connections);
        let answers = tokio::time::timeout(REFERENCE_TIMEOUT, any)
            .await
            .is_ok_and(|connected| connected.is_ok());
        *last = Some((since_boot(), answers));
        Some(answers)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::known;
    use super::*;
    use crate::wire::ping_system::served::Status;
    use tokio::net::TcpListener;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn failure(kind: FailureKind) -> AttemptFailure {
        AttemptFailure {
            kind,
            reason: String::new(),
        }
    }

    fn agent(key: i64, status: Status) -> AgentRecord {
        let mut agent = known("a");
        agent.key = key;
        agent.agent.status = status;
        agent
    }

    #[test]
    fn a_process_that_did_not_run_saw_nothing() {
        let stall = StallDetector::new(seconds(100));
        stall.tick(seconds(100) + TICK);
        assert!(!stall.stood_still(seconds(100), seconds(101)));
        // Noticed by the next tick, or before it.
        assert!(stall.stood_still(seconds(100), seconds(130)));
        stall.tick(seconds(130));
        assert!(stall.stood_still(seconds(100), seconds(130)));
        assert!(!stall.stood_still(seconds(130), seconds(131)));
    }

    #[tokio::test]
    async fn one_agent_that_refuses_the_token_is_at_fault_and_two_are_not() {
        let observer = Observer::new(Vec::new());
        let refused = failure(FailureKind::TokenRefused);
        let judge = async |key| {
            let agent = agent(key, Status::Active);
            observer.judge(&agent, &refused, since_boot()).await
        };
        assert_eq!(judge(1).await, Judgment::Observed);
        assert_eq!(judge(1).await, Judgment::Observed);
        let own = Judgment::Unobserved {
            obstacle: Obstacle::TokenRefused,
            also_earlier: true,
        };
        assert_eq!(judge(2).await, own);
        assert_eq!(judge(1).await, own);
    }

    #[tokio::test]
    async fn a_reference_decides_whose_fault_it_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let reference = listener.local_addr().unwrap().to_string();
        let observer = Observer::new(vec!["127.0.0.1:1".to_owned(), reference]);
        let lost = failure(FailureKind::NoAnswer);
        for key in 0..10 {
            let agent = agent(key, Status::Active);
            let judgment = observer.judge(&agent, &lost, since_boot()).await;
            assert_eq!(judgment, Judgment::Observed);
        }
        let observer = Observer::new(vec!["127.0.0.1:1".to_owned()]);
        let agent = agent(1, Status::Active);
        let judgment = observer.judge(&agent, &lost, since_boot()).await;
        let obstacle = Obstacle::ReferenceUnreachable;
        assert_eq!(
            judgment,
            Judgment::Unobserved {
                obstacle,
                also_earlier: false
            }
        );
        observer.hindered(obstacle, Utc::now());
        observer.hindered(obstacle, Utc::now());
        let hindrances = observer.hindrances();
        assert_eq!((hindrances[0].obstacle, hindrances[0].pings), (obstacle, 2));
    }
}
