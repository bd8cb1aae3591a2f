//! The ping system's Prometheus metrics.

use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::ping_system::store::Totals;
use crate::wire::ping_system::served::{Ping, Status};

/// Counters and gauges of one ping system.
#[derive(Debug)]
pub(crate) struct PingMetrics {
    registry: Registry,
    pings: IntCounterVec,
    duration: Histogram,
    lateness: Histogram,
    not_stored: IntCounter,
    in_flight: IntGauge,
    agents: IntGaugeVec,
}

impl PingMetrics {
    /// All at 0.
    ///
    /// # Errors
    /// Only where two had the same name.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
        };
        let metrics = Self {
            pings: IntCounterVec::new(
                Opts::new(
                    "uptime_ping_system_pings_total",
                    "Pings that are stored, by result: answered, failed or unobserved.",
                ),
                &["result"],
            )?,
            duration: histogram(
                "uptime_ping_system_ping_duration_seconds",
                "How long agents took to answer.",
                &[
                    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ],
            )?,
            lateness: histogram(
                "uptime_ping_system_ping_lateness_seconds",
                "How long after it was due an agent was asked.",
                &[
                    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0,
                ],
            )?,
            not_stored: IntCounter::new(
                "uptime_ping_system_pings_not_stored_total",
                "Pings that could not be stored; their agents are asked again.",
            )?,
            in_flight: IntGauge::new("uptime_ping_system_in_flight", "Agents being asked now.")?,
            agents: IntGaugeVec::new(
                Opts::new("uptime_ping_system_agents", "Registered agents, by status."),
                &["status"],
            )?,
            registry,
        };
        metrics.registry.register(Box::new(metrics.pings.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.duration.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.lateness.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.not_stored.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.in_flight.clone()))?;
        metrics
            .registry
            .register(Box::new(metrics.agents.clone()))?;
        Ok(metrics)
    }

    /// A ping began, this much later than scheduled.
    pub(crate) fn begin(&self, late: Duration) {
        self.in_flight.inc();
        self.lateness.observe(late.as_secs_f64());
    }

    /// A ping ended.
    pub(crate) fn end(&self) {
        self.in_flight.dec();
    }

    /// A ping was stored.
    pub(crate) fn stored(&self, ping: &Ping) {
        let result = match ping {
            Ping {
                observed: false, ..
            } => "unobserved",
            Ping { success: true, .. } => "answered",
            Ping { .. } => "failed",
        };
        self.pings.with_label_values(&[result]).inc();
        if let Some(milliseconds) = ping.response_time_ms {
            self.duration.observe(milliseconds / 1e3);
        }
    }

    /// A ping could not be stored.
    pub(crate) fn not_stored(&self) {
        self.not_stored.inc();
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn text(&self, totals: Totals) -> prometheus::Result<String> {
        for status in Status::ALL {
            let count = i64::try_from(totals.of(status)).unwrap_or(i64::MAX);
            self.agents.with_label_values(&[status.name()]).set(count);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
