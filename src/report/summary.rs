//! The figures of a report.

use std::collections::BTreeMap;

use serde::Serialize;

use super::history::{AgentHistory, History, Jobs, Timeline};
use super::replay::{held, replayed, slots};
use crate::runner::policy::Policy;
use crate::units::{JobsPerMinute, Percent};

/// What recorded runs say.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How many runs.
    pub runs: u64,
    /// Records that are missing, since the disk was too slow.
    pub records_dropped: u64,
    /// By agent's name.
    pub agents: BTreeMap<String, AgentReport>,
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
    /// Of these, those that the policy withheld.
    pub slots_withheld: f64,
    /// By capability.
    pub capabilities: BTreeMap<String, JobsReport>,
    /// What each policy that was asked for would have done.
    pub what_if: Vec<WhatIf>,
}

/// Jobs of one kind.
#[derive(Debug, Serialize)]
pub struct JobsReport {
    /// How many were sent and answered, or given up.
    pub jobs: u64,
    /// Of these, those that succeeded.
    pub successful: u64,
    /// Their share.
    pub success_rate_percent: Option<Percent>,
    /// Latencies in milliseconds, from slot to last byte.
    pub latency_ms: Option<Latencies>,
    /// How many ended how.
    pub outcomes: BTreeMap<String, u64>,
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latencies {
    /// The mean.
    pub mean: f64,
    /// Half took at most this.
    pub p50: f64,
    /// Nine of ten took at most this.
    pub p90: f64,
    /// 99 of 100 took at most this.
    pub p99: f64,
}

/// The recorded uptimes under another policy. Jobs that were never sent have no outcome: they are
/// taken to succeed as often as this agent's jobs did.
#[derive(Debug, Serialize)]
pub struct WhatIf {
    /// The policy.
    pub policy: String,
    /// Jobs that it would have sent.
    pub jobs: f64,
    /// More than at the rates that held; fewer where negative.
    pub jobs_more: f64,
    /// Of these, expected successes.
    pub good_jobs_more: Option<f64>,
    /// And expected failures.
    pub failed_jobs_more: Option<f64>,
}

impl Report {
    /// What a history says, and what each of these policies would have done.
    #[must_use]
    pub fn of(history: &History, policies: &[Policy]) -> Self {
        let agents = history.agents.iter();
        Self {
            runs: history.runs,
            records_dropped: history.records_dropped,
            agents: agents
                .map(|(name, agent)| (name.clone(), agent_report(agent, policies)))
                .collect(),
        }
    }
}

fn agent_report(agent: &AgentHistory, policies: &[Policy]) -> AgentReport {
    let rates: Vec<_> = agent.runs.iter().flat_map(held).collect();
    let micros = |suspended_only: bool| -> i64 {
        let counted = rates
            .iter()
            .filter(|(rate, _)| !suspended_only || *rate == JobsPerMinute::ZERO);
        counted.map(|(_, micros)| micros).sum()
    };
    let all: f64 = agent.runs.iter().map(full_slots).sum();
    let held_slots = slots(&rates);
    let capabilities: BTreeMap<String, JobsReport> = agent
        .jobs
        .iter()
        .map(|(name, jobs)| (name.clone(), jobs_report(jobs)))
        .collect();
    let jobs: u64 = capabilities.values().map(|report| report.jobs).sum();
    let successful: u64 = capabilities.values().map(|report| report.successful).sum();
    let success = share(successful, jobs);
    AgentReport {
        seconds_followed: seconds(micros(false)),
        uptime_percent: mean_uptime(&agent.runs),
        seconds_suspended: seconds(micros(true)),
        rate_changes: agent.runs.iter().map(|run| run.rates.len()).sum(),
        slots: rounded(all),
        slots_withheld: rounded(all - held_slots),
        capabilities,
        what_if: policies
            .iter()
            .map(|policy| {
                let rates = agent.runs.iter().flat_map(|run| replayed(run, policy));
                let jobs = slots(&rates.collect::<Vec<_>>());
                let more = jobs - held_slots;
                WhatIf {
                    policy: policy.to_string(),
                    jobs: rounded(jobs),
                    jobs_more: rounded(more),
                    good_jobs_more: success.map(|success| rounded(more * success)),
                    failed_jobs_more: success.map(|success| rounded(more * (1.0 - success))),
                }
            })
            .collect(),
    }
}

fn full_slots(run: &Timeline) -> f64 {
    let stretches: Vec<_> = held(run)
        .into_iter()
        .map(|(_, micros)| (run.base_rate, micros))
        .collect();
    slots(&stretches)
}

/// Each uptime holds until the next look.
fn mean_uptime(runs: &[Timeline]) -> Option<Percent> {
    let (mut weighted, mut micros) = (0.0, 0);
    for run in runs {
        let ends = run
            .uptimes
            .iter()
            .skip(1)
            .map(|&(at, _)| at)
            .chain([run.end]);
        for (&(at, uptime), end) in run.uptimes.iter().zip(ends) {
            if let Some(uptime) = uptime {
                let held = (end - at).max(0);
                weighted += uptime.get() * seconds(held);
                micros += held;
            }
        }
    }
    if micros == 0 {
        return None;
    }
    let mean = weighted / seconds(micros);
    Percent::new(mean.min(100.0))
        .map(Percent::to_a_billionth)
        .ok()
}

fn jobs_report(jobs: &Jobs) -> JobsReport {
    let all = jobs.outcomes.values().sum();
    let successful = jobs.outcomes.get("success").copied().unwrap_or(0);
    let latencies = &jobs.latencies;
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds of at most an hour"
    )]
    let at = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 1e3;
    JobsReport {
        jobs: all,
        successful,
        success_rate_percent: share(successful, all)
            .and_then(|share| Percent::new(share * 100.0).ok()),
        latency_ms: (!latencies.is_empty()).then(|| Latencies {
            mean: latencies.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
        }),
        outcomes: jobs.outcomes.clone(),
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53 jobs")]
    let share = part as f64 / whole as f64;
    (whole > 0).then_some(share)
}

fn seconds(micros: i64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "exact up to 285 years")]
    let seconds = micros as f64 / 1e6;
    seconds
}

/// To a tenth of a job.
fn rounded(jobs: f64) -> f64 {
    // Adding 0 makes a negative zero positive.
    (jobs * 10.0).round() / 10.0 + 0.0
}
