//! Forecasts the probability that an agent reaches a tier soon.
//!
//! Per tier, an agent alternates between two states: reaching the tier or not. Each state is left at a
//! constant rate, so that the probability to be up after a time h is p + (now − p) × exp(−(f + r) × h), where f and r are the
//! rates of falling and rising, p = r ÷ (f + r), and now is 1 or 0. The rates are changes per time, with a
//! half-life of three days; the prior is a fifth of a change in half a day.
//!
//! The quality is measured on the past (backtest): a forecast for each hour, from what was known then, is
//! compared with what happened (Brier score: the mean square of probability minus outcome, 0 at best), and
//! with the forecast that nothing changes.

use serde::Serialize;

use super::timeline::{Micros, Timeline};
use crate::units::Percent;

const HOUR: f64 = 3600.0;
/// The half-life of observations.
const HALF_LIFE: f64 = 72.0 * HOUR;
/// The prior: this many changes in this time.
const PRIOR: (f64, f64) = (0.2, 12.0 * HOUR);

/// The forecast for one agent and one tier.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierForecast {
    pub tier_percent: Percent,
    /// Whether the tier is reached at the end of the records.
    pub reached: bool,
    /// The next hour.
    pub next_hour: Chance,
    /// The next day.
    pub next_day: Chance,
}

/// A probability, and how good past forecasts of its kind were.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Chance {
    /// The probability to reach the tier after the horizon.
    pub chance: f64,
    /// The number of past forecasts that could be compared with the outcome.
    pub compared: u64,
    /// Their Brier score; the lower the better.
    pub brier: Option<f64>,
    /// The score of the forecast that nothing changes.
    pub brier_as_now: Option<f64>,
}

/// A period in which a tier was reached, or was not. In seconds from any origin.
#[derive(Debug, Clone, Copy, PartialEq)]
struct UptimeRun {
    from: f64,
    until: f64,
    up: bool,
}

/// An agent's forecasts for each of the tiers; none if its uptime was never known.
#[must_use]
pub(crate) fn forecast(runs: &[Timeline], tiers: &[Percent]) -> Vec<TierForecast> {
    let of_tier = |&tier: &Percent| {
        let segments = segments(runs, tier);
        let last = segments.last()?;
        let mut model = Model::default();
        for segment in &segments {
            model.learn(segment, segment.until);
        }
        let chance = |horizon: f64| {
            let past = compare(&segments, horizon);
            Chance {
                chance: model.chance(last.up, horizon),
                ..past
            }
        };
        Some(TierForecast {
            tier_percent: tier,
            reached: last.up,
            next_hour: chance(HOUR),
            next_day: chance(24.0 * HOUR),
        })
    };
    tiers.iter().filter_map(of_tier).collect()
}

fn segments(runs: &[Timeline], tier: Percent) -> Vec<UptimeRun> {
    let known = runs.iter().flat_map(Timeline::known);
    let known: Vec<_> = known.filter(|known| known.until > known.from).collect();
    let Some(origin) = known.first().map(|first| first.from) else {
        return Vec::new();
    };
    let seconds = |at: Micros| super::timeline::seconds(at - origin);
    let mut segments: Vec<UptimeRun> = Vec::new();
    for known in known {
        let next = UptimeRun {
            from: seconds(known.from),
            until: seconds(known.until),
            up: known.uptime >= tier,
        };
        match segments.last_mut() {
            Some(last) if last.up == next.up && next.from <= last.until => last.until = next.until,
            _ => segments.push(next),
        }
    }
    segments
}

/// The observations of both states, weighted by age.
#[derive(Debug, Clone, Copy, Default)]
struct Model {
    up: Seen,
    down: Seen,
    /// Ages are measured from this instant.
    at: f64,
    last: Option<(f64, bool)>,
}

/// The time in a state, and how often it was left.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    seconds: f64,
    left: f64,
}

impl Seen {
    fn aged(self, factor: f64) -> Self {
        Self {
            seconds: self.seconds * factor,
            left: self.left * factor,
        }
    }

    fn rate(self) -> f64 {
        (self.left + PRIOR.0) / (self.seconds + PRIOR.1)
    }
}

impl Model {
    /// Adds a segment's part until an instant; segments must come in order, each from its beginning.
    fn learn(&mut self, segment: &UptimeRun, until: f64) {
        let until = until.min(segment.until);
        let begin = self
            .last
            .map_or(segment.from, |(last, _)| segment.from.max(last));
        if until <= begin {
            return;
        }
        self.age(begin);
        let followed = self
            .last
            .is_some_and(|(last, up)| segment.from <= last && up != segment.up);
        if followed {
            let left = if segment.up {
                &mut self.down
            } else {
                &mut self.up
            };
            left.left += 1.0;
        }
        self.age(until);
        let decay = std::f64::consts::LN_2 / HALF_LIFE;
        // The integral of the weight over the period.
        let weighed = (1.0 - (-(until - begin) * decay).exp()) / decay;
        let state = if segment.up {
            &mut self.up
        } else {
            &mut self.down
        };
        state.seconds += weighed;
        self.last = Some((until, segment.up));
    }

    fn age(&mut self, until: f64) {
        let factor = (-(until - self.at).max(0.0) * std::f64::consts::LN_2 / HALF_LIFE).exp();
        (self.up, self.down) = (self.up.aged(factor), self.down.aged(factor));
        self.at = self.at.max(until);
    }

    /// The probability to be up after `horizon` seconds.
    fn chance(&self, up: bool, horizon: f64) -> f64 {
        let (falls, rises) = (self.up.rate(), self.down.rate());
        let settled = rises / (falls + rises);
        let now = f64::from(u8::from(up));
        settled + (now - settled) * (-(falls + rises) * horizon).exp()
    }
}

/// Compares forecasts for each hour of the past with the outcome. (Their probability is not set.)
fn compare(segments: &[UptimeRun], horizon: f64) -> Chance {
    let mut model = Model::default();
    let (mut compared, mut squares, mut squares_as_now) = (0_u64, 0.0, 0.0);
    let end = segments.last().map_or(0.0, |last| last.until);
    let (mut known, mut later) = (0, 0);
    let mut now = HOUR;
    while now + horizon < end {
        while segments[known].until <= now {
            model.learn(&segments[known], now);
            known += 1;
        }
        let then = now + horizon;
        while segments[later].until <= then {
            later += 1;
        }
        let (current, coming) = (&segments[known], &segments[later]);
        if current.from <= now {
            model.learn(current, now);
        }
        if current.from <= now && coming.from <= then {
            let came = f64::from(u8::from(coming.up));
            let as_now = f64::from(u8::from(current.up));
            squares += (model.chance(current.up, horizon) - came).powi(2);
            squares_as_now += (as_now - came).powi(2);
            compared += 1;
        }
        now += HOUR;
    }
    #[expect(clippy::cast_precision_loss, reason = "far fewer hours than 2^53")]
    let mean = |sum: f64| (compared > 0).then(|| sum / compared as f64);
    Chance {
        chance: f64::NAN,
        compared,
        brier: mean(squares),
        brier_as_now: mean(squares_as_now),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fastrand::Rng;
    use proptest::prelude::*;

    const MICROS: f64 = 1e6;

    /// Alternates between 100 % and 80 %, beginning up, after these many hours each.
    fn alternating(hours: &[f64]) -> Vec<Timeline> {
        let mut at = 0.0;
        let mut uptimes = Vec::new();
        for (n, hours) in hours.iter().enumerate() {
            let uptime = if n % 2 == 0 { 100 } else { 80 };
            uptimes.push(((at * HOUR * MICROS) as Micros, Some(Percent::whole(uptime))));
            at += hours;
        }
        vec![Timeline {
            uptimes,
            end: (at * HOUR * MICROS) as Micros,
            ..Timeline::default()
        }]
    }

    fn one(runs: &[Timeline]) -> TierForecast {
        forecast(runs, &[Percent::whole(99)]).remove(0)
    }

    #[test]
    fn what_is_always_up_is_expected_to_stay_so() {
        let runs = alternating(&[200.0]);
        let always = one(&runs);
        assert!(always.reached && always.next_hour.chance > 0.98);
        assert_eq!(always.next_hour.brier_as_now, Some(0.0));
        assert!(always.next_hour.brier.unwrap() < 0.01);
        assert_eq!(forecast(&[], &[Percent::whole(99)]), []);
    }

    #[test]
    fn rates_are_changes_by_time_weighed_by_age() {
        // Up for a half-life, down for another one: what is older counts half of the newer.
        let runs = alternating(&[72.0, 72.0]);
        let got = one(&runs);
        let decay = std::f64::consts::LN_2 / HALF_LIFE;
        let newer = 0.5 / decay;
        let (up, down) = (newer / 2.0, newer);
        let falls = (0.5 + 0.2) / (up + 12.0 * HOUR);
        let rises = 0.2 / (down + 12.0 * HOUR);
        let settled = rises / (falls + rises);
        let expected = settled - settled * (-(falls + rises) * HOUR).exp();
        assert!(
            (got.next_hour.chance - expected).abs() < 1e-9,
            "{got:?} {expected}"
        );
        assert!(!got.reached);
    }

    #[test]
    fn of_flapping_agents_the_model_knows_more_than_as_now() {
        let mut rng = Rng::with_seed(7);
        let hours: Vec<f64> = (0..400).map(|_| -rng.f64().ln() * 0.7).collect();
        let day = one(&alternating(&hours)).next_day;
        assert!(day.compared > 100);
        assert!(
            day.brier.unwrap() < day.brier_as_now.unwrap() * 0.7,
            "{day:?}"
        );
    }

    proptest! {
        /// Against a model that is learned anew for each hour of the past.
        #[test]
        fn the_past_is_compared_with_what_was_known_then(
            hours in prop::collection::vec(0.01..9.0_f64, 1..25), horizon in prop::sample::select(vec![1.0, 24.0]),
            gap in 0.0..3.0_f64,
        ) {
            let mut runs = alternating(&hours);
            // A second run, after a time in which nothing was known.
            let mut second = runs[0].clone();
            let shift = runs[0].end + (gap * HOUR * MICROS) as Micros;
            for (at, _) in &mut second.uptimes {
                *at += shift;
            }
            second.end += shift;
            runs.push(second);
            let segments = segments(&runs, Percent::whole(99));
            let horizon = horizon * HOUR;
            let got = compare(&segments, horizon);
            let at = |when: f64| segments.iter().find(|s| s.from <= when && when < s.until).map(|s| s.up);
            let (mut compared, mut squares) = (0, 0.0);
            let mut now = HOUR;
            while now + horizon < segments.last().unwrap().until {
                if let (Some(current), Some(came)) = (at(now), at(now + horizon)) {
                    let mut model = Model::default();
                    for segment in segments.iter().filter(|segment| segment.from <= now) {
                        model.learn(segment, now);
                    }
                    squares += (model.chance(current, horizon) - f64::from(u8::from(came))).powi(2);
                    compared += 1;
                }
                now += HOUR;
            }
            prop_assert_eq!(got.compared, compared);
            if let Some(brier) = got.brier {
                prop_assert!((brier - squares / compared as f64).abs() < 1e-9);
            }
        }
    }
}
