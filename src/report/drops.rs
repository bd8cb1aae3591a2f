//! The drops of an agent's rate, and its jobs in the hours around them.

use super::timeline::{Micros, Timeline};
use crate::runner::events::event::RateReason;

pub(super) const HOUR: Micros = 3_600_000_000;
/// The number of hours after a drop that are evaluated.
pub(super) const HOURS_AFTER: i64 = 3;

/// When the rate of an agent dropped because of its uptime.
#[must_use]
pub(crate) fn drops(runs: &[Timeline]) -> Vec<Micros> {
    let drops = runs.iter().flat_map(|run| {
        run.rates.windows(2).filter_map(|pair| {
            let [before, after] = pair else { return None };
            let punished = matches!(after.reason, RateReason::Uptime | RateReason::Evidence);
            (punished && after.rate < before.rate).then_some(after.at)
        })
    });
    drops.collect()
}

/// Counts jobs in the hours around drops; each job is looked up once, however many hours overlap.
#[derive(Debug, Default)]
pub struct DropWindows {
    pub(super) drops: Vec<Micros>,
    /// The bounds of the hours.
    pub(super) bounds: Vec<Micros>,
    /// Jobs, and good ones, from each bound to the next.
    counts: Vec<(u64, u64)>,
}

impl DropWindows {
    /// Counts around these drops.
    #[must_use]
    pub fn new(drops: Vec<Micros>) -> Self {
        let hours = drops
            .iter()
            .flat_map(|&drop| (-1..=HOURS_AFTER).map(move |hour| drop + hour * HOUR));
        let mut bounds: Vec<Micros> = hours.collect();
        bounds.sort_unstable();
        bounds.dedup();
        Self {
            drops,
            counts: vec![(0, 0); bounds.len()],
            bounds,
        }
    }

    /// Adds a job.
    pub fn job(&mut self, sent_at: Micros, good: bool) {
        let after = self.bounds.partition_point(|&bound| bound <= sent_at);
        if let Some(counts) = after.checked_sub(1).and_then(|n| self.counts.get_mut(n)) {
            counts.0 += 1;
            counts.1 += u64::from(good);
        }
    }

    /// Jobs, and good ones, before each bound.
    #[must_use]
    pub fn sums(&self) -> Vec<(u64, u64)> {
        let mut sum = (0, 0);
        let sums = self.counts.iter().map(|(jobs, good)| {
            let before = sum;
            sum = (sum.0 + jobs, sum.1 + good);
            before
        });
        sums.collect()
    }
}
