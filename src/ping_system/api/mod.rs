//! The ping system's routes (`.github/docs/protocol.md` section 1.3).

mod access;
mod agents;
mod dashboard;
mod error;
mod events;
mod history;
mod pages;
mod registration;
pub(crate) mod state;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::broadcast::Receiver;

use self::access::Access;
use self::dashboard::ListQuery;
use self::error::{ApiError, ApiResult};
use self::history::history;
use self::state::AppState;
use crate::net::browsers::is_of_browser;
use crate::net::credentials::Token;
use crate::net::metrics::metrics_answer;
use crate::net::server::{Peer, error, errors_as_json};
use crate::ping_system::agent_tokens::{RegisterTokens, SelfRegistrar};
use crate::ping_system::feed::{FeedEvent, Topic};
use crate::ping_system::store::Registration;
use crate::wire::ping_system::served::{Agent, Ping};

/// Concurrent event streams; each holds a connection.
pub(crate) const MAX_STREAMS: usize = 512;
/// The longest path and query; an agent's name is up to 256 bytes, three times that when escaped.
const MAX_PATH_BYTES: usize = 4 << 10;
/// The longest that a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The dashboard, in the colours that all pages have.
static PAGE: LazyLock<String> = LazyLock::new(|| {
    let colours = include_str!("../../palette.css");
    include_str!("dashboard.html").replacen("/* palette */", colours, 1)
});

/// The tokens of the API.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    /// Required by calls that change something; may also read.
    pub write: Option<Token>,
    /// Required by calls that only read; without it they are open.
    pub read: Option<Token>,
    /// Those with which each agent registers itself.
    pub(crate) register: Option<RegisterTokens>,
}

/// All routes; the page and `/health` are open to everybody and reveal nothing about agents.
pub(crate) fn routes(state: Arc<AppState>, tokens: Tokens) -> Router {
    let access = Access::new(tokens);
    let reading = Router::new()
        .route("/ping-system/agents", get(agents::list))
        .route(
            "/ping-system/agents/due-for-ping",
            get(agents::due_for_ping),
        )
        .route("/ping-system/agents/{agent_id}", get(agent))
        .route("/ping-system/agents/{agent_id}/history", get(history))
        .route("/ping-system/agents/{agent_id}/events", get(agent_events))
        .route("/ping-system/events", get(all_events))
        .route("/ping-system/dashboard", get(totals))
        .route("/ping-system/dashboard/agents", get(rows))
        .route("/metrics", get(metrics))
        .with_state(Arc::clone(&state))
        .layer(from_fn_with_state(Arc::clone(&access), access::reading));
    let registering = Router::new()
        .route("/ping-system/agents/register", post(register))
        .with_state(Arc::clone(&state))
        .layer(from_fn_with_state(Arc::clone(&access), access::registering));
    let writing = Router::new()
        .route("/ping-system/agents/{agent_id}", delete(remove))
        .route("/ping-system/agents/{agent_id}/ping", post(ping))
        .with_state(Arc::clone(&state))
        .layer(from_fn_with_state(access, access::writing));
    let open = Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .with_state(state);
    let routes = reading
        .merge(registering)
        .merge(writing)
        .merge(open)
        .fallback(async || error(StatusCode::NOT_FOUND, "no such path"))
        .method_not_allowed_fallback(async || {
            error(StatusCode::METHOD_NOT_ALLOWED, "no such method here")
        })
        .layer(middleware::from_fn(bound_path));
    errors_as_json(routes)
}

async fn bound_path(request: Request, next: Next) -> Response {
    let length = request
        .uri()
        .path_and_query()
        .map_or(0, |path| path.as_str().len());
    if length > MAX_PATH_BYTES {
        return error(StatusCode::URI_TOO_LONG, "expected a path of up to 4 KiB");
    }
    next.run(request).await
}

/// The page runs its own script, known by its hash, and contacts no other server.
static PAGE_POLICY: LazyLock<String> = LazyLock::new(|| {
    let (style, script) = (hash_of("style"), hash_of("script"));
    format!(
        "default-src 'none'; connect-src 'self'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
});

/// The hash of what the page has in its one element of this name, as a content security policy names it.
fn hash_of(element: &str) -> String {
    let (begin, end) = (format!("<{element}>"), format!("</{element}>"));
    let content = PAGE
        .split_once(&begin)
        .and_then(|(_, rest)| rest.split_once(&end))
        .map_or("", |(content, _)| content);
    STANDARD.encode(Sha256::digest(content))
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, Html(PAGE.as_str())).into_response()
}

/// Whether the store can be written to, and if not why, and what keeps agents from being observed; it answers within a
/// second.
async fn health(State(state): State<Arc<AppState>>) -> Response {
    match state.store.health().await {
        Ok(database) => {
            let unobserved = state.observer.hindrances();
            Json(json!({ "status": "ok", "database": database, "unobserved": unobserved }))
                .into_response()
        }
        Err(cause) => {
            let answer = json!({ "status": "unavailable", "error": cause.to_string() });
            (StatusCode::SERVICE_UNAVAILABLE, Json(answer)).into_response()
        }
    }
}

async fn metrics(State(state): State<Arc<AppState>>) -> ApiResult<Response> {
    let totals = state.store.totals(state.clock.now()).await?;
    Ok(metrics_answer(state.metrics.text(totals)))
}

async fn agent(
    State(state): State<Arc<AppState>>,
    Path(agent_id): Path<String>,
) -> ApiResult<Json<Agent>> {
    Ok(Json(state.find(&agent_id).await?.agent))
}

async fn register(
    State(state): State<Arc<AppState>>,
    mut request: Request,
) -> ApiResult<Json<Agent>> {
    let registrar: Option<SelfRegistrar> = request.extensions_mut().remove();
    let own_networks = registrar.as_ref().map(|registrar| {
        let peer = request.extensions().get();
        let peer = peer.map(|Peer(address)| IpNet::from(address.ip().to_canonical()));
        registrar.network.or(peer)
    });
    if is_of_browser(request.headers()) && !is_json(request.headers()) {
        return Err(ApiError::NotJson);
    }
    let body = body(request).await?;
    let form =
        registration::read(&body).map_err(|wrong| ApiError::BadRequest(wrong.to_string()))?;
    if let Some(registrar) = registrar.filter(|own| own.agent_id != form.agent_id) {
        return Err(ApiError::Forbidden(format!(
            "this token is that of '{}', which may register only itself",
            registrar.agent_id
        )));
    }
    let url = state
        .address_policy
        .check_registration(&form.agent_url)
        .await
        .map_err(|refused| ApiError::BadRequest(refused.to_string()))?;
    if let Some(own) = own_networks
        && !state.address_policy.leads_into(&url, own).await
    {
        return Err(ApiError::Forbidden(format!(
            "agent_url leads elsewhere than to {}: an agent registers itself where it is",
            own.map_or("the address it calls from".to_owned(), |own| own
                .to_string())
        )));
    }
    let new = Registration {
        agent_id: form.agent_id,
        agent_url: url.as_str().trim_end_matches('/').to_owned(),
        capabilities: form.capabilities,
        metadata: form.metadata,
        at: state.clock.now(),
        interval: state.rules.interval.base,
    };
    let known = state.store.register(&new).await?;
    tracing::info!(
        agent = known.agent.agent_id,
        url = known.agent.agent_url,
        "registered"
    );
    state.pinger.wake.notify_one();
    Ok(Json(known.agent))
}

/// Whether a body is said to be JSON, which no page of another origin may say without being asked first.
fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind.map(|kind| kind.split(';').next().unwrap_or_default().trim());
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"))
}

async fn body(request: Request) -> ApiResult<Bytes> {
    let read = to_bytes(request.into_body(), registration::MAX_BODY_BYTES);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => Err(ApiError::TooLarge),
        Err(_) => Err(ApiError::TooSlow),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RemoveQuery {
    /// Whether its history is deleted, too.
    forget: bool,
}

async fn remove(
    State(state): State<Arc<AppState>>,
    Path(agent_id): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> ApiResult<Json<Value>> {
    // An invalid id is not looked up: a database may refuse it (NUL bytes in PostgreSQL).
    if agent_id.contains('\0') {
        return Err(ApiError::NoAgent);
    }
    let removed = state
        .store
        .remove(&agent_id, state.clock.now(), query.forget);
    if !removed.await? {
        return Err(ApiError::NoAgent);
    }
    state.feed.forget(&agent_id);
    state.pinger.gpu_owners.forget(&agent_id);
    tracing::info!(agent = agent_id, "removed");
    Ok(Json(json!({ "agent_id": agent_id, "removed": true })))
}

async fn ping(
    State(state): State<Arc<AppState>>,
    Path(agent_id): Path<String>,
) -> ApiResult<Json<Ping>> {
    state.find(&agent_id).await?;
    Ok(Json(state.pinger.ping_now(&agent_id).await?))
}

async fn agent_events(
    State(state): State<Arc<AppState>>,
    Path(agent_id): Path<String>,
) -> ApiResult<Response> {
    // Subscribed first, so that no ping is missed once the client knows that the stream is open.
    let pings = state.feed.listen(Topic::Agent(agent_id.clone()));
    state.find(&agent_id).await?;
    stream_of(&state, pings)
}

async fn all_events(State(state): State<Arc<AppState>>) -> ApiResult<Response> {
    stream_of(&state, state.feed.listen(Topic::All))
}

fn stream_of(state: &AppState, pings: Receiver<FeedEvent>) -> ApiResult<Response> {
    let place = Arc::clone(&state.streams)
        .try_acquire_owned()
        .map_err(|_| ApiError::TooManyStreams)?;
    Ok(events::answer(pings, place))
}

async fn totals(State(state): State<Arc<AppState>>) -> ApiResult<Json<Value>> {
    let now = state.clock.now();
    let totals = state.store.totals(now).await?;
    Ok(Json(dashboard::totals(totals, now)))
}

async fn rows(
    State(state): State<Arc<AppState>>,
    Query(query): Query<ListQuery>,
) -> ApiResult<Json<Value>> {
    let (store, threshold) = (&*state.store, state.rules.interval.threshold);
    let mut page = dashboard::rows(store, &query, threshold, state.clock.now()).await?;
    page["unobserved"] = json!(state.observer.hindrances());
    Ok(Json(page))
}
