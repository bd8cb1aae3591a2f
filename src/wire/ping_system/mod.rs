//! The ping system's answers (`.github/docs/protocol.md` section 1.3): as the runner reads them from any of its kind,
//! and as ours gives them.

mod read;
pub mod served;

pub use read::{
    HistoryPing, InvalidAnswer, ListedAgent, MAX_BODY_BYTES, read_agent, read_agents, read_event,
    read_history,
};
