//! Probes GPUs through NVIDIA's management library (NVML), in a process of its own: any call may hang for ever, or end
//! it, with a broken driver.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::NVML_FI_DEV_REMAPPED_FAILURE;
use nvml_wrapper::{Device, EventSet, Nvml};

use super::gpu::{GpuSnapshot, XidFault, memory};
use super::protocol::MAX_DEVICES;
use crate::wire::agent::{ComputeCapability, GpuDevice, GpuHealth, Utilization};

/// Faults of the application that runs on the GPU: they say nothing about the GPU (NVIDIA's Xid
/// catalogue).
const APPLICATION_XIDS: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// What the driver wants done about a GPU (nvml.h, `NVML_FI_DEV_GET_GPU_RECOVERY_ACTION`), and the names of that.
const RECOVERY_ACTION: FieldId = FieldId(230);
const RECOVERY_ACTIONS: [&str; 5] = [
    "none",
    "reset the GPU",
    "reboot the node",
    "drain its peers",
    "drain and reset",
];

/// The MIG devices that a container may see are named by this variable.
const VISIBLE_DEVICES: &str = "NVIDIA_VISIBLE_DEVICES";

/// Loads this library, or the system's, and initialises it.
///
/// # Errors
/// What is found instead.
pub(super) fn load(library: Option<&Path>) -> Result<Nvml, GpuSnapshot> {
    let mut builder = Nvml::builder();
    if let Some(library) = library {
        builder.lib_path(OsStr::new(library));
    }
    builder.init().map_err(|error| GpuSnapshot {
        is_driver_away: matches!(error, NvmlError::DriverNotLoaded),
        ..GpuSnapshot::nothing(no_library(&error))
    })
}

/// A session with the loaded library, and the device events that are watched in it.
pub(super) struct Session<'nvml> {
    nvml: &'nvml Nvml,
    events: Option<EventSet<'nvml>>,
    driver_version: Option<String>,
}

impl<'nvml> Session<'nvml> {
    pub(super) fn new(nvml: &'nvml Nvml) -> Self {
        let count = nvml.device_count().unwrap_or(0);
        let watched = count.min(u32::try_from(MAX_DEVICES).unwrap_or(u32::MAX));
        Self {
            nvml,
            events: watch_xids(nvml, watched),
            driver_version: nvml.sys_driver_version().ok(),
        }
    }

    pub(super) fn probe(&mut self) -> GpuSnapshot {
        let count = match self.nvml.device_count() {
            Ok(count) => count,
            Err(error) => {
                return GpuSnapshot {
                    is_driver_away: matches!(error, NvmlError::DriverNotLoaded),
                    ..GpuSnapshot::nothing(format!("GPUs cannot be counted: {error}"))
                };
            }
        };
        if count as usize > MAX_DEVICES {
            return GpuSnapshot::nothing(format!(
                "the driver lists {count} GPUs: at most {MAX_DEVICES} are believed"
            ));
        }
        let devices: Vec<GpuDevice> = if count == 0 {
            visible_mig_devices(self.nvml)
        } else {
            (0..count).map(|index| self.device(index)).collect()
        };
        if devices.is_empty() {
            return GpuSnapshot::nothing("the driver lists no GPU");
        }
        let mut devices = devices;
        for (index, device) in devices.iter_mut().enumerate() {
            device.device_id = u32::try_from(index).unwrap_or(u32::MAX);
        }
        GpuSnapshot {
            devices,
            driver_version: self.driver_version.clone(),
            is_driver_away: false,
            faults: self.faults(),
            problem: None,
        }
    }

    fn device(&self, index: u32) -> GpuDevice {
        match self.nvml.device_by_index(index) {
            Ok(device) => describe(&device),
            Err(error) => GpuDevice {
                health: health_of(&error),
                ..GpuDevice::default()
            },
        }
    }

    /// The Xids since the last probe.
    fn faults(&self) -> Vec<XidFault> {
        let mut faults = BTreeSet::new();
        let Some(events) = &self.events else {
            return Vec::new();
        };
        // Bounded: a driver that floods us with events must not prevent probes.
        for _ in 0..1000 {
            let Ok(event) = events.wait(0) else { break };
            if let (Some(XidError::Value(xid)), Ok(gpu)) = (event.event_data, event.device.index())
            {
                faults.insert((gpu, xid));
            }
        }
        let of_the_application = |xid| APPLICATION_XIDS.contains(&xid);
        let faults = faults.into_iter().map(|(gpu, xid)| XidFault {
            gpu,
            xid,
            of_the_application: of_the_application(xid),
        });
        faults.take(MAX_DEVICES).collect()
    }
}

/// The MIG devices that this container may see, where it may see none of their parents.
fn visible_mig_devices(nvml: &Nvml) -> Vec<GpuDevice> {
    let visible = std::env::var(VISIBLE_DEVICES).unwrap_or_default();
    let ids = visible
        .split(',')
        .map(str::trim)
        .filter(|id| id.starts_with("MIG-"));
    let device = |id: &str| match nvml.device_by_uuid(id) {
        Ok(device) => describe(&device),
        Err(error) => GpuDevice {
            uuid: Some(id.to_owned()),
            health: health_of(&error),
            ..GpuDevice::default()
        },
    };
    ids.take(MAX_DEVICES).map(device).collect()
}

/// Watches for Xids where NVML offers them.
fn watch_xids(nvml: &Nvml, devices: u32) -> Option<EventSet<'_>> {
    let mut watched: Vec<u32> = (0..devices).collect();
    loop {
        let events = nvml.create_event_set().ok()?;
        match register_all(nvml, &watched, events) {
            Ok(events) => return Some(events),
            // A device that cannot be added invalidates the whole set: start again without it.
            Err(refused) => watched.retain(|index| *index != refused),
        }
    }
}

/// The device that cannot be watched, in place of the set.
fn register_all<'nvml>(
    nvml: &'nvml Nvml,
    devices: &[u32],
    mut events: EventSet<'nvml>,
) -> Result<EventSet<'nvml>, u32> {
    for &index in devices {
        let device = nvml.device_by_index(index).map_err(|_| index)?;
        events = device
            .register_events(EventTypes::CRITICAL_XID_ERROR, events)
            .map_err(|_| index)?;
    }
    Ok(events)
}

/// The attributes that a device reports. Busy is never down, nor is what it does not support.
fn describe(device: &Device<'_>) -> GpuDevice {
    let memory_info = device.memory_info();
    let health = match &memory_info {
        Ok(_) => GpuHealth::Ok,
        Err(error) if is_withheld(error) => health_without_memory(device),
        Err(error) => health_of(error),
    };
    let health = match health {
        GpuHealth::Ok => soundness(device),
        broken => broken,
    };
    GpuDevice {
        device_id: 0,
        health,
        since: None,
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
        throttle_reasons: device.current_throttle_reasons().ok().map(|reasons| {
            reasons
                .iter_names()
                .map(|(name, _)| name.to_lowercase())
                .collect()
        }),
        uncorrected_ecc_errors: device
            .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
            .ok(),
    }
}

/// The health of a device whose memory cannot be asked for: by another call that reaches it, or by its MIG devices.
fn health_without_memory(device: &Device<'_>) -> GpuHealth {
    let mig_devices = device.mig_device_count().unwrap_or(0);
    let mig_devices =
        (0..mig_devices.min(64)).filter_map(|index| device.mig_device_by_index(index).ok());
    let asked = mig_devices.map(|device| device.memory_info().map(|_| ()));
    let others = [
        device.bar1_memory_info().map(|_| ()),
        device.temperature(TemperatureSensor::Gpu).map(|_| ()),
    ];
    for answer in asked.chain(others) {
        match answer {
            Err(error) if is_withheld(&error) => {}
            Err(error) => return health_of(&error),
            Ok(()) => {}
        }
    }
    GpuHealth::Ok
}

/// Whether the driver wants something done about a device that answers.
fn soundness(device: &Device<'_>) -> GpuHealth {
    let field = |field: FieldId| -> Option<u64> {
        let values = device.field_values_for(&[field]).ok()?;
        match values.into_iter().next()?.ok()?.value.ok()? {
            SampleValue::U32(value) => Some(value.into()),
            SampleValue::U64(value) => Some(value),
            SampleValue::I64(value) => u64::try_from(value).ok(),
            SampleValue::F64(_) => None,
        }
    };
    if let Some(action) = field(RECOVERY_ACTION).filter(|action| *action != 0) {
        let index = usize::try_from(action).unwrap_or(usize::MAX);
        let name = RECOVERY_ACTIONS.get(index).copied();
        let name = name.map_or_else(|| format!("action {action}"), str::to_owned);
        return GpuHealth::Other(format!("the driver asks to {name}"));
    }
    if field(FieldId(NVML_FI_DEV_REMAPPED_FAILURE)).is_some_and(|failed| failed != 0) {
        return GpuHealth::Other("a row of its memory could not be remapped".to_owned());
    }
    match device.are_pages_pending_retired() {
        Ok(true) => GpuHealth::Other("pages of its memory wait to be retired: reset it".to_owned()),
        Err(error) if is_reset_required(&error) => health_of(&error),
        _ => GpuHealth::Ok,
    }
}

/// Whether a call is not there for this device or this process, which says nothing about the device.
fn is_withheld(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::NotSupported
            | NvmlError::NoPermission
            | NvmlError::FailedToLoadSymbol(_)
            | NvmlError::FunctionNotFound
    )
}

fn is_reset_required(error: &NvmlError) -> bool {
    matches!(error, NvmlError::ResetRequired)
}

fn health_of(error: &NvmlError) -> GpuHealth {
    match error {
        NvmlError::GpuLost => GpuHealth::Lost,
        NvmlError::NotFound | NvmlError::InvalidArg => GpuHealth::NotFound,
        NvmlError::Timeout => GpuHealth::Timeout,
        error if is_reset_required(error) => GpuHealth::Other("reset required".to_owned()),
        other => GpuHealth::Other(format!("unreachable: {other}")),
    }
}

fn no_library(error: &NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(error) => format!(
            "NVML cannot be loaded: {error}. Install the NVIDIA driver, or let the container runtime mount it \
             (NVIDIA_DRIVER_CAPABILITIES=utility); without a GPU try --gpu 'simulated:up 1h'"
        ),
        NvmlError::DriverNotLoaded => "the NVIDIA driver is not loaded".to_owned(),
        other => format!("NVML cannot be started: {other}"),
    }
}
