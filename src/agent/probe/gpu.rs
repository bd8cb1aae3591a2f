//! The result of a probe of the GPUs.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::text::foreign;
use crate::wire::agent::{GpuDevice, GpuHealth, GpuMemory};

/// The GPUs as one probe found them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct GpuSnapshot {
    /// All GPUs that the driver lists.
    pub devices: Vec<GpuDevice>,
    pub driver_version: Option<String>,
    /// Whether the driver is not loaded.
    pub is_driver_away: bool,
    /// Xids since the last probe.
    pub faults: Vec<XidFault>,
    /// Why none could be listed.
    pub problem: Option<String>,
}

impl GpuSnapshot {
    /// A probe that found nothing, with the reason.
    #[must_use]
    pub(crate) fn nothing(problem: impl Into<String>) -> Self {
        Self {
            devices: Vec::new(),
            driver_version: None,
            is_driver_away: false,
            faults: Vec::new(),
            problem: Some(problem.into()),
        }
    }

    /// The number of healthy GPUs.
    #[must_use]
    pub(crate) fn healthy(&self) -> usize {
        self.devices
            .iter()
            .filter(|device| device.health == GpuHealth::Ok)
            .count()
    }
}

/// A critical Xid that the driver told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct XidFault {
    /// The device's number.
    pub gpu: u32,
    pub xid: u64,
    /// Whether it says nothing about the GPU.
    pub of_the_application: bool,
}

/// The longest text of a driver that is kept.
const MAX_TEXT_CHARS: usize = 120;
/// The same of a reason.
const MAX_REASON_CHARS: usize = 500;

/// The same, with texts that fit on a line.
pub(super) fn cleaned(mut snapshot: GpuSnapshot) -> GpuSnapshot {
    let clean = |text: &mut Option<String>, most| {
        if let Some(text) = text {
            *text = foreign(text, most);
        }
    };
    clean(&mut snapshot.driver_version, MAX_TEXT_CHARS);
    clean(&mut snapshot.problem, MAX_REASON_CHARS);
    for device in &mut snapshot.devices {
        clean(&mut device.uuid, MAX_TEXT_CHARS);
        clean(&mut device.name, MAX_TEXT_CHARS);
    }
    snapshot
}

/// The memory of a GPU, with the percentage that is used.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    reason = "a share of bytes, shown as a percentage"
)]
pub(crate) fn memory(total_bytes: u64, used_bytes: u64) -> GpuMemory {
    GpuMemory {
        total_bytes,
        free_bytes: total_bytes.saturating_sub(used_bytes),
        used_bytes,
        usage_percentage: used_bytes as f64 / total_bytes.max(1) as f64 * 100.0,
    }
}

impl fmt::Display for GpuSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(problem) = &self.problem {
            return f.write_str(problem);
        }
        write!(f, "{} of {} GPUs ok", self.healthy(), self.devices.len())?;
        for device in self
            .devices
            .iter()
            .filter(|device| device.health != GpuHealth::Ok)
        {
            write!(f, ", GPU {} {}", device.device_id, device.health)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_says_what_is_wrong() {
        let device = |device_id, health| GpuDevice {
            device_id,
            health,
            ..GpuDevice::default()
        };
        let snapshot = GpuSnapshot {
            devices: vec![device(0, GpuHealth::Ok), device(1, GpuHealth::Xid(79))],
            driver_version: None,
            is_driver_away: false,
            faults: Vec::new(),
            problem: None,
        };
        assert_eq!(snapshot.healthy(), 1);
        assert_eq!(snapshot.to_string(), "1 of 2 GPUs ok, GPU 1 xid 79");
        assert_eq!(GpuSnapshot::nothing("no driver").to_string(), "no driver");
    }
}
