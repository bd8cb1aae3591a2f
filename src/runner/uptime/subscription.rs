//! Subscribes to a ping system's events: a drop in uptime takes effect at once, not at the next poll.

use std::time::Duration;

use tokio::sync::mpsc;

use super::client::{PingEvents, PollError, StreamMessage, UptimeSource};
use crate::wire::ping_system::{HistoryPing, ListedAgent};

/// The delay before a ping system without events is tried again: it may have been replaced by one that has
/// them.
const UNSUPPORTED_PAUSE: Duration = Duration::from_mins(10);

/// What happens on an agent's event stream.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum StreamEvent {
    /// From now on each new ping arrives; those before must be polled for.
    Opened,
    /// A new ping, and the agent after it.
    Ping(Box<(ListedAgent, HistoryPing)>),
    Closed,
}

/// Forwards an agent's events to `events` until the receiver is dropped. After the stream has ended it waits
/// for `pause` and subscribes again.
pub(crate) async fn follow(
    source: &impl UptimeSource,
    agent_id: &str,
    pause: Duration,
    events: mpsc::Sender<StreamEvent>,
) {
    loop {
        let pause = match listen(source, agent_id, &events).await {
            Ok(()) => return,
            Err(PollError::StreamUnsupported(url)) => {
                tracing::debug!("{url}: has no event stream, it is polled");
                UNSUPPORTED_PAUSE
            }
            Err(error) => {
                tracing::debug!(agent = agent_id, "the event stream ended: {error}");
                pause
            }
        };
        if events.send(StreamEvent::Closed).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// Returns `Ok` only when the receiver is dropped.
async fn listen(
    source: &impl UptimeSource,
    agent_id: &str,
    events: &mpsc::Sender<StreamEvent>,
) -> Result<(), PollError> {
    let mut stream = source.listen(agent_id).await?;
    if events.send(StreamEvent::Opened).await.is_err() {
        return Ok(());
    }
    loop {
        let event = match stream.next().await? {
            StreamMessage::Ping(ping) => StreamEvent::Ping(ping),
            // As at the beginning: the history must be read again.
            StreamMessage::Resync => StreamEvent::Opened,
        };
        if events.send(event).await.is_err() {
            return Ok(());
        }
    }
}
