//! The routes that list agents.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::response::Response;
use chrono::{DateTime, Utc};
use serde::Deserialize;

use super::error::{ApiError, ApiResult};
use super::pages::{self, PAGE, Pages};
use super::state::AppState;
use crate::ping_system::store::{AgentPage, AgentRecord, StoreError};
use crate::wire::ping_system::served::Agent;

/// The size of a page, at most.
const MAX_LIMIT: usize = 1000;

/// Which agents are listed, and what of them.
#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    /// Only agents whose id is greater.
    #[serde(default)]
    after: String,
    /// The size of the page; without it all agents are listed.
    limit: Option<String>,
    /// `false` leaves the metadata out.
    metadata: Option<bool>,
}

pub(super) async fn list(
    State(state): State<Arc<AppState>>,
    Query(query): Query<ListQuery>,
) -> ApiResult<Response> {
    let with_metadata = query.metadata.unwrap_or(true);
    // PostgreSQL refuses NUL bytes, and no id contains one.
    if query.after.contains('\0') {
        return Err(ApiError::BadRequest(
            "after: expected an agent id".to_owned(),
        ));
    }
    let limit = query.limit.as_deref().map(limit).transpose()?;
    let agents = AgentPages {
        state,
        after: query.after,
        due_at: None,
        with_metadata,
        left: limit.unwrap_or(usize::MAX),
        has_more: false,
    };
    Ok(pages::answer(r#"{"agents":"#.to_owned(), agents).await?)
}

pub(super) async fn due_for_ping(State(state): State<Arc<AppState>>) -> ApiResult<Response> {
    let agents = AgentPages {
        due_at: Some(state.clock.now()),
        state,
        after: String::new(),
        with_metadata: true,
        left: usize::MAX,
        has_more: false,
    };
    Ok(pages::answer(r#"{"agents":"#.to_owned(), agents).await?)
}

/// Parses a page's size; more than `MAX_LIMIT` is that.
fn limit(text: &str) -> ApiResult<usize> {
    match text.parse::<usize>() {
        Ok(limit) if limit > 0 => Ok(limit.min(MAX_LIMIT)),
        _ => Err(ApiError::BadRequest(format!(
            "limit: expected a number from 1 to {MAX_LIMIT}"
        ))),
    }
}

fn shown(mut agent: Agent, with_metadata: bool) -> Agent {
    if !with_metadata {
        agent.metadata = None;
    }
    agent
}

/// Agents in the order of their ids. Those that come or go meanwhile do not shift the others.
struct AgentPages {
    state: Arc<AppState>,
    /// The last id so far.
    after: String,
    due_at: Option<DateTime<Utc>>,
    with_metadata: bool,
    /// How many more are wanted, and whether there are more than those.
    left: usize,
    has_more: bool,
}

impl AgentPages {
    async fn is_followed(&self, records: &[AgentRecord]) -> Result<bool, StoreError> {
        let Some(last) = records.last() else {
            return Ok(false);
        };
        let page = AgentPage {
            after: &last.agent.agent_id,
            due_at: self.due_at,
            limit: 1,
        };
        Ok(!self.state.store.agents(page).await?.is_empty())
    }
}

impl Pages for AgentPages {
    type Item = Agent;

    async fn next(&mut self) -> Result<Vec<Agent>, StoreError> {
        let page = AgentPage {
            after: &self.after,
            due_at: self.due_at,
            // One more shows whether there are more.
            limit: PAGE.min(self.left.saturating_add(1)),
        };
        if self.left == 0 {
            return Ok(Vec::new());
        }
        let mut records = self.state.store.agents(page).await?;
        self.has_more = records.len() > self.left;
        records.truncate(self.left);
        self.left -= records.len();
        if self.left == 0 && !self.has_more {
            // The page was as long as what was left: whether more follows is not known yet.
            self.has_more = self.is_followed(&records).await?;
        }
        if let Some(last) = records.last() {
            self.after.clone_from(&last.agent.agent_id);
        }
        let agents = records.into_iter();
        Ok(agents
            .map(|record| shown(record.agent, self.with_metadata))
            .collect())
    }

    fn following(&self) -> Option<String> {
        self.has_more.then(|| self.after.clone())
    }
}
