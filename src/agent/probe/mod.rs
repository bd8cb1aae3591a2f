//! Probing GPUs through a driver that may hang.

pub(crate) mod gpu;
pub(crate) mod nvml;
pub(crate) mod prober;
pub(crate) mod simulated;
pub(crate) mod source;
