//! Publishes new pings to subscribers.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::broadcast::{Receiver, Sender, channel};

use crate::wire::ping_system::served::PingEvent;

/// How many pings a subscriber may lag behind before it loses some.
const BACKLOG: usize = 256;

/// The agents to which a subscription applies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Topic {
    /// All agents.
    All,
    /// One agent.
    Agent(String),
}

/// What a subscriber receives.
#[derive(Debug, Clone)]
pub(crate) enum FeedEvent {
    /// A new ping, shared by all subscribers.
    Ping(Arc<PingEvent>),
    /// Pings may have been missed: the history must be read again.
    Resync,
}

/// Publishes each new ping to its subscribers. A subscriber that lags too far behind, or whose channel closes, may have
/// missed pings as well.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    listeners: Mutex<HashMap<Topic, Sender<FeedEvent>>>,
}

impl Feed {
    /// Subscribes to all pings from now on.
    pub(crate) fn listen(&self, topic: Topic) -> Receiver<FeedEvent> {
        let mut listeners = self.listeners.lock();
        // Entries without subscribers are dropped here, where entries are added.
        listeners.retain(|_, sender| sender.receiver_count() > 0);
        let sender = listeners.entry(topic).or_insert_with(|| channel(BACKLOG).0);
        sender.subscribe()
    }

    /// Publishes a ping.
    pub(crate) fn publish(&self, event: &PingEvent) {
        let listeners = self.listeners.lock();
        let topic = Topic::Agent(event.agent.agent_id.clone());
        let interested = [listeners.get(&topic), listeners.get(&Topic::All)];
        let mut interested = interested.into_iter().flatten().peekable();
        if interested.peek().is_some() {
            let told = Arc::new(event.clone());
            for sender in interested {
                // The last subscriber may have left.
                let _ = sender.send(FeedEvent::Ping(Arc::clone(&told)));
            }
        }
    }

    /// Disconnects the subscribers of an agent that was removed.
    pub(crate) fn forget(&self, agent_id: &str) {
        self.listeners
            .lock()
            .remove(&Topic::Agent(agent_id.to_owned()));
    }

    /// Tells all subscribers that pings may have been missed.
    pub(crate) fn resync(&self) {
        for sender in self.listeners.lock().values() {
            // The last subscriber may have left.
            let _ = sender.send(FeedEvent::Resync);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::event;
    use super::*;
    use tokio::sync::broadcast::error::TryRecvError;

    /// The agent of the next ping.
    fn agent(subscriber: &mut Receiver<FeedEvent>) -> Result<String, TryRecvError> {
        subscriber.try_recv().map(|event| match event {
            FeedEvent::Ping(ping) => ping.agent.agent_id.clone(),
            FeedEvent::Resync => "resync".to_owned(),
        })
    }

    #[test]
    fn each_hears_what_it_listens_to() {
        let feed = Feed::default();
        let mut one = feed.listen(Topic::Agent("a".to_owned()));
        let mut all = feed.listen(Topic::All);
        feed.publish(&event("a"));
        feed.publish(&event("b"));
        assert_eq!(agent(&mut one), Ok("a".to_owned()));
        assert_eq!(agent(&mut one), Err(TryRecvError::Empty));
        assert_eq!(agent(&mut all), Ok("a".to_owned()));
        assert_eq!(agent(&mut all), Ok("b".to_owned()));
    }

    #[test]
    fn who_may_have_missed_something_is_told() {
        let feed = Feed::default();
        let mut one = feed.listen(Topic::Agent("a".to_owned()));
        let mut other = feed.listen(Topic::Agent("b".to_owned()));
        feed.forget("a");
        assert_eq!(agent(&mut one), Err(TryRecvError::Closed));
        assert_eq!(agent(&mut other), Err(TryRecvError::Empty));
        feed.resync();
        assert_eq!(agent(&mut other), Ok("resync".to_owned()));
        for _ in 0..=BACKLOG {
            feed.publish(&event("c"));
        }
        let mut slow = feed.listen(Topic::All);
        for _ in 0..=BACKLOG {
            feed.publish(&event("c"));
        }
        assert_eq!(agent(&mut slow), Err(TryRecvError::Lagged(1)));
    }

    #[test]
    fn nobody_who_left_is_remembered() {
        let feed = Feed::default();
        for n in 0..100 {
            drop(feed.listen(Topic::Agent(n.to_string())));
        }
        assert_eq!(feed.listeners.lock().len(), 1);
    }
}
