//! The figures of a report.

use std::collections::BTreeMap;

use serde::Serialize;

use super::claims::{Claims, claims};
use super::cost::{Cost, Interval, cost};
use super::discovery::{Discovery, discovery};
use super::effect::Effect;
use super::forecast::{TierForecast, forecast};
use super::history::{AgentHistory, RecordedRuns};
use super::replay::replayed;
use super::suggest::{Suggestion, suggest};
use super::tally::JobTotals;
use super::timeline::{RateInterval, Slots, Timeline, UptimeIntegral, seconds, tenths, utc};
use crate::money::Wei;
use crate::runner::events::event::RateReason;
use crate::runner::rate::policy::Policy;
use crate::units::{JobsPerMinute, Percent};

/// What is asked beyond what happened.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// What would these policies have done?
    pub policies: &'a [Policy],
    /// Which tiers are worth most, if a good job is worth so much?
    pub value: Option<&'a Wei>,
    /// What is to be expected?
    pub forecast: bool,
}

/// What recorded runs say.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How many runs.
    pub runs: u64,
    /// Records that are missing, since the disk was too slow.
    pub records_dropped: u64,
    /// From when, in UTC.
    pub from: String,
    /// Until when, in UTC.
    pub until: String,
    /// All agents together.
    pub total: Total,
    /// By agent's name.
    pub agents: BTreeMap<String, AgentReport>,
    /// The agents whose cost is known, those first that surely gave most good jobs for their money: by
    /// the lower bound of what is known.
    pub ranking: Vec<Ranked>,
    /// The tiers that would have been worth most, where that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<Suggestion>,
}

/// All agents together.
#[derive(Debug, Serialize)]
pub struct Total {
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub successful: u64,
    pub success_rate_percent: Option<Percent>,
    /// What they cost, as far as that is known.
    pub spent_wei: Option<Wei>,
    /// What was not spent because of punishment.
    pub not_spent_wei: Option<Wei>,
}

/// An agent and what it gave for its money.
#[derive(Debug, Serialize)]
pub struct Ranked {
    pub agent: String,
    /// How many jobs succeeded for an ETH.
    pub good_jobs_per_eth: Interval,
}

/// What they say of one agent.
#[derive(Debug, Serialize)]
pub struct AgentReport {
    /// For how long it was followed since its uptime was first known.
    pub seconds_followed: f64,
    /// Its mean uptime over the time in which one was known.
    pub uptime_percent: Option<Percent>,
    /// For how long it got no jobs.
    pub seconds_suspended: f64,
    /// How often its rate changed.
    pub rate_changes: usize,
    /// Slots that full uptime would have earned.
    pub slots: f64,
    /// Of these, those that were withheld.
    pub slots_withheld: f64,
    /// Those by reason.
    pub withheld_by_reason: BTreeMap<&'static str, f64>,
    pub capabilities: BTreeMap<String, JobsReport>,
    /// What its jobs cost, where that is known.
    pub cost: Option<Cost>,
    /// What punishment did, where there was any.
    pub punishment: Option<Effect>,
    /// Whether its jobs contradict what it claims, where they say something of it.
    pub claims: Option<Claims>,
    /// What the orchestrator of its live runner listed, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery: Option<Discovery>,
    /// What each policy that was asked for would have done.
    pub what_if: Vec<WhatIf>,
    /// What is to be expected, where that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Vec<TierForecast>>,
}

/// Jobs of one kind.
#[derive(Debug, Serialize)]
pub struct JobsReport {
    /// How many were sent and answered, or given up.
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub successful: u64,
    pub success_rate_percent: Option<Percent>,
    /// Latencies in milliseconds, from slot to last byte.
    pub latency_ms: Option<LatencyReport>,
    /// How many ended how.
    pub outcomes: BTreeMap<&'static str, u64>,
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct LatencyReport {
    pub mean: f64,
    /// Half took at most this.
    pub p50: f64,
    /// Nine of ten took at most this.
    pub p90: f64,
    /// 99 of 100 took at most this.
    pub p99: f64,
}

/// The recorded uptimes under another policy. Jobs that were never sent have no outcome: they are
/// taken to succeed, and to cost, as this agent's jobs did.
#[derive(Debug, Serialize)]
pub struct WhatIf {
    pub policy: String,
    /// Jobs that it would have sent.
    pub jobs: f64,
    /// More than at the rates that held; fewer where negative.
    pub jobs_more: f64,
    /// Of these, expected successes: good jobs forgone where negative.
    pub good_jobs_more: Option<f64>,
    /// And expected failures: failures avoided where negative.
    pub failed_jobs_more: Option<f64>,
    /// What they would have cost.
    pub spent_more_wei: Option<Wei>,
}

impl Report {
    /// What a history says.
    #[must_use]
    pub fn of(history: &RecordedRuns, queries: &Queries<'_>) -> Self {
        let recorded = &history.policy;
        let agents: BTreeMap<String, AgentReport> = history
            .agents
            .iter()
            .map(|(name, agent)| (name.clone(), agent_report(agent, queries, recorded)))
            .collect();
        let total = total(history, &agents);
        Self {
            runs: history.runs,
            records_dropped: history.records_dropped,
            from: utc(history.from),
            until: utc(history.until),
            ranking: ranking(&agents),
            suggestion: queries.value.map(|value| {
                let pasts = history.agents.values();
                let pasts = pasts.map(|agent| (&agent.runs[..], &agent.jobs));
                suggest(pasts, recorded, value, mean_cost(&agents))
            }),
            agents,
            total,
        }
    }
}

fn total(history: &RecordedRuns, agents: &BTreeMap<String, AgentReport>) -> Total {
    let tallies = || history.agents.values().map(|agent| &agent.jobs);
    let (jobs, successful) = (
        tallies().map(super::tally::Tally::all).sum(),
        tallies().map(super::tally::Tally::good).sum(),
    );
    let costs = || agents.values().filter_map(|agent| agent.cost.as_ref());
    let sum = |of: fn(&Cost) -> &Wei| {
        let known = costs().next().is_some();
        known.then(|| costs().map(|cost| of(cost).clone()).sum())
    };
    Total {
        jobs,
        successful,
        success_rate_percent: share_percent(successful, jobs),
        spent_wei: sum(|cost| &cost.spent_wei),
        not_spent_wei: sum(|cost| &cost.not_spent_wei),
    }
}

/// What a job costs on average, over the agents whose cost is known.
fn mean_cost(agents: &BTreeMap<String, AgentReport>) -> Option<Wei> {
    let costs = || agents.values().filter_map(|agent| agent.cost.as_ref());
    let jobs = costs().map(|cost| cost.jobs).sum();
    let spent: Wei = costs().map(|cost| cost.spent_wei.clone()).sum();
    spent.for_each_of(jobs)
}

fn ranking(agents: &BTreeMap<String, AgentReport>) -> Vec<Ranked> {
    let known = agents.iter().filter_map(|(name, agent)| {
        Some(Ranked {
            agent: name.clone(),
            good_jobs_per_eth: agent.cost.as_ref()?.good_jobs_per_eth?,
        })
    });
    let mut ranked: Vec<Ranked> = known.collect();
    ranked.sort_by(|a, b| b.good_jobs_per_eth.low.total_cmp(&a.good_jobs_per_eth.low));
    ranked
}

fn agent_report(agent: &AgentHistory, queries: &Queries<'_>, recorded: &Policy) -> AgentReport {
    let held: Vec<RateInterval> = agent.runs.iter().flat_map(Timeline::held).collect();
    let followed = held
        .iter()
        .filter(|held| held.step.base > JobsPerMinute::ZERO);
    let suspended = followed
        .clone()
        .filter(|held| held.step.rate == JobsPerMinute::ZERO);
    let time = |micros: i64| seconds(micros);
    let mut withheld: BTreeMap<&'static str, Slots> = BTreeMap::new();
    for (reason, slots) in agent.runs.iter().flat_map(Timeline::withheld) {
        let sum = withheld.entry(reason).or_default();
        *sum = *sum + slots;
    }
    let of_reason = |reason: RateReason| withheld.get(reason.name()).copied().unwrap_or_default();
    let punished = of_reason(RateReason::Uptime) + of_reason(RateReason::Evidence);
    let cost = cost(&agent.jobs, punished);
    let first = agent.runs.iter().filter_map(|run| run.uptimes.first());
    let begin = first.map(|&(at, _)| at).min().unwrap_or(0);
    let end = agent.runs.iter().map(|run| run.end).max().unwrap_or(0);
    let effect = Effect::of(&agent.jobs.around_drops, &agent.runs);
    AgentReport {
        seconds_followed: time(followed.map(RateInterval::micros).sum()),
        seconds_suspended: time(suspended.map(RateInterval::micros).sum()),
        uptime_percent: UptimeIntegral::of(&agent.runs).mean(begin, end),
        rate_changes: rate_changes(&agent.runs),
        slots: held
            .iter()
            .map(RateInterval::slots)
            .sum::<Slots>()
            .rounded(),
        slots_withheld: withheld.values().copied().sum::<Slots>().rounded(),
        withheld_by_reason: withheld
            .iter()
            .map(|(reason, slots)| (*reason, slots.rounded()))
            .collect(),
        capabilities: agent
            .jobs
            .capabilities
            .values()
            .map(|(name, jobs)| (name.clone(), jobs_report(jobs)))
            .collect(),
        what_if: queries
            .policies
            .iter()
            .map(|policy| what_if(agent, policy, cost.as_ref()))
            .collect(),
        cost,
        punishment: (effect.drops > 0).then_some(effect),
        claims: claims(&agent.jobs.evidence, &agent.runs),
        discovery: discovery(&agent.runs),
        forecast: queries
            .forecast
            .then(|| forecast(&agent.runs, &recorded.thresholds())),
    }
}

/// How often another rate took hold, the first one included.
fn rate_changes(runs: &[Timeline]) -> usize {
    let of_run = runs.iter().map(|run| {
        let rates = run.rates.windows(2);
        let changed = rates.filter(|pair| pair[0].rate != pair[1].rate).count();
        changed + run.rates.len().min(1)
    });
    of_run.sum()
}

fn what_if(agent: &AgentHistory, policy: &Policy, cost: Option<&Cost>) -> WhatIf {
    let sent = |held: &RateInterval| Slots::of(held.step.rate, held.micros());
    let held: Slots = agent
        .runs
        .iter()
        .flat_map(Timeline::held)
        .map(|h| sent(&h))
        .sum();
    let replayed = agent.runs.iter().flat_map(|run| replayed(run, policy));
    let jobs: Slots = replayed.map(|held| sent(&held)).sum();
    let more = jobs - held;
    let success = share(agent.jobs.good(), agent.jobs.all());
    let (numerator, denominator) = more.fraction();
    WhatIf {
        policy: policy.to_string(),
        jobs: jobs.rounded(),
        jobs_more: more.rounded(),
        good_jobs_more: success.map(|success| tenths(more.count() * success)),
        failed_jobs_more: success.map(|success| tenths(more.count() * (1.0 - success))),
        spent_more_wei: cost.map(|cost| {
            cost.spent_wei
                .part(numerator, denominator * u128::from(cost.jobs))
        }),
    }
}

fn jobs_report(jobs: &JobTotals) -> JobsReport {
    let latencies = &jobs.latencies;
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds of at most an hour"
    )]
    let at = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 1e3;
    JobsReport {
        jobs: jobs.all(),
        successful: jobs.good(),
        success_rate_percent: share_percent(jobs.good(), jobs.all()),
        latency_ms: (!latencies.is_empty()).then(|| LatencyReport {
            mean: latencies.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
        }),
        outcomes: jobs.outcomes(),
    }
}

fn share_percent(part: u64, whole: u64) -> Option<Percent> {
    share(part, whole).and_then(|share| Percent::new(share * 100.0).ok())
}

fn share(part: u64, whole: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 jobs")]
    let share = part as f64 / whole as f64;
    (whole > 0).then_some(share)
}
