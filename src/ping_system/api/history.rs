//! The route of an agent's history.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::response::Response;
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::pages::{self, PAGE, Pages};
use super::state::AppState;
use crate::ping_system::store::{Cursor, StoreError};
use crate::units::saturating_sub;
use crate::wire::ping_system::served::Ping;

/// The size of a page of an answer, at most.
const MAX_LIMIT: usize = 2000;
const DEFAULT_HOURS: f64 = 24.0;

/// Which pings are wanted.
#[derive(Deserialize)]
pub(super) struct HistoryQuery {
    hours: Option<String>,
    /// Only pings after this time.
    after: Option<String>,
    /// The size of the page; without it all pings are listed.
    limit: Option<String>,
}

impl HistoryQuery {
    /// The length of the history, at most as long as it is kept.
    fn hours(&self, retention: Duration) -> ApiResult<f64> {
        let kept = retention.as_secs_f64() / 3600.0;
        let hours = match self.hours.as_deref() {
            None if self.after.is_some() => kept,
            None => DEFAULT_HOURS,
            Some(text) => match text.parse() {
                Ok(hours) if hours > 0.0 && f64::is_finite(hours) => hours,
                _ => return Err(refused("hours", text, "a number over 0")),
            },
        };
        Ok(hours.min(kept))
    }

    fn after(&self) -> ApiResult<Option<DateTime<Utc>>> {
        let Some(text) = self.after.as_deref() else {
            return Ok(None);
        };
        // A plus sign that was not encoded arrives as a space.
        let instant = DateTime::parse_from_rfc3339(&text.replace(' ', "+"));
        match instant {
            Ok(instant) => Ok(Some(instant.to_utc())),
            Err(_) => Err(refused("after", text, "a time as in 2026-01-01T12:00:00Z")),
        }
    }

    fn limit(&self) -> ApiResult<Option<usize>> {
        let limit = |text: &str| match text.parse::<usize>() {
            Ok(limit) if limit > 0 => Ok(limit.min(MAX_LIMIT)),
            _ => Err(refused("limit", text, "a number over 0")),
        };
        self.limit.as_deref().map(limit).transpose()
    }
}

fn refused(parameter: &str, text: &str, expected: &str) -> ApiError {
    let text: String = text.chars().take(40).collect();
    ApiError::BadRequest(format!(
        "{parameter}={}: expected {expected}",
        text.escape_debug()
    ))
}

pub(super) async fn history(
    State(state): State<Arc<AppState>>,
    Path(agent_id): Path<String>,
    Query(query): Query<HistoryQuery>,
) -> ApiResult<Response> {
    let hours = query.hours(state.retention)?;
    let (after, limit) = (query.after()?, query.limit()?);
    let key = state.find(&agent_id).await?.key;
    let begin = saturating_sub(state.clock.now(), Duration::from_secs_f64(hours * 3600.0));
    let cursor = match after {
        Some(after) if after >= begin => Cursor::after(after),
        _ => Cursor::before(begin),
    };
    let hours = shown_hours(hours);
    let head = format!(
        r#"{{"agent_id":{},"hours":{hours},"pings":"#,
        json!(agent_id)
    );
    let mut pings = HistoryPages {
        state,
        key,
        cursor,
        left: usize::MAX,
        following: None,
    };
    if let Some(limit) = limit {
        // Where the page ends is known before it is sent, so that only a part of it is in memory then.
        let found = pings.state.store.history(key, cursor, limit + 1).await?;
        let (of_page, next) = page(found, limit);
        (pings.left, pings.following) = (of_page.len(), next);
    }
    Ok(pages::answer(head, pings).await?)
}

/// The first `limit` of one more than that, and the time after which the next page begins. Pings of one instant are not
/// separated, since the next page could not tell them apart.
fn page(found: Vec<(Cursor, Ping)>, limit: usize) -> (Vec<Ping>, Option<DateTime<Utc>>) {
    let mut pings: Vec<Ping> = found.into_iter().map(|(_, ping)| ping).collect();
    if pings.len() <= limit {
        return (pings, None);
    }
    let following = pings[limit].timestamp;
    let whole = pings.partition_point(|ping| ping.timestamp < following);
    pings.truncate(if whole > 0 { whole } else { limit });
    let next = pings.last().map(|last| last.timestamp);
    (pings, next)
}

fn shown_hours(hours: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
    if hours.fract() == 0.0 {
        json!(hours as i64)
    } else {
        json!(hours)
    }
}

struct HistoryPages {
    state: Arc<AppState>,
    key: i64,
    cursor: Cursor,
    /// How many more are wanted.
    left: usize,
    /// The time after which the next page begins.
    following: Option<DateTime<Utc>>,
}

impl Pages for HistoryPages {
    type Item = Ping;

    async fn next(&mut self) -> Result<Vec<Ping>, StoreError> {
        if self.left == 0 {
            return Ok(Vec::new());
        }
        let limit = PAGE.min(self.left);
        let pings = self.state.store.history(self.key, self.cursor, limit);
        let pings = pings.await?;
        self.left -= pings.len();
        if let Some(&(cursor, _)) = pings.last() {
            self.cursor = cursor;
        }
        Ok(pings.into_iter().map(|(_, ping)| ping).collect())
    }

    fn following(&self) -> Option<String> {
        let next = self.following?;
        Some(json!(next).as_str().unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ping_system::testing::{event, utc};
    use chrono::TimeDelta;

    #[test]
    fn a_page_ends_between_two_instants() {
        let at = |seconds| utc("2026-01-01T00:00:00Z") + TimeDelta::seconds(seconds);
        let found = |seconds: &[i64]| {
            let ping = |&seconds| {
                let mut ping = event("a").ping;
                ping.timestamp = at(seconds);
                (Cursor::before(at(seconds)), ping)
            };
            seconds.iter().map(ping).collect::<Vec<_>>()
        };
        for (seconds, limit, length, next) in [
            (&[][..], 2, 0, None),
            (&[1, 2][..], 2, 2, None),
            (&[1, 2, 3][..], 2, 2, Some(2)),
            (&[1, 2, 2][..], 2, 1, Some(1)),
            (&[1, 1][..], 1, 1, Some(1)),
        ] {
            let (pings, found_next) = page(found(seconds), limit);
            assert_eq!(pings.len(), length, "{seconds:?}");
            assert_eq!(found_next, next.map(at), "{seconds:?}");
        }
    }
}
