//! The metrics of live runners, which only agents have that have one.

use prometheus::{GaugeVec, Opts, Registry};

use super::event::Listing;

/// What orchestrators list, one series for each agent with a live runner.
#[derive(Debug)]
pub(super) struct RunnerMetrics {
    listed: GaugeVec,
    places: GaugeVec,
    places_in_use: GaugeVec,
}

impl RunnerMetrics {
    /// Without series yet.
    ///
    /// # Errors
    /// When a name is not valid or registered twice.
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| -> prometheus::Result<GaugeVec> {
            let gauge = GaugeVec::new(Opts::new(name, help), &["agent"])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        Ok(Self {
            listed: gauge(
                "uptime_runner_runner_listed",
                "1 while the orchestrator lists an agent's live runner, NaN while it does not answer.",
            )?,
            places: gauge(
                "uptime_runner_runner_places",
                "Jobs that an agent's live runner does at once, as its orchestrator lists it.",
            )?,
            places_in_use: gauge(
                "uptime_runner_runner_places_in_use",
                "Of these places, those in use when the orchestrator was last asked.",
            )?,
        })
    }

    pub(super) fn set(&self, agent: &str, listing: &Listing) {
        let set = |family: &GaugeVec, value: Option<u64>| {
            #[expect(clippy::cast_precision_loss, reason = "far fewer places than 2^53")]
            let value = value.map_or(f64::NAN, |value| value as f64);
            family.with_label_values(&[agent]).set(value);
        };
        let runner = listing.runner();
        set(&self.listed, listing.is_listed().map(u64::from));
        set(&self.places, runner.and_then(|runner| runner.capacity));
        set(&self.places_in_use, runner.and_then(|runner| runner.in_use));
    }

    /// Ends the series of an agent, if it has any.
    pub(super) fn forget(&self, agent: &str) {
        for family in [&self.listed, &self.places, &self.places_in_use] {
            let _ = family.remove_label_values(&[agent]);
        }
    }
}
