//! The dashboard's data: totals, and one page of agents with their uptimes and last pings.

use std::cmp::Ordering;
use std::collections::HashMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::ping_system::store::{AgentPage, AgentRecord, Store, StoreError, Sum, Totals};
use crate::units::Percent;
use crate::wire::ping_system::served::{Agent, Ping, Status};

/// Agents on a page at most.
const MAX_ROWS: usize = 100;
/// Agents that are read from the store at once.
const STORE_PAGE: usize = 1000;
/// Pings in an agent's strip.
const STRIP: usize = 30;

/// Which agents, in which order.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ListQuery {
    /// The sort key.
    pub sort: Sort,
    /// Whether the order is reversed.
    pub descending: bool,
    /// Only those whose name, address, capabilities or metadata contain this.
    pub filter: String,
    /// Only those of this status.
    pub status: Option<Status>,
    /// The number of agents to skip.
    pub offset: usize,
    /// The number of agents, at most 100.
    pub limit: Option<usize>,
}

/// The sort keys of agents; ties are broken by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Sort {
    #[default]
    Agent,
    /// The worst first: unreachable, without GPUs, not observed, not pinged yet, active.
    Status,
    /// The last ping's uptime.
    Last,
    /// Uptime over the last hour.
    #[serde(rename = "uptime_1h")]
    Hour,
    /// Uptime over the last 24 hours.
    #[serde(rename = "uptime_24h")]
    Day,
    /// Uptime over the last 7 days.
    #[serde(rename = "uptime_7d")]
    Week,
    Interval,
    Next,
}

/// Mean uptimes; null if no ping covers any time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Uptimes {
    #[serde(rename = "uptime_1h")]
    hour: Option<Percent>,
    #[serde(rename = "uptime_24h")]
    day: Option<Percent>,
    #[serde(rename = "uptime_7d")]
    week: Option<Percent>,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    agent: Agent,
    #[serde(flatten)]
    uptimes: Uptimes,
    recent: Vec<Ping>,
}

/// The totals over all agents.
#[must_use]
pub(super) fn totals(totals: Totals, now: DateTime<Utc>) -> Value {
    json!({
        "timestamp": now,
        "agents": totals.agents,
        "active": totals.of(Status::Active),
        "no_gpu": totals.no_gpu,
        "unreachable": totals.unreachable,
        "unknown": totals.unknown,
        "unobserved": totals.unobserved,
        "due": totals.due,
        "poor": totals.poor,
        "total_pings": totals.pings,
    })
}

/// What an agent is sorted by. All agents are read for one page of the dashboard, so this is all that is kept of each.
#[derive(Debug, PartialEq)]
struct Candidate {
    key: i64,
    agent_id: String,
    status: Status,
    last_uptime_percent: Option<Percent>,
    ping_interval_minutes: f64,
    next_ping_at: DateTime<Utc>,
}

impl From<AgentRecord> for Candidate {
    fn from(AgentRecord { key, agent, .. }: AgentRecord) -> Self {
        Self {
            key,
            agent_id: agent.agent_id,
            status: agent.status,
            last_uptime_percent: agent.last_uptime_percent,
            ping_interval_minutes: agent.ping_interval_minutes,
            next_ping_at: agent.next_ping_at,
        }
    }
}

async fn candidates(store: &dyn Store, query: &ListQuery) -> Result<Vec<Candidate>, StoreError> {
    let mut candidates = Vec::new();
    let mut after = String::new();
    loop {
        let page = AgentPage {
            after: &after,
            due_at: None,
            limit: STORE_PAGE,
        };
        let page = store.agents(page).await?;
        let Some(last) = page.last() else {
            return Ok(candidates);
        };
        after.clone_from(&last.agent.agent_id);
        let fitting = page.into_iter().filter(|record| query.fits(&record.agent));
        candidates.extend(fitting.map(Candidate::from));
    }
}

/// One page of agents.
///
/// # Errors
/// When the store fails.
pub(super) async fn rows(
    store: &dyn Store,
    query: &ListQuery,
    uptime_threshold: Percent,
    now: DateTime<Utc>,
) -> Result<Value, StoreError> {
    let totals = totals(store.totals(now).await?, now);
    let mut candidates = candidates(store, query).await?;
    let count = candidates.len();
    let by_uptime = matches!(query.sort, Sort::Hour | Sort::Day | Sort::Week);
    let mut uptimes = if by_uptime {
        uptimes(store, None, now).await?
    } else {
        HashMap::new()
    };
    candidates.sort_by(|a, b| {
        let of = |known: &Candidate| uptimes.get(&known.key).copied().unwrap_or_default();
        query.order((a, of(a)), (b, of(b)))
    });
    let limit = query.limit.unwrap_or(MAX_ROWS).min(MAX_ROWS);
    let page = candidates.into_iter().skip(query.offset).take(limit);
    let page: Vec<Candidate> = page.collect();
    if !by_uptime && !page.is_empty() {
        let keys: Vec<i64> = page.iter().map(|known| known.key).collect();
        uptimes = self::uptimes(store, Some(&keys), now).await?;
    }
    let mut rows = Vec::with_capacity(page.len());
    for Candidate { agent_id, .. } in page {
        // It may have been removed meanwhile.
        let Some(AgentRecord { key, agent, .. }) = store.agent(&agent_id).await? else {
            continue;
        };
        rows.push(Row {
            recent: store.latest(key, STRIP).await?,
            uptimes: uptimes.get(&key).copied().unwrap_or_default(),
            agent,
        });
    }
    Ok(json!({
        "timestamp": now,
        "agents": rows,
        "count": count,
        "totals": totals,
        "uptime_threshold": uptime_threshold,
    }))
}

async fn uptimes(
    store: &dyn Store,
    keys: Option<&[i64]>,
    now: DateTime<Utc>,
) -> Result<HashMap<i64, Uptimes>, StoreError> {
    let mut all: HashMap<i64, Uptimes> = HashMap::new();
    for hours in [1, 24, 7 * 24] {
        let mut sums: HashMap<i64, Sum> = HashMap::new();
        for (key, part) in store
            .sums_since(now - TimeDelta::hours(hours), keys)
            .await?
        {
            let sum = sums.entry(key).or_default();
            sum.up_seconds += part.up_seconds;
            sum.covered_seconds += part.covered_seconds;
        }
        for (key, sum) in sums {
            let uptimes = all.entry(key).or_default();
            let slot = match hours {
                1 => &mut uptimes.hour,
                24 => &mut uptimes.day,
                _ => &mut uptimes.week,
            };
            *slot = sum.uptime();
        }
    }
    Ok(all)
}

impl ListQuery {
    fn fits(&self, agent: &Agent) -> bool {
        let wanted = self.filter.trim().to_lowercase();
        let holds = |text: &str| text.to_lowercase().contains(&wanted);
        self.status.is_none_or(|status| agent.status == status)
            && (wanted.is_empty()
                || holds(&agent.agent_id)
                || holds(&agent.agent_url)
                || agent.capabilities.iter().any(|name| holds(name))
                || holds(&json!(agent.metadata).to_string()))
    }

    fn order(
        &self,
        (a, a_uptimes): (&Candidate, Uptimes),
        (b, b_uptimes): (&Candidate, Uptimes),
    ) -> Ordering {
        let number = |a: Option<Percent>, b: Option<Percent>| self.known_first(a, b);
        let order = match self.sort {
            Sort::Agent => self.turn(a.agent_id.cmp(&b.agent_id)),
            Sort::Status => self.turn(severity(a.status).cmp(&severity(b.status))),
            Sort::Last => number(a.last_uptime_percent, b.last_uptime_percent),
            Sort::Hour => number(a_uptimes.hour, b_uptimes.hour),
            Sort::Day => number(a_uptimes.day, b_uptimes.day),
            Sort::Week => number(a_uptimes.week, b_uptimes.week),
            Sort::Interval => {
                self.turn(a.ping_interval_minutes.total_cmp(&b.ping_interval_minutes))
            }
            Sort::Next => self.turn(a.next_ping_at.cmp(&b.next_ping_at)),
        };
        order.then_with(|| a.agent_id.cmp(&b.agent_id))
    }

    /// Unknown values come last in both directions.
    fn known_first(&self, a: Option<Percent>, b: Option<Percent>) -> Ordering {
        match (a, b) {
            (Some(a), Some(b)) => self.turn(a.get().total_cmp(&b.get())),
            (a, b) => b.is_some().cmp(&a.is_some()),
        }
    }

    fn turn(&self, order: Ordering) -> Ordering {
        if self.descending {
            order.reverse()
        } else {
            order
        }
    }
}

/// From the worst.
fn severity(status: Status) -> u8 {
    match status {
        Status::Unreachable => 0,
        Status::NoGpu => 1,
        Status::Unobserved => 2,
        Status::Unknown => 3,
        Status::Active => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ping_system::testing::known;

    fn agent(id: &str, last: Option<f64>, status: Status) -> Candidate {
        Candidate {
            last_uptime_percent: last.map(|last| Percent::new(last).unwrap()),
            status,
            ..known(id).into()
        }
    }

    fn sorted(query: &ListQuery, mut agents: Vec<Candidate>) -> Vec<String> {
        agents.sort_by(|a, b| query.order((a, Uptimes::default()), (b, Uptimes::default())));
        agents.into_iter().map(|agent| agent.agent_id).collect()
    }

    #[test]
    fn agents_are_sorted_with_the_unknown_last() {
        let agents = || {
            vec![
                agent("c", Some(99.5), Status::Active),
                agent("a", None, Status::Unreachable),
                agent("d", Some(12.0), Status::NoGpu),
                agent("b", Some(99.5), Status::Active),
            ]
        };
        for (sort, descending, order) in [
            (Sort::Agent, false, ["a", "b", "c", "d"]),
            (Sort::Agent, true, ["d", "c", "b", "a"]),
            (Sort::Last, false, ["d", "b", "c", "a"]),
            (Sort::Last, true, ["b", "c", "d", "a"]),
            (Sort::Status, false, ["a", "d", "b", "c"]),
        ] {
            let query = ListQuery {
                sort,
                descending,
                ..ListQuery::default()
            };
            assert_eq!(sorted(&query, agents()), order, "{sort:?}");
        }
    }

    #[test]
    fn the_filter_looks_at_all_that_is_said_of_an_agent() {
        let mut agent = known("Agent-001").agent;
        agent.capabilities = vec!["text-to-image".to_owned()];
        agent.metadata = json!({"region": "eu-West"}).as_object().cloned();
        let fits = |filter: &str, status| {
            let query = ListQuery {
                filter: filter.to_owned(),
                status,
                ..ListQuery::default()
            };
            query.fits(&agent)
        };
        for good in ["", "agent-0", "8001", "IMAGE", "eu-west", " 001 "] {
            assert!(fits(good, None), "{good}");
        }
        assert!(!fits("agent-002", None));
        assert!(fits("", Some(Status::Unknown)) && !fits("", Some(Status::Unreachable)));
    }
}
