//! A report for people.

use std::fmt::Write as _;

use super::summary::{AgentReport, Report};
use crate::units::Percent;

pub(super) fn lines(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(report, &mut text);
    text
}

fn write(report: &Report, text: &mut String) -> std::fmt::Result {
    writeln!(
        text,
        "📊 REPORT OF {} RUN{}",
        report.runs,
        if report.runs == 1 { "" } else { "S" }
    )?;
    writeln!(text, "=====================================")?;
    if report.records_dropped > 0 {
        writeln!(
            text,
            "⚠️  {} records are missing: the disk was too slow",
            report.records_dropped
        )?;
    }
    for (name, agent) in &report.agents {
        writeln!(text, "\n🖥️  {name}")?;
        writeln!(text, "-----------------------------------------")?;
        write_agent(agent, text)?;
    }
    Ok(())
}

fn write_agent(agent: &AgentReport, text: &mut String) -> std::fmt::Result {
    let percent = |percent: Option<Percent>| {
        percent.map_or_else(|| "unknown".to_owned(), |p| format!("{}%", p.floored(2)))
    };
    writeln!(text, "  🕐 Followed: {}", span(agent.seconds_followed))?;
    writeln!(text, "  📈 Mean Uptime: {}", percent(agent.uptime_percent))?;
    writeln!(
        text,
        "  ⏳ Withheld: {} of {} slots, none sent for {}",
        agent.slots_withheld,
        agent.slots,
        span(agent.seconds_suspended)
    )?;
    for (name, jobs) in &agent.capabilities {
        writeln!(
            text,
            "  🎯 {name}: {} jobs, {} good",
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
        writeln!(text, "     📊 {}", outcomes.join(", "))?;
    }
    for what_if in &agent.what_if {
        writeln!(text, "  🔮 {}", what_if.policy)?;
        write!(text, "     {} jobs, {:+} ", what_if.jobs, what_if.jobs_more)?;
        match (what_if.good_jobs_more, what_if.failed_jobs_more) {
            (Some(good), Some(failed)) => {
                writeln!(text, "(expected: {good:+} good, {failed:+} failed)")?;
            }
            _ => writeln!(text, "(no job tells how many would have been good)")?,
        }
    }
    Ok(())
}

fn span(seconds: f64) -> String {
    match seconds {
        s if s < 600.0 => format!("{s:.1}s"),
        s if s < 36_000.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
