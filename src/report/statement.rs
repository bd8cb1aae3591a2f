//! What an agent earned in a period, for its owner: all that both need to come to the same amount from
//! the same records.

use serde::Serialize;

use super::cost::{CostSource, cost};
use super::history::{AgentHistory, RecordedRuns};
use super::timeline::{Micros, RateInterval, Slots, Timeline, UptimeIntegral, cause, utc};
use crate::money::Wei;
use crate::units::{JobsPerMinute, Percent};

/// What an agent earned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statement {
    pub agent_id: String,
    /// From when, in UTC.
    pub from: String,
    /// Until before when, in UTC.
    pub until: String,
    /// The mean of the uptimes that it reported, over the time in which one was known.
    pub uptime_percent: Option<Percent>,
    /// The slots that full uptime would have earned.
    pub slots_asked: f64,
    /// The jobs that it was sent.
    pub jobs_sent: u64,
    /// Of these, those that succeeded.
    pub jobs_succeeded: u64,
    /// The slots that were withheld.
    pub slots_withheld: f64,
    /// When, and why.
    pub withheld: Vec<WithheldInterval>,
    /// What was charged by each price that there was.
    pub charged: Vec<ChargedAt>,
    /// What it earned, where that is known.
    pub amount_wei: Option<Wei>,
    pub amount_from: Option<CostSource>,
}

/// A time in which slots were withheld.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WithheldInterval {
    /// From when, in UTC.
    pub from: String,
    /// Until before when, in UTC.
    pub until: String,
    pub reason: &'static str,
    /// The rate in jobs per minute.
    pub rate: JobsPerMinute,
    /// The rate that full uptime would have earned.
    pub base_rate: JobsPerMinute,
    /// The slots between the two.
    pub slots: f64,
}

/// Jobs that were charged by the same price.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChargedAt {
    /// Wei for each second begun.
    pub price_wei: String,
    /// How many jobs.
    pub jobs: u64,
    pub seconds: u64,
    /// Price times seconds.
    pub amount_wei: Wei,
}

/// What each agent earned.
#[must_use]
pub fn statements(history: &RecordedRuns) -> Vec<Statement> {
    let agents = history.agents.iter();
    agents
        .map(|(name, agent)| statement(name, agent, history.from, history.until))
        .collect()
}

fn statement(name: &str, agent: &AgentHistory, from: Micros, until: Micros) -> Statement {
    let held = || agent.runs.iter().flat_map(Timeline::held);
    let cost = cost(&agent.jobs, Slots::default());
    Statement {
        agent_id: name.to_owned(),
        from: utc(from),
        until: utc(until),
        uptime_percent: UptimeIntegral::of(&agent.runs).mean(from, until),
        slots_asked: held().map(|held| held.slots()).sum::<Slots>().rounded(),
        jobs_sent: agent.jobs.all(),
        jobs_succeeded: agent.jobs.good(),
        slots_withheld: held().map(|held| held.withheld()).sum::<Slots>().rounded(),
        withheld: withheld(held()),
        charged: agent
            .jobs
            .charged
            .iter()
            .map(|charged| ChargedAt {
                price_wei: charged.price.to_string(),
                jobs: charged.jobs,
                seconds: charged.seconds,
                amount_wei: charged.amount(),
            })
            .collect(),
        amount_from: cost.as_ref().map(|cost| cost.source),
        amount_wei: cost.map(|cost| cost.spent_wei),
    }
}

/// Times that follow each other at the same rates for the same reason are one.
fn withheld(held: impl Iterator<Item = RateInterval>) -> Vec<WithheldInterval> {
    let mut joined: Vec<RateInterval> = Vec::new();
    for held in held.filter(|held| held.withheld() > Slots::default()) {
        let terms = |held: &RateInterval| (cause(held.step.reason), held.step.rate, held.step.base);
        match joined.last_mut() {
            Some(last) if last.until == held.from && terms(last) == terms(&held) => {
                last.until = held.until;
            }
            _ => joined.push(held),
        }
    }
    let times = joined.iter();
    times
        .map(|held| WithheldInterval {
            from: utc(held.from),
            until: utc(held.until),
            reason: cause(held.step.reason),
            rate: held.step.rate,
            base_rate: held.step.base,
            slots: held.withheld().rounded(),
        })
        .collect()
}
