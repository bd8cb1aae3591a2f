//! The choice between NVML and a simulation.

use std::path::PathBuf;
use std::time::Instant;

use super::simulated::GpuScript;

/// How GPUs are probed.
#[derive(Debug, Clone)]
pub enum GpuSource {
    /// NVIDIA's library, the system's or another.
    Nvml(Option<PathBuf>),
    /// A script, followed since an instant.
    Simulated(GpuScript, Instant),
}

impl GpuSource {
    /// As it is reported in each answer.
    #[must_use]
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Nvml(_) => "nvml",
            Self::Simulated(..) => "simulated",
        }
    }
}
