//! The result of a probe of the GPUs, and the trait of what can probe them.

use std::fmt;
use std::sync::mpsc::Receiver;

use tokio::sync::oneshot;

use crate::wire::agent::{GpuDevice, GpuHealth, GpuMemory};

/// The GPUs as one probe found them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuSnapshot {
    /// All GPUs that the driver lists.
    pub devices: Vec<GpuDevice>,
    /// Why none could be listed.
    pub problem: Option<String>,
}

impl GpuSnapshot {
    /// A probe that found nothing, with the reason.
    #[must_use]
    pub fn nothing(problem: impl Into<String>) -> Self {
        Self {
            devices: Vec::new(),
            problem: Some(problem.into()),
        }
    }

    /// The number of healthy GPUs.
    #[must_use]
    pub fn healthy(&self) -> usize {
        self.devices
            .iter()
            .filter(|device| device.health == GpuHealth::Ok)
            .count()
    }
}

/// A request for a probe, answered on this channel.
pub(crate) type ProbeRequest = oneshot::Sender<GpuSnapshot>;

/// A way to probe GPUs. It may block for as long as the driver does, even for ever: it runs on a
/// thread of its own.
pub trait GpuProbe: Send {
    /// Answers requests until the channel closes.
    fn serve(self: Box<Self>, requests: &Receiver<ProbeRequest>);
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
    fn a_sighting_says_what_is_wrong() {
        let device = |device_id, health| GpuDevice {
            device_id,
            health,
            ..GpuDevice::default()
        };
        let snapshot = GpuSnapshot {
            devices: vec![device(0, GpuHealth::Ok), device(1, GpuHealth::Xid(79))],
            problem: None,
        };
        assert_eq!(snapshot.healthy(), 1);
        assert_eq!(snapshot.to_string(), "1 of 2 GPUs ok, GPU 1 xid 79");
        assert_eq!(GpuSnapshot::nothing("no driver").to_string(), "no driver");
    }
}
