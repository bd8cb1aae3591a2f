//! The choice between NVML and a simulation.

use std::path::PathBuf;
use std::time::Instant;

use super::gpu::GpuProbe;
use super::nvml::NvmlProbe;
use super::simulated::{GpuScript, SimulatedProbe};

/// How GPUs are probed.
#[derive(Debug, Clone)]
pub enum GpuSource {
    /// NVIDIA's library, the system's or another.
    Nvml(Option<PathBuf>),
    /// A script, followed since an instant.
    Simulated(GpuScript, Instant),
}

impl GpuSource {
    /// A new probe.
    #[must_use]
    pub fn probe(&self) -> Box<dyn GpuProbe> {
        match self {
            Self::Nvml(library) => Box::new(NvmlProbe::new(library.clone())),
            Self::Simulated(script, started) => {
                Box::new(SimulatedProbe::new(script.clone(), *started))
            }
        }
    }
}
