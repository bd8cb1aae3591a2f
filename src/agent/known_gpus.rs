//! What is known of the agent's GPUs beyond their uptime. It survives a restart, so that an agent that comes back with
//! one GPU of two, or after a fatal fault, is not well by that.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::probe::gpu::GpuSnapshot;
use super::probe::xids::HeldXids;
use crate::wire::agent::GpuHealth;

/// The most UUIDs that are kept.
const MAX_UUIDS: usize = 256;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KnownGpus {
    /// As many were there at once.
    pub(crate) count: Option<usize>,
    /// Those that were healthy when enough were.
    pub(crate) uuids: BTreeSet<String>,
    pub(crate) xids: HeldXids,
}

impl KnownGpus {
    /// Takes in what a probe found, where at least `required` GPUs must be healthy.
    pub(crate) fn record(&mut self, snapshot: &GpuSnapshot, required: usize) {
        let healthy: BTreeSet<String> = snapshot
            .devices
            .iter()
            .filter(|device| device.health == GpuHealth::Ok)
            .filter_map(|device| device.uuid.clone())
            .take(MAX_UUIDS)
            .collect();
        if snapshot.healthy() >= required && !healthy.is_empty() {
            self.uuids = healthy;
        }
    }

    /// The known GPUs that a probe did not find.
    pub(crate) fn missing(&self, snapshot: &GpuSnapshot) -> Vec<&str> {
        let found: BTreeSet<&str> = snapshot
            .devices
            .iter()
            .filter_map(|device| device.uuid.as_deref())
            .collect();
        let known = self.uuids.iter().map(String::as_str);
        known.filter(|uuid| !found.contains(uuid)).collect()
    }
}
