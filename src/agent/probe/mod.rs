//! Looking at GPUs, through a driver that may hang.

pub mod gpu;
pub mod nvml;
pub mod prober;
pub mod simulated;
pub mod source;
