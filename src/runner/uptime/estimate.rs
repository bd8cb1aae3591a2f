//! Estimates an agent's uptime from its pings, and for how long the estimate may be used
//! (`.github/docs/protocol.md` section 4).

use std::time::{Duration, Instant};

use crate::runner::events::event::{Freshness, PingStats};
use crate::units::{Percent, saturating_sub};
use crate::wire::coverage::{covered_seconds, first_ping_uptime};
use crate::wire::ping_system::{HistoryPing, ListedAgent};
use chrono::{DateTime, TimeDelta, Utc};

/// Intervals are spread by up to ±5 % (`.github/docs/protocol.md` section 1.2), so a ping covers that much more.
const INTERVAL_SPREAD: f64 = 1.05;

/// How far the clocks of ping system and runner may differ.
const CLOCK_SLACK: TimeDelta = TimeDelta::minutes(5);

/// The uptime of an agent that follows from a good answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UptimeEstimate {
    /// The uptime now; `None` if no ping covers now.
    pub uptime: Option<Percent>,
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

/// What a ping system has reported about an agent so far.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AgentSnapshot {
    /// The agent, as listed.
    pub agent: ListedAgent,
    /// Its pings, oldest first.
    pub history: Vec<HistoryPing>,
}

impl AgentSnapshot {
    /// The estimate for the moment `now`.
    #[must_use]
    pub(crate) fn estimate(&self, now: DateTime<Utc>, window: Duration) -> UptimeEstimate {
        let (mean, pings) = mean_in_window(&self.history, now, window);
        let uptime = mean.or_else(|| {
            let newest = newest_in_list(&self.agent).or_else(|| newest_in_history(&self.history));
            newest_if_covering(newest, self.agent.ping_interval_minutes, now)
        });
        UptimeEstimate {
            uptime,
            pings,
            ping_stats: PingStats::from(&self.agent),
        }
    }

    /// Adds a new ping, and drops what is older than the window except the last ping before it. A
    /// ping that is known changes nothing.
    pub(crate) fn add(
        &mut self,
        agent: ListedAgent,
        ping: HistoryPing,
        now: DateTime<Utc>,
        window: Duration,
    ) {
        let place = self
            .history
            .partition_point(|known| known.timestamp <= ping.timestamp);
        let before = place.checked_sub(1).map(|before| &self.history[before]);
        if before.is_some_and(|before| before.timestamp == ping.timestamp) {
            return;
        }
        if agent.total_pings >= self.agent.total_pings {
            self.agent = agent;
        }
        let begin = saturating_sub(now, window);
        self.history.insert(place, ping);
        let older = self
            .history
            .partition_point(|known| known.timestamp < begin);
        self.history.drain(..older.saturating_sub(1));
    }
}

/// The mean of the pings in the window, each weighted by the time that it covers, and how many
/// there are. `history` is sorted oldest first and may begin before the window.
///
/// First pings prove only that a GPU exists: they count only where there is nothing better.
#[must_use]
pub(crate) fn mean_in_window(
    history: &[HistoryPing],
    now: DateTime<Utc>,
    window: Duration,
) -> (Option<Percent>, usize) {
    let begin = saturating_sub(now, window);
    let in_window = history.partition_point(|ping| ping.timestamp < begin);
    // Pings stamped by a clock that was ahead would stay in the window for too long.
    let end = history.partition_point(|ping| ping.timestamp <= now + CLOCK_SLACK);
    let in_window = in_window..end.max(in_window);
    let counting = counting(history);
    let weighted = |first_pings: bool| -> Vec<(Percent, Option<f64>)> {
        in_window
            .clone()
            .filter(|&index| history[index].first_ping == first_pings)
            .filter(|&index| counting[index])
            .filter_map(|index| {
                let before = index.checked_sub(1).map(|before| &history[before]);
                let ping = &history[index];
                let since_previous =
                    before.map(|before| (ping.timestamp - before.timestamp).as_seconds_f64());
                let covered = match ping.covers_from {
                    Some(from) => Some(seconds_between(from.max(begin), ping.timestamp)),
                    None => covered_seconds(ping.window_seconds, since_previous),
                };
                percent_of(ping).map(|percent| (percent, covered))
            })
            .collect()
    };
    let mean = weighted_mean(&weighted(false)).or_else(|| weighted_mean(&weighted(true)));
    (mean, in_window.len())
}

/// Which pings say something: a failed one does not if one that was answered later covers its time. The ping system says so
/// as well, but maybe only in its next answer.
fn counting(history: &[HistoryPing]) -> Vec<bool> {
    let mut answered_from = DateTime::<Utc>::MAX_UTC;
    let newest_first = history.iter().rev().map(|ping| {
        if let Some(from) = ping.covers_from.filter(|_| ping.success) {
            answered_from = answered_from.min(from);
        }
        !ping.is_void && (ping.success || ping.timestamp <= answered_from)
    });
    let mut counting: Vec<bool> = newest_first.collect();
    counting.reverse();
    counting
}

fn seconds_between(from: DateTime<Utc>, until: DateTime<Utc>) -> f64 {
    (until - from).as_seconds_f64().max(0.0)
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
    let interval =
        Duration::try_from_secs_f64(ping_interval_minutes? * 60.0 * INTERVAL_SPREAD).ok()?;
    (saturating_sub(now, interval) <= at).then_some(percent)
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

/// The uptime that a ping reports; `None` if it reports none.
fn percent_of(ping: &HistoryPing) -> Option<Percent> {
    let gone = ping.gpu_available == Some(false);
    match ping.uptime_percent {
        _ if !ping.success => Some(Percent::ZERO),
        reported if ping.first_ping => Some(first_ping_uptime(ping.gpu_available, reported)),
        None if gone => Some(Percent::ZERO),
        reported => reported,
    }
}

/// `None` if `values` is empty; all weigh the same if a weight is missing or all are 0.
fn weighted_mean(pings: &[(Percent, Option<f64>)]) -> Option<Percent> {
    let (origin, _) = pings.first()?;
    let known: Option<Vec<f64>> = pings.iter().map(|(_, seconds)| *seconds).collect();
    let heaviest = known.iter().flatten().copied().fold(0.0, f64::max);
    let weights = match known {
        // Shares of the heaviest cannot overflow when they are added up.
        Some(seconds) if heaviest > 0.0 => seconds.iter().map(|s| s / heaviest).collect(),
        _ => vec![1.0; pings.len()],
    };
    let total: f64 = weights.iter().sum();
    // Counted from one of the values and rounded to a billionth, so that equal pings have exactly
    // that value as their mean: a 99.0 must not fall out of its tier by a rounding error.
    let above: f64 = pings
        .iter()
        .zip(&weights)
        .map(|((percent, _), weight)| (percent.get() - origin.get()) * weight)
        .sum();
    let mean = origin.get() + above / total;
    Percent::new(mean.clamp(0.0, 100.0))
        .map(Percent::to_a_billionth)
        .ok()
}

/// An agent's latest known uptime and its age, over all good and bad answers so far.
#[derive(Debug, Clone)]
pub(crate) struct UptimeFreshness {
    stale_after: Duration,
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
    pub(crate) fn answered(&mut self, uptime: Option<Percent>, now: Instant) {
        self.last = uptime.map(|percent| (percent, now));
    }

    /// Takes in what the pings that are known say of a later moment: the uptime changes, but is no
    /// younger than before.
    pub(crate) fn reestimated(&mut self, uptime: Option<Percent>) {
        self.last = uptime.zip(self.last.map(|(_, at)| at));
    }

    /// The state and the last known uptime.
    #[must_use]
    pub(crate) fn at(&self, now: Instant) -> (Freshness, Option<Percent>) {
        match (self.last, self.stale_at()) {
            (Some((percent, _)), Some(stale_at)) if now < stale_at => {
                (Freshness::Fresh, Some(percent))
            }
            (Some((percent, _)), _) => (Freshness::Stale, Some(percent)),
            (None, _) => (Freshness::Unknown, None),
        }
    }

    /// When the known uptime may no longer be acted on, unless a good answer comes before.
    #[must_use]
    pub(crate) fn stale_at(&self) -> Option<Instant> {
        self.last.map(|(_, known_at)| known_at + self.stale_after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_000_000_000 + seconds, 0).unwrap()
    }

    fn percent(value: f64) -> Percent {
        Percent::new(value).unwrap()
    }

    fn ping(seconds: i64, uptime: f64, window_seconds: Option<f64>) -> HistoryPing {
        HistoryPing {
            timestamp: at(seconds),
            success: true,
            uptime_percent: Some(percent(uptime)),
            window_seconds,
            gpu_available: Some(true),
            first_ping: false,
            covers_from: None,
            is_void: false,
        }
    }

    fn failed(seconds: i64, covers_from: i64) -> HistoryPing {
        HistoryPing {
            success: false,
            uptime_percent: None,
            covers_from: Some(at(covers_from)),
            ..ping(seconds, 0.0, None)
        }
    }

    fn covering(covers_from: i64, seconds: i64, uptime: f64) -> HistoryPing {
        HistoryPing {
            covers_from: Some(at(covers_from)),
            ..ping(seconds, uptime, None)
        }
    }

    fn mean(history: &[HistoryPing]) -> Option<f64> {
        mean_in_window(history, at(0), HOUR).0.map(Percent::get)
    }

    #[test]
    fn pings_weigh_by_the_time_that_they_cover() {
        let history = [
            ping(-900, 100.0, Some(900.0)),
            ping(-100, 90.0, Some(300.0)),
        ];
        assert_eq!(mean(&history), Some(97.5));
    }

    #[test]
    fn what_an_answer_covers_is_not_held_against_the_agent() {
        let before = covering(-1800, -900, 100.0);
        let lost = failed(-600, -900);
        assert_eq!(mean(&[before.clone(), lost.clone()]), Some(75.0));
        let answered = covering(-900, -300, 100.0);
        assert_eq!(mean(&[before.clone(), lost.clone(), answered]), Some(100.0));
        // One that asked for less does not.
        let shorter = covering(-600, -300, 100.0);
        assert_eq!(mean(&[before.clone(), lost.clone(), shorter]), Some(80.0));
        let void = HistoryPing {
            is_void: true,
            ..lost
        };
        assert_eq!(mean(&[before, void]), Some(100.0));
    }

    #[test]
    fn only_the_part_inside_the_window_counts() {
        // A quarter of the window was down, and three quarters up.
        let history = [covering(-9000, -2700, 0.0), covering(-2700, 0, 100.0)];
        assert_eq!(mean(&history), Some(75.0));
    }

    #[test]
    fn pings_from_a_clock_that_was_ahead_do_not_count() {
        let ahead = ping(3000, 0.0, Some(3600.0));
        assert_eq!(mean(&[ping(-100, 98.0, None), ahead.clone()]), Some(98.0));
        assert_eq!(mean(&[ahead]), None);
        // Clocks need not agree to the second.
        assert_eq!(mean(&[ping(30, 98.0, None)]), Some(98.0));
    }

    #[test]
    fn a_missing_window_is_the_time_since_the_ping_before() {
        let before_the_window = ping(-3700, 0.0, None);
        let history = [
            before_the_window,
            ping(-3400, 90.0, None),
            ping(-2500, 98.0, None),
        ];
        assert_eq!(mean(&history), Some(96.0));
    }

    #[test]
    fn all_weigh_the_same_where_a_weight_is_unknown() {
        let history = [ping(-1000, 90.0, None), ping(-100, 100.0, Some(900.0))];
        assert_eq!(mean(&history), Some(95.0));
        let zero = [ping(-1000, 90.0, Some(0.0)), ping(-100, 100.0, Some(0.0))];
        assert_eq!(mean(&zero), Some(95.0));
    }

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
        AgentSnapshot { agent, history }
    }

    #[test]
    fn told_pings_are_kept_in_order_once_and_within_the_window() {
        let agent = |total| ListedAgent {
            total_pings: Some(total),
            ..snapshot(Vec::new()).agent
        };
        let told = |snapshot: &mut AgentSnapshot, seconds: i64, total| {
            let now = at(seconds.max(0));
            snapshot.add(agent(total), ping(seconds, 99.0, None), now, HOUR);
        };
        let mut snapshot = snapshot(vec![ping(-3000, 90.0, None), ping(-2000, 90.0, None)]);
        told(&mut snapshot, -1000, 3);
        told(&mut snapshot, -1000, 9);
        // Late ones find their place, but say nothing of the agent now.
        told(&mut snapshot, -1500, 2);
        let seconds = |snapshot: &AgentSnapshot| -> Vec<i64> {
            let pings = snapshot.history.iter();
            pings
                .map(|ping| (ping.timestamp - at(0)).num_seconds())
                .collect()
        };
        assert_eq!(seconds(&snapshot), [-3000, -2000, -1500, -1000]);
        assert_eq!(snapshot.agent.total_pings, Some(3));
        // The one before the window tells what the first one in it covers.
        told(&mut snapshot, 1800, 4);
        assert_eq!(seconds(&snapshot), [-2000, -1500, -1000, 1800]);
        told(&mut snapshot, 100_000, 5);
        assert_eq!(seconds(&snapshot), [1800, 100_000]);
    }

    #[test]
    fn an_unanswered_ping_counts_as_zero() {
        let mut missed = ping(-100, 100.0, Some(900.0));
        missed.success = false;
        missed.uptime_percent = None;
        assert_eq!(mean(&[ping(-1000, 100.0, Some(900.0)), missed]), Some(50.0));
    }

    #[test]
    fn first_pings_count_only_while_there_is_nothing_better() {
        let mut first = ping(-1000, 37.0, None);
        first.first_ping = true;
        assert_eq!(mean(&[first.clone()]), Some(100.0));
        assert_eq!(mean(&[first.clone(), ping(-100, 96.0, None)]), Some(96.0));
        first.gpu_available = Some(false);
        assert_eq!(mean(&[first.clone()]), Some(0.0));
        first.gpu_available = None;
        assert_eq!(mean(&[first.clone()]), Some(100.0));
        first.success = false;
        assert_eq!(mean(&[first]), Some(0.0));
    }

    #[test]
    fn pings_before_the_window_do_not_count() {
        assert_eq!(
            mean(&[ping(-3601, 0.0, None), ping(-3600, 99.0, None)]),
            Some(99.0)
        );
        assert_eq!(
            mean_in_window(&[ping(-3601, 50.0, None)], at(0), HOUR),
            (None, 0)
        );
    }

    #[test]
    fn an_answer_without_uptime_says_nothing_unless_the_gpu_is_gone() {
        let mut silent = ping(-100, 0.0, None);
        silent.uptime_percent = None;
        assert_eq!(mean(&[ping(-1000, 99.0, None), silent.clone()]), Some(99.0));
        silent.gpu_available = Some(false);
        assert_eq!(mean(&[silent]), Some(0.0));
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

    #[test]
    fn knowledge_ages_until_it_is_stale_and_comes_back() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut freshness = UptimeFreshness::new(Duration::from_secs(300));
        assert_eq!(freshness.at(start), (Freshness::Unknown, None));
        freshness.answered(Some(percent(99.5)), start);
        assert_eq!(
            freshness.at(after(299)),
            (Freshness::Fresh, Some(percent(99.5)))
        );
        assert_eq!(
            freshness.at(after(300)),
            (Freshness::Stale, Some(percent(99.5)))
        );
        freshness.answered(Some(percent(96.0)), after(400));
        assert_eq!(
            freshness.at(after(500)),
            (Freshness::Fresh, Some(percent(96.0)))
        );
        freshness.answered(None, after(501));
        assert_eq!(freshness.at(after(501)), (Freshness::Unknown, None));
    }

    prop_compose! {
        fn any_ping()(
            seconds in -7200..100_i64, success in any::<bool>(), first_ping in any::<bool>(),
            uptime in prop::option::of(0.0..=100.0_f64), gpu_available in any::<Option<bool>>(),
            window_seconds in prop::option::of(0.0..1e308_f64),
        ) -> HistoryPing {
            HistoryPing {
                timestamp: at(seconds), success, first_ping, gpu_available, window_seconds,
                uptime_percent: uptime.map(percent), covers_from: None, is_void: false,
            }
        }
    }

    proptest! {
        #[test]
        fn the_mean_lies_between_its_pings(mut history in prop::collection::vec(any_ping(), 0..20)) {
            history.sort_by_key(|ping| ping.timestamp);
            let (mean, count) = mean_in_window(&history, at(0), HOUR);
            let percents: Vec<f64> = history[history.len() - count..]
                .iter().filter_map(percent_of).map(Percent::get).collect();
            prop_assert_eq!(mean.is_none(), percents.is_empty());
            if let Some(mean) = mean {
                let least = percents.iter().copied().fold(f64::MAX, f64::min);
                let most = percents.iter().copied().fold(0.0, f64::max);
                prop_assert!(least - 1e-6 <= mean.get() && mean.get() <= most + 1e-6);
            }
        }

        #[test]
        fn equal_pings_have_exactly_their_value_as_mean(
            tenths in 0..=1000_u32, windows in prop::collection::vec(0.001..1e6_f64, 1..30),
        ) {
            let value = f64::from(tenths) / 10.0;
            let history: Vec<HistoryPing> = windows.iter().map(|w| ping(-10, value, Some(*w))).collect();
            prop_assert_eq!(mean(&history), Some(value));
        }
    }
}
