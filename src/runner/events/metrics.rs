//! The runner's Prometheus metrics, fed with the same events as the accounts.

use std::sync::Arc;

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder,
};

use super::event::{Event, RateReason};
use super::runner_metrics::RunnerMetrics;
use crate::runner::rate::pause::PauseChange;
use crate::runner::roster::{AgentIndex, Roster};
use crate::wire::outcome::Outcome;

/// In seconds: from a busy GPU's shortest answers to the longest usual timeout.
const DURATION_BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 120.0,
];

/// Counters and gauges of one run.
#[derive(Debug)]
pub(crate) struct RunMetrics {
    registry: Registry,
    families: Families,
    capabilities: Vec<Arc<str>>,
    agents: Vec<AgentMetrics>,
    names: Vec<Arc<str>>,
    runners: RunnerMetrics,
    in_flight: IntGauge,
}

/// The families with one series per agent.
#[derive(Debug)]
struct Families {
    jobs: IntCounterVec,
    duration: HistogramVec,
    delayed: IntCounterVec,
    dropped: IntCounterVec,
    rate: GaugeVec,
    uptime: GaugeVec,
    uptime_age: GaugeVec,
    contradicted: GaugeVec,
    paused: GaugeVec,
    throttled: GaugeVec,
}

/// One agent's share, looked up once, for a look-up by label in every job would cost more than the
/// count.
#[derive(Debug)]
struct AgentMetrics {
    rate: Gauge,
    uptime: Gauge,
    uptime_age: Gauge,
    contradicted: Gauge,
    paused: Gauge,
    throttled: Gauge,
    capabilities: Vec<CapabilityMetrics>,
}

#[derive(Debug)]
struct CapabilityMetrics {
    outcomes: Vec<IntCounter>,
    duration: Histogram,
    delayed: IntCounter,
    dropped: IntCounter,
}

impl Families {
    /// Creates an agent's series at 0; those of the uptime are NaN until it is known.
    fn of(&self, agent: &str, capabilities: &[Arc<str>]) -> AgentMetrics {
        let capabilities = capabilities.iter().map(|capability| {
            let labels = [agent, capability];
            CapabilityMetrics {
                outcomes: Outcome::ALL
                    .iter()
                    .map(|o| self.jobs.with_label_values(&[agent, capability, o.name()]))
                    .collect(),
                duration: self.duration.with_label_values(&labels),
                delayed: self.delayed.with_label_values(&labels),
                dropped: self.dropped.with_label_values(&labels),
            }
        });
        let metrics = AgentMetrics {
            rate: self.rate.with_label_values(&[agent]),
            uptime: self.uptime.with_label_values(&[agent]),
            uptime_age: self.uptime_age.with_label_values(&[agent]),
            contradicted: self.contradicted.with_label_values(&[agent]),
            paused: self.paused.with_label_values(&[agent]),
            throttled: self.throttled.with_label_values(&[agent]),
            capabilities: capabilities.collect(),
        };
        metrics.uptime.set(f64::NAN);
        metrics.uptime_age.set(f64::NAN);
        metrics
    }
}

impl RunMetrics {
    /// All series of a run.
    ///
    /// # Errors
    /// When a name is not valid or registered twice.
    pub(crate) fn new(roster: &Roster) -> prometheus::Result<Self> {
        let by_capability = ["agent", "capability"];
        let counter = |name: &str, help: &str, labels: &[&str]| {
            IntCounterVec::new(Opts::new(name, help), labels)
        };
        let gauge = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &["agent"]);
        let jobs = counter(
            "uptime_runner_jobs_total",
            "Jobs answered or given up, by outcome.",
            &["agent", "capability", "outcome"],
        )?;
        let duration = HistogramVec::new(
            HistogramOpts::new(
                "uptime_runner_job_duration_seconds",
                "From a job's slot to its answer's last byte.",
            )
            .buckets(DURATION_BUCKETS.to_vec()),
            &by_capability,
        )?;
        let delayed = counter(
            "uptime_runner_delayed_total",
            "Slots of the base rate that the policy withheld.",
            &by_capability,
        )?;
        let dropped = counter(
            "uptime_runner_dropped_total",
            "Slots without a place for a job, or overdue.",
            &by_capability,
        )?;
        let rate = gauge("uptime_runner_job_rate_per_minute", "Jobs per minute now.")?;
        let uptime = gauge(
            "uptime_runner_agent_uptime_percent",
            "The last known uptime.",
        )?;
        let age = gauge(
            "uptime_runner_uptime_age_seconds",
            "Age of the last known uptime.",
        )?;
        let contradicted = gauge(
            "uptime_runner_claim_contradicted",
            "1 while an agent's jobs contradict the uptime that it reports.",
        )?;
        let paused = gauge(
            "uptime_runner_paused",
            "1 while an agent's jobs are paused, since none did any good.",
        )?;
        let throttled = gauge(
            "uptime_runner_throttled",
            "1 while an agent's jobs are withheld, since a server asks to wait (Retry-After).",
        )?;
        let in_flight = IntGauge::new(
            "uptime_runner_in_flight",
            "Jobs waiting for an answer, over all agents.",
        )?;

        let registry = Registry::new();
        registry.register(Box::new(jobs.clone()))?;
        registry.register(Box::new(duration.clone()))?;
        registry.register(Box::new(delayed.clone()))?;
        registry.register(Box::new(dropped.clone()))?;
        registry.register(Box::new(rate.clone()))?;
        registry.register(Box::new(uptime.clone()))?;
        registry.register(Box::new(age.clone()))?;
        registry.register(Box::new(contradicted.clone()))?;
        registry.register(Box::new(paused.clone()))?;
        registry.register(Box::new(throttled.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;

        let families = Families {
            jobs,
            duration,
            delayed,
            dropped,
            rate,
            uptime,
            uptime_age: age,
            contradicted,
            paused,
            throttled,
        };
        let agents = roster.agents.iter();
        Ok(Self {
            agents: agents
                .map(|agent| families.of(agent, &roster.capabilities))
                .collect(),
            names: roster.agents.clone(),
            runners: RunnerMetrics::new(&registry)?,
            families,
            capabilities: roster.capabilities.clone(),
            registry,
            in_flight,
        })
    }

    /// Applies an event.
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Started { .. }
            | Event::Sent(_)
            | Event::BaseChanged(_)
            | Event::Alias(_)
            | Event::Stopping { .. } => {}
            Event::AgentJoined(joined) => {
                if joined.agent.0 == self.agents.len() {
                    let metrics = self.families.of(&joined.id, &self.capabilities);
                    self.agents.push(metrics);
                    self.names.push(Arc::clone(&joined.id));
                }
            }
            Event::AgentLeft { agent, .. } => {
                let metrics = &self.agents[agent.0];
                metrics.rate.set(0.0);
                metrics.uptime.set(f64::NAN);
                metrics.contradicted.set(0.0);
                metrics.paused.set(0.0);
                metrics.throttled.set(0.0);
                self.runners.forget(&self.names[agent.0]);
            }
            Event::Discovery(discovered) => {
                let agent = &self.names[discovered.agent.0];
                self.runners.set(agent, &discovered.listing);
            }
            Event::Pause(pause) => {
                let paused = f64::from(u8::from(pause.change != PauseChange::Resumed));
                self.agents[pause.agent.0].paused.set(paused);
            }
            Event::Claim(claim) => {
                let contradicted = f64::from(u8::from(claim.contradiction.is_some()));
                self.agents[claim.agent.0].contradicted.set(contradicted);
            }
            Event::Uptime(polled) => {
                let percent = polled.uptime.map_or(f64::NAN, crate::units::Percent::get);
                self.agents[polled.agent.0].uptime.set(percent);
            }
            Event::RateChanged(changed) => {
                let metrics = &self.agents[changed.agent.0];
                metrics.rate.set(changed.to.get().into());
                let throttled = changed.reason == RateReason::Throttled;
                metrics.throttled.set(f64::from(u8::from(throttled)));
            }
            Event::Job(job) => {
                let metrics = &self.agents[job.agent.0].capabilities[job.capability.0];
                metrics.outcomes[job.answer.outcome as usize].inc();
                metrics.duration.observe(job.latency.as_secs_f64());
            }
            Event::Delayed(agent, capability) => {
                self.agents[agent.0].capabilities[capability.0]
                    .delayed
                    .inc();
            }
            Event::Dropped(agent, capability, _) => {
                self.agents[agent.0].capabilities[capability.0]
                    .dropped
                    .inc();
            }
        }
    }

    /// Sets the age of an agent's last known uptime; NaN if none is known.
    pub(crate) fn set_uptime_age(&self, agent: AgentIndex, seconds: f64) {
        self.agents[agent.0].uptime_age.set(seconds);
    }

    /// Sets how many jobs wait for an answer.
    pub(crate) fn set_in_flight(&self, jobs: usize) {
        self.in_flight.set(i64::try_from(jobs).unwrap_or(i64::MAX));
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub(crate) fn text(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
