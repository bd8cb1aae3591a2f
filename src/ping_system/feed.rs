//! Publishes new pings to subscribers.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::broadcast::{Receiver, Sender, channel};

use crate::wire::ping_system::served::PingEvent;

/// How many pings a subscriber may lag behind before it is disconnected.
const BACKLOG: usize = 256;

/// The agents to which a subscription applies.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Topic {
    /// All agents.
    All,
    /// One agent.
    Agent(String),
}

/// A published ping, shared by all subscribers.
pub(crate) type SharedPing = Arc<PingEvent>;

/// Publishes each new ping to its subscribers. A subscriber whose channel closes may have missed
/// pings, and must read the history again.
#[derive(Debug, Default)]
pub struct Feed {
    listeners: Mutex<HashMap<Topic, Sender<SharedPing>>>,
}

impl Feed {
    /// Subscribes to all pings from now on.
    pub fn listen(&self, topic: Topic) -> Receiver<SharedPing> {
        let mut listeners = self.listeners.lock();
        // Entries without subscribers are dropped here, where entries are added.
        listeners.retain(|_, sender| sender.receiver_count() > 0);
        let sender = listeners.entry(topic).or_insert_with(|| channel(BACKLOG).0);
        sender.subscribe()
    }

    /// Publishes a ping.
    pub fn publish(&self, event: &PingEvent) {
        let listeners = self.listeners.lock();
        let topic = Topic::Agent(event.agent_id.clone());
        let interested = [listeners.get(&topic), listeners.get(&Topic::All)];
        let mut interested = interested.into_iter().flatten().peekable();
        if interested.peek().is_some() {
            let told = Arc::new(event.clone());
            for sender in interested {
                // The last subscriber may have left.
                let _ = sender.send(Arc::clone(&told));
            }
        }
    }

    /// Disconnects the subscribers of an agent that was removed.
    pub fn forget(&self, agent_id: &str) {
        self.listeners
            .lock()
            .remove(&Topic::Agent(agent_id.to_owned()));
    }

    /// Disconnects all subscribers, since pings may have been missed.
    pub fn interrupt(&self) {
        self.listeners.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::event;
    use super::*;
    use tokio::sync::broadcast::error::TryRecvError;

    #[test]
    fn each_hears_what_it_listens_to() {
        let feed = Feed::default();
        let mut one = feed.listen(Topic::Agent("a".to_owned()));
        let mut all = feed.listen(Topic::All);
        feed.publish(&event("a"));
        feed.publish(&event("b"));
        assert_eq!(one.try_recv().unwrap().agent_id, "a");
        assert_eq!(one.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(all.try_recv().unwrap().agent_id, "a");
        assert_eq!(all.try_recv().unwrap().agent_id, "b");
    }

    #[test]
    fn who_may_have_missed_something_is_let_go() {
        let feed = Feed::default();
        let mut one = feed.listen(Topic::Agent("a".to_owned()));
        let mut other = feed.listen(Topic::Agent("b".to_owned()));
        feed.forget("a");
        assert_eq!(one.try_recv(), Err(TryRecvError::Closed));
        assert_eq!(other.try_recv(), Err(TryRecvError::Empty));
        feed.interrupt();
        assert_eq!(other.try_recv(), Err(TryRecvError::Closed));
        for _ in 0..=BACKLOG {
            feed.publish(&event("c"));
        }
        let mut slow = feed.listen(Topic::All);
        for _ in 0..=BACKLOG {
            feed.publish(&event("c"));
        }
        assert_eq!(slow.try_recv(), Err(TryRecvError::Lagged(1)));
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
