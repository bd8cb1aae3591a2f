//! What a probe's child process and the agent say to each other: the agent sends a line feed for each probe, the child
//! answers with lines of JSON.

use serde::{Deserialize, Serialize};

use super::gpu::GpuSnapshot;

/// The longest line that the agent reads.
pub(super) const MAX_LINE_BYTES: usize = 64 << 10;
/// More devices are not believed.
pub(super) const MAX_DEVICES: usize = 256;

/// One line of the child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum ChildLine {
    /// The driver is being initialised, which may take long.
    Starting,
    /// It is initialised.
    Ready,
    /// The result of a probe.
    Snapshot { snapshot: GpuSnapshot },
}
