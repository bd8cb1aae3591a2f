//! Scripted ping system, gateway and live runners, for `mock` and `demo`.

pub mod demo;
#[cfg(test)]
mod honesty;
mod job_request;
pub mod mock;
mod mock_gateway;
mod mock_orchestrator;
pub(crate) mod recorded_answers;
pub(crate) mod script;
