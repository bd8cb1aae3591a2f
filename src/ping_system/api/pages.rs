//! Answers with an array that is read from the store page by page: however long it is, and however slowly its client reads,
//! a part of one page is in memory.

use std::collections::VecDeque;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;

use crate::ping_system::store::StoreError;

/// The rows that are read from the store at once. Clients that do not read hold them.
pub(super) const PAGE: usize = 100;
/// The size from which on text is sent.
const PIECE_BYTES: usize = 16 << 10;

/// Where the elements of an array come from.
pub(super) trait Pages: Send + 'static {
    type Item: Serialize + Send;

    /// The next elements; an empty page is the last one.
    fn next(&mut self) -> impl Future<Output = Result<Vec<Self::Item>, StoreError>> + Send;

    /// Where the following answer begins, once the last page has been read; `None` if there is none.
    fn following(&self) -> Option<String> {
        None
    }
}

/// Answers `HEAD[…],"count":N}`, and with `"next"` if more follows, where `head` begins a JSON object and ends with the name
/// of the array and a colon.
///
/// # Errors
/// When the first page cannot be read. If a later one cannot, the body is cut off.
pub(super) async fn answer<P: Pages>(head: String, mut pages: P) -> Result<Response, StoreError> {
    // Read before anything is sent, so that a failing store is reported by the status.
    let first = pages.next().await?;
    let array = Array {
        pages,
        is_last: first.is_empty(),
        page: first.into(),
        text: (head + "[").into_bytes(),
        count: 0,
        is_sent: false,
    };
    let pieces = stream::try_unfold(array, Array::next);
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, Body::from_stream(pieces)).into_response())
}

/// An array that is being sent.
struct Array<P: Pages> {
    pages: P,
    /// What is left of the page that was read last.
    page: VecDeque<P::Item>,
    is_last: bool,
    /// What is sent next.
    text: Vec<u8>,
    count: usize,
    is_sent: bool,
}

impl<P: Pages> Array<P> {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, StoreError> {
        if self.is_sent {
            return Ok(None);
        }
        while self.text.len() < PIECE_BYTES {
            if let Some(item) = self.page.pop_front() {
                if self.count > 0 {
                    self.text.push(b',');
                }
                self.count += 1;
                // Writing to memory never fails, and every field can be serialized as JSON.
                let _ = serde_json::to_writer(&mut self.text, &item);
            } else if self.is_last {
                self.end();
                break;
            } else {
                // Read only when the client has taken what was before.
                self.page = self.pages.next().await?.into();
                self.is_last = self.page.is_empty();
            }
        }
        let piece = std::mem::take(&mut self.text);
        Ok(Some((piece.into(), self)))
    }

    fn end(&mut self) {
        let count = self.count;
        let next = self.pages.following().map_or_else(String::new, |next| {
            format!(r#","next":{}"#, serde_json::Value::from(next))
        });
        let tail = format!(r#"],"count":{count}{next}}}"#);
        self.text.extend_from_slice(tail.as_bytes());
        self.is_sent = true;
    }
}
