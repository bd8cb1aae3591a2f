//! A report for people.

use std::fmt::Write as _;

use chrono::{DateTime, Local, SecondsFormat};

use crate::money::Wei;
use crate::report::claims::Claims;
use crate::report::cost::{Cost, CostSource};
use crate::report::discovery::Discovery;
use crate::report::effect::{Effect, HourAround};
use crate::report::forecast::{Chance, TierForecast};
use crate::report::suggest::Suggestion;
use crate::report::summary::{AgentReport, JobsReport, Report, WhatIf};
use crate::text::{self, foreign_name};
use crate::units::Percent;

pub(crate) fn lines(report: &Report) -> String {
    text::build(|text| write(report, text))
}

fn write(report: &Report, text: &mut String) -> std::fmt::Result {
    let runs = if report.runs == 1 { "" } else { "S" };
    writeln!(text, "📊 REPORT OF {} RUN{runs}", report.runs)?;
    writeln!(text, "=====================================")?;
    if report.runs > 0 {
        let (from, until) = (here(&report.from), here(&report.until));
        writeln!(text, "🕐 {from} – {until}")?;
    }
    if report.records_dropped > 0 {
        writeln!(
            text,
            "⚠️  {} records are missing: the disk was too slow",
            report.records_dropped
        )?;
    }
    let total = &report.total;
    writeln!(
        text,
        "📤 {} jobs, {} good",
        total.jobs,
        percent(total.success_rate_percent)
    )?;
    if let (Some(spent), Some(not_spent)) = (&total.spent_wei, &total.not_spent_wei) {
        writeln!(
            text,
            "💰 Spent: {}; not spent because of punishment: {}",
            money(spent),
            money(not_spent)
        )?;
    }
    for (name, agent) in &report.agents {
        writeln!(text, "\n🖥️  {}", foreign_name(name))?;
        writeln!(text, "-----------------------------------------")?;
        write_agent(agent, text)?;
    }
    if report.ranking.len() > 1 {
        writeln!(text, "\n🏆 GOOD JOBS FOR AN ETH (95 of 100 times within)")?;
        writeln!(text, "-----------------------------------------")?;
        for (rank, ranked) in report.ranking.iter().enumerate() {
            let jobs = ranked.good_jobs_per_eth;
            writeln!(
                text,
                "  {}. {}: {:.4e} ({:.4e} – {:.4e})",
                rank + 1,
                ranked.agent,
                jobs.estimate,
                jobs.low,
                jobs.high
            )?;
        }
    }
    if let Some(suggestion) = &report.suggestion {
        write_suggestion(suggestion, text)?;
    }
    Ok(())
}

fn write_agent(agent: &AgentReport, text: &mut String) -> std::fmt::Result {
    writeln!(text, "  🕐 Followed: {}", span(agent.seconds_followed))?;
    writeln!(text, "  📈 Mean Uptime: {}", percent(agent.uptime_percent))?;
    let reasons: Vec<String> = agent
        .withheld_by_reason
        .iter()
        .map(|(reason, slots)| format!("{reason} {slots}"))
        .collect();
    let reasons = match &reasons[..] {
        [] => String::new(),
        reasons => format!(" ({})", reasons.join(", ")),
    };
    writeln!(
        text,
        "  ⏳ Withheld: {} of {} slots{reasons}, none sent for {}",
        agent.slots_withheld,
        agent.slots,
        span(agent.seconds_suspended)
    )?;
    for (name, jobs) in &agent.capabilities {
        write_jobs(name, jobs, text)?;
    }
    if let Some(cost) = &agent.cost {
        write_cost(cost, text)?;
    }
    if let Some(effect) = &agent.punishment {
        write_effect(effect, text)?;
    }
    if let Some(claims) = &agent.claims {
        write_claims(claims, text)?;
    }
    if let Some(discovery) = &agent.discovery {
        write_discovery(discovery, text)?;
    }
    for what_if in &agent.what_if {
        write_what_if(what_if, text)?;
    }
    for forecast in agent.forecast.iter().flatten() {
        write_forecast(forecast, text)?;
    }
    Ok(())
}

fn write_jobs(name: &str, jobs: &JobsReport, text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "  🎯 {}: {} jobs, {} good",
        foreign_name(name),
        jobs.jobs,
        percent(jobs.success_rate_percent)
    )?;
    if let Some(latency) = jobs.latency_ms {
        writeln!(
            text,
            "     📐 mean {:.1}ms, p50/p90/p99: {:.1}ms / {:.1}ms / {:.1}ms",
            latency.mean, latency.p50, latency.p90, latency.p99
        )?;
    }
    let outcomes: Vec<String> = jobs
        .outcomes
        .iter()
        .map(|(outcome, count)| format!("{outcome} {count}"))
        .collect();
    writeln!(text, "     📊 {}", outcomes.join(", "))
}

fn write_cost(cost: &Cost, text: &mut String) -> std::fmt::Result {
    let from = match cost.source {
        CostSource::Price => {
            let seconds = cost.seconds_charged.map(|seconds| format!("{seconds} s"));
            let jobs = cost.jobs_charged.map(|jobs| format!("{jobs} jobs"));
            let units: Vec<String> = seconds.into_iter().chain(jobs).collect();
            format!("{} charged", units.join(" and "))
        }
        CostSource::Balance => format!("by the balances of {} jobs", cost.jobs),
    };
    writeln!(text, "  💰 Spent: {} ({from})", money(&cost.spent_wei))?;
    if let Some(each) = &cost.per_good_job_wei {
        writeln!(text, "     For each good job: {}", money(each))?;
    }
    writeln!(
        text,
        "     Not spent because of punishment: {}",
        money(&cost.not_spent_wei)
    )?;
    if cost.top_ups > 0 {
        writeln!(
            text,
            "     Topped up {} times, by {} at least",
            cost.top_ups,
            money(&cost.topped_up_wei)
        )?;
    }
    if cost.books_forgotten > 0 {
        writeln!(
            text,
            "     Forgotten by a node {} times: what fell then is not counted",
            cost.books_forgotten
        )?;
    }
    Ok(())
}

fn write_effect(effect: &Effect, text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "  📉 {} drops of the rate; in the hour before: {}",
        effect.drops,
        hour(&effect.together.hour_before)
    )?;
    for (n, after) in effect.together.hours_after.iter().enumerate() {
        writeln!(text, "     In hour {} after: {}", n + 1, hour(after))?;
    }
    Ok(())
}

fn hour(hour: &HourAround) -> String {
    format!(
        "uptime {}, {} jobs, {} good",
        percent(hour.uptime_percent),
        hour.jobs,
        percent(hour.success_rate_percent)
    )
}

fn write_discovery(discovery: &Discovery, text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "  🔎 Its orchestrator listed its runner for {} min, and not for {} min",
        discovery.minutes_listed, discovery.minutes_not_listed
    )?;
    writeln!(
        text,
        "     Uptime said otherwise: up but not listed {} min, listed but down {} min",
        discovery.minutes_up_but_not_listed, discovery.minutes_listed_but_down
    )
}

fn write_claims(claims: &Claims, text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "  🔍 Claims against evidence: contradicted {} of {} times ({} of {} jobs good)",
        claims.contradicted.len(),
        claims.looks,
        claims.successful,
        claims.jobs
    )?;
    // The worst of them, by the order of time.
    let mut worst: Vec<_> = claims.contradicted.iter().collect();
    worst.sort_by(|a, b| a.chance.total_cmp(&b.chance));
    worst.truncate(5);
    worst.sort_by_key(|found| found.from);
    for found in worst {
        writeln!(
            text,
            "     {}: reported {}, but {} of {} jobs good: by chance at most {:.1e}",
            here(&crate::report::timeline::utc(found.from)),
            percent(Some(found.uptime_percent)),
            found.successful,
            found.jobs,
            found.chance
        )?;
    }
    Ok(())
}

fn write_what_if(what_if: &WhatIf, text: &mut String) -> std::fmt::Result {
    writeln!(text, "  🔮 {}", what_if.policy)?;
    write!(text, "     {} jobs, {:+} ", what_if.jobs, what_if.jobs_more)?;
    match (what_if.good_jobs_more, what_if.failed_jobs_more) {
        (Some(good), Some(failed)) => {
            write!(text, "(expected: {good:+} good, {failed:+} failed)")?;
        }
        _ => write!(text, "(no job tells how many would have been good)")?,
    }
    match &what_if.spent_more_wei {
        Some(more) => {
            let plus = if more.is_negative() { "" } else { "+" };
            writeln!(text, ", {plus}{}", money(more))
        }
        None => writeln!(text),
    }
}

fn write_forecast(forecast: &TierForecast, text: &mut String) -> std::fmt::Result {
    let chance = |chance: &Chance| {
        let scores = match (chance.brier, chance.brier_as_now) {
            (Some(brier), Some(as_now)) => format!(
                "Brier {brier:.3}, as now {as_now:.3}, {} times",
                chance.compared
            ),
            _ => "not compared with any past yet".to_owned(),
        };
        format!("{:.1}% ({scores})", chance.chance * 100.0)
    };
    writeln!(
        text,
        "  🌤️  {} or more ({}): in an hour {}, in a day {}",
        percent(Some(forecast.tier_percent)),
        if forecast.reached {
            "now it is"
        } else {
            "now it is not"
        },
        chance(&forecast.next_hour),
        chance(&forecast.next_day)
    )
}

fn write_suggestion(suggestion: &Suggestion, text: &mut String) -> std::fmt::Result {
    writeln!(text, "\n💡 TIERS WORTH MOST")?;
    writeln!(text, "-----------------------------------------")?;
    let cost = suggestion.cost_per_job_wei.as_ref();
    writeln!(
        text,
        "  If a good job is worth {} and a job costs {}",
        money(&suggestion.value_per_good_job_wei),
        cost.map_or_else(|| "nothing (no cost is known)".to_owned(), money)
    )?;
    let thresholds: Vec<String> = suggestion
        .thresholds_percent
        .iter()
        .map(ToString::to_string)
        .collect();
    writeln!(
        text,
        "  Compared: {} policies, three tiers of 100, 50 and 10 % at any of {} %, and the recorded one",
        suggestion.policies_compared,
        thresholds.join(", ")
    )?;
    for (what, worth) in [
        ("Recorded", &suggestion.recorded),
        ("Best", &suggestion.best),
    ] {
        writeln!(
            text,
            "  {what}: {}: {} jobs, {} of them good as expected",
            worth.policy, worth.jobs, worth.good_jobs
        )?;
    }
    writeln!(
        text,
        "  Gain: {} (90 of 100 times from {} to {})",
        money(&suggestion.gain_wei),
        money(&suggestion.gain_low_wei),
        money(&suggestion.gain_high_wei)
    )
}

fn percent(percent: Option<Percent>) -> String {
    percent.map_or_else(|| "unknown".to_owned(), |p| format!("{}%", p.floored(2)))
}

/// Exactly, in ETH where that is shorter to read.
fn money(amount: &Wei) -> String {
    if amount.approximate_eth().abs() >= 1e-6 {
        format!("{} ETH", amount.in_eth())
    } else {
        format!("{amount} wei")
    }
}

/// An instant in UTC, in the reader's zone.
fn here(utc: &str) -> String {
    let parsed = DateTime::parse_from_rfc3339(utc);
    parsed.map_or_else(
        |_| utc.to_owned(),
        |time| {
            time.with_timezone(&Local)
                .to_rfc3339_opts(SecondsFormat::Secs, true)
        },
    )
}

fn span(seconds: f64) -> String {
    match seconds {
        s if s < 600.0 => format!("{s:.1}s"),
        s if s < 36_000.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
