//! Probes GPUs with a deadline, whatever the driver does.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::gpu::{GpuSnapshot, cleaned};
use super::process::{ProbeEnded, ProbeProcess, Spawner};
use super::protocol::{ChildLine, MAX_DEVICES};
use super::simulated::SimulatedGpu;
use super::source::GpuSource;

/// A child is replaced after so long: a library that was upgraded is loaded, and leaks are bounded.
const MAX_AGE: Duration = Duration::from_mins(10);
/// While a device is not healthy, the driver is initialised again, but no more often.
const MIN_AGE_OF_UNHEALTHY: Duration = Duration::from_mins(1);
/// How long the driver may take to start.
const START_TIMEOUT: Duration = Duration::from_mins(1);
/// With so many children that cannot be ended, new ones are rare.
const MAX_UNREAPED: usize = 4;
const RARE_START: Duration = Duration::from_mins(5);

/// Probes NVML or a simulation.
#[derive(Debug)]
pub(crate) enum Prober {
    Nvml(NvmlProber),
    Simulated(SimulatedGpu),
}

impl Prober {
    /// # Errors
    /// When the thread that starts children cannot be started.
    pub(crate) fn new(source: GpuSource) -> io::Result<Self> {
        Ok(match source {
            GpuSource::Nvml(library) => Self::Nvml(NvmlProber::new(library)?),
            GpuSource::Simulated(script, started) => {
                Self::Simulated(SimulatedGpu::new(script, started))
            }
        })
    }

    /// Probes once. A probe that takes longer than `deadline` finds nothing.
    pub(crate) async fn probe(&mut self, deadline: Duration) -> GpuSnapshot {
        match self {
            Self::Nvml(prober) => prober.probe(deadline).await,
            Self::Simulated(gpu) => gpu.probe(deadline).await,
        }
    }
}

/// Keeps one child that has the driver's library loaded.
#[derive(Debug)]
pub(crate) struct NvmlProber {
    spawner: Spawner,
    current: Option<Current>,
    /// Children that were given up and have not ended yet.
    unreaped: Arc<AtomicUsize>,
    last_start: Option<Instant>,
}

#[derive(Debug)]
struct Current {
    process: ProbeProcess,
    is_starting: bool,
    /// Whether it has not answered the last request yet.
    is_asked: bool,
    is_healthy: bool,
}

impl NvmlProber {
    fn new(library: Option<PathBuf>) -> io::Result<Self> {
        Ok(Self {
            spawner: Spawner::new(library)?,
            current: None,
            unreaped: Arc::default(),
            last_start: None,
        })
    }

    async fn probe(&mut self, deadline: Duration) -> GpuSnapshot {
        let deadline = Instant::now() + deadline;
        let mut current = match self.ready_child().await {
            Ok(current) => current,
            Err(problem) => return GpuSnapshot::nothing(problem),
        };
        match timeout_at(deadline, current.snapshot()).await {
            Ok(Ok(snapshot)) => {
                if snapshot.problem.is_none() {
                    self.current = Some(current);
                } else {
                    // Drivers get loaded and unloaded while we run: the next probe starts again.
                    current.process.give_up(&self.unreaped);
                }
                snapshot
            }
            Ok(Err(ended)) => {
                tracing::warn!("{ended}: another probe is started");
                current.process.give_up(&self.unreaped);
                GpuSnapshot::nothing(ended.to_string())
            }
            Err(_) if current.is_starting && current.process.born.elapsed() < START_TIMEOUT => {
                self.current = Some(current);
                GpuSnapshot::nothing("the driver is starting")
            }
            Err(_) => {
                current.process.give_up(&self.unreaped);
                GpuSnapshot::nothing("timeout: the driver does not answer")
            }
        }
    }

    /// The child that is asked next, taken out of its place.
    async fn ready_child(&mut self) -> Result<Current, String> {
        if let Some(current) = self.current.take() {
            if current.is_asked || !current.is_worn() {
                return Ok(current);
            }
            current.process.give_up(&self.unreaped);
        }
        let hanging = self.unreaped.load(Ordering::Relaxed);
        let recently = self.last_start.is_some_and(|at| at.elapsed() < RARE_START);
        if hanging >= MAX_UNREAPED && recently {
            return Err(format!(
                "timeout: {hanging} probes hang in the driver, another is started every 5 min"
            ));
        }
        self.last_start = Some(Instant::now());
        let process = ProbeProcess::start(&self.spawner)
            .await
            .map_err(|error| format!("no probe can be started: {error}"))?;
        Ok(Current {
            process,
            is_starting: true,
            is_asked: false,
            is_healthy: true,
        })
    }
}

/// Whether a child of this age, by whose last snapshot all devices were healthy or not, is to be replaced.
fn is_worn(age: Duration, is_healthy: bool) -> bool {
    age >= if is_healthy {
        MAX_AGE
    } else {
        MIN_AGE_OF_UNHEALTHY
    }
}

impl Current {
    fn is_worn(&self) -> bool {
        is_worn(self.process.born.elapsed(), self.is_healthy)
    }

    /// Cancel-safe: the answer to a request that took too long is that to the next one.
    async fn snapshot(&mut self) -> Result<GpuSnapshot, ProbeEnded> {
        if !self.is_asked {
            self.process.request().await?;
            self.is_asked = true;
        }
        loop {
            match self.process.next_line().await? {
                ChildLine::Starting => self.is_starting = true,
                ChildLine::Ready => self.is_starting = false,
                ChildLine::Snapshot { snapshot } => {
                    self.is_asked = false;
                    self.is_starting = false;
                    if snapshot.devices.len() > MAX_DEVICES {
                        let count = snapshot.devices.len();
                        return Err(ProbeEnded::Garbage(format!("{count} GPUs")));
                    }
                    self.is_healthy = snapshot.healthy() == snapshot.devices.len();
                    return Ok(cleaned(snapshot));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_replaced_after_ten_minutes_or_one_if_a_device_is_not_healthy() {
        let second = Duration::from_secs(1);
        for (is_healthy, minutes) in [(true, 10), (false, 1)] {
            let age = Duration::from_mins(minutes);
            assert!(is_worn(age, is_healthy));
            assert!(!is_worn(age - second, is_healthy));
        }
    }
}
