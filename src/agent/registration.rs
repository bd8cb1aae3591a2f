//! Registers the agent at its ping system, so that nobody else has to.

use std::time::Duration;

use reqwest::header::AUTHORIZATION;
use reqwest::{Client, StatusCode};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::net::client::{read_body, root_cause};
use crate::net::credentials::Token;
use crate::net::endpoint::with_path;
use crate::text::foreign;

/// Registered again after so long: the ping system may have lost it.
const REPEAT: Duration = Duration::from_hours(1);
/// Pauses after a failure.
const MIN_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_mins(1);
/// The longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest reason of a refusal that is read.
const MAX_REASON_BYTES: usize = 4 << 10;
/// How much of it is told.
const MAX_REASON_CHARS: usize = 200;

/// Where the agent registers itself, and as what.
#[derive(Debug, Clone)]
pub struct RegistrationConfig {
    /// The ping system's base URL.
    pub ping_system: Url,
    /// Where the ping system reaches the agent; `None` for the address that it listens on.
    pub advertise: Option<Url>,
    pub token: Option<Token>,
}

/// Registers the agent until `stop`, at once and again from time to time. Nothing that goes wrong here stops the agent.
pub(crate) async fn run(
    config: RegistrationConfig,
    client: Client,
    agent_id: String,
    agent_url: Url,
    stop: CancellationToken,
) {
    let mut pause = MIN_PAUSE;
    let mut warned = false;
    let mut registered = false;
    loop {
        let attempt = register(&config, &client, &agent_id, &agent_url);
        let Some(result) = stop.run_until_cancelled(attempt).await else {
            return;
        };
        let wait = match result {
            Ok(()) => {
                if !std::mem::replace(&mut registered, true) || warned {
                    tracing::info!(
                        "registered at {} as reachable at {agent_url}",
                        config.ping_system
                    );
                }
                (pause, warned) = (MIN_PAUSE, false);
                REPEAT
            }
            Err(reason) => {
                if !std::mem::replace(&mut warned, true) {
                    tracing::warn!(
                        "not registered at {}, trying again: {reason}",
                        config.ping_system
                    );
                }
                let wait = pause;
                pause = (pause * 2).min(MAX_PAUSE);
                wait
            }
        };
        if stop
            .run_until_cancelled(tokio::time::sleep(wait))
            .await
            .is_none()
        {
            return;
        }
    }
}

async fn register(
    config: &RegistrationConfig,
    client: &Client,
    agent_id: &str,
    agent_url: &Url,
) -> Result<(), String> {
    let url = with_path(&config.ping_system, "ping-system/agents/register");
    // Without capabilities and metadata: those that an operator has told stay.
    let body = json!({ "agent_id": agent_id, "agent_url": agent_url.as_str() });
    let mut request = client
        .post(url)
        .header("content-type", "application/json")
        .body(body.to_string());
    if let Some(token) = &config.token {
        request = request.header(AUTHORIZATION, token.header());
    }
    let exchange = async {
        let response = request.send().await.map_err(|error| root_cause(&error))?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(());
        }
        let reason = read_body(response, MAX_REASON_BYTES)
            .await
            .unwrap_or_default();
        let reason = foreign(&String::from_utf8_lossy(&reason), MAX_REASON_CHARS);
        let hint = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ": check --register-token-file",
            _ => "",
        };
        Err(format!("status {status}{hint} {reason}"))
    };
    tokio::time::timeout(TIMEOUT, exchange)
        .await
        .unwrap_or_else(|_| Err(format!("no answer in {}s", TIMEOUT.as_secs())))
}
