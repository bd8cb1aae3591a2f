//! New pings as server-sent events, for the dashboard and for programs.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;

use crate::ping_system::feed::SharedPing;

/// The interval of keep-alives, by which a client notices that the connection is lost.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);

/// Sends each ping as an event `ping` until the channel closes, or the client falls too far
/// behind; then the stream ends, and the client must read the history again. `place` is held as long.
#[must_use]
pub(super) fn answer(pings: Receiver<SharedPing>, place: OwnedSemaphorePermit) -> Response {
    let events = stream::unfold((pings, place), async |(mut pings, place)| {
        let told = pings.recv().await.ok()?;
        // Every field can be serialized as JSON.
        let event = Event::default().event("ping").json_data(&*told).ok()?;
        Some((Ok::<_, Infallible>(event), (pings, place)))
    });
    Sse::new(events)
        .keep_alive(KeepAlive::new().interval(HEARTBEAT))
        .into_response()
}
