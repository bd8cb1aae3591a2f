//! The route of an agent's history: streamed, since a history can be larger than the memory that one
//! request should use.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use futures_util::stream;
use serde::Deserialize;
use serde_json::json;

use super::error::{ApiError, ApiResult};
use super::state::AppState;
use crate::ping_system::store::{Cursor, StoreError};
use crate::units::saturating_sub;
use crate::wire::ping_system::served::Ping;

/// Pings that are read from the store, and held in memory, at once.
const HISTORY_PAGE: usize = 2000;
const DEFAULT_HOURS: f64 = 24.0;

/// The question's length.
#[derive(Deserialize)]
pub(super) struct Hours {
    hours: Option<String>,
}

impl Hours {
    /// At most as many as are kept.
    fn within(self, retention: Duration) -> ApiResult<f64> {
        let hours = match self.hours {
            None => DEFAULT_HOURS,
            Some(text) => match text.parse() {
                Ok(hours) if hours > 0.0 && f64::is_finite(hours) => hours,
                _ => {
                    let text: String = text.chars().take(40).collect();
                    return Err(ApiError::BadRequest(format!(
                        "hours={}: expected a number over 0",
                        text.escape_debug()
                    )));
                }
            },
        };
        Ok(hours.min(retention.as_secs_f64() / 3600.0))
    }
}

pub(super) async fn history(
    State(state): State<Arc<AppState>>,
    Path(agent_id): Path<String>,
    Query(hours): Query<Hours>,
) -> ApiResult<Response> {
    let hours = hours.within(state.retention)?;
    let key = state.find(&agent_id).await?.key;
    let begin = saturating_sub(Utc::now(), Duration::from_secs_f64(hours * 3600.0));
    let cursor = Cursor::before(begin);
    // Read before anything is sent, so that a failing store is reported by the status.
    let first = state.store.history(key, cursor, HISTORY_PAGE).await?;
    #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
    let shown_hours = if hours.fract() == 0.0 {
        json!(hours as i64)
    } else {
        json!(hours)
    };
    let head = format!(
        r#"{{"agent_id":{},"hours":{shown_hours},"pings":["#,
        json!(agent_id)
    );
    let pages = Pages {
        state,
        key,
        count: 0,
        next: Some(first),
        head,
    };
    let pieces = stream::try_unfold(pages, Pages::next);
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, Body::from_stream(pieces)).into_response())
}

/// A history that is being sent.
struct Pages {
    state: Arc<AppState>,
    key: i64,
    count: usize,
    /// The next part to send; `None` at the end.
    next: Option<Vec<(Cursor, Ping)>>,
    /// What stands before it.
    head: String,
}

impl Pages {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, StoreError> {
        let Some(page) = self.next.take() else {
            return Ok(None);
        };
        let mut text = std::mem::take(&mut self.head);
        for (_, ping) in &page {
            if self.count > 0 {
                text.push(',');
            }
            self.count += 1;
            // Every field can be serialized as JSON.
            text.push_str(&serde_json::to_string(ping).unwrap_or_default());
        }
        match page.last() {
            Some(&(cursor, _)) if page.len() == HISTORY_PAGE => {
                let next = self.state.store.history(self.key, cursor, HISTORY_PAGE);
                self.next = Some(next.await?);
            }
            _ => {
                text.push_str(r#"],"count":"#);
                text.push_str(&self.count.to_string());
                text.push('}');
            }
        }
        Ok(Some((text.into(), self)))
    }
}
