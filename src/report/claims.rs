//! Whether an agent's jobs contradicted what it claimed, by the test of [`claims`](crate::runner::rate::claims).

use std::collections::BTreeMap;

use serde::Serialize;

use super::timeline::{Micros, Timeline, UptimeIntegral};
use crate::runner::events::event::Evidence;
use crate::runner::rate::claims::{LEAST_JOBS, contradiction};
use crate::units::Percent;

const HOUR: Micros = 3_600_000_000;

/// What an agent's jobs say of its claims.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Claims {
    /// Jobs that say something of it.
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub successful: u64,
    /// The times that were looked at: whole hours, as many together as hold enough jobs.
    pub looks: usize,
    /// Those in which its jobs contradicted its claim.
    pub contradicted: Vec<Contradicted>,
}

/// A time in which jobs contradicted a claim.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Contradicted {
    /// Microseconds since 1970.
    pub from: Micros,
    /// Microseconds since 1970.
    pub until: Micros,
    /// The mean uptime that was reported.
    pub uptime_percent: Percent,
    /// The tier that it claims.
    pub claimed_tier_percent: Percent,
    /// The jobs that contradict it.
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub successful: u64,
    /// The chance of so few at most, if the claim were true.
    pub chance: f64,
}

/// What the jobs of each hour say; `None` where none says anything.
#[must_use]
pub(crate) fn claims(evidence: &BTreeMap<i64, Evidence>, runs: &[Timeline]) -> Option<Claims> {
    if evidence.is_empty() {
        return None;
    }
    let mut claims = Claims {
        jobs: evidence.values().map(|hour| hour.jobs).sum(),
        successful: evidence.values().map(|hour| hour.good).sum(),
        looks: 0,
        contradicted: Vec::new(),
    };
    let uptimes = UptimeIntegral::of(runs);
    let mut begin = None;
    let mut sum = Evidence::default();
    for (&hour, of_hour) in evidence {
        let from = *begin.get_or_insert(hour) * HOUR;
        sum.jobs += of_hour.jobs;
        sum.good += of_hour.good;
        if sum.jobs < LEAST_JOBS {
            continue;
        }
        claims.looks += 1;
        let until = (hour + 1) * HOUR;
        claims
            .contradicted
            .extend(look(runs, &uptimes, (from, until), sum));
        (begin, sum) = (None, Evidence::default());
    }
    Some(claims)
}

fn look(
    runs: &[Timeline],
    uptimes: &UptimeIntegral,
    (from, until): (Micros, Micros),
    evidence: Evidence,
) -> Option<Contradicted> {
    let uptime = uptimes.mean(from, until)?;
    let policy = &runs.iter().find(|run| run.end > from)?.policy;
    let found = contradiction(policy, uptime, evidence)?;
    Some(Contradicted {
        from,
        until,
        uptime_percent: uptime,
        claimed_tier_percent: found.claimed_tier,
        jobs: evidence.jobs,
        successful: evidence.good,
        chance: found.chance,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_looked_at_once_they_hold_enough_jobs() {
        let runs = [Timeline {
            uptimes: vec![(0, Percent::new(99.5).ok())],
            end: 10 * HOUR,
            policy: "tiers:99=100,90=10".parse().unwrap(),
            ..Timeline::default()
        }];
        let hours = [
            (0, 30, 30),
            (1, 19, 19),
            (2, 1, 1),
            (3, 100, 80),
            (4, 10, 0),
        ];
        let evidence = hours.map(|(hour, jobs, good)| (hour, Evidence { jobs, good }));
        let claims = claims(&evidence.into_iter().collect(), &runs).unwrap();
        assert_eq!(
            (claims.jobs, claims.successful, claims.looks),
            (160, 130, 2)
        );
        let [found] = &claims.contradicted[..] else {
            panic!("{claims:?}")
        };
        assert_eq!((found.from, found.until), (3 * HOUR, 4 * HOUR));
        assert_eq!((found.jobs, found.claimed_tier_percent.get()), (100, 99.0));
        assert_eq!(super::claims(&BTreeMap::new(), &runs), None);
    }
}
