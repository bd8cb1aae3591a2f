//! Listens to a ping system that tells each new ping at once, so that a drop in uptime need not
//! wait for the next question.

use std::time::Duration;

use tokio::sync::mpsc;

use super::client::{AskError, AskUptime, Listening};
use crate::wire::ping_system::{Agent, Ping};

/// The pause before a ping system that tells nothing by itself is tried again: it may have been
/// replaced by one that does.
const UNSUPPORTED_PAUSE: Duration = Duration::from_mins(10);

/// What is heard of an agent.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// From now on each new ping is told.
    Begun,
    /// A new ping, and what it made of its agent.
    Ping(Box<(Agent, Ping)>),
    /// No longer.
    Ended,
}

/// Tells `heard` what `source` tells of an agent, for ever, or until nobody takes it. After each end
/// it waits for `pause` before it listens again.
pub async fn follow(
    source: &impl AskUptime,
    agent_id: &str,
    pause: Duration,
    heard: mpsc::Sender<Heard>,
) {
    loop {
        let pause = match listen(source, agent_id, &heard).await {
            Ok(()) => return,
            Err(AskError::TellsNothing(url)) => {
                tracing::debug!("{url}: tells no pings by itself, it is asked from time to time");
                UNSUPPORTED_PAUSE
            }
            Err(error) => {
                tracing::debug!(agent = agent_id, "new pings are not told any more: {error}");
                pause
            }
        };
        if heard.send(Heard::Ended).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Ends well only where nobody takes what is heard.
async fn listen(
    source: &impl AskUptime,
    agent_id: &str,
    heard: &mpsc::Sender<Heard>,
) -> Result<(), AskError> {
    let mut stream = source.listen(agent_id).await?;
    if heard.send(Heard::Begun).await.is_err() {
        return Ok(());
    }
    loop {
        let told = Heard::Ping(Box::new(stream.next().await?));
        if heard.send(told).await.is_err() {
            return Ok(());
        }
    }
}
