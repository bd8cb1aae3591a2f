//! What every server of this program has in common: bounds against slow or hostile clients, and the
//! bearer token.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::credentials::Token;

/// Concurrent connections; further ones wait to be accepted.
pub const MAX_CONNECTIONS: usize = 1024;
/// The longest that a client may take to send a request's head, idling before it included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest head that is read.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// The pause after a connection could not be accepted, usually because no file descriptor was free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Binds a listener to the address that was given by `option`.
///
/// # Errors
/// When the address cannot be bound, in a message that names the option.
pub async fn listen(option: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("{option} {address}: cannot listen there, expected a free ADDRESS:PORT")
    })
}

/// Serves until `stop`; then all connections are closed.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = accept(&listener, &places) => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (connection, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        connections.spawn(async move {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD_BYTES)
                .serve_connection(TokioIo::new(connection), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection ended badly");
            }
            drop(place);
        });
    }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (connection, _) = listener.accept().await?;
    // Answers are short: Nagle's algorithm would only delay them.
    let _ = connection.set_nodelay(true);
    Ok((connection, place))
}

/// Requires one of the tokens for the routes of `router`; without tokens they are open.
pub fn guard(router: Router, tokens: Vec<Token>) -> Router {
    if tokens.is_empty() {
        return router;
    }
    let tokens: Arc<[Token]> = tokens.into();
    router.layer(middleware::from_fn_with_state(tokens, check))
}

async fn check(State(tokens): State<Arc<[Token]>>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let shown = authorization.map(header::HeaderValue::as_bytes);
    if tokens.iter().any(|token| token.is_shown_by(shown)) {
        return next.run(request).await;
    }
    let mut refused = error(
        StatusCode::UNAUTHORIZED,
        "expected Authorization: Bearer and the token",
    );
    refused.headers_mut().insert(
        header::WWW_AUTHENTICATE,
        header::HeaderValue::from_static("Bearer"),
    );
    refused
}

/// Wraps the framework's own plain-text errors in `{"error": text}`.
pub fn errors_as_json(router: Router) -> Router {
    router.layer(middleware::map_response(async |answer: Response| {
        let status = answer.status();
        let kind = answer.headers().get(header::CONTENT_TYPE);
        let is_text = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/plain"));
        if !(status.is_client_error() && is_text) {
            return answer;
        }
        let text = to_bytes(answer.into_body(), MAX_HEAD_BYTES).await;
        let text = text.unwrap_or_default();
        error(status, String::from_utf8_lossy(&text).trim())
    }))
}

#[must_use]
pub fn error(status: StatusCode, text: &str) -> Response {
    (status, axum::Json(json!({ "error": text }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::{Instant, timeout};

    /// A client that never ends its head must not hold a connection.
    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_end_is_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Router::new(), CancellationToken::new()));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
        let begun = Instant::now();
        let mut answer = Vec::new();
        let closed = timeout(10 * HEAD_TIMEOUT, client.read_to_end(&mut answer)).await;
        closed.expect("the connection is closed").unwrap();
        assert!((HEAD_TIMEOUT..2 * HEAD_TIMEOUT).contains(&begun.elapsed()));
    }
}
