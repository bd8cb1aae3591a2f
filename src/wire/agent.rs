//! What an agent answers (CONTRACT.md section 3).

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::units::Percent;

/// The answer to a ping: the uptime of a window.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UptimeReport {
    /// Who answers.
    pub agent_id: String,
    /// Time during which the GPU was seen healthy, over the window.
    pub uptime_percent: Percent,
    /// The window's length.
    pub window_seconds: f64,
    /// When the window begins.
    pub since: DateTime<Utc>,
    /// When it ends.
    pub timestamp: DateTime<Utc>,
    /// Whether the window begins with the agent's first start.
    pub first_ping: bool,
    /// Whether enough GPUs are healthy now.
    pub gpu_available: bool,
    /// How many are healthy now.
    pub gpu_count: usize,
    /// Checks in the window.
    pub checks_total: u64,
    /// Of these, those that found enough GPUs healthy.
    pub checks_available: u64,
    /// Another for each start of the agent.
    pub boot_id: Uuid,
}

/// The state of all GPUs at the last check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuStatus {
    /// `available`, or why not.
    pub status: String,
    /// When they were checked.
    pub timestamp: DateTime<Utc>,
    /// How many are healthy.
    pub gpu_count: usize,
    /// By index.
    pub devices: BTreeMap<u32, GpuDevice>,
}

/// One GPU; what it or its driver does not tell is `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuDevice {
    /// Its index.
    pub device_id: u32,
    /// `ok`, or why it is not.
    pub health: String,
    /// Its name for ever.
    pub uuid: Option<String>,
    /// Its model.
    pub name: Option<String>,
    /// Its memory.
    pub memory: Option<GpuMemory>,
    /// What its code is compiled for.
    pub compute_capability: Option<ComputeCapability>,
    /// How busy it is.
    pub utilization: Option<Utilization>,
    /// How warm it is.
    pub temperature_celsius: Option<u32>,
}

/// A GPU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GpuMemory {
    /// Installed.
    pub total_bytes: u64,
    /// Not in use.
    pub free_bytes: u64,
    /// In use.
    pub used_bytes: u64,
    /// In use, of what is installed.
    pub usage_percentage: f64,
}

/// A version of the instruction set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComputeCapability {
    /// The generation.
    pub major: i32,
    /// The step in it.
    pub minor: i32,
    /// Both, with a dot.
    pub version: String,
}

/// How busy a GPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Utilization {
    /// Its processors.
    pub gpu_percent: u32,
    /// Its memory's bus.
    pub memory_percent: u32,
}
