//! Probing GPUs through a driver that may hang, crash or lie.

pub mod child;
pub(crate) mod gpu;
mod nvml;
pub(crate) mod prober;
mod process;
mod protocol;
pub(crate) mod simulated;
pub(crate) mod source;
pub(crate) mod xids;
