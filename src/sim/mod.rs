//! Scripted ping system and gateway, for `mock` and `demo`.

pub mod demo;
#[cfg(test)]
mod honesty;
mod job_request;
pub mod mock;
mod mock_gateway;
pub(crate) mod recorded_answers;
pub(crate) mod script;
