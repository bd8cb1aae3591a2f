//! Simulated GPUs that follow a script.

use std::str::FromStr;
use std::time::{Duration, Instant};

use super::gpu::{GpuSnapshot, memory};
use crate::units::Span;
use crate::wire::agent::{GpuDevice, GpuHealth};

/// The state of a simulated GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimState {
    /// The GPU is healthy.
    Up,
    /// The driver reports the GPU as lost.
    Lost,
    /// The driver hangs.
    Hang,
    /// No GPU is found.
    Absent,
}

/// The steps of a simulated GPU, repeated: `up 50s, lost 10s, hang 5s, none 3s`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuScript(Vec<(SimState, Duration)>);

impl GpuScript {
    /// Repeats these steps.
    #[must_use]
    pub fn new(steps: Vec<(SimState, Duration)>) -> Self {
        Self(steps)
    }

    /// The GPU's current state, and how long it lasts.
    #[must_use]
    pub fn at(&self, elapsed: Duration) -> (SimState, Duration) {
        let whole: Duration = self.0.iter().map(|(_, length)| *length).sum();
        let mut rest = elapsed.as_nanos() % whole.as_nanos().max(1);
        for (state, length) in &self.0 {
            match rest.checked_sub(length.as_nanos()) {
                None => {
                    let passed = Duration::from_nanos(u64::try_from(rest).unwrap_or(u64::MAX));
                    return (*state, length.saturating_sub(passed));
                }
                Some(later) => rest = later,
            }
        }
        (SimState::Up, whole)
    }
}

impl FromStr for GpuScript {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let step = |step: &str| {
            let (state, length) = step.trim().split_once(char::is_whitespace)?;
            let state = match state {
                "up" => SimState::Up,
                "lost" => SimState::Lost,
                "hang" => SimState::Hang,
                "none" => SimState::Absent,
                _ => return None,
            };
            Some((state, length.parse::<Span>().ok()?.get()))
        };
        let steps = text.split(',').map(|text| {
            step(text).ok_or_else(|| {
                format!("'{}': expected up, lost, hang or none and a length of time, such as up 50s, lost 10s, hang 5s", text.trim())
            })
        });
        steps.collect::<Result<_, _>>().map(Self)
    }
}

/// Follows a script.
#[derive(Debug)]
pub(crate) struct SimulatedGpu {
    script: GpuScript,
    started: Instant,
}

impl SimulatedGpu {
    /// Follows `script`, which began at `started`.
    #[must_use]
    pub(crate) fn new(script: GpuScript, started: Instant) -> Self {
        Self { script, started }
    }

    /// Probes once; a hang that lasts longer than `deadline` finds nothing.
    pub(crate) async fn probe(&self, deadline: Duration) -> GpuSnapshot {
        let deadline = tokio::time::Instant::now() + deadline;
        loop {
            let health = match self.script.at(self.started.elapsed()) {
                (SimState::Hang, rest) => {
                    let over = tokio::time::Instant::now() + rest;
                    tokio::time::sleep_until(over.min(deadline)).await;
                    if over >= deadline {
                        return GpuSnapshot::nothing("timeout: the driver does not answer");
                    }
                    continue;
                }
                (SimState::Absent, _) => return GpuSnapshot::nothing("no GPU (simulated)"),
                (SimState::Up, _) => GpuHealth::Ok,
                (SimState::Lost, _) => GpuHealth::Lost,
            };
            let total_bytes = 24 << 30;
            return GpuSnapshot {
                devices: vec![GpuDevice {
                    uuid: Some("GPU-00000000-0000-0000-0000-000000000000".to_owned()),
                    name: Some("Simulated GPU".to_owned()),
                    memory: (health == GpuHealth::Ok).then(|| memory(total_bytes, total_bytes / 4)),
                    health,
                    ..GpuDevice::default()
                }],
                driver_version: None,
                is_driver_away: false,
                faults: Vec::new(),
                problem: None,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    #[test]
    fn a_script_is_followed_and_repeated() {
        let script: GpuScript = "up 50s, lost 10s,hang 5s, none 500ms".parse().unwrap();
        for (milliseconds, state, rest) in [
            (0, SimState::Up, 50_000),
            (49_999, SimState::Up, 1),
            (50_000, SimState::Lost, 10_000),
            (60_000, SimState::Hang, 5000),
            (65_000, SimState::Absent, 500),
            (65_500, SimState::Up, 50_000),
        ] {
            let at = script.at(Duration::from_millis(milliseconds));
            assert_eq!(at, (state, Duration::from_millis(rest)), "{milliseconds}");
        }
        for bad in ["", "up", "up 0s", "down 5s", "up 5s,", "up5s"] {
            assert!(bad.parse::<GpuScript>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nearly_right_scripts_are_read_or_refused(
            text in mutated(&["up 50s, lost 10s, hang 5s, none 3s", "up 1h30m,lost 500ms"]),
            later in any::<u32>(),
        ) {
            if let Ok(script) = String::from_utf8_lossy(&text).parse::<GpuScript>() {
                let (_, left) = script.at(Duration::from_millis(later.into()));
                prop_assert!(!left.is_zero());
            }
        }

        #[test]
        fn any_text_is_a_script_or_refused(text in ".{0,40}") {
            if let Ok(script) = text.parse::<GpuScript>() {
                let _ = script.at(Duration::from_secs(12_345));
            }
        }
    }
}
