//! Listens to a ping system that tells each new ping at once, so that a drop in uptime need not
//! wait for the next question.

use std::time::Duration;

use tokio::sync::mpsc;

use super::client::{AskError, PingEvents, UptimeSource};
use crate::wire::ping_system::{HistoryPing, ListedAgent};

/// The pause before a ping system that tells nothing by itself is tried again: it may have been
/// replaced by one that does.
const UNSUPPORTED_PAUSE: Duration = Duration::from_mins(10);

/// What is events of an agent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum StreamEvent {
    /// From now on each new ping is told.
    Opened,
    /// A new ping, and what it made of its agent.
    Ping(Box<(ListedAgent, HistoryPing)>),
    Closed,
}

/// Tells `events` what `source` tells of an agent, for ever, or until nobody takes it. After each end
/// it waits for `pause` before it listens again.
pub(crate) async fn follow(
    source: &impl UptimeSource,
    agent_id: &str,
    pause: Duration,
    events: mpsc::Sender<StreamEvent>,
) {
    loop {
        let pause = match listen(source, agent_id, &events).await {
            Ok(()) => return,
            Err(AskError::StreamUnsupported(url)) => {
                tracing::debug!("{url}: tells no pings by itself, it is asked from time to time");
                UNSUPPORTED_PAUSE
            }
            Err(error) => {
                tracing::debug!(agent = agent_id, "new pings are not told any more: {error}");
                pause
            }
        };
        if events.send(StreamEvent::Closed).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Ends well only where nobody takes what is events.
async fn listen(
    source: &impl UptimeSource,
    agent_id: &str,
    events: &mpsc::Sender<StreamEvent>,
) -> Result<(), AskError> {
    let mut stream = source.listen(agent_id).await?;
    if events.send(StreamEvent::Opened).await.is_err() {
        return Ok(());
    }
    loop {
        let told = StreamEvent::Ping(Box::new(stream.next().await?));
        if events.send(told).await.is_err() {
            return Ok(());
        }
    }
}
