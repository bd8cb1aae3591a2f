//! New pings as server-sent events, for the dashboard and for programs.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use crate::ping_system::feed::FeedEvent;

/// The interval of keep-alives, by which a client notices that the connection is lost.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(10);

/// Sends each ping as an event `ping`, and `resync` when some may have been missed, also by a client that falls too far
/// behind. The stream ends when the channel closes. `permit` is held as long.
#[must_use]
pub(super) fn answer(subscriber: Receiver<FeedEvent>, permit: OwnedSemaphorePermit) -> Response {
    let events = stream::unfold((subscriber, permit), async |(mut subscriber, permit)| {
        let event = match subscriber.recv().await {
            // Every field can be serialized as JSON.
            Ok(FeedEvent::Ping(ping)) => Event::default().event("ping").json_data(&*ping).ok()?,
            Ok(FeedEvent::Resync) | Err(RecvError::Lagged(_)) => {
                Event::default().event("resync").data("")
            }
            Err(RecvError::Closed) => return None,
        };
        Some((Ok::<_, Infallible>(event), (subscriber, permit)))
    });
    Sse::new(events)
        .keep_alive(KeepAlive::new().interval(HEARTBEAT))
        .into_response()
}
