//! What an agent's records add up to in a statement.

use std::collections::BTreeMap;
use std::io::Write;

use chrono::DateTime;
use uuid::Uuid;

use super::jobs::JobsFile;
use super::{
    AgentStatement, AmountSource, BalancesSpent, ChargedAt, Day, JobSums, OutcomeSum, SlotSums,
    WithheldInterval, day, instant,
};
use crate::money::Wei;
use crate::report::balance::BalanceSums;
use crate::report::timeline::{Micros, Timeline, UptimeIntegral};
use crate::units::{JobsPerMinute, Percent};
use crate::wire::charge::{ChargedPer, Price};
use crate::wire::coverage::mean_between;
use crate::wire::ping_system::HistoryPing;

const DAY: Micros = 86_400_000_000;
/// What became of a job that was in flight when its runner was killed.
pub(super) const UNKNOWN: &str = "unknown";

/// What an agent's records add up to.
#[derive(Debug, Default)]
pub(super) struct AgentSums {
    pub(super) jobs: JobSums,
    /// By capability, price and what that is for.
    pub(super) charged: BTreeMap<(String, String, ChargedPer), Charge>,
    pub(super) days: BTreeMap<Micros, Day>,
    pub(super) has_price: bool,
    pub(super) amount: Wei,
    pub(super) balance: BalanceSums,
    pub(super) pings: BTreeMap<Micros, HistoryPing>,
    pub(super) withheld: BTreeMap<String, u64>,
    pub(super) dropped: BTreeMap<String, u64>,
    pub(super) intervals: Vec<Interval>,
    /// Jobs that the slots tell, less those that are recorded.
    pub(super) missing: i64,
    /// Slots of runs that did not record them.
    pub(super) old_asked: u64,
    pub(super) old_uptimes: Vec<Timeline>,
}

#[derive(Debug)]
pub(super) struct Charge {
    pub(super) price: Price,
    pub(super) from: Micros,
    pub(super) until: Micros,
    pub(super) jobs: u64,
    pub(super) seconds: u64,
    pub(super) units: u64,
}

#[derive(Debug)]
pub(super) struct Interval {
    pub(super) from: Micros,
    pub(super) until: Micros,
    pub(super) reason: String,
    pub(super) rate: JobsPerMinute,
    pub(super) base: JobsPerMinute,
    pub(super) slots: u64,
}

/// A job of a statement.
pub(super) struct Job<'a> {
    pub(super) id: Uuid,
    pub(super) agent: &'a str,
    pub(super) capability: &'a str,
    pub(super) orchestrator: String,
    pub(super) sent_at: Micros,
    pub(super) outcome: &'static str,
    pub(super) charged: Option<ChargedJob>,
    pub(super) price: Option<&'a Price>,
}

/// A job that is charged.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChargedJob {
    pub(super) seconds: u64,
    /// Of its price, if it has one.
    pub(super) units: u64,
}

impl Job<'_> {
    fn amount(&self) -> Wei {
        let units = self.charged.map_or(0, |charged| charged.units);
        self.price
            .map_or_else(Wei::default, |price| price.unit.for_units(units))
    }

    fn seconds(&self) -> u64 {
        self.charged.map_or(0, |charged| charged.seconds)
    }

    pub(super) fn write<W: Write>(&self, out: &mut JobsFile<W>) -> csv::Result<()> {
        let price = self.price.map(|price| price.unit.to_string());
        out.write([
            &self.id.to_string(),
            self.agent,
            self.capability,
            &self.orchestrator,
            &instant(self.sent_at),
            self.outcome,
            &self.seconds().to_string(),
            &price.unwrap_or_default(),
            &self.amount().to_string(),
        ])
    }
}

impl AgentSums {
    /// `charged_in` is the time of the job's run in the period.
    pub(super) fn add(&mut self, job: &Job<'_>, succeeded: bool, charged_in: (Micros, Micros)) {
        let amount = job.amount();
        let seconds = job.seconds();
        self.jobs.sent += 1;
        self.jobs.succeeded += u64::from(succeeded);
        if !self.jobs.outcomes.contains_key(job.outcome) {
            let none = OutcomeSum::default();
            self.jobs.outcomes.insert(job.outcome.to_owned(), none);
        }
        if let Some(outcome) = self.jobs.outcomes.get_mut(job.outcome) {
            outcome.jobs += 1;
            outcome.seconds += seconds;
            outcome.amount_wei += &amount;
        }
        let day_of = job.sent_at.div_euclid(DAY) * DAY;
        let of_day = self.days.entry(day_of).or_insert_with(|| Day {
            day: day(day_of),
            jobs: 0,
            succeeded: 0,
            amount_wei: Wei::default(),
        });
        of_day.jobs += 1;
        of_day.succeeded += u64::from(succeeded);
        of_day.amount_wei += &amount;
        self.amount += &amount;
        let Some(price) = job.price else { return };
        self.has_price = true;
        let Some(charged) = job.charged else { return };
        let unit = price.unit.to_string();
        let key = (job.capability.to_owned(), unit, price.per);
        let (from, until) = charged_in;
        let charge = self.charged.entry(key).or_insert_with(|| Charge {
            price: price.clone(),
            from,
            until,
            jobs: 0,
            seconds: 0,
            units: 0,
        });
        charge.from = charge.from.min(from);
        charge.until = charge.until.max(until);
        charge.jobs += 1;
        charge.seconds += seconds;
        charge.units += charged.units;
    }

    /// Times that follow each other at the same rates for the same reason are one.
    pub(super) fn withhold(&mut self, new: Interval) {
        let terms = |interval: &Interval| (interval.rate, interval.base);
        match self.intervals.last_mut() {
            Some(last)
                if last.until == new.from
                    && terms(last) == terms(&new)
                    && last.reason == new.reason =>
            {
                last.until = new.until;
                last.slots += new.slots;
            }
            _ => self.intervals.push(new),
        }
    }

    fn uptime(&self, from: Micros, until: Micros) -> Option<Percent> {
        let time = |micros| DateTime::from_timestamp_micros(micros);
        let pings: Vec<HistoryPing> = self.pings.values().cloned().collect();
        let of_pings = mean_between(&pings, time(from)?, time(until)?);
        of_pings.or_else(|| UptimeIntegral::of(&self.old_uptimes).mean(from, until))
    }

    pub(super) fn statement(self, agent_id: String, from: Micros, until: Micros) -> AgentStatement {
        let uptime_percent = self.uptime(from, until);
        let accounted = self.jobs.sent
            + self.withheld.values().sum::<u64>()
            + self.dropped.values().sum::<u64>();
        // What runs of 0.1.0 dropped is not known.
        let missing = self.missing.max(0).unsigned_abs();
        let of_old = if self.old_asked > 0 {
            self.old_asked.saturating_sub(accounted)
        } else {
            0
        };
        let unaccounted = missing.max(of_old);
        let (amount, amount_from) = if self.has_price {
            (self.amount, AmountSource::Price)
        } else if self.balance.jobs > 0 {
            (self.balance.spent.clone(), AmountSource::Balance)
        } else {
            (Wei::default(), AmountSource::None)
        };
        let balances = (self.balance.jobs > 0).then(|| BalancesSpent {
            differs_by_wei: self.balance.spent.clone() - &amount,
            spent_wei: self.balance.spent,
        });
        let mut intervals = self.intervals;
        intervals.sort_by_key(|interval| interval.from);
        AgentStatement {
            agent_id,
            uptime_percent,
            slots: SlotSums {
                asked: accounted + unaccounted,
                sent: self.jobs.sent,
                withheld: self.withheld,
                dropped: self.dropped,
                unaccounted,
            },
            jobs: self.jobs,
            withheld: intervals
                .into_iter()
                .map(|interval| WithheldInterval {
                    from: instant(interval.from),
                    until: instant(interval.until),
                    reason: interval.reason,
                    rate: interval.rate,
                    base_rate: interval.base,
                    slots: interval.slots,
                })
                .collect(),
            charged: self
                .charged
                .into_iter()
                .map(|((capability, price_wei, per), charge)| ChargedAt {
                    capability,
                    price_wei,
                    per: per.name(),
                    from: instant(charge.from),
                    until: instant(charge.until),
                    jobs: charge.jobs,
                    seconds: charge.seconds,
                    amount_wei: charge.price.unit.for_units(charge.units),
                })
                .collect(),
            days: self.days.into_values().collect(),
            amount_eth: amount.in_eth(),
            amount_wei: amount,
            amount_from,
            balances,
        }
    }
}
