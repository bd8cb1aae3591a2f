//! Hands each event to accounts, metrics, records and output, in the same order.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::accounts::{Accounts, CapabilityStatistics};
use super::database::AgentTerms;
use super::event::{AgentJoined, Event, JobDone};
use super::metrics::RunMetrics;
use super::output::{AgentProgress, Output, Progress};
use super::recorder::RunRecorder;
use super::run_clock::RunClock;
use crate::runner::events::event::Freshness;
use crate::runner::events::output::text::TextOutput;
use crate::runner::events::output::writer::Writer;
use crate::runner::roster::{AgentIndex, Roster};
use crate::units::Percent;
use crate::wire::outcome::Outcome;

/// Receives the events of all tasks of a run.
#[derive(Debug)]
pub(crate) struct EventDispatcher {
    clock: RunClock,
    output: Output,
    stats_every: u64,
    writer: Writer,
    recorder: Option<RunRecorder>,
    state: Mutex<RecorderState>,
}

#[derive(Debug)]
struct RecorderState {
    roster: Roster,
    accounts: Accounts,
    metrics: RunMetrics,
    /// By agent: the last known uptime, and when it was received.
    uptimes: Vec<Option<(Percent, Instant)>>,
    lines: Vec<u8>,
    lines_skipped: u64,
    has_known_uptime: bool,
    /// Whether it was told that jobs go to a path that no node has.
    is_wrong_path_told: bool,
    rejections: RejectionLog,
    /// Whether the summary was written.
    is_closed: bool,
}

impl RecorderState {
    fn join(&mut self, joined: &AgentJoined) {
        if joined.agent.0 == self.roster.agents.len() {
            self.roster.agents.push(Arc::clone(&joined.id));
            self.uptimes.push(None);
        }
    }
}

/// Limits the log of rejected jobs: they are our own fault, but at full rate one line each is too much.
#[derive(Debug, Default)]
struct RejectionLog {
    told_at: Option<Instant>,
    since: u64,
}

impl RejectionLog {
    const SILENCE: Duration = Duration::from_secs(10);

    fn tell(&mut self, job: &JobDone) {
        self.since += 1;
        if self
            .told_at
            .is_some_and(|told_at| told_at.elapsed() < Self::SILENCE)
        {
            return;
        }
        tracing::error!(
            job_id = %job.job_id,
            jobs = self.since,
            "the gateway cannot read what it is sent: {}",
            job.answer.error.as_deref().unwrap_or_default()
        );
        *self = Self {
            told_at: Some(Instant::now()),
            since: 0,
        };
    }
}

fn is_wrong_path(job: &JobDone) -> bool {
    job.answer.outcome == Outcome::BadGateway
        && job.answer.status == Some(404)
        && job
            .answer
            .error
            .as_deref()
            .is_some_and(|error| error.starts_with("404 page not found"))
}

impl EventDispatcher {
    /// Nothing has happened yet. A block of statistics comes after every `stats_every` jobs, never
    /// for 0.
    ///
    /// # Errors
    /// When the metrics cannot be set up.
    pub(crate) fn new(
        roster: Roster,
        output: Output,
        stats_every: u64,
        writer: Writer,
        recorder: Option<RunRecorder>,
        clock: RunClock,
    ) -> prometheus::Result<Self> {
        Ok(Self {
            state: Mutex::new(RecorderState {
                accounts: Accounts::new(&roster),
                metrics: RunMetrics::new(&roster)?,
                uptimes: vec![None; roster.agents.len()],
                roster,
                lines: Vec::new(),
                lines_skipped: 0,
                has_known_uptime: false,
                is_closed: false,
                is_wrong_path_told: false,
                rejections: RejectionLog::default(),
            }),
            clock,
            output,
            stats_every,
            writer,
            recorder,
        })
    }

    /// The run's time.
    #[must_use]
    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    /// Adds an agent, before there is any event of it.
    pub(crate) fn add_agent(&self, agent: AgentIndex, terms: AgentTerms) {
        let id = Arc::clone(&terms.id);
        if let Some(recorder) = &self.recorder
            && agent.0 == self.state.lock().roster.agents.len()
        {
            recorder.add_agent(terms);
        }
        let ts = self.now();
        self.record(&Event::AgentJoined(AgentJoined { ts, agent, id }));
    }

    /// Applies an event. What happens after the run was closed is in no account, and not told: the summary comes last.
    pub(crate) fn record(&self, event: &Event) {
        let mut state = self.state.lock();
        if state.is_closed {
            return;
        }
        if let Some(recorder) = &self.recorder {
            recorder.record(event);
        }
        state.metrics.apply(event);
        state.accounts.apply(event);
        match event {
            Event::AgentJoined(joined) => state.join(joined),
            Event::AgentLeft { agent, .. } => state.uptimes[agent.0] = None,
            Event::RateChanged(changed) if changed.uptime.is_some() => {
                state.has_known_uptime = true;
            }
            Event::Uptime(polled) => match polled.uptime {
                Some(uptime) if polled.answered => {
                    state.uptimes[polled.agent.0] = Some((uptime, Instant::now()));
                }
                None if polled.state == Freshness::Unknown => state.uptimes[polled.agent.0] = None,
                _ => {}
            },
            Event::Job(job) if job.answer.outcome == Outcome::Rejected => {
                state.rejections.tell(job);
            }
            Event::Job(job) if is_wrong_path(job) && !state.is_wrong_path_told => {
                state.is_wrong_path_told = true;
                tracing::error!(
                    "{}: a node answers, but has no such path; `uptime-runner check` finds the right one",
                    job.answer.error.as_deref().unwrap_or_default()
                );
            }
            Event::Alias(alias) => tracing::info!(
                agent = state.roster.agent(alias.agent),
                "the orchestrator {} calls itself {:?}: its jobs count as the agent's all the same",
                alias.orchestrator,
                alias.name
            ),
            _ => {}
        }
        let RecorderState {
            roster,
            accounts,
            lines,
            lines_skipped,
            ..
        } = &mut *state;
        lines.clear();
        let is_job = matches!(event, Event::Job(_));
        if is_job && self.may_skip_lines() && !self.writer.has_capacity() {
            *lines_skipped += 1;
        } else {
            if *lines_skipped > 0 {
                tracing::warn!(
                    lines = *lines_skipped,
                    "standard output was too slow: jobs were counted, but their lines left out"
                );
                *lines_skipped = 0;
            }
            self.output.event(event, roster, lines);
        }
        if is_job && self.stats_every > 0 && accounts.jobs_done().is_multiple_of(self.stats_every) {
            let statistics = accounts.statistics(self.now(), self.clock.elapsed());
            self.output.statistics(&statistics, lines);
        }
        if !lines.is_empty() {
            self.writer.write(lines);
        }
    }

    /// Whether lines may be skipped when the reader is too slow: text may, JSON may not.
    fn may_skip_lines(&self) -> bool {
        matches!(self.output, Output::Text(_))
    }

    /// Waits until standard output has taken enough lines that no more than a bounded number wait.
    /// A job's task waits here before it gives its permit back: where records must not be
    /// lost, an output that stalls ends up dropping slots, not lines.
    pub(crate) async fn ready(&self) {
        if !self.may_skip_lines() {
            self.writer.ready().await;
        }
    }

    /// Writes the final accounts, after which nothing is taken in. Returns the totals.
    fn write_summary(&self) -> CapabilityStatistics {
        let mut state = self.state.lock();
        state.is_closed = true;
        let statistics = state.accounts.statistics(self.now(), self.clock.elapsed());
        let mut lines = Vec::new();
        self.output.summary(&statistics, &mut lines);
        self.writer.write(&lines);
        state.accounts.total()
    }

    /// Writes the final accounts and waits until all is written. Returns the totals.
    ///
    /// # Errors
    /// When standard output did not take all lines.
    pub(crate) async fn close(&self) -> std::io::Result<CapabilityStatistics> {
        let total = self.write_summary();
        if let Some(recorder) = &self.recorder {
            match recorder.close().await? {
                0 => {}
                dropped => tracing::warn!(
                    records = dropped,
                    "--record: records are missing in the file; the accounts have them all"
                ),
            }
        }
        self.writer.close().await?;
        Ok(total)
    }

    /// Whether any agent was ever followed.
    #[must_use]
    pub(crate) fn has_agents(&self) -> bool {
        !self.state.lock().roster.agents.is_empty()
    }

    /// Whether any agent's uptime was ever known.
    #[must_use]
    pub(crate) fn has_known_uptime(&self) -> bool {
        self.state.lock().has_known_uptime
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub(crate) fn metrics_text(&self, in_flight: usize) -> prometheus::Result<String> {
        let state = self.state.lock();
        for (index, known) in state.uptimes.iter().enumerate() {
            let age = known.map_or(f64::NAN, |(_, at)| at.elapsed().as_secs_f64());
            state.metrics.set_uptime_age(AgentIndex(index), age);
        }
        state.metrics.set_in_flight(in_flight);
        state.metrics.text()
    }

    /// Updates the status line of a terminal that is `columns` wide.
    pub(crate) fn show_status(
        &self,
        text: TextOutput,
        columns: usize,
        in_flight: usize,
        left: Option<Duration>,
    ) {
        let progress = {
            let state = self.state.lock();
            let agents = state.roster.agents.iter().zip(&state.uptimes);
            let agents = agents
                .enumerate()
                .map(|(index, (id, known))| AgentProgress {
                    id: Arc::clone(id),
                    uptime: known.map(|(uptime, at)| (uptime, at.elapsed())),
                    listing: state.accounts.listing(AgentIndex(index)),
                });
            Progress {
                rate: state.accounts.current_rate(),
                agents: agents.collect(),
                in_flight,
                sent: state.accounts.jobs_sent(),
                p50_p99_ms: state.accounts.total().latency_ms.map(|l| (l.p50, l.p99)),
                left,
            }
        };
        self.writer.set_status(text.status(&progress, columns));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::testing::recorder;

    #[tokio::test]
    async fn the_summary_comes_last() {
        let (events, sink) = recorder(60);
        let left = || Event::AgentLeft {
            ts: events.now(),
            agent: AgentIndex(0),
        };
        events.record(&left());
        events.write_summary();
        // Of a task that has not ended yet.
        events.record(&left());
        events.writer.close().await.unwrap();
        assert_eq!(sink.events("agent_left").len(), 1);
        assert_eq!(sink.events("summary").len(), 1);
    }
}
