//! New pings, for those who listen.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::broadcast::{Receiver, Sender, channel};

use crate::wire::ping_system::served::PingEvent;

/// How far a listener may fall behind before it is let go.
const BACKLOG: usize = 256;

/// Whose pings are listened to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Those of all agents.
    All,
    /// Those of one.
    Agent(String),
}

/// What is published, shared by all who listen.
pub(crate) type SharedPing = Arc<PingEvent>;

/// Passes each new ping on to those who listen. A listener whose channel closes has missed
/// something, and must ask anew.
#[derive(Debug, Default)]
pub struct Feed {
    listeners: Mutex<HashMap<Topic, Sender<SharedPing>>>,
}

impl Feed {
    /// All pings from now on.
    pub fn listen(&self, topic: Topic) -> Receiver<SharedPing> {
        let mut listeners = self.listeners.lock();
        // Here, since it is where entries are added, those are dropped that nobody listens to.
        listeners.retain(|_, sender| sender.receiver_count() > 0);
        let sender = listeners.entry(topic).or_insert_with(|| channel(BACKLOG).0);
        sender.subscribe()
    }

    /// Tells of a ping.
    pub fn publish(&self, event: &PingEvent) {
        let listeners = self.listeners.lock();
        let topic = Topic::Agent(event.agent_id.clone());
        let interested = [listeners.get(&topic), listeners.get(&Topic::All)];
        let mut interested = interested.into_iter().flatten().peekable();
        if interested.peek().is_some() {
            let told = Arc::new(event.clone());
            for sender in interested {
                // Nobody may listen any more.
                let _ = sender.send(Arc::clone(&told));
            }
        }
    }

    /// Lets go of those who listen to an agent that is no more.
    pub fn forget(&self, agent_id: &str) {
        self.listeners
            .lock()
            .remove(&Topic::Agent(agent_id.to_owned()));
    }

    /// Lets go of all listeners, since pings may have been missed.
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
