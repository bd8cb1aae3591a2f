//! The accounts: every slot of the base rate is sent, delayed or dropped, every job sent is
//! successful, failed or under way (`.github/docs/protocol.md` section 5.1). Their size does not depend on the
//! number of jobs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::event::{AgentJoined, Event, JobDone};
use crate::money::Wei;
use crate::runner::events::event::{Listing, PingStats};
use crate::runner::roster::{AgentIndex, Roster};
use crate::units::{JobsPerMinute, Percent, milliseconds};
use crate::wire::outcome::Outcome;

/// What a run has done so far.
#[derive(Debug)]
pub(crate) struct Accounts {
    sent: u64,
    agents: Vec<(Arc<str>, AgentAccount)>,
    capabilities: Vec<(Arc<str>, CapabilityAccount)>,
}

#[derive(Debug, Clone, Default)]
struct AgentAccount {
    uptime: Option<Percent>,
    ping_stats: PingStats,
    rate: JobsPerMinute,
    spent: Option<Wei>,
    /// Of a live runner.
    listing: Option<Listing>,
}

#[derive(Debug, Clone, Default)]
struct CapabilityAccount {
    sent: u64,
    delayed: u64,
    dropped: u64,
    outcomes: [u64; Outcome::ALL.len()],
    status_codes: BTreeMap<u16, u64>,
    latency: Latencies,
}

impl Accounts {
    /// Nothing has happened yet.
    #[must_use]
    pub(crate) fn new(roster: &Roster) -> Self {
        let (agents, capabilities) = (roster.agents.iter(), roster.capabilities.iter());
        Self {
            sent: 0,
            agents: agents
                .map(|name| (Arc::clone(name), AgentAccount::default()))
                .collect(),
            capabilities: capabilities
                .map(|name| (Arc::clone(name), CapabilityAccount::default()))
                .collect(),
        }
    }

    /// Takes in what happened.
    pub(crate) fn apply(&mut self, event: &Event) {
        match event {
            Event::Started { .. }
            | Event::BaseChanged(_)
            | Event::Claim(_)
            | Event::Alias(_)
            | Event::Pause(_)
            | Event::Stopping { .. } => {}
            Event::Discovery(discovered) => {
                self.agent(discovered.agent).listing = Some(discovered.listing.clone());
            }
            Event::AgentJoined(joined) => self.join(joined),
            Event::AgentLeft { agent, .. } => self.agent(*agent).rate = JobsPerMinute::ZERO,
            Event::Uptime(polled) => {
                let agent = self.agent(polled.agent);
                agent.uptime = polled.uptime;
                agent.ping_stats = polled.ping_stats;
            }
            Event::RateChanged(changed) => self.agent(changed.agent).rate = changed.to,
            Event::Sent(job) => {
                self.sent += 1;
                self.capabilities[job.capability.0].1.sent += 1;
            }
            Event::Job(job) => {
                if let Some(cost) = &job.cost {
                    *self.agent(job.agent).spent.get_or_insert_default() += cost;
                }
                self.capabilities[job.capability.0].1.job(job);
            }
            Event::Delayed(_, capability) => self.capabilities[capability.0].1.delayed += 1,
            Event::Dropped(_, capability, _) => self.capabilities[capability.0].1.dropped += 1,
        }
    }

    fn agent(&mut self, AgentIndex(index): AgentIndex) -> &mut AgentAccount {
        &mut self.agents[index].1
    }

    fn join(&mut self, joined: &AgentJoined) {
        if joined.agent.0 == self.agents.len() {
            let account = AgentAccount::default();
            self.agents.push((Arc::clone(&joined.id), account));
        }
    }

    /// What the orchestrator of an agent's live runner lists, if it has one.
    #[must_use]
    pub(crate) fn listing(&self, AgentIndex(index): AgentIndex) -> Option<&'static str> {
        self.agents[index].1.listing.as_ref().map(Listing::name)
    }

    /// Jobs that left.
    #[must_use]
    pub(crate) fn jobs_sent(&self) -> u64 {
        self.sent
    }

    /// Jobs that were answered or given up.
    #[must_use]
    pub(crate) fn jobs_done(&self) -> u64 {
        self.capabilities
            .iter()
            .map(|(_, account)| account.attempts())
            .sum()
    }

    /// The rate of all agents together.
    #[must_use]
    pub(crate) fn current_rate(&self) -> u64 {
        self.agents
            .iter()
            .map(|(_, agent)| u64::from(agent.rate.get()))
            .sum()
    }

    /// All capabilities together.
    #[must_use]
    pub(crate) fn total(&self) -> CapabilityStatistics {
        let mut total = CapabilityAccount::default();
        for (_, capability) in &self.capabilities {
            total.add(capability);
        }
        total.statistics()
    }

    /// The accounts as they are printed.
    #[must_use]
    pub(crate) fn statistics(&self, ts: DateTime<Utc>, runtime: Duration) -> Statistics {
        let (agents, capabilities) = (self.agents.iter(), self.capabilities.iter());
        Statistics {
            ts,
            runtime_s: milliseconds(runtime).round() / 1e3,
            jobs_sent: self.sent,
            current_rate: self.current_rate(),
            agents: agents
                .map(|(name, account)| (name.clone(), account.statistics()))
                .collect(),
            capabilities: capabilities
                .map(|(name, account)| (name.clone(), account.statistics()))
                .collect(),
        }
    }
}

impl AgentAccount {
    fn statistics(&self) -> AgentStatistics {
        AgentStatistics {
            uptime_percent: self.uptime,
            consecutive_poor: self.ping_stats.consecutive_poor,
            ping_interval_minutes: self.ping_stats.ping_interval_minutes,
            total_pings: self.ping_stats.total_pings,
            rate: self.rate,
            spent_wei: self.spent.clone(),
            discovery: self.listing.as_ref().map(DiscoveryStatistics::of),
        }
    }
}

impl CapabilityAccount {
    fn job(&mut self, job: &JobDone) {
        self.outcomes[job.answer.outcome as usize] += 1;
        if let Some(status) = job.answer.status {
            *self.status_codes.entry(status).or_default() += 1;
        }
        self.latency.record(job.latency);
    }

    fn attempts(&self) -> u64 {
        self.outcomes.iter().sum()
    }

    fn add(&mut self, other: &Self) {
        self.delayed += other.delayed;
        self.sent += other.sent;
        self.dropped += other.dropped;
        for (mine, others) in self.outcomes.iter_mut().zip(&other.outcomes) {
            *mine += others;
        }
        for (status, count) in &other.status_codes {
            *self.status_codes.entry(*status).or_default() += count;
        }
        self.latency.add(&other.latency);
    }

    fn statistics(&self) -> CapabilityStatistics {
        let attempts = self.attempts();
        let successful = self.outcomes[Outcome::Success as usize];
        let counted = Outcome::ALL
            .iter()
            .zip(self.outcomes)
            .filter(|&(_, count)| count > 0);
        CapabilityStatistics {
            attempts,
            successful,
            failed: attempts - successful,
            delayed: self.delayed,
            dropped: self.dropped,
            under_way: self.sent.saturating_sub(attempts),
            success_rate_percent: share_percent(successful, attempts),
            latency_ms: self.latency.statistics(),
            outcomes: counted
                .map(|(outcome, count)| (outcome.name(), count))
                .collect(),
            status_codes: self.status_codes.clone(),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "exact up to 2^53, more jobs than a run has"
)]
fn share_percent(part: u64, whole: u64) -> Option<Percent> {
    Percent::new(part as f64 / whole as f64 * 100.0).ok()
}

/// Latencies: exact extremes and mean, percentiles to a thousandth of their value.
#[derive(Debug, Clone)]
struct Latencies {
    micros: Histogram<u64>,
    sum: Duration,
    min: Duration,
    max: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        /// Beyond it, percentiles say an hour.
        const HOUR_MICROS: u64 = 3_600_000_000;
        Self {
            micros: Histogram::new_with_bounds(1, HOUR_MICROS, 3)
                .expect("1 is over 0, an hour over twice that, and 3 digits at most 5"),
            sum: Duration::ZERO,
            min: Duration::MAX,
            max: Duration::ZERO,
        }
    }
}

impl Latencies {
    fn record(&mut self, latency: Duration) {
        self.micros
            .saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
        self.sum += latency;
        self.min = self.min.min(latency);
        self.max = self.max.max(latency);
    }

    fn add(&mut self, other: &Self) {
        self.micros
            .add(&other.micros)
            .expect("all histograms have the same bounds");
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "exact up to 2^53, more jobs than a run has"
    )]
    fn statistics(&self) -> Option<LatencyStatistics> {
        let count = self.micros.len();
        let quantile = |q: f64| {
            let micros = Duration::from_micros(self.micros.value_at_quantile(q));
            milliseconds(micros.clamp(self.min, self.max))
        };
        (count > 0).then(|| LatencyStatistics {
            mean: (self.sum.as_secs_f64() / count as f64 * 1e6).round() / 1e3,
            min: milliseconds(self.min),
            max: milliseconds(self.max),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99),
            p999: quantile(0.999),
        })
    }
}

/// The accounts at one instant: the fields of the JSON events `statistics` and `summary`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Statistics {
    #[serde(serialize_with = "crate::units::serialize_timestamp")]
    pub ts: DateTime<Utc>,
    /// Seconds since the start.
    pub runtime_s: f64,
    /// Jobs that left, those under way included.
    pub jobs_sent: u64,
    /// Jobs per minute now, over all agents.
    pub current_rate: u64,
    #[serde(serialize_with = "as_map")]
    pub agents: Vec<(Arc<str>, AgentStatistics)>,
    #[serde(serialize_with = "as_map")]
    pub capabilities: Vec<(Arc<str>, CapabilityStatistics)>,
}

/// An agent as the ping system last described it, and its rate.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct AgentStatistics {
    /// The last known uptime.
    pub uptime_percent: Option<Percent>,
    /// Poor pings in a row.
    pub consecutive_poor: Option<u64>,
    /// Minutes between pings.
    pub ping_interval_minutes: Option<f64>,
    /// Pings so far.
    pub total_pings: Option<u64>,
    /// Jobs per minute now.
    pub rate: JobsPerMinute,
    /// What its jobs have cost, where they have a price.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spent_wei: Option<Wei>,
    /// What the orchestrator of its live runner lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery: Option<DiscoveryStatistics>,
}

/// What an orchestrator says of a live runner.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DiscoveryStatistics {
    pub listed: Option<bool>,
    pub capacity: Option<u64>,
    pub in_use: Option<u64>,
    #[serde(skip)]
    pub name: &'static str,
}

impl DiscoveryStatistics {
    fn of(listing: &Listing) -> Self {
        let runner = listing.runner();
        Self {
            listed: listing.is_listed(),
            capacity: runner.and_then(|runner| runner.capacity),
            in_use: runner.and_then(|runner| runner.in_use),
            name: listing.name(),
        }
    }
}

/// What became of the slots of a capability.
#[derive(Debug, Clone, Serialize)]
pub struct CapabilityStatistics {
    /// Jobs answered or given up.
    pub attempts: u64,
    /// Of these, the successes.
    pub successful: u64,
    /// Of these, the rest.
    pub failed: u64,
    /// Slots that the policy withheld.
    pub delayed: u64,
    /// Slots without a place for a job, or overdue.
    pub dropped: u64,
    /// Jobs that were sent and await their answers.
    pub under_way: u64,
    /// Successes among attempts.
    pub success_rate_percent: Option<Percent>,
    /// How long answers took, from the job's slot.
    pub latency_ms: Option<LatencyStatistics>,
    /// Attempts by outcome.
    #[serde(serialize_with = "as_map")]
    pub outcomes: Vec<(&'static str, u64)>,
    /// Attempts by HTTP status, where one came.
    pub status_codes: BTreeMap<u16, u64>,
}

/// Latencies in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct LatencyStatistics {
    pub mean: f64,
    pub min: f64,
    pub max: f64,
    /// Half took at most this.
    pub p50: f64,
    /// Nine of ten took at most this.
    pub p90: f64,
    /// 99 of 100 took at most this.
    pub p99: f64,
    /// 999 of 1000 took at most this.
    pub p999: f64,
}

fn as_map<K: Serialize, V: Serialize, S: serde::Serializer>(
    pairs: &[(K, V)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
}

#[cfg(test)]
mod tests {
    use super::super::event::JobAnswer;
    use super::*;
    use crate::runner::events::event::DropReason;
    use crate::runner::roster::{AgentIndex, CapabilityIndex};
    use crate::wire::charge::Work;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn roster() -> Roster {
        Roster {
            agents: vec!["agent-001".into()],
            capabilities: vec!["gpu-check".into(), "text-to-image".into()],
            base_rate: JobsPerMinute::new(60),
        }
    }

    fn job(capability: usize, outcome: Outcome, status: Option<u16>, latency_us: u64) -> Event {
        Event::Job(JobDone {
            ts: DateTime::UNIX_EPOCH,
            agent: AgentIndex(0),
            job_id: Uuid::nil(),
            capability: CapabilityIndex(capability),
            sent_to: None,
            latency: Duration::from_micros(latency_us),
            send_lag: Duration::ZERO,
            rate: JobsPerMinute::new(60),
            uptime: Percent::FULL,
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
                ..JobAnswer::failure(outcome, String::new())
            },
        })
    }

    fn statistics(events: &[Event]) -> (CapabilityStatistics, CapabilityStatistics) {
        let mut accounts = Accounts::new(&roster());
        for event in events {
            accounts.apply(event);
        }
        let statistics = accounts.statistics(DateTime::UNIX_EPOCH, Duration::from_millis(1500));
        (statistics.capabilities[0].1.clone(), accounts.total())
    }

    #[test]
    fn jobs_are_counted_by_outcome_and_status() {
        let (gpu_check, total) = statistics(&[
            job(0, Outcome::Success, Some(200), 40_000),
            job(0, Outcome::Success, Some(200), 60_000),
            job(0, Outcome::NoOrchestrator, Some(200), 5_000),
            job(0, Outcome::Connect, None, 1_000),
            job(1, Outcome::HttpError, Some(500), 2_000),
            Event::Delayed(AgentIndex(0), CapabilityIndex(0)),
            Event::Dropped(AgentIndex(0), CapabilityIndex(1), DropReason::Late),
        ]);
        assert_eq!(
            (gpu_check.attempts, gpu_check.successful, gpu_check.failed),
            (4, 2, 2)
        );
        assert_eq!((gpu_check.delayed, gpu_check.dropped), (1, 0));
        assert_eq!(gpu_check.success_rate_percent, Percent::new(50.0).ok());
        assert_eq!(gpu_check.status_codes, BTreeMap::from([(200, 3)]));
        assert_eq!(
            gpu_check.outcomes,
            [("success", 2), ("no_orchestrator", 1), ("connect", 1)]
        );
        let latency = gpu_check.latency_ms.unwrap();
        assert_eq!((latency.mean, latency.min, latency.max), (26.5, 1.0, 60.0));
        assert_eq!((total.attempts, total.dropped), (5, 1));
    }

    #[test]
    fn without_jobs_there_is_no_rate_of_success_and_no_latency() {
        let (nothing, _) = statistics(&[]);
        assert_eq!(nothing.success_rate_percent, None);
        assert!(nothing.latency_ms.is_none());
    }

    proptest! {
        #[test]
        fn percentiles_are_within_a_thousandth(mut micros in prop::collection::vec(1..100_000_000_u64, 1..200)) {
            let mut latencies = Latencies::default();
            for &micros in &micros {
                latencies.record(Duration::from_micros(micros));
            }
            micros.sort_unstable();
            let statistics = latencies.statistics().unwrap();
            for (quantile, got) in [(0.5, statistics.p50), (0.9, statistics.p90), (0.99, statistics.p99)] {
                let rank = ((micros.len() as f64) * quantile).ceil() as usize;
                let exact = micros[rank.max(1) - 1] as f64 / 1e3;
                prop_assert!((got - exact).abs() <= exact / 1000.0 + 0.001, "p{} {} {}", quantile, got, exact);
            }
        }
    }
}
