//! Estimates an agent's uptime from its pings, and for how long the estimate may be used
//! (`.github/docs/protocol.md` section 4).

use std::time::{Duration, Instant};

use crate::runner::events::event::{Freshness, PingStats};
use crate::units::{Percent, saturating_add, saturating_sub};
use crate::wire::coverage::{mean_since, percent_of};
use crate::wire::ping_system::{HistoryPing, ListedAgent};
use chrono::{DateTime, Utc};

/// Intervals are spread by up to ±5 % (`.github/docs/protocol.md` section 1.2), so a ping covers that much more.
const INTERVAL_SPREAD: f64 = 1.05;

/// The uptime of an agent that follows from a good answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UptimeEstimate {
    /// The uptime now; `None` if no ping covers now.
    pub uptime: Option<Percent>,
    /// For how long the agent's next ping has been missing.
    pub overdue: Duration,
    /// How many pings the window holds.
    pub pings: usize,
    /// Counters of the ping system, for display.
    pub ping_stats: PingStats,
}

impl From<&ListedAgent> for PingStats {
    fn from(agent: &ListedAgent) -> Self {
        Self {
            consecutive_poor: agent.consecutive_poor_uptime,
            ping_interval_minutes: agent.ping_interval_minutes,
            total_pings: agent.total_pings,
        }
    }
}

/// The ping system's time: what it told, continued by our own steady clock. The runner's wall clock plays no part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ServerTime {
    pub told: DateTime<Utc>,
    /// When, by an [`AgeClock`](crate::clock::AgeClock), it was told.
    pub told_at: Instant,
}

impl ServerTime {
    pub(crate) fn at(self, now: Instant) -> DateTime<Utc> {
        saturating_add(self.told, now.saturating_duration_since(self.told_at))
    }
}

/// The newest time that an agent and its pings tell. When the next ping is due says nothing about now.
#[must_use]
pub(crate) fn newest_time(agent: &ListedAgent, history: &[HistoryPing]) -> Option<DateTime<Utc>> {
    let pings = history.iter().map(|ping| ping.timestamp);
    pings.chain(agent.last_ping_at).max()
}

/// What a ping system has reported about an agent so far.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AgentSnapshot {
    /// The agent, as listed.
    pub agent: ListedAgent,
    /// Its pings, oldest first.
    pub history: Vec<HistoryPing>,
    /// The ping system's time when it answered.
    pub time: ServerTime,
}

impl AgentSnapshot {
    /// The estimate for the moment `now`.
    #[must_use]
    pub(crate) fn estimate(&self, now: Instant, window: Duration) -> UptimeEstimate {
        let now = self.time.at(now);
        let (mean, pings) = mean_since(&self.history, saturating_sub(now, window));
        let uptime = mean.or_else(|| {
            let newest = newest_in_list(&self.agent).or_else(|| newest_in_history(&self.history));
            newest_if_covering(newest, self.agent.ping_interval_minutes, now)
        });
        UptimeEstimate {
            uptime,
            overdue: self.overdue(now).unwrap_or_default(),
            pings,
            ping_stats: PingStats::from(&self.agent),
        }
    }

    /// For how long the next ping has been missing; `None` if that is unknown.
    fn overdue(&self, now: DateTime<Utc>) -> Option<Duration> {
        let interval = interval(self.agent.ping_interval_minutes?)?;
        let observed = self.history.iter().rfind(|ping| !ping.is_void);
        let ended_at = observed
            .map(|ping| ping.timestamp)
            .max(self.agent.last_ping_at)?;
        let age = (now - ended_at).to_std().unwrap_or_default();
        Some(age.saturating_sub(interval))
    }

    /// Adds a new ping, and drops what is older than the window except the last ping before it. A
    /// ping that is known changes nothing.
    ///
    /// Returns whether pings are missing between the known ones and this one.
    pub(crate) fn add(
        &mut self,
        agent: ListedAgent,
        ping: HistoryPing,
        now: Instant,
        window: Duration,
    ) -> bool {
        let told = newest_time(&agent, std::slice::from_ref(&ping));
        if let Some(told) = told.filter(|told| *told > self.time.at(now)) {
            self.time = ServerTime { told, told_at: now };
        }
        let place = self
            .history
            .partition_point(|known| known.timestamp <= ping.timestamp);
        let before = place.checked_sub(1).map(|before| &self.history[before]);
        if before.is_some_and(|before| before.timestamp == ping.timestamp) {
            return false;
        }
        let is_gap = |(known, new): (u64, u64)| new > known.saturating_add(1);
        let missing = self
            .agent
            .total_pings
            .zip(agent.total_pings)
            .is_some_and(is_gap);
        if agent.total_pings >= self.agent.total_pings {
            self.agent = agent;
        }
        let begin = saturating_sub(self.time.at(now), window);
        self.history.insert(place, ping);
        let older = self
            .history
            .partition_point(|known| known.timestamp < begin);
        self.history.drain(..older.saturating_sub(1));
        missing
    }
}

/// The newest ping, for as long as its own interval covers now: for agents that are pinged so
/// seldom that the window holds nothing.
#[must_use]
pub(crate) fn newest_if_covering(
    newest: Option<(Percent, DateTime<Utc>)>,
    ping_interval_minutes: Option<f64>,
    now: DateTime<Utc>,
) -> Option<Percent> {
    let (percent, at) = newest?;
    (saturating_sub(now, interval(ping_interval_minutes?)?) <= at).then_some(percent)
}

/// The longest time between two pings.
fn interval(ping_interval_minutes: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(ping_interval_minutes * 60.0 * INTERVAL_SPREAD).ok()
}

/// The newest ping, according to the list of agents.
#[must_use]
pub(crate) fn newest_in_list(agent: &ListedAgent) -> Option<(Percent, DateTime<Utc>)> {
    Some((agent.last_uptime_percent?, agent.last_ping_at?))
}

/// The newest ping of a history sorted oldest first.
#[must_use]
pub(crate) fn newest_in_history(history: &[HistoryPing]) -> Option<(Percent, DateTime<Utc>)> {
    history
        .iter()
        .rev()
        .filter(|ping| !ping.is_void)
        .find_map(|ping| Some((percent_of(ping)?, ping.timestamp)))
}

/// An agent's latest known uptime and its age, over all good and bad answers so far.
#[derive(Debug, Clone)]
pub(crate) struct UptimeFreshness {
    stale_after: Duration,
    /// The uptime, and when it becomes stale.
    last: Option<(Percent, Instant)>,
}

impl UptimeFreshness {
    /// Nothing is known yet; a known uptime may be used for `stale_after`.
    #[must_use]
    pub(crate) fn new(stale_after: Duration) -> Self {
        Self {
            stale_after,
            last: None,
        }
    }

    /// Records a good answer at `now`. An answer without an uptime is knowledge as well: it replaces the
    /// last one. (Bad answers and silence change nothing but let the last one age.)
    pub(crate) fn answered(&mut self, estimate: &UptimeEstimate, now: Instant) {
        let fresh_for = self.stale_after.saturating_sub(estimate.overdue);
        self.last = estimate.uptime.map(|percent| (percent, now + fresh_for));
    }

    /// Takes in what the pings that are known say of a later moment: the uptime changes, but is no
    /// younger than before.
    pub(crate) fn reestimated(&mut self, uptime: Option<Percent>) {
        self.last = uptime.zip(self.last.map(|(_, stale_at)| stale_at));
    }

    /// The state and the last known uptime.
    #[must_use]
    pub(crate) fn at(&self, now: Instant) -> (Freshness, Option<Percent>) {
        match self.last {
            Some((percent, stale_at)) if now < stale_at => (Freshness::Fresh, Some(percent)),
            Some((percent, _)) => (Freshness::Stale, Some(percent)),
            None => (Freshness::Unknown, None),
        }
    }

    /// When the known uptime may no longer be acted on, unless a good answer comes before.
    #[must_use]
    pub(crate) fn stale_at(&self) -> Option<Instant> {
        self.last.map(|(_, stale_at)| stale_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::coverage::tests::{at, percent, ping};

    const HOUR: Duration = Duration::from_secs(3600);

    fn snapshot(history: Vec<HistoryPing>) -> AgentSnapshot {
        let agent = ListedAgent {
            agent_id: "a".to_owned(),
            agent_url: None,
            last_ping_at: None,
            total_pings: None,
            consecutive_poor_uptime: None,
            ping_interval_minutes: None,
            last_uptime_percent: None,
        };
        let time = ServerTime {
            told: at(0),
            told_at: Instant::now(),
        };
        AgentSnapshot {
            agent,
            history,
            time,
        }
    }

    #[test]
    fn told_pings_are_kept_in_order_once_and_within_the_window() {
        let agent = |total| ListedAgent {
            total_pings: Some(total),
            ..snapshot(Vec::new()).agent
        };
        let told = |snapshot: &mut AgentSnapshot, seconds: i64, total| {
            let now = snapshot.time.told_at;
            snapshot.add(agent(total), ping(seconds, 99.0, None), now, HOUR)
        };
        let mut snapshot = snapshot(vec![ping(-3000, 90.0, None), ping(-2000, 90.0, None)]);
        assert!(!told(&mut snapshot, -1000, 3));
        assert!(!told(&mut snapshot, -1000, 9));
        // Late ones find their place, but say nothing of the agent now.
        assert!(!told(&mut snapshot, -1500, 2));
        let seconds = |snapshot: &AgentSnapshot| -> Vec<i64> {
            let pings = snapshot.history.iter();
            pings
                .map(|ping| (ping.timestamp - at(0)).num_seconds())
                .collect()
        };
        assert_eq!(seconds(&snapshot), [-3000, -2000, -1500, -1000]);
        assert_eq!(snapshot.agent.total_pings, Some(3));
        // The one before the window tells what the first one in it covers.
        assert!(!told(&mut snapshot, 1800, 4));
        assert_eq!(seconds(&snapshot), [-2000, -1500, -1000, 1800]);
        // It is later now, and pings 5 and 6 are missing.
        assert!(told(&mut snapshot, 100_000, 7));
        assert_eq!(seconds(&snapshot), [1800, 100_000]);
        assert_eq!(snapshot.time.told, at(100_000));
    }

    #[test]
    fn now_is_what_the_ping_system_told_and_the_time_since() {
        let mut snapshot = snapshot(vec![ping(-3000, 0.0, None), ping(-100, 100.0, None)]);
        let later = |seconds| snapshot.time.told_at + Duration::from_secs(seconds);
        let uptime = |now| snapshot.estimate(now, HOUR).uptime.map(Percent::get);
        assert_eq!(uptime(later(0)), Some(50.0));
        assert_eq!(uptime(later(1000)), Some(100.0));
        assert_eq!(uptime(later(4000)), None);
        // Stamped in the future by its clock, it is the newest time, and stays what it is.
        let now = later(0);
        snapshot.history.push(ping(7200, 60.0, None));
        snapshot.time.told = newest_time(&snapshot.agent, &snapshot.history).unwrap();
        assert_eq!(snapshot.estimate(now, HOUR).uptime, Some(percent(60.0)));
    }

    #[test]
    fn an_agent_that_is_no_longer_pinged_becomes_stale() {
        let mut snapshot = snapshot(vec![ping(0, 99.0, None)]);
        snapshot.agent.ping_interval_minutes = Some(10.0);
        let told_at = snapshot.time.told_at;
        let overdue = |snapshot: &AgentSnapshot, seconds| {
            let now = told_at + Duration::from_secs(seconds);
            snapshot.estimate(now, HOUR).overdue.as_secs()
        };
        assert_eq!(overdue(&snapshot, 630), 0);
        assert_eq!(overdue(&snapshot, 700), 70);
        // A ping that says nothing changes nothing.
        snapshot.history.push(HistoryPing {
            is_void: true,
            ..ping(600, 0.0, None)
        });
        assert_eq!(overdue(&snapshot, 700), 70);

        let mut freshness = UptimeFreshness::new(Duration::from_secs(100));
        let now = told_at + Duration::from_secs(700);
        freshness.answered(&snapshot.estimate(now, HOUR), now);
        assert_eq!(freshness.stale_at(), Some(now + Duration::from_secs(30)));
        let now = told_at + Duration::from_secs(730);
        freshness.answered(&snapshot.estimate(now, HOUR), now);
        assert_eq!(freshness.at(now), (Freshness::Stale, Some(percent(99.0))));
    }

    #[test]
    fn the_newest_ping_counts_while_its_interval_covers_now() {
        let newest = |ago: i64| Some((percent(96.0), at(-ago)));
        assert_eq!(
            newest_if_covering(newest(86_400), Some(1440.0), at(0)),
            Some(percent(96.0))
        );
        assert_eq!(
            newest_if_covering(newest(95_000), Some(1440.0), at(0)),
            None
        );
        assert_eq!(newest_if_covering(newest(10), None, at(0)), None);
        assert_eq!(newest_if_covering(newest(10), Some(1e300), at(0)), None);
        assert_eq!(newest_if_covering(None, Some(15.0), at(0)), None);
    }

    fn known(uptime: Option<f64>) -> UptimeEstimate {
        UptimeEstimate {
            uptime: uptime.map(percent),
            overdue: Duration::ZERO,
            pings: 1,
            ping_stats: PingStats::default(),
        }
    }

    #[test]
    fn knowledge_ages_until_it_is_stale_and_comes_back() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut freshness = UptimeFreshness::new(Duration::from_secs(300));
        assert_eq!(freshness.at(start), (Freshness::Unknown, None));
        freshness.answered(&known(Some(99.5)), start);
        assert_eq!(
            freshness.at(after(299)),
            (Freshness::Fresh, Some(percent(99.5)))
        );
        assert_eq!(
            freshness.at(after(300)),
            (Freshness::Stale, Some(percent(99.5)))
        );
        freshness.answered(&known(Some(96.0)), after(400));
        assert_eq!(
            freshness.at(after(500)),
            (Freshness::Fresh, Some(percent(96.0)))
        );
        freshness.answered(&known(None), after(501));
        assert_eq!(freshness.at(after(501)), (Freshness::Unknown, None));
    }
}
