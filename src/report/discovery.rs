//! What orchestrators listed of a live runner, beside the uptime that its agent reported.

use serde::Serialize;

use super::timeline::{Micros, Timeline, tenths};
use crate::units::Share;

const MINUTE_MICROS: f64 = 60e6;

/// For how long a live runner was listed, and whether its uptime said the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Discovery {
    pub minutes_listed: f64,
    pub minutes_not_listed: f64,
    /// The orchestrator did not answer.
    pub minutes_unknown: f64,
    /// The uptime earned jobs, but the runner was not listed.
    pub minutes_up_but_not_listed: f64,
    /// The runner was listed, but the uptime earned none.
    pub minutes_listed_but_down: f64,
}

/// Microseconds of each kind.
#[derive(Debug, Default)]
struct Times {
    listed: Micros,
    not_listed: Micros,
    unknown: Micros,
    up_but_not_listed: Micros,
    listed_but_down: Micros,
}

/// The sums of runs in which there was a live runner; `None` if there was none.
#[must_use]
pub(crate) fn discovery(runs: &[Timeline]) -> Option<Discovery> {
    if runs.iter().all(|run| run.listings.is_empty()) {
        return None;
    }
    let mut times = Times::default();
    for run in runs {
        times.add(run);
    }
    #[expect(clippy::cast_precision_loss, reason = "exact for centuries")]
    let minutes = |micros: Micros| tenths(micros as f64 / MINUTE_MICROS);
    Some(Discovery {
        minutes_listed: minutes(times.listed),
        minutes_not_listed: minutes(times.not_listed),
        minutes_unknown: minutes(times.unknown),
        minutes_up_but_not_listed: minutes(times.up_but_not_listed),
        minutes_listed_but_down: minutes(times.listed_but_down),
    })
}

impl Times {
    fn add(&mut self, run: &Timeline) {
        let ends = run.listings.iter().skip(1).map(|&(at, _)| at);
        for (&(from, listed), until) in run.listings.iter().zip(ends.chain([run.end])) {
            let until = until.max(from);
            let sum = match listed {
                Some(true) => &mut self.listed,
                Some(false) => &mut self.not_listed,
                None => &mut self.unknown,
            };
            *sum += until - from;
            let earns = run.known().map(|known| {
                let shared = known.until.min(until) - known.from.max(from);
                let earns = run.policy.share(known.uptime) > Share::NOTHING;
                (earns, shared.max(0))
            });
            for (earns, micros) in earns {
                match (listed, earns) {
                    (Some(false), true) => self.up_but_not_listed += micros,
                    (Some(true), false) => self.listed_but_down += micros,
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Percent;

    const MINUTE: Micros = 60_000_000;

    #[test]
    fn minutes_in_which_uptime_and_list_differ_are_counted() {
        let uptime = |minute, uptime| (minute * MINUTE, Percent::new(uptime).ok());
        let run = Timeline {
            policy: "tiers:99=100,90=10".parse().unwrap(),
            // -1: nothing is known.
            uptimes: vec![uptime(1, 100.0), uptime(10, 50.0), uptime(20, -1.0)],
            listings: vec![
                (0, None),
                (2 * MINUTE, Some(true)),
                (5 * MINUTE, Some(false)),
                (12 * MINUTE, Some(true)),
            ],
            end: 30 * MINUTE,
            ..Timeline::default()
        };
        assert_eq!(
            discovery(&[run]),
            Some(Discovery {
                minutes_listed: 3.0 + 18.0,
                minutes_not_listed: 7.0,
                minutes_unknown: 2.0,
                minutes_up_but_not_listed: 5.0,
                minutes_listed_but_down: 8.0,
            })
        );
        assert_eq!(discovery(&[Timeline::default()]), None);
    }
}
