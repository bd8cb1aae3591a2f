//! A second opinion on live runners: what their orchestrators list. It is shown, counted and recorded beside the uptime, and
//! never part of it or of the rate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use url::Url;

use super::events::dispatcher::EventDispatcher;
use super::events::event::{Event, Listing, RunnerDiscovered};
use super::rate::job_stats::JobStats;
use super::roster::AgentIndex;
use super::send::live_runner::{DiscoveryError, LiveRunner, Orchestrator};
use crate::wire::live_runner::{ListedRunner, listed_path};

/// How often each orchestrator is asked, whatever the number of its runners.
const INTERVAL: Duration = Duration::from_secs(10);
/// The number of consecutive failures after which nothing is known of an orchestrator's runners.
const MAX_FAILURES: u32 = 3;

/// The live runners of the agents that are followed.
#[derive(Debug, Default)]
pub(crate) struct Discovery {
    followed: Mutex<BTreeMap<AgentIndex, FollowedRunner>>,
}

/// An agent's live runner, and what was told of it last.
#[derive(Debug)]
pub(crate) struct FollowedRunner {
    path: String,
    runner: Arc<LiveRunner>,
    job_stats: Arc<JobStats>,
    told: Option<Listing>,
}

impl FollowedRunner {
    #[must_use]
    pub(crate) fn new(url: &Url, runner: Arc<LiveRunner>, job_stats: Arc<JobStats>) -> Self {
        Self {
            path: listed_path(url.as_str()).to_owned(),
            runner,
            job_stats,
            told: None,
        }
    }

    /// Takes in what is known of it now. Returns whether that differs from what was told last: places that are taken and
    /// freed are no news.
    fn apply(&mut self, listing: &Listing) -> bool {
        if matches!(listing, Listing::Listed(_)) {
            self.runner.listed();
            self.job_stats.runner_listed();
        }
        let is_new = self.told.as_ref().is_none_or(|told| !told.says_as(listing));
        self.told = Some(listing.clone());
        is_new
    }
}

impl Discovery {
    pub(crate) fn follow(&self, agent: AgentIndex, runner: FollowedRunner) {
        self.followed.lock().insert(agent, runner);
    }

    pub(crate) fn unfollow(&self, agent: AgentIndex) {
        self.followed.lock().remove(&agent);
    }

    /// Asks the orchestrators at each interval. Never returns.
    pub(crate) async fn watch<'a>(
        &self,
        orchestrators: impl Iterator<Item = &'a Arc<Orchestrator>>,
        events: &EventDispatcher,
    ) {
        let watched = orchestrators.map(|orchestrator| self.watch_one(orchestrator, events));
        join_all(watched).await;
        std::future::pending::<()>().await;
    }

    async fn watch_one(&self, orchestrator: &Arc<Orchestrator>, events: &EventDispatcher) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failures = 0;
        loop {
            ticks.tick().await;
            if !self.has_runners_at(orchestrator) {
                continue;
            }
            let discovered = orchestrator.discover().await;
            failures = match &discovered {
                Ok(_) => {
                    if failures > 0 {
                        tracing::info!("{} lists its runners again", orchestrator.url());
                    }
                    0
                }
                Err(error) => {
                    log_failure(orchestrator, error, failures);
                    failures + 1
                }
            };
            // What was known a moment ago still holds after a single answer that is lost.
            if failures == 0 || failures >= MAX_FAILURES {
                self.tell(orchestrator, discovered.ok().as_deref(), events);
            }
        }
    }

    fn has_runners_at(&self, orchestrator: &Arc<Orchestrator>) -> bool {
        let followed = self.followed.lock();
        let mut runners = followed.values();
        runners.any(|followed| Arc::ptr_eq(followed.runner.orchestrator(), orchestrator))
    }

    /// Emits what is known of each runner of an orchestrator; nothing for `None`.
    fn tell(
        &self,
        orchestrator: &Arc<Orchestrator>,
        listed: Option<&[ListedRunner]>,
        events: &EventDispatcher,
    ) {
        let by_path: Option<BTreeMap<&str, &ListedRunner>> = listed.map(|listed| {
            let runners = listed.iter();
            runners
                .map(|runner| (listed_path(&runner.url), runner))
                .collect()
        });
        let ts = events.now();
        for (&agent, followed) in self.followed.lock().iter_mut() {
            if !Arc::ptr_eq(followed.runner.orchestrator(), orchestrator) {
                continue;
            }
            let listing = match &by_path {
                None => Listing::Unknown,
                Some(by_path) => match by_path.get(followed.path.as_str()) {
                    None => Listing::NotListed,
                    Some(&runner) => Listing::Listed(runner.clone()),
                },
            };
            let is_new = followed.apply(&listing);
            events.record(&Event::Discovery(RunnerDiscovered {
                ts,
                agent,
                listing,
                is_new,
            }));
        }
    }
}

fn log_failure(orchestrator: &Orchestrator, error: &DiscoveryError, failures_before: u32) {
    if failures_before == 0 {
        tracing::warn!(
            "{} does not tell which runners it lists: {error}; jobs are sent all the same",
            orchestrator.url()
        );
    }
}
