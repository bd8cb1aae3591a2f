//! The jobs of each capability, and the choice of the next one.

use std::time::Duration;

use fastrand::Rng;
use reqwest::header::HeaderMap;
use serde_json::{Map, Value, json};

use super::template::{PlaceholderValues, Template};
use crate::runner::roster::CapabilityIndex;
use crate::wire::expectation::Expectation;

/// The default capability.
pub(crate) const DEFAULT: &str = "gpu-check";

/// What a gateway may take for each orchestrator beyond `timeout_seconds` (go-livepeer, byoc/job_gateway.go).
const ORCHESTRATOR_OVERHEAD: Duration = Duration::from_secs(5);
/// What an orchestrator may take for a live runner's job beyond `timeout_seconds`.
const RUNNER_OVERHEAD: Duration = Duration::from_secs(5);
/// What it may take beside them: a stream goes on for 10 s, the rest is a second's margin on each side.
const GATEWAY_OVERHEAD: Duration = Duration::from_secs(12);

/// A kind of job.
#[derive(Debug, Clone, PartialEq)]
pub struct Capability {
    /// Its name here.
    pub name: String,
    /// The path after `/process/request/`.
    pub route: String,
    /// What an orchestrator must offer.
    pub capability: String,
    /// What is run there.
    pub run: String,
    /// The longest that a job may run, greater than 0.
    pub timeout_seconds: u32,
    /// Its weight in the random choice, greater than 0.
    pub weight: f64,
    /// Additional headers of its requests.
    pub headers: HeaderMap,
    /// The body, with placeholders.
    pub payload: Map<String, Value>,
    /// What its answers must hold; those of streams are exempt.
    pub expect: Expectation,
}

impl Capability {
    /// One whose route, capability and run are its name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            route: name.to_owned(),
            capability: name.to_owned(),
            run: name.to_owned(),
            timeout_seconds: 60,
            weight: 1.0,
            headers: HeaderMap::new(),
            payload: Map::new(),
            expect: Expectation::default(),
        }
    }

    /// The built-in capabilities (`.github/docs/protocol.md` section 3.1).
    #[must_use]
    pub fn built_in() -> Vec<Self> {
        let with_payload = |name, payload| match payload {
            Value::Object(payload) => Self {
                payload,
                ..Self::named(name)
            },
            _ => Self::named(name),
        };
        let gpu_check = json!({
            "action": "gpu-check", "agent_id": "{agent_id}", "include_utilization": true,
            "timestamp": "{timestamp}",
        });
        let text_to_image = json!({
            "prompt": "{prompt}", "agent_id": "{agent_id}", "seed": "{seed}",
            "timestamp": "{timestamp}",
        });
        let prompt_enhance = json!({
            "prompt": "{prompt}", "agent_id": "{agent_id}", "timestamp": "{timestamp}",
        });
        let agent_net = "agent-net".to_owned();
        vec![
            Self {
                route: agent_net.clone(),
                capability: agent_net.clone(),
                run: agent_net,
                ..with_payload(DEFAULT, gpu_check)
            },
            with_payload("text-to-image", text_to_image),
            with_payload("prompt-enhance", prompt_enhance),
        ]
    }

    /// The timeout of a job if none is set: how long a gateway may take that tries this number of orchestrators, for a stream too.
    #[must_use]
    pub fn default_timeout(&self, orchestrators: u32) -> Duration {
        let each = Duration::from_secs(self.timeout_seconds.into()) + ORCHESTRATOR_OVERHEAD;
        each * orchestrators + GATEWAY_OVERHEAD
    }

    /// The same, of a live runner.
    #[must_use]
    pub fn default_runner_timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds.into()) + RUNNER_OVERHEAD
    }

    /// The parts that all jobs have in common.
    #[must_use]
    pub fn prepare(&self) -> JobTemplate {
        JobTemplate {
            timeout_seconds: self.timeout_seconds,
            payload: Template::new(&Value::Object(self.payload.clone())),
        }
    }
}

/// A capability's jobs for one agent.
#[derive(Debug, Clone)]
pub struct JobTemplate {
    timeout_seconds: u32,
    payload: Template,
}

impl JobTemplate {
    /// `timeout_seconds` of a job that may run for `seconds` at most, and never longer than its capability says.
    #[must_use]
    pub fn timeout_seconds(&self, seconds: u64) -> u32 {
        let own = self.timeout_seconds;
        u32::try_from(seconds).map_or(own, |seconds| seconds.min(own))
    }

    /// The body with its placeholders filled.
    #[must_use]
    pub fn payload(&self, values: &PlaceholderValues) -> Vec<u8> {
        self.payload.fill(values)
    }
}

/// The repeatable random choice of an agent's capabilities and payloads.
///
/// Slots that send nothing draw from a stream of their own: how many of them fall between two jobs
/// depends on the clock, and must not change which job comes next.
#[derive(Debug)]
pub(crate) struct JobPicker {
    cumulated_weights: Vec<f64>,
    sent: Rng,
    unsent: Rng,
}

impl JobPicker {
    /// Chooses among capabilities of these weights.
    #[must_use]
    pub(crate) fn new(weights: impl IntoIterator<Item = f64>, seed: u64) -> Self {
        let mut sent = Rng::with_seed(seed);
        let cumulated_weights = weights
            .into_iter()
            .scan(0.0, |sum, weight| {
                *sum += weight;
                Some(*sum)
            })
            .collect();
        Self {
            cumulated_weights,
            unsent: sent.fork(),
            sent,
        }
    }

    /// The next job's capability, and the seed of its payload, which fits the signed 32 bits of image models.
    pub(crate) fn next_sent(&mut self) -> (CapabilityIndex, u32) {
        (
            draw(&self.cumulated_weights, &mut self.sent),
            self.sent.u32(..=i32::MAX.unsigned_abs()),
        )
    }

    /// The capability to which a slot is assigned that sends nothing.
    pub(crate) fn next_unsent(&mut self) -> CapabilityIndex {
        draw(&self.cumulated_weights, &mut self.unsent)
    }
}

fn draw(cumulated_weights: &[f64], rng: &mut Rng) -> CapabilityIndex {
    let [.., total] = cumulated_weights else {
        return CapabilityIndex(0);
    };
    let point = rng.f64() * total;
    let index = cumulated_weights.partition_point(|&end| end <= point);
    CapabilityIndex(index.min(cumulated_weights.len() - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn built_in_capabilities_are_those_of_the_contract() {
        let [gpu_check, text_to_image, prompt_enhance] = &Capability::built_in()[..] else {
            panic!("three capabilities")
        };
        assert_eq!(gpu_check.name, "gpu-check");
        assert_eq!(
            (&*gpu_check.route, &*gpu_check.capability, &*gpu_check.run),
            ("agent-net", "agent-net", "agent-net")
        );
        let keys = |c: &Capability| c.payload.keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(
            keys(gpu_check),
            "action agent_id include_utilization timestamp"
        );
        assert_eq!(keys(text_to_image), "agent_id prompt seed timestamp");
        assert_eq!(keys(prompt_enhance), "agent_id prompt timestamp");
        assert_eq!(gpu_check.default_timeout(1), Duration::from_secs(77));
        assert_eq!(gpu_check.default_timeout(2), Duration::from_secs(142));
    }

    #[test]
    fn the_choice_follows_the_weights() {
        let mut picker = JobPicker::new([1.0, 2.0, 1.0], 7);
        let mut counts = [0; 3];
        for _ in 0..40_000 {
            counts[picker.next_sent().0.0] += 1;
        }
        for (count, expected) in counts.into_iter().zip([10_000_i32, 20_000, 10_000]) {
            assert!((count - expected).abs() < 500, "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn the_same_seed_sends_the_same_jobs_whatever_is_withheld_between(
            seed in any::<u64>(), withheld in prop::collection::vec(0..5_usize, 20),
        ) {
            let mut plain = JobPicker::new([1.0, 1.0, 3.0], seed);
            let mut busy = JobPicker::new([1.0, 1.0, 3.0], seed);
            for count in withheld {
                for _ in 0..count {
                    busy.next_unsent();
                }
                prop_assert_eq!(plain.next_sent(), busy.next_sent());
            }
        }
    }
}
