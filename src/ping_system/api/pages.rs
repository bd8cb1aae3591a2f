//! Answers with an array that is read from the store page by page: however long it is, one page is in memory.

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;

use crate::ping_system::store::StoreError;

/// Where the elements of an array come from.
pub(super) trait Pages: Send + 'static {
    type Item: Serialize + Send;

    /// The next elements; an empty page is the last one.
    fn next(&mut self) -> impl Future<Output = Result<Vec<Self::Item>, StoreError>> + Send;
}

/// Answers `HEAD[…],"count":N}`, where `head` begins a JSON object and ends with the name of the array and a colon.
///
/// # Errors
/// When the first page cannot be read. If a later one cannot, the body is cut off.
pub(super) async fn answer<P: Pages>(head: String, mut pages: P) -> Result<Response, StoreError> {
    // Read before anything is sent, so that a failing store is reported by the status.
    let first = pages.next().await?;
    let array = Array {
        pages,
        page: Some(first),
        text: head + "[",
        count: 0,
    };
    let pieces = stream::try_unfold(array, Array::next);
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, Body::from_stream(pieces)).into_response())
}

/// An array that is being sent.
struct Array<P: Pages> {
    pages: P,
    /// The page that is sent next; `None` at the end.
    page: Option<Vec<P::Item>>,
    /// What is sent before it.
    text: String,
    count: usize,
}

impl<P: Pages> Array<P> {
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, StoreError> {
        let Some(page) = self.page.take() else {
            return Ok(None);
        };
        let mut text = std::mem::take(&mut self.text).into_bytes();
        if page.is_empty() {
            text.extend_from_slice(format!(r#"],"count":{}}}"#, self.count).as_bytes());
            return Ok(Some((text.into(), self)));
        }
        for item in &page {
            if self.count > 0 {
                text.push(b',');
            }
            self.count += 1;
            // Writing to memory never fails, and every field can be serialized as JSON.
            let _ = serde_json::to_writer(&mut text, item);
        }
        self.page = Some(self.pages.next().await?);
        Ok(Some((text.into(), self)))
    }
}
