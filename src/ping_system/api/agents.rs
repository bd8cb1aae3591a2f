//! The routes that list agents.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::error::{ApiError, ApiResult};
use super::pages::{self, Pages};
use super::state::AppState;
use crate::ping_system::store::{AgentPage, StoreError};
use crate::wire::ping_system::served::Agent;

/// The size of a page, at most.
const MAX_LIMIT: usize = 1000;
/// The size of the pages in which a list without a limit is read from the store.
const STREAMED_PAGE: usize = 500;

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

#[derive(Serialize)]
struct Page {
    agents: Vec<Agent>,
    count: usize,
    /// The last id, if there are more agents.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
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
    let Some(limit) = query.limit.as_deref().map(limit).transpose()? else {
        let agents = AgentPages {
            state,
            after: query.after,
            due_at: None,
            with_metadata,
        };
        return Ok(pages::answer(r#"{"agents":"#.to_owned(), agents).await?);
    };
    let page = AgentPage {
        after: &query.after,
        due_at: None,
        // One more shows whether there are more.
        limit: limit + 1,
    };
    let mut records = state.store.agents(page).await?;
    let has_more = records.len() > limit;
    records.truncate(limit);
    let last = records.last().filter(|_| has_more);
    Ok(Json(Page {
        next: last.map(|last| last.agent.agent_id.clone()),
        count: records.len(),
        agents: records
            .into_iter()
            .map(|record| shown(record.agent, with_metadata))
            .collect(),
    })
    .into_response())
}

pub(super) async fn due_for_ping(State(state): State<Arc<AppState>>) -> ApiResult<Response> {
    let agents = AgentPages {
        due_at: Some(state.clock.now()),
        state,
        after: String::new(),
        with_metadata: true,
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
}

impl Pages for AgentPages {
    type Item = Agent;

    async fn next(&mut self) -> Result<Vec<Agent>, StoreError> {
        let page = AgentPage {
            after: &self.after,
            due_at: self.due_at,
            limit: STREAMED_PAGE,
        };
        let records = self.state.store.agents(page).await?;
        if let Some(last) = records.last() {
            self.after.clone_from(&last.agent.agent_id);
        }
        let agents = records.into_iter();
        Ok(agents
            .map(|record| shown(record.agent, self.with_metadata))
            .collect())
    }
}
