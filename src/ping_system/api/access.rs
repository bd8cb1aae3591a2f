//! Who may do what (`.github/SECURITY.md`): the write token all, the read token reading, and an agent's own token what
//! concerns itself.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use percent_encoding::percent_decode_str;

use super::Tokens;
use crate::net::server::{Peer, unauthorized};
use crate::net::wrong_tokens::WrongTokens;
use crate::ping_system::agent_tokens::SelfRegistrar;

/// The tokens, and the addresses that sent wrong ones.
#[derive(Debug)]
pub(super) struct Access {
    tokens: Tokens,
    wrong: WrongTokens,
}

/// Who makes a request.
enum Caller {
    Writer,
    Reader,
    Agent(SelfRegistrar),
    Nobody,
}

impl Access {
    #[must_use]
    pub(super) fn new(tokens: Tokens) -> Arc<Self> {
        Arc::new(Self {
            tokens,
            wrong: WrongTokens::default(),
        })
    }

    fn caller(&self, request: &Request) -> Caller {
        let Tokens {
            write,
            read,
            register,
        } = &self.tokens;
        let shown = request.headers().get(header::AUTHORIZATION);
        let shown = shown.map(header::HeaderValue::as_bytes);
        let registrar = || register.as_ref()?.registrar(shown);
        if write.as_ref().is_some_and(|token| token.is_shown_by(shown)) {
            Caller::Writer
        } else if read.as_ref().is_some_and(|token| token.is_shown_by(shown)) {
            Caller::Reader
        } else {
            registrar().map_or(Caller::Nobody, Caller::Agent)
        }
    }

    fn refuse(self: Arc<Self>, request: &Request) -> impl Future<Output = Response> + use<> {
        let peer = request.extensions().get();
        let peer: Option<IpAddr> = peer.map(|Peer(address)| address.ip());
        // To show none is no guess.
        let is_guess = request.headers().contains_key(header::AUTHORIZATION);
        async move {
            if is_guess {
                self.wrong.wait(peer).await;
            }
            unauthorized()
        }
    }
}

/// For routes that change something.
pub(super) async fn writing(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Response {
    match access.caller(&request) {
        Caller::Writer => next.run(request).await,
        _ if access.tokens.write.is_none() => next.run(request).await,
        _ => {
            let refused = access.refuse(&request);
            drop(request);
            refused.await
        }
    }
}

/// For the registration: an agent may register itself. The route is told who it is.
pub(super) async fn registering(
    State(access): State<Arc<Access>>,
    mut request: Request,
    next: Next,
) -> Response {
    match access.caller(&request) {
        Caller::Writer => next.run(request).await,
        Caller::Agent(agent) => {
            request.extensions_mut().insert(agent);
            next.run(request).await
        }
        _ if access.tokens.write.is_none() => next.run(request).await,
        _ => {
            let refused = access.refuse(&request);
            drop(request);
            refused.await
        }
    }
}

/// For routes that only read.
pub(super) async fn reading(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Response {
    match access.caller(&request) {
        _ if access.tokens.read.is_none() => next.run(request).await,
        Caller::Writer | Caller::Reader => next.run(request).await,
        Caller::Agent(agent) if concerns(request.uri().path(), &agent.agent_id) => {
            next.run(request).await
        }
        _ => {
            let refused = access.refuse(&request);
            drop(request);
            refused.await
        }
    }
}

/// Whether a path is that of an agent's own record, history or events.
fn concerns(path: &str, agent_id: &str) -> bool {
    let Some(rest) = path.strip_prefix("/ping-system/agents/") else {
        return false;
    };
    let (id, what) = rest.split_once('/').unwrap_or((rest, ""));
    let id = percent_decode_str(id).decode_utf8();
    id.is_ok_and(|id| id == agent_id) && ["", "history", "events"].contains(&what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_reads_what_concerns_itself() {
        for (path, is_own) in [
            ("/ping-system/agents/a%20b", true),
            ("/ping-system/agents/a%20b/history", true),
            ("/ping-system/agents/a%20b/events", true),
            ("/ping-system/agents/a%20b/ping", false),
            ("/ping-system/agents/a", false),
            ("/ping-system/agents/a%20bc/history", false),
            ("/ping-system/agents", false),
            ("/ping-system/agents/", false),
            ("/ping-system/dashboard", false),
            ("/metrics", false),
        ] {
            assert_eq!(concerns(path, "a b"), is_own, "{path}");
        }
    }
}
