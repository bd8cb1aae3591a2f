//! The sums of an agent's jobs. Their size does not depend on the number of jobs.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::balance::{BalanceSums, OrchestratorBalances, ToldBalance};
use super::drops::DropWindows;
use super::timeline::Micros;
use crate::money::Wei;
use crate::runner::events::event::Evidence;
use crate::runner::rate::claims::Witness;
use crate::wire::charge::{Price, Work};
use crate::wire::outcome::Outcome;

/// The longest latency that is told apart from longer ones.
const HOUR_MICROS: u64 = 3_600_000_000;
const HOUR: Micros = 3_600_000_000;

/// A job as it was recorded.
#[derive(Debug)]
pub struct JobRecord<'a> {
    /// When it was sent.
    pub sent_at: Micros,
    /// What it is charged for.
    pub work: Work,
    /// From its slot to its end.
    pub latency: Duration,
    /// The agent's uptime when it was sent, in percent.
    pub uptime: f64,
    /// Who did it.
    pub orchestrator: Option<&'a str>,
    /// What was left with them.
    pub balance_wei: Option<&'a str>,
}

/// On which terms an agent was followed in a run.
#[derive(Debug, Default)]
pub struct RunTerms {
    price: Option<Price>,
    /// Whether it was tied to orchestrators that did only its jobs.
    is_tied: bool,
    witness: Witness,
    /// Since when its live runner was listed, if it was.
    listed_since: Option<Micros>,
}

impl RunTerms {
    /// With a price, where there is one.
    #[must_use]
    pub fn new(price: Option<Price>, is_tied: bool) -> Self {
        Self {
            price,
            is_tied,
            ..Self::default()
        }
    }

    /// The agent's live runner was listed at an instant.
    pub fn listed(&mut self, at: Micros) {
        let since = self.listed_since.map_or(at, |since| since.min(at));
        self.listed_since = Some(since);
    }

    /// What the next job to end says of the agent, as the runner judges it.
    fn says(&mut self, outcome: Outcome, ended_at: Micros) -> Option<bool> {
        if self.listed_since.is_some_and(|since| since <= ended_at) {
            self.witness.runner_listed();
        }
        self.witness.says(outcome).filter(|_| self.is_tied)
    }
}

/// The sums of an agent's jobs.
#[derive(Debug, Default)]
pub struct Tally {
    /// By capability's number: its name and its jobs.
    pub capabilities: BTreeMap<i64, (String, JobTotals)>,
    /// What was charged by price, for each price that there was.
    pub charged: Vec<Charged>,
    /// What went from balances.
    pub balance: BalanceSums,
    /// By the agent's uptime at their sending, in whole tenths of a percent: jobs, and good ones.
    pub by_uptime: BTreeMap<u16, (u64, u64)>,
    /// By hour since 1970: what its jobs say of it.
    pub evidence: BTreeMap<i64, Evidence>,
    /// Around the drops of its rate.
    pub around_drops: DropWindows,
    /// In equal parts of the whole time.
    pub slices: TimeBuckets,
}

/// Jobs that were charged by the same price.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charged {
    pub price: Price,
    /// How many jobs.
    pub jobs: u64,
    /// Their seconds, each begun one whole.
    pub seconds: u64,
    /// What they are charged for: these seconds, or jobs.
    pub units: u64,
}

impl Charged {
    /// What they cost.
    #[must_use]
    pub fn amount(&self) -> Wei {
        self.price.unit.for_units(self.units)
    }
}

/// Jobs of one kind.
#[derive(Debug)]
pub struct JobTotals {
    outcomes: [u64; Outcome::ALL.len()],
    /// Their latencies in microseconds; no larger than the longest of them needs.
    pub latencies: Histogram<u32>,
}

impl Default for JobTotals {
    fn default() -> Self {
        Self {
            outcomes: [0; Outcome::ALL.len()],
            latencies: Histogram::new(3).expect("3 digits are at most 5"),
        }
    }
}

impl JobTotals {
    /// How many there are.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.outcomes.iter().sum()
    }

    /// How many succeeded.
    #[must_use]
    pub fn good(&self) -> u64 {
        self.outcomes[Outcome::Success as usize]
    }

    /// How many ended how, of those ways in which any did.
    #[must_use]
    pub fn outcomes(&self) -> BTreeMap<&'static str, u64> {
        let counted = Outcome::ALL.iter().zip(self.outcomes);
        counted
            .filter(|&(_, count)| count > 0)
            .map(|(outcome, count)| (outcome.name(), count))
            .collect()
    }
}

impl Tally {
    /// No job yet, of an agent whose rate dropped at these instants. `slices` are so many parts of the
    /// time from one instant to another.
    #[must_use]
    pub fn new(drops: Vec<Micros>, (slices, from, until): (usize, Micros, Micros)) -> Self {
        Self {
            around_drops: DropWindows::new(drops),
            slices: TimeBuckets::new(slices, from, until),
            ..Self::default()
        }
    }

    /// Takes in a job; jobs come in the order in which they were answered.
    pub fn job(
        &mut self,
        job: &JobRecord<'_>,
        (capability, name): (i64, &dyn Fn() -> String),
        terms: &mut RunTerms,
        balances: &mut OrchestratorBalances,
    ) {
        let good = job.work.outcome == Outcome::Success;
        let worked = i64::try_from(job.work.time.as_micros()).unwrap_or(i64::MAX);
        let ended_at = job.sent_at.saturating_add(worked);
        let micros = u64::try_from(job.latency.as_micros())
            .unwrap_or(u64::MAX)
            .max(1);
        let (_, jobs) = self
            .capabilities
            .entry(capability)
            .or_insert_with(|| (name(), JobTotals::default()));
        jobs.outcomes[job.work.outcome as usize] += 1;
        // It grows as long as the value is one that can be had.
        let _ = jobs.latencies.record(micros.min(HOUR_MICROS));

        if let Some(price) = &terms.price {
            let (seconds, units) = (job.work.charged_seconds(), price.units(job.work));
            match self.charged.iter_mut().find(|known| known.price == *price) {
                Some(known) => {
                    known.jobs += 1;
                    known.seconds += seconds;
                    known.units += units;
                }
                None => self.charged.push(Charged {
                    price: price.clone(),
                    jobs: 1,
                    seconds,
                    units,
                }),
            }
        }
        if let Some(orchestrator) = job.orchestrator {
            let balance: Option<Wei> = job.balance_wei.and_then(|balance| balance.parse().ok());
            let most = terms.price.as_ref().map(|price| {
                price
                    .unit
                    .for_units(u64::from(job.work.timeout_seconds) + 1)
            });
            let change = balances.told(ToldBalance {
                orchestrator,
                capability,
                balance: balance.as_ref(),
                seconds: job.work.charged_seconds(),
                most: most.as_ref(),
                sent_at: job.sent_at,
                answered_at: ended_at,
            });
            self.balance.add(&change);
        }
        let tally = self.by_uptime.entry(tenth(job.uptime)).or_default();
        tally.0 += 1;
        tally.1 += u64::from(good);
        if let Some(good) = terms.says(job.work.outcome, ended_at) {
            let evidence = self
                .evidence
                .entry(job.sent_at.div_euclid(HOUR))
                .or_default();
            evidence.jobs += 1;
            evidence.good += u64::from(good);
        }
        self.around_drops.job(job.sent_at, good);
        self.slices.job(job.sent_at, good, micros);
    }

    /// How many jobs there are.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.capabilities.values().map(|(_, jobs)| jobs.all()).sum()
    }

    /// How many succeeded.
    #[must_use]
    pub fn good(&self) -> u64 {
        self.capabilities
            .values()
            .map(|(_, jobs)| jobs.good())
            .sum()
    }
}

/// The tenth of a percent in which an uptime lies.
#[must_use]
pub(crate) fn tenth(percent: f64) -> u16 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped; and what is no number is 0"
    )]
    let tenth = (percent * 10.0 + 1e-9).clamp(0.0, 1000.0) as u16;
    tenth
}

/// Jobs in equal parts of a time.
#[derive(Debug)]
pub struct TimeBuckets {
    from: Micros,
    width: Micros,
    pub all: Vec<Slice>,
}

/// Jobs in one part of a time.
#[derive(Debug, Clone, Default)]
pub struct Slice {
    /// Those that succeeded.
    pub good: u64,
    /// Those that did not.
    pub failed: u64,
    /// Latencies in microseconds, where there were any.
    pub latencies: Option<Box<Histogram<u32>>>,
}

impl Default for TimeBuckets {
    fn default() -> Self {
        Self::new(0, 0, 0)
    }
}

impl TimeBuckets {
    fn new(slices: usize, from: Micros, until: Micros) -> Self {
        let parts = i64::try_from(slices).unwrap_or(i64::MAX).max(1);
        Self {
            from,
            width: ((until - from) / parts + 1).max(1),
            all: vec![Slice::default(); slices],
        }
    }

    /// When each part begins and ends.
    pub fn spans(&self) -> impl Iterator<Item = (Micros, Micros)> + '_ {
        (0..).take(self.all.len()).map(|n: i64| {
            let begin = self.from + n * self.width;
            (begin, begin + self.width)
        })
    }

    fn job(&mut self, sent_at: Micros, good: bool, micros: u64) {
        let index = usize::try_from((sent_at - self.from).max(0) / self.width).unwrap_or(0);
        let Some(slice) = self.all.get_mut(index) else {
            return;
        };
        if good {
            slice.good += 1;
        } else {
            slice.failed += 1;
        }
        // Two digits, and no larger than its longest latency needs: there are thousands of these.
        let latencies = slice
            .latencies
            .get_or_insert_with(|| Box::new(Histogram::new(2).expect("2 digits are at most 5")));
        let _ = latencies.record(micros.min(HOUR_MICROS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenths_are_rounded_down() {
        for (percent, expected) in [
            (0.0, 0),
            (98.999, 989),
            (99.0, 990),
            (99.1, 991),
            (100.0, 1000),
            (f64::NAN, 0),
        ] {
            assert_eq!(tenth(percent), expected, "{percent}");
        }
    }

    #[test]
    fn slices_cover_the_whole_time() {
        let mut slices = TimeBuckets::new(4, 100, 107);
        for at in 100..=107 {
            slices.job(at, true, 5);
        }
        let counts: Vec<u64> = slices.all.iter().map(|slice| slice.good).collect();
        assert_eq!(counts, [2, 2, 2, 2]);
        assert_eq!(slices.spans().last(), Some((106, 108)));
    }
}
