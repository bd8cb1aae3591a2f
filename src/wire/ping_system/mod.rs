//! The ping system's answers (CONTRACT.md section 2): as the runner reads them from any of its kind,
//! and as ours gives them.

mod read;
pub mod served;

pub use read::{Agent, InvalidAnswer, MAX_BODY_BYTES, Ping, read_agents, read_event, read_history};
