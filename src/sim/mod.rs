//! Scripted ping system and gateway, for `mock` and `demo`.

pub mod demo;
pub mod mock;
pub(crate) mod script;
