//! What a look at the GPUs finds, and what can look.

use std::fmt;
use std::sync::mpsc::Receiver;

use tokio::sync::oneshot;

use crate::wire::agent::{GpuDevice, GpuHealth, GpuMemory};

/// What one look found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sighting {
    /// All GPUs that the driver lists.
    pub devices: Vec<GpuDevice>,
    /// Why none could be listed.
    pub problem: Option<String>,
}

impl Sighting {
    /// Nothing was found, and why.
    #[must_use]
    pub fn nothing(problem: impl Into<String>) -> Self {
        Self {
            devices: Vec::new(),
            problem: Some(problem.into()),
        }
    }

    /// How many GPUs are well.
    #[must_use]
    pub fn healthy(&self) -> usize {
        self.devices
            .iter()
            .filter(|device| device.health == GpuHealth::Ok)
            .count()
    }
}

/// A request for a look, to be answered with what it found.
pub type Look = oneshot::Sender<Sighting>;

/// A way to look at GPUs. It may block for as long as a driver does, and for ever: it lives on a
/// thread of its own.
pub trait GpuProbe: Send {
    /// Answers looks until there are no more to come.
    fn serve(self: Box<Self>, looks: &Receiver<Look>);
}

/// Memory of which so much is used.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    reason = "a share of bytes, shown as a percentage"
)]
pub fn memory(total_bytes: u64, used_bytes: u64) -> GpuMemory {
    GpuMemory {
        total_bytes,
        free_bytes: total_bytes.saturating_sub(used_bytes),
        used_bytes,
        usage_percentage: used_bytes as f64 / total_bytes.max(1) as f64 * 100.0,
    }
}

impl fmt::Display for Sighting {
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
        let sighting = Sighting {
            devices: vec![device(0, GpuHealth::Ok), device(1, GpuHealth::Xid(79))],
            problem: None,
        };
        assert_eq!(sighting.healthy(), 1);
        assert_eq!(sighting.to_string(), "1 of 2 GPUs ok, GPU 1 xid 79");
        assert_eq!(Sighting::nothing("no driver").to_string(), "no driver");
    }
}
