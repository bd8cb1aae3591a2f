//! Critical Xids hold until their GPU was reset or the driver reloaded: a GPU that answers again is not well by that.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::gpu::GpuSnapshot;
use crate::wire::agent::GpuHealth;

/// The Xids that hold, by the GPU's UUID, or by its number where it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HeldXids {
    held: BTreeMap<String, HeldXid>,
    driver_version: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HeldXid {
    xid: u64,
    /// Whether the GPU, or the driver, was away since: then it was reset, or reloaded.
    was_away: bool,
}

impl HeldXids {
    /// Takes in what a probe found, and marks the GPUs whose Xids hold.
    pub(crate) fn apply(&mut self, snapshot: &mut GpuSnapshot) {
        if snapshot.driver_version.is_some() {
            if self.driver_version.is_some() && snapshot.driver_version != self.driver_version {
                self.held.clear();
            }
            self.driver_version.clone_from(&snapshot.driver_version);
        }
        // A driver that does not answer in time may have gone nowhere.
        if snapshot.is_driver_away {
            self.held.values_mut().for_each(|held| held.was_away = true);
        }
        for fault in snapshot
            .faults
            .iter()
            .filter(|fault| !fault.of_the_application)
        {
            let device = snapshot
                .devices
                .iter()
                .find(|device| device.device_id == fault.gpu);
            let Some(device) = device else { continue };
            let held = HeldXid {
                xid: fault.xid,
                was_away: false,
            };
            self.held.insert(key(device.uuid.as_ref(), fault.gpu), held);
        }
        for device in &mut snapshot.devices {
            let key = key(device.uuid.as_ref(), device.device_id);
            let Some(held) = self.held.get_mut(&key) else {
                continue;
            };
            match &device.health {
                GpuHealth::Ok if held.was_away => {
                    self.held.remove(&key);
                }
                GpuHealth::Ok => device.health = GpuHealth::Xid(held.xid),
                // It comes back from these only by a reset.
                GpuHealth::Lost | GpuHealth::NotFound => held.was_away = true,
                GpuHealth::Timeout | GpuHealth::Xid(_) | GpuHealth::Other(_) => {}
            }
        }
    }
}

fn key(uuid: Option<&String>, gpu: u32) -> String {
    uuid.cloned().unwrap_or_else(|| gpu.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::gpu::XidFault;
    use super::*;
    use crate::wire::agent::GpuDevice;

    fn snapshot(health: GpuHealth, xid: Option<u64>) -> GpuSnapshot {
        let fault = |xid| XidFault {
            gpu: 0,
            xid,
            of_the_application: xid == 43,
        };
        GpuSnapshot {
            devices: vec![GpuDevice {
                health,
                uuid: Some("GPU-1".to_owned()),
                ..GpuDevice::default()
            }],
            driver_version: Some("550".to_owned()),
            is_driver_away: false,
            faults: xid.map(fault).into_iter().collect(),
            problem: None,
        }
    }

    fn health(held: &mut HeldXids, mut snapshot: GpuSnapshot) -> GpuHealth {
        held.apply(&mut snapshot);
        snapshot
            .devices
            .pop()
            .map_or(GpuHealth::NotFound, |device| device.health)
    }

    #[test]
    fn an_xid_holds_until_the_gpu_was_away() {
        use GpuHealth::{Lost, Ok, Xid};
        let mut held = HeldXids::default();
        assert_eq!(health(&mut held, snapshot(Ok, Some(43))), Ok);
        assert_eq!(health(&mut held, snapshot(Ok, Some(79))), Xid(79));
        assert_eq!(health(&mut held, snapshot(Ok, None)), Xid(79));
        // A hang is no reset.
        held.apply(&mut GpuSnapshot::nothing("timeout"));
        assert_eq!(health(&mut held, snapshot(Ok, None)), Xid(79));
        assert_eq!(health(&mut held, snapshot(Lost, None)), Lost);
        assert_eq!(health(&mut held, snapshot(Ok, None)), Ok);
        assert!(held.held.is_empty());
    }

    #[test]
    fn a_driver_that_was_loaded_anew_clears_them() {
        use GpuHealth::{Ok, Xid};
        let mut held = HeldXids::default();
        assert_eq!(health(&mut held, snapshot(Ok, Some(48))), Xid(48));
        held.apply(&mut GpuSnapshot {
            is_driver_away: true,
            ..GpuSnapshot::nothing("the NVIDIA driver is not loaded")
        });
        assert_eq!(health(&mut held, snapshot(Ok, None)), Ok);

        assert_eq!(health(&mut held, snapshot(Ok, Some(48))), Xid(48));
        let newer = GpuSnapshot {
            driver_version: Some("560".to_owned()),
            ..snapshot(Ok, None)
        };
        assert_eq!(health(&mut held, newer), Ok);
    }
}
