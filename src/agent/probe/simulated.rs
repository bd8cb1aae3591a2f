//! GPUs that follow a script.

use std::str::FromStr;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use super::gpu::{GpuProbe, Look, Sighting, memory};
use crate::units::Span;
use crate::wire::agent::{GpuDevice, GpuHealth};

/// What a simulated GPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// It is well.
    Up,
    /// It is lost.
    Lost,
    /// The driver does not answer.
    Hang,
    /// There is none.
    Absent,
}

/// A story of a simulated GPU, repeated: `up 50s, lost 10s, hang 5s, none 3s`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuScript(Vec<(Act, Duration)>);

impl GpuScript {
    /// This story, over and over.
    #[must_use]
    pub fn new(story: Vec<(Act, Duration)>) -> Self {
        Self(story)
    }

    /// What the GPU does now, and for how long yet.
    #[must_use]
    pub fn at(&self, elapsed: Duration) -> (Act, Duration) {
        let whole: Duration = self.0.iter().map(|(_, length)| *length).sum();
        let mut rest = elapsed.as_nanos() % whole.as_nanos().max(1);
        for (act, length) in &self.0 {
            match rest.checked_sub(length.as_nanos()) {
                None => {
                    let passed = Duration::from_nanos(u64::try_from(rest).unwrap_or(u64::MAX));
                    return (*act, length.saturating_sub(passed));
                }
                Some(later) => rest = later,
            }
        }
        (Act::Up, whole)
    }
}

impl FromStr for GpuScript {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let step = |step: &str| {
            let (act, length) = step.trim().split_once(char::is_whitespace)?;
            let act = match act {
                "up" => Act::Up,
                "lost" => Act::Lost,
                "hang" => Act::Hang,
                "none" => Act::Absent,
                _ => return None,
            };
            Some((act, length.parse::<Span>().ok()?.get()))
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
pub struct SimulatedProbe {
    script: GpuScript,
    started: Instant,
}

impl GpuProbe for SimulatedProbe {
    fn serve(self: Box<Self>, looks: &Receiver<Look>) {
        for look in looks {
            // Whoever asked may have given up.
            let _ = look.send(self.sighting());
        }
    }
}

impl SimulatedProbe {
    /// Follows `script`, which began at `started`.
    #[must_use]
    pub fn new(script: GpuScript, started: Instant) -> Self {
        Self { script, started }
    }

    fn sighting(&self) -> Sighting {
        loop {
            let health = match self.script.at(self.started.elapsed()) {
                (Act::Hang, rest) => {
                    thread::sleep(rest);
                    continue;
                }
                (Act::Absent, _) => return Sighting::nothing("no GPU (simulated)"),
                (Act::Up, _) => GpuHealth::Ok,
                (Act::Lost, _) => GpuHealth::Lost,
            };
            let total_bytes = 24 << 30;
            return Sighting {
                devices: vec![GpuDevice {
                    uuid: Some("GPU-00000000-0000-0000-0000-000000000000".to_owned()),
                    name: Some("Simulated GPU".to_owned()),
                    memory: (health == GpuHealth::Ok).then(|| memory(total_bytes, total_bytes / 4)),
                    health,
                    ..GpuDevice::default()
                }],
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
        for (milliseconds, act, rest) in [
            (0, Act::Up, 50_000),
            (49_999, Act::Up, 1),
            (50_000, Act::Lost, 10_000),
            (60_000, Act::Hang, 5000),
            (65_000, Act::Absent, 500),
            (65_500, Act::Up, 50_000),
        ] {
            let at = script.at(Duration::from_millis(milliseconds));
            assert_eq!(at, (act, Duration::from_millis(rest)), "{milliseconds}");
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
