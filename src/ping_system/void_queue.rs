//! Failures of the last minute: when it turns out that the ping system's own network is down, or its token wrong, they say
//! nothing about their agents.

use std::collections::VecDeque;
use std::time::Duration;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;

use super::client::FailureKind;
use super::mass_failure::PERIOD;
use crate::clock::since_boot;
use crate::units::saturating_sub;

/// So many of an agent's newest pings are looked at: more than it has in the minutes that matter.
pub(crate) const VOIDED_PINGS: usize = 500;
/// Failures that are remembered.
const MAX_FAILURES: usize = 100_000;
/// Entries that are dealt with before the schedule is looked at again.
const AT_ONCE: usize = 20;
/// How long it is tried to make a failure unobserved.
const PATIENCE: Duration = Duration::from_mins(5);

#[derive(Debug, Default)]
pub(crate) struct VoidQueue(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    failures: VecDeque<StoredFailure>,
    entries: Vec<VoidEntry>,
}

#[derive(Debug)]
struct StoredFailure {
    at: Duration,
    kind: FailureKind,
    agent_id: String,
}

/// An agent whose failures since an instant are to be made unobserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VoidEntry {
    pub(crate) agent_id: String,
    pub(crate) since: DateTime<Utc>,
    pub(crate) reason: String,
    asked_at: Duration,
}

impl VoidQueue {
    /// An agent's failure is stored.
    pub(crate) fn failed(&self, agent_id: &str, kind: FailureKind) {
        let mut inner = self.0.lock();
        let now = since_boot();
        inner.expire(now);
        if inner.failures.len() < MAX_FAILURES {
            inner.failures.push_back(StoredFailure {
                at: now,
                kind,
                agent_id: agent_id.to_owned(),
            });
        }
    }

    /// At `at` it turned out that the failures of this kind within the last minute were not the agents'.
    pub(crate) fn begin(&self, at: DateTime<Utc>, kind: FailureKind, reason: &str) {
        let mut inner = self.0.lock();
        let now = since_boot();
        inner.expire(now);
        let (found, others) = inner
            .failures
            .drain(..)
            .partition::<VecDeque<_>, _>(|failure| failure.kind == kind);
        inner.failures = others;
        let mut agents: Vec<String> = found.into_iter().map(|failure| failure.agent_id).collect();
        agents.sort();
        agents.dedup();
        inner
            .entries
            .extend(agents.into_iter().map(|agent_id| VoidEntry {
                agent_id,
                since: saturating_sub(at, PERIOD),
                reason: reason.to_owned(),
                asked_at: now,
            }));
    }

    /// Some entries; the schedule must not wait for all of them.
    pub(crate) fn take(&self) -> Vec<VoidEntry> {
        let entries = &mut self.0.lock().entries;
        let rest = entries.len().saturating_sub(AT_ONCE);
        entries.split_off(rest)
    }

    /// To be tried again later.
    pub(crate) fn put_back(&self, entry: VoidEntry) {
        if since_boot().saturating_sub(entry.asked_at) < PATIENCE {
            self.0.lock().entries.insert(0, entry);
        }
    }
}

impl Inner {
    fn expire(&mut self, now: Duration) {
        while let Some(oldest) = self.failures.front()
            && now.saturating_sub(oldest.at) > PERIOD
        {
            self.failures.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::utc;
    use super::*;

    #[test]
    fn each_agent_that_failed_is_in_it_once() {
        let queue = VoidQueue::default();
        queue.failed("b", FailureKind::NoAnswer);
        queue.failed("a", FailureKind::NoAnswer);
        queue.failed("b", FailureKind::NoAnswer);
        queue.failed("c", FailureKind::InvalidAnswer);
        assert_eq!(queue.take(), []);
        queue.begin(
            utc("2026-01-01T00:01:30Z"),
            FailureKind::NoAnswer,
            "our network",
        );
        let entries = queue.take();
        let ids: Vec<&str> = entries.iter().map(|entry| &*entry.agent_id).collect();
        assert_eq!(ids, ["a", "b"]);
        assert_eq!(entries[0].since, utc("2026-01-01T00:00:30Z"));
        queue.put_back(entries[0].clone());
        assert_eq!(queue.take().len(), 1);
        // Those were dealt with.
        queue.begin(
            utc("2026-01-01T00:02:00Z"),
            FailureKind::NoAnswer,
            "our network",
        );
        assert_eq!(queue.take(), []);
        queue.begin(
            utc("2026-01-01T00:02:00Z"),
            FailureKind::InvalidAnswer,
            "our bug",
        );
        assert_eq!(queue.take().len(), 1);
    }
}
