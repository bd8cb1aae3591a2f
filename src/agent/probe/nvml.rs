//! Probes GPUs through NVIDIA's management library (NVML).
//!
//! All of this runs on the probe's own thread: any call, unloading the library included, may
//! hang for ever with a broken driver.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, EventSet, Nvml};

use super::gpu::{GpuProbe, GpuSnapshot, ProbeRequest, memory};
use crate::wire::agent::{ComputeCapability, GpuDevice, GpuHealth, Utilization};

/// Faults of the application that runs on the GPU: they say nothing about the GPU (NVIDIA's Xid
/// catalogue).
const APPLICATION_XIDS: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// Probes through NVML.
#[derive(Debug)]
pub(crate) struct NvmlProbe {
    library: Option<PathBuf>,
}

impl NvmlProbe {
    /// Uses this library, or the system's.
    #[must_use]
    pub(crate) fn new(library: Option<PathBuf>) -> Self {
        Self { library }
    }

    fn load(&self) -> Result<Nvml, NvmlError> {
        let mut builder = Nvml::builder();
        if let Some(library) = &self.library {
            builder.lib_path(OsStr::new(library));
        }
        builder.init()
    }
}

impl GpuProbe for NvmlProbe {
    fn serve(self: Box<Self>, requests: &Receiver<ProbeRequest>) {
        // Drivers get loaded and unloaded while we run: a probe that finds none ends the session, and
        // the next one starts a new one.
        while let Ok(request) = requests.recv() {
            match self.load() {
                Ok(nvml) => Session::new(&nvml).serve(request, requests),
                Err(error) => {
                    let _ = request.send(GpuSnapshot::nothing(no_library(&error)));
                }
            }
        }
    }
}

/// A session with the loaded library, and the device events that are watched in it.
struct Session<'nvml> {
    nvml: &'nvml Nvml,
    events: Option<EventSet<'nvml>>,
    watched_devices: u32,
}

impl<'nvml> Session<'nvml> {
    fn new(nvml: &'nvml Nvml) -> Self {
        let watched_devices = nvml.device_count().unwrap_or(0);
        Self {
            nvml,
            events: watch_xids(nvml, watched_devices),
            watched_devices,
        }
    }

    /// Answers `request` and those that follow for as long as the driver is there.
    fn serve(self, request: ProbeRequest, requests: &Receiver<ProbeRequest>) {
        let mut next = Some(request);
        while let Some(request) = next {
            let snapshot = self.request();
            let goes_on = snapshot.problem.is_none()
                && snapshot.devices.len() == self.watched_devices as usize
                && snapshot
                    .devices
                    .iter()
                    .all(|device| matches!(device.health, GpuHealth::Ok | GpuHealth::Xid(_)));
            let _ = request.send(snapshot);
            next = if goes_on { requests.recv().ok() } else { None };
        }
    }

    fn request(&self) -> GpuSnapshot {
        let count = match self.nvml.device_count() {
            Ok(0) => return GpuSnapshot::nothing("the driver lists no GPU"),
            Ok(count) => count,
            Err(error) => return GpuSnapshot::nothing(format!("GPUs cannot be counted: {error}")),
        };
        let xids = self.critical_xids();
        let device = |index| {
            let mut device = match self.nvml.device_by_index(index) {
                Ok(device) => describe(&device),
                Err(error) => GpuDevice {
                    health: health_of(&error),
                    ..GpuDevice::default()
                },
            };
            device.device_id = index;
            // Only until the next probe: a GPU that then passes in full is healthy again.
            if let Some(xid) = xids.get(&index) {
                device.health = GpuHealth::Xid(*xid);
            }
            device
        };
        GpuSnapshot {
            devices: (0..count).map(device).collect(),
            problem: None,
        }
    }

    /// The critical Xid of each device since the last probe.
    fn critical_xids(&self) -> BTreeMap<u32, u64> {
        let mut xids = BTreeMap::new();
        let Some(events) = &self.events else {
            return xids;
        };
        // Bounded: a driver that floods us with events must not prevent probes.
        for _ in 0..1000 {
            let Ok(event) = events.wait(0) else { break };
            let (Some(XidError::Value(xid)), Ok(index)) = (event.event_data, event.device.index())
            else {
                continue;
            };
            if APPLICATION_XIDS.contains(&xid) {
                tracing::info!(
                    gpu = index,
                    xid,
                    "a fault of the application, not of the GPU"
                );
            } else {
                tracing::warn!(gpu = index, xid, "a fault of the GPU");
                xids.insert(index, xid);
            }
        }
        xids
    }
}

/// Watches for Xids where NVML offers them.
fn watch_xids(nvml: &Nvml, devices: u32) -> Option<EventSet<'_>> {
    let mut watched: Vec<u32> = (0..devices).collect();
    loop {
        let events = nvml.create_event_set().ok()?;
        match register_all(nvml, &watched, events) {
            Ok(events) => return Some(events),
            // A device that cannot be added invalidates the whole set: start again without it.
            Err((refused, error)) => {
                tracing::debug!(gpu = refused, %error, "Xids are not watched");
                watched.retain(|index| *index != refused);
            }
        }
    }
}

/// The device that cannot be watched, and why, in place of the set.
fn register_all<'nvml>(
    nvml: &'nvml Nvml,
    devices: &[u32],
    mut events: EventSet<'nvml>,
) -> Result<EventSet<'nvml>, (u32, String)> {
    for &index in devices {
        let device = nvml
            .device_by_index(index)
            .map_err(|error| (index, error.to_string()))?;
        events = device
            .register_events(EventTypes::CRITICAL_XID_ERROR, events)
            .map_err(|error| (index, error.to_string()))?;
    }
    Ok(events)
}

/// The attributes that a device reports. Busy is never down, nor is what it does not support.
fn describe(device: &Device<'_>) -> GpuDevice {
    let memory_info = device.memory_info();
    let health = match &memory_info {
        Ok(_) => GpuHealth::Ok,
        Err(error) if is_unsupported(error) => GpuHealth::Ok,
        Err(error) => health_of(error),
    };
    GpuDevice {
        device_id: 0,
        health,
        uuid: device.uuid().ok(),
        name: device.name().ok(),
        memory: memory_info.ok().map(|info| memory(info.total, info.used)),
        compute_capability: device.cuda_compute_capability().ok().map(|capability| {
            ComputeCapability {
                major: capability.major,
                minor: capability.minor,
                version: format!("{}.{}", capability.major, capability.minor),
            }
        }),
        utilization: device.utilization_rates().ok().map(|rates| Utilization {
            gpu_percent: rates.gpu,
            memory_percent: rates.memory,
        }),
        temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
    }
}

fn is_unsupported(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound
    )
}

fn health_of(error: &NvmlError) -> GpuHealth {
    match error {
        NvmlError::GpuLost => GpuHealth::Lost,
        NvmlError::NotFound | NvmlError::InvalidArg => GpuHealth::NotFound,
        NvmlError::Timeout => GpuHealth::Timeout,
        other => GpuHealth::Other(format!("unreachable: {other}")),
    }
}

fn no_library(error: &NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(error) => format!("NVML cannot be loaded: {error}"),
        NvmlError::DriverNotLoaded => "the NVIDIA driver is not loaded".to_owned(),
        other => format!("NVML cannot be started: {other}"),
    }
}
