//! Lines for people, in the form that the Python scripts had (`.github/docs/migration.md`).

use std::fmt::{self, Write as _};
use std::io::Write;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use chrono::{DateTime, Local, TimeZone, Utc};

use super::{AgentProgress, Progress};
use crate::runner::events::accounts::{AgentStatistics, CapabilityStatistics, Statistics};
use crate::runner::events::event::{
    ClaimChecked, Event, JobDone, Listing, RateChanged, RateReason,
};
use crate::runner::rate::pause::PauseChange;
use crate::runner::roster::Roster;
use crate::text;
use crate::wire::outcome::Outcome;

const WRITABLE: &str = "a buffer takes whatever is written";

/// Writes events as text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TextOutput {
    /// Whether colours are wanted.
    pub colour: bool,
}

struct Styles {
    failed: Style,
    heading: Style,
    changed: Style,
    faint: Style,
}

impl TextOutput {
    fn styles(self) -> Styles {
        let coloured = |style: Style| if self.colour { style } else { Style::new() };
        Styles {
            failed: coloured(AnsiColor::Red.on_default()),
            heading: coloured(Style::new().bold()),
            changed: coloured(AnsiColor::Yellow.on_default().bold()),
            faint: coloured(Style::new().dimmed()),
        }
    }

    /// Appends the lines of an event, where it has any.
    pub(crate) fn event(self, event: &Event, roster: &Roster, lines: &mut Vec<u8>) {
        match event {
            Event::Job(job) => self.job(job, roster, &Local, lines),
            Event::RateChanged(changed) => self.rate_changed(changed, roster, lines),
            Event::AgentJoined(joined) => {
                writeln!(lines, "➕ Agent {} is followed from now on", joined.id).expect(WRITABLE);
            }
            Event::AgentLeft { agent, .. } => {
                let agent = roster.agent(*agent);
                writeln!(
                    lines,
                    "➖ Agent {agent} is listed no more, and not followed"
                )
                .expect(WRITABLE);
            }
            Event::Claim(claim) => self.claim(claim, roster, lines),
            Event::Discovery(discovered) if discovered.is_new => {
                let agent = roster.agent(discovered.agent);
                writeln!(
                    lines,
                    "🔎 Agent {agent}'s runner: {}",
                    listing_text(&discovered.listing)
                )
                .expect(WRITABLE);
            }
            Event::Pause(pause) => {
                let agent = roster.agent(pause.agent);
                match pause.change {
                    PauseChange::Paused(jobs) => writeln!(
                        lines,
                        "⏸️  Agent {agent} is paused: {jobs} jobs in a row did no good ({}); one is sent every 10 s",
                        pause.outcome.name()
                    ),
                    PauseChange::Resumed => writeln!(lines, "▶️  Agent {agent} is sent jobs again"),
                }
                .expect(WRITABLE);
            }
            Event::Started { .. }
            | Event::BaseChanged(_)
            | Event::Uptime(_)
            | Event::Alias(_)
            | Event::Discovery(_)
            | Event::Sent(_)
            | Event::Stopping { .. }
            | Event::Delayed(..)
            | Event::Dropped(..) => {}
        }
    }

    /// Appends a job's line, with its time in `zone`.
    fn job<Z: TimeZone>(self, job: &JobDone, roster: &Roster, zone: &Z, lines: &mut Vec<u8>) {
        let success = job.answer.outcome == Outcome::Success;
        let style = if success {
            Style::new()
        } else {
            self.styles().failed
        };
        let agent = match roster.agents[..] {
            [_, _, ..] => format!(" | Agent: {}", roster.agent(job.agent)),
            _ => String::new(),
        };
        let failure = if success {
            String::new()
        } else {
            let error = job.answer.error.as_deref().unwrap_or_default();
            format!(" | {}: {error}", job.answer.outcome.name())
        };
        writeln!(
            lines,
            "{style}{mark} [{time}] {capability}: {status} ({latency}ms) | Rate: {rate}/min | Uptime: {uptime}%{agent}{failure}{style:#}",
            mark = if success { "✅" } else { "❌" },
            time = clock_time(job.ts, zone),
            capability = roster.capability(job.capability),
            status = job
                .answer
                .status
                .map_or_else(|| "---".to_owned(), |s| s.to_string()),
            latency = (job.latency.as_secs_f64() * 1e3).round(),
            rate = job.rate,
            uptime = job.uptime.floored(1),
        )
        .expect(WRITABLE);
    }

    fn claim(self, claim: &ClaimChecked, roster: &Roster, lines: &mut Vec<u8>) {
        let Styles { failed: style, .. } = self.styles();
        let agent = roster.agent(claim.agent);
        let uptime = claim.uptime.floored(1);
        match &claim.contradiction {
            Some(found) => writeln!(
                lines,
                "{style}🔍 Agent {agent} reports {uptime}%, but {} of its {} jobs failed: by chance at most once in {:.0}{style:#}",
                found.evidence.jobs - found.evidence.good,
                found.evidence.jobs,
                1.0 / found.chance.max(1e-15),
            ),
            None => writeln!(
                lines,
                "🔍 Agent {agent} reports {uptime}%, which its jobs contradict no more"
            ),
        }
        .expect(WRITABLE);
    }

    fn rate_changed(self, changed: &RateChanged, roster: &Roster, lines: &mut Vec<u8>) {
        let Styles { changed: style, .. } = self.styles();
        let RateChanged { from, to, .. } = changed;
        writeln!(
            lines,
            "{style}📊 Job rate changed: {from} → {to} jobs/min{style:#}"
        )
        .expect(WRITABLE);
        let uptime = match (changed.uptime, changed.reason) {
            (Some(uptime), reason) => {
                let why = match reason {
                    RateReason::Uptime => "",
                    RateReason::Stale | RateReason::Unknown => {
                        ", too old to act on: no newer answer from the ping system"
                    }
                    RateReason::Evidence => ", but its jobs contradict that",
                    RateReason::Allotment => " (another part of the total rate)",
                    RateReason::Budget => " (its budget is spent)",
                    RateReason::Throttled => " (a server asks to wait: Retry-After)",
                    RateReason::Paused => " (its jobs did no good)",
                };
                format!("{}%{why}", uptime.floored(1))
            }
            (None, _) => "unknown: the ping system has no ping of late".to_owned(),
        };
        writeln!(lines, "   Uptime: {uptime}").expect(WRITABLE);
        if let [_, _, ..] = roster.agents[..] {
            writeln!(lines, "   Agent: {}", roster.agent(changed.agent)).expect(WRITABLE);
        }
    }

    /// Appends the block of statistics.
    pub(crate) fn statistics(self, statistics: &Statistics, lines: &mut Vec<u8>) {
        let block = text::build(|text| self.write_statistics(statistics, text));
        writeln!(lines, "\n{block}").expect(WRITABLE);
    }

    fn write_statistics(self, statistics: &Statistics, text: &mut String) -> fmt::Result {
        let Styles { heading, .. } = self.styles();
        writeln!(text, "{heading}📊 STATISTICS SUMMARY{heading:#}")?;
        writeln!(text, "{}", "=".repeat(37))?;
        writeln!(text, "🕐 Total Runtime: {:.1}s", statistics.runtime_s)?;
        writeln!(text, "📤 Total Jobs Sent: {}", statistics.jobs_sent)?;
        writeln!(
            text,
            "⚡ Current Job Rate: {} jobs/min",
            statistics.current_rate
        )?;
        for (id, agent) in &statistics.agents {
            writeln!(text, "\n{heading}🖥️  AGENT STATUS{heading:#}\n{RULE}")?;
            writeln!(text, "  🆔 Agent ID: {id}")?;
            write_agent(agent, text)?;
            if let [_, _, ..] = statistics.agents[..] {
                writeln!(text, "  ⚡ Job Rate: {} jobs/min", agent.rate)?;
            }
        }
        for (name, capability) in &statistics.capabilities {
            let name = name.to_uppercase();
            writeln!(text, "\n{heading}🎯 {name}{heading:#}\n{RULE}")?;
            write_capability(capability, text)?;
        }
        Ok(())
    }

    /// The status line of a terminal that is `columns` wide.
    #[must_use]
    pub(crate) fn status(self, progress: &Progress, columns: usize) -> String {
        let Styles { faint, .. } = self.styles();
        let line = text::build(|line| write_progress(progress, line));
        // All its characters are one column wide; the last column stays free, for there a
        // terminal would wrap.
        let line: String = line.chars().take(columns.saturating_sub(1)).collect();
        format!("{faint}{line}{faint:#}")
    }
}

fn write_progress(progress: &Progress, line: &mut String) -> fmt::Result {
    write!(line, "{}/min", progress.rate)?;
    match &progress.agents[..] {
        [
            AgentProgress {
                uptime: Some((uptime, age)),
                ..
            },
        ] => write!(
            line,
            " · uptime {}% ({} ago)",
            uptime.floored(1),
            short(*age)
        )?,
        [_] => line.write_str(" · waiting for an uptime")?,
        agents => write!(line, " · uptime {}", lowest(agents))?,
    }
    write_listings(&progress.agents, line)?;
    write!(
        line,
        " · {} in flight · {} sent",
        progress.in_flight, progress.sent
    )?;
    if let Some((p50, p99)) = progress.p50_p99_ms {
        write!(line, " · p50 {p50:.0}ms p99 {p99:.0}ms")?;
    }
    if let Some(left) = progress.left {
        write!(line, " · {} left", short(left))?;
    }
    Ok(())
}

/// What an orchestrator says of a live runner, in words.
fn listing_text(listing: &Listing) -> String {
    let Some(runner) = listing.runner() else {
        return match listing {
            Listing::NotListed => "not listed by its orchestrator".to_owned(),
            _ => "unknown, its orchestrator does not tell".to_owned(),
        };
    };
    let mut text = listing.name().to_owned();
    if let (Some(in_use), Some(capacity)) = (runner.in_use, runner.capacity) {
        let _ = write!(text, ", {in_use} of {capacity} places in use");
    }
    if let Some(price) = &runner.price {
        let _ = write!(text, ", {price}");
    }
    if !runner.is_single_shot {
        text.push_str("; it takes no single jobs");
    }
    text
}

fn write_listings(agents: &[AgentProgress], line: &mut String) -> fmt::Result {
    let listings = || agents.iter().filter_map(|agent| agent.listing);
    match (agents.len(), listings().count()) {
        (_, 0) => Ok(()),
        (1, _) => listings().try_for_each(|listing| write!(line, ", {listing}")),
        (_, runners) => {
            let listed = listings().filter(|&listing| listing == "listed" || listing == "full");
            write!(line, " · {} of {runners} runners listed", listed.count())
        }
    }
}

const RULE: &str = "-----------------------------------------";

fn clock_time<Z: TimeZone>(ts: DateTime<Utc>, zone: &Z) -> chrono::NaiveTime {
    use chrono::Timelike;
    let time = ts.with_timezone(zone).naive_local().time();
    time.with_nanosecond(0).unwrap_or(time)
}

fn write_agent(agent: &AgentStatistics, text: &mut String) -> fmt::Result {
    let or_unknown = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let uptime = agent
        .uptime_percent
        .map(|uptime| format!("{}%", uptime.floored(2)));
    let interval = agent
        .ping_interval_minutes
        .map(|minutes| format!("{} min", (minutes * 100.0).round() / 100.0));
    writeln!(text, "  📈 Uptime: {}", or_unknown(uptime))?;
    writeln!(
        text,
        "  ⚠️  Consecutive Poor: {}",
        or_unknown(agent.consecutive_poor.map(|count| count.to_string()))
    )?;
    writeln!(text, "  ⏱️  Ping Interval: {}", or_unknown(interval))?;
    writeln!(
        text,
        "  📊 Total Pings: {}",
        or_unknown(agent.total_pings.map(|count| count.to_string()))
    )?;
    if let Some(discovery) = &agent.discovery {
        write!(text, "  🔎 Orchestrator: {}", discovery.name)?;
        if let (Some(in_use), Some(capacity)) = (discovery.in_use, discovery.capacity) {
            write!(text, " ({in_use} of {capacity} places in use)")?;
        }
        writeln!(text)?;
    }
    Ok(())
}

fn write_capability(capability: &CapabilityStatistics, text: &mut String) -> fmt::Result {
    writeln!(text, "  📤 Total Attempts: {}", capability.attempts)?;
    writeln!(text, "  ✅ Successful: {}", capability.successful)?;
    writeln!(text, "  ❌ Failed: {}", capability.failed)?;
    writeln!(text, "  ⏳ Delayed (Punished): {}", capability.delayed)?;
    if capability.dropped > 0 {
        writeln!(text, "  🚫 Dropped: {}", capability.dropped)?;
    }
    if let Some(rate) = capability.success_rate_percent {
        writeln!(text, "  📈 Success Rate: {}%", rate.floored(2))?;
    }
    if let Some(latency) = &capability.latency_ms {
        writeln!(text, "  ⏱️  Avg Response Time: {:.1}ms", latency.mean)?;
        writeln!(
            text,
            "  🏃 Min/Max: {:.1}ms / {:.1}ms",
            latency.min, latency.max
        )?;
        writeln!(
            text,
            "  📐 p50/p90/p99: {:.1}ms / {:.1}ms / {:.1}ms",
            latency.p50, latency.p90, latency.p99
        )?;
    }
    let codes: Vec<String> = capability
        .status_codes
        .iter()
        .map(|(status, count)| format!("{status}: {count}"))
        .collect();
    writeln!(text, "  📊 Status Codes: {{{}}}", codes.join(", "))
}

/// Of several agents, the one that most needs a look.
fn lowest(agents: &[AgentProgress]) -> String {
    let known = || {
        agents
            .iter()
            .filter_map(|agent| Some((&agent.id, agent.uptime?.0)))
    };
    let worst = known().min_by(|(_, a), (_, b)| a.get().total_cmp(&b.get()));
    worst.map_or_else(
        || format!("unknown of {} agents", agents.len()),
        |(id, uptime)| {
            let (known, all) = (known().count(), agents.len());
            format!(
                "known of {known}/{all} agents, lowest {}% ({id})",
                uptime.floored(1)
            )
        },
    )
}

/// A duration in two units at most.
fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::runner::events::accounts::Accounts;
    use crate::runner::events::event::{DropReason, JobSent};
    use crate::runner::events::event::{Freshness, PingStats};
    use crate::runner::events::event::{JobAnswer, UptimePolled};
    use crate::runner::roster::{AgentIndex, CapabilityIndex};
    use crate::runner::testing::percent;
    use crate::units::JobsPerMinute;
    use crate::wire::charge::Work;
    use uuid::Uuid;

    const PLAIN: TextOutput = TextOutput { colour: false };

    fn roster(agents: &[&str]) -> Roster {
        Roster {
            agents: agents.iter().map(|&agent| agent.into()).collect(),
            capabilities: vec!["gpu-check".into()],
            base_rate: JobsPerMinute::new(60),
        }
    }

    fn job(outcome: Outcome, status: Option<u16>, error: &str, latency_us: u64) -> JobDone {
        JobDone {
            ts: "2026-01-01T14:32:15.9Z".parse().unwrap(),
            agent: AgentIndex(0),
            job_id: Uuid::nil(),
            capability: CapabilityIndex(0),
            sent_to: None,
            latency: Duration::from_micros(latency_us),
            send_lag: Duration::ZERO,
            rate: JobsPerMinute::new(60),
            uptime: percent(99.56),
            work: Work {
                outcome,
                is_stream: false,
                time: Duration::from_micros(latency_us),
                timeout_seconds: 60,
            },
            cost: None,
            answer: JobAnswer {
                is_stream: false,
                connect: None,
                retry_after: None,
                unpaid_since: None,
                status,
                ..JobAnswer::failure(outcome, error.to_owned())
            },
        }
    }

    fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut lines = Vec::new();
        write(&mut lines);
        String::from_utf8(lines).unwrap()
    }

    fn job_line(output: TextOutput, agents: &[&str], job: &JobDone) -> String {
        text(|lines| output.job(job, &roster(agents), &Utc, lines))
    }

    #[test]
    fn a_job_is_one_line() {
        let success = job(Outcome::Success, Some(200), "", 45_200);
        assert_eq!(
            job_line(PLAIN, &["a"], &success),
            "✅ [14:32:15] gpu-check: 200 (45ms) | Rate: 60/min | Uptime: 99.5%\n"
        );
        let failed = job(Outcome::HttpError, Some(500), "oops", 45_200);
        assert_eq!(
            job_line(PLAIN, &["a"], &failed),
            "❌ [14:32:15] gpu-check: 500 (45ms) | Rate: 60/min | Uptime: 99.5% | http_error: oops\n"
        );
        let refused = job(Outcome::Connect, None, "Connection refused", 300);
        assert_eq!(
            job_line(PLAIN, &["a", "b"], &refused),
            "❌ [14:32:15] gpu-check: --- (0ms) | Rate: 60/min | Uptime: 99.5% | Agent: a | connect: Connection refused\n"
        );
    }

    #[test]
    fn colour_marks_what_failed() {
        let colour = TextOutput { colour: true };
        let failed = job_line(colour, &["a"], &job(Outcome::Timeout, None, "late", 1));
        assert!(
            failed.starts_with("\x1b[31m❌") && failed.ends_with("late\x1b[0m\n"),
            "{failed:?}"
        );
        let success = job_line(colour, &["a"], &job(Outcome::Success, Some(200), "", 1));
        assert!(!success.contains('\x1b'), "{success:?}");
    }

    #[test]
    fn a_rate_change_says_why() {
        let changed = |uptime: Option<f64>, reason| {
            let changed = RateChanged {
                ts: DateTime::UNIX_EPOCH,
                agent: AgentIndex(0),
                from: JobsPerMinute::new(60),
                to: JobsPerMinute::new(30),
                base: JobsPerMinute::new(60),
                uptime: uptime.map(percent),
                reason,
            };
            text(|lines| PLAIN.rate_changed(&changed, &roster(&["a"]), lines))
        };
        assert_eq!(
            changed(Some(96.25), RateReason::Uptime),
            "📊 Job rate changed: 60 → 30 jobs/min\n   Uptime: 96.2%\n"
        );
        assert!(changed(Some(96.2), RateReason::Stale).contains("Uptime: 96.2%, too old"));
        assert!(changed(None, RateReason::Unknown).contains("Uptime: unknown"));
    }

    #[test]
    fn the_block_of_statistics() {
        let mut accounts = Accounts::new(&roster(&["agent-001"]));
        accounts.apply(&Event::Uptime(UptimePolled {
            ts: DateTime::UNIX_EPOCH,
            agent: AgentIndex(0),
            state: Freshness::Fresh,
            uptime: Some(percent(96.256)),
            answered: true,
            pings: 4,
            told: None,
            ping_stats: PingStats {
                consecutive_poor: Some(0),
                ping_interval_minutes: Some(15.0),
                total_pings: Some(8),
            },
        }));
        accounts.apply(&Event::RateChanged(RateChanged {
            ts: DateTime::UNIX_EPOCH,
            agent: AgentIndex(0),
            from: JobsPerMinute::new(60),
            to: JobsPerMinute::new(30),
            base: JobsPerMinute::new(60),
            uptime: Some(percent(96.256)),
            reason: RateReason::Uptime,
        }));
        for (outcome, status, latency_us) in [
            (Outcome::Success, 200, 35_200),
            (Outcome::Success, 200, 48_300),
            (Outcome::HttpError, 500, 125_600),
        ] {
            accounts.apply(&Event::Sent(JobSent {
                ts: DateTime::UNIX_EPOCH,
                agent: AgentIndex(0),
                job_id: Uuid::nil(),
                capability: CapabilityIndex(0),
            }));
            accounts.apply(&Event::Job(job(outcome, Some(status), "", latency_us)));
        }
        accounts.apply(&Event::Delayed(AgentIndex(0), CapabilityIndex(0)));
        accounts.apply(&Event::Dropped(
            AgentIndex(0),
            CapabilityIndex(0),
            DropReason::Late,
        ));
        let statistics = accounts.statistics(DateTime::UNIX_EPOCH, Duration::from_millis(120_500));
        insta::assert_snapshot!(text(|lines| PLAIN.statistics(&statistics, lines)));
    }

    #[test]
    fn the_status_line_fits_the_terminal() {
        let agent = |id: &str, uptime: Option<f64>| AgentProgress {
            id: id.into(),
            uptime: uptime.map(|uptime| (percent(uptime), Duration::from_secs(75))),
            listing: None,
        };
        let mut progress = Progress {
            rate: 30,
            agents: vec![agent("agent-001", Some(96.25))],
            in_flight: 2,
            sent: 95,
            p50_p99_ms: Some((45.2, 120.7)),
            left: Some(Duration::from_secs(3700)),
        };
        assert_eq!(
            PLAIN.status(&progress, 200),
            "30/min · uptime 96.2% (1m15s ago) · 2 in flight · 95 sent · p50 45ms p99 121ms · 1h01m left"
        );
        assert_eq!(PLAIN.status(&progress, 20).chars().count(), 19);
        progress
            .agents
            .extend([agent("agent-002", Some(91.0)), agent("agent-003", None)]);
        assert!(
            PLAIN
                .status(&progress, 200)
                .contains("known of 2/3 agents, lowest 91.0% (agent-002)")
        );
        for listing in ["full", "not listed"] {
            progress.agents[0].listing = Some(listing);
            progress.agents[1].listing = Some("listed");
            let known = if listing == "full" { 2 } else { 1 };
            let text = format!("(agent-002) · {known} of 2 runners listed · 2 in flight");
            let line = PLAIN.status(&progress, 200).replace("91.0% ", "");
            assert!(line.contains(&text), "{line}");
        }
        progress.agents.truncate(1);
        let line = PLAIN.status(&progress, 200);
        assert!(line.contains("(1m15s ago), not listed · 2"), "{line}");
        progress.agents = vec![agent("agent-001", None)];
        assert!(
            PLAIN
                .status(&progress, 200)
                .contains("waiting for an uptime")
        );
    }
}
