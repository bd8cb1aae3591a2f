//! What every server of this program has in common: bounds against slow or hostile clients, and the
//! bearer token.

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
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt::set_socket_send_buffer_size;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::browsers::{AllowedHosts, guard_against_pages};
use super::connections::{Connections, WatchedConnection};
use super::credentials::Token;
use super::server_tls::ServerTls;
use super::wrong_tokens::WrongTokens;

/// Concurrent connections. For a further one that is closed which has been still for longest.
pub const MAX_CONNECTIONS: usize = 2048;
/// The same of one address, if no option says otherwise: proxies and NAT share one.
pub const MAX_CONNECTIONS_PER_ADDRESS: usize = 1024;
/// The longest that a client may take to send a request's head, idling before it included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest handshake of TLS.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest head that is read, and how much of an answer waits for its client.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How much of an answer the kernel keeps for a client.
const SEND_BUFFER_BYTES: usize = 64 << 10;
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

/// Where a request comes from, among its extensions: a proxy's address where there is one in between.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub SocketAddr);

/// Tells the routes where a connection comes from.
struct WithPeer {
    peer: Peer,
    router: TowerToHyperService<Router>,
}

impl hyper::service::Service<hyper::Request<Incoming>> for WithPeer {
    type Response = Response;
    type Error = std::convert::Infallible;
    type Future =
        <TowerToHyperService<Router> as hyper::service::Service<hyper::Request<Incoming>>>::Future;

    fn call(&self, mut request: hyper::Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(self.peer);
        self.router.call(request)
    }
}

/// How a server treats its clients.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    pub hosts: AllowedHosts,
    /// TLS, if it speaks that.
    pub tls: Option<ServerTls>,
    pub max_connections_per_address: usize,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            hosts: AllowedHosts::default(),
            tls: None,
            max_connections_per_address: MAX_CONNECTIONS_PER_ADDRESS,
        }
    }
}

impl ServerSettings {
    /// How its URL begins.
    #[must_use]
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Warns of tokens that cross a network in clear text.
    pub(crate) fn warn_of_clear_text(&self, option: &str, listen: SocketAddr, has_tokens: bool) {
        if has_tokens && self.tls.is_none() && !listen.ip().is_loopback() {
            tracing::warn!(
                "{option} {listen}: tokens cross the network in clear text: give a certificate (--tls-cert, --tls-key), or let a \
                 proxy speak TLS"
            );
        }
    }
}

/// Serves until `stop`; then all connections are closed.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: ServerSettings,
    stop: CancellationToken,
) {
    // Connections have the size of their listener. By itself the kernel would take megabytes of answers that nobody reads.
    let _ = set_socket_send_buffer_size(&listener, SEND_BUFFER_BYTES);
    let router = guard_against_pages(router, settings.hosts);
    let admitted = Arc::new(Connections::new(
        MAX_CONNECTIONS,
        settings.max_connections_per_address,
    ));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (connection, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Answers are short: Nagle's algorithm would only delay them.
        let _ = connection.set_nodelay(true);
        let place = admitted.admit(peer.ip().to_canonical());
        let service = WithPeer {
            peer: Peer(peer),
            router: TowerToHyperService::new(router.clone()),
        };
        let tls = settings.tls.as_ref().map(ServerTls::acceptor);
        connections.spawn(async move {
            let evicted = place.evicted();
            let connection = WatchedConnection::new(connection, place);
            let served = async {
                match tls {
                    None => serve_one(connection, service).await,
                    Some(tls) => {
                        let handshake =
                            tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(connection));
                        if let Ok(Ok(connection)) = handshake.await {
                            serve_one(connection, service).await;
                        }
                    }
                }
            };
            evicted.run_until_cancelled(served).await;
        });
    }
}

async fn serve_one(
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: WithPeer,
) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(connection), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended badly");
    }
}

/// Requires one of the tokens for the routes of `router`; without tokens they are open.
pub fn guard(router: Router, tokens: Vec<Token>) -> Router {
    if tokens.is_empty() {
        return router;
    }
    let guard = Arc::new(Guard {
        tokens,
        wrong: WrongTokens::default(),
    });
    router.layer(middleware::from_fn_with_state(guard, check))
}

/// The tokens of which one is required.
struct Guard {
    tokens: Vec<Token>,
    wrong: WrongTokens,
}

async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let shown = authorization.map(header::HeaderValue::as_bytes);
    if guard.tokens.iter().any(|token| token.is_shown_by(shown)) {
        return next.run(request).await;
    }
    // To show none is no guess.
    if shown.is_some() {
        let peer = request.extensions().get();
        let peer = peer.map(|Peer(address)| address.ip());
        guard.wrong.wait(peer).await;
    }
    unauthorized()
}

/// The answer to a request without a token that is right.
#[must_use]
pub(crate) fn unauthorized() -> Response {
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
    use tokio::net::TcpStream;
    use tokio::time::{Instant, timeout};

    /// A client that never ends its head must not hold a connection.
    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_end_is_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(
            listener,
            Router::new(),
            ServerSettings::default(),
            CancellationToken::new(),
        ));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost:").await.unwrap();
        let begun = Instant::now();
        let mut answer = Vec::new();
        let closed = timeout(10 * HEAD_TIMEOUT, client.read_to_end(&mut answer)).await;
        closed.expect("the connection is closed").unwrap();
        assert!((HEAD_TIMEOUT..2 * HEAD_TIMEOUT).contains(&begun.elapsed()));
    }
}
