//! The health of the application that uses the GPU, asked in the background so that `/agent/ready` answers at once.

use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Client;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::net::client::root_cause;

/// How often it is asked, and the longest wait for its answer.
const INTERVAL: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(2);

/// What the application last said.
#[derive(Debug)]
pub(crate) struct ApplicationHealth {
    url: Url,
    /// Why it is not healthy, if it is not.
    problem: Mutex<Option<String>>,
}

impl ApplicationHealth {
    #[must_use]
    pub(crate) fn new(url: Url) -> Self {
        let problem = Mutex::new(Some(format!("{url} has not answered yet")));
        Self { url, problem }
    }

    #[must_use]
    pub(crate) fn is_https(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// Why the application is not healthy, if it is not.
    #[must_use]
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.lock().clone()
    }

    /// Asks until `stop`.
    pub(crate) async fn watch(&self, client: Client, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let asked = async {
            loop {
                ticks.tick().await;
                let problem = self.ask(&client).await.err();
                let before = std::mem::replace(&mut *self.problem.lock(), problem.clone());
                match (before, problem) {
                    (Some(_), None) => tracing::info!("--ready-also {}: healthy", self.url),
                    (None, Some(problem)) => tracing::warn!("--ready-also {problem}"),
                    _ => {}
                }
            }
        };
        stop.run_until_cancelled(asked).await;
    }

    async fn ask(&self, client: &Client) -> Result<(), String> {
        let url = &self.url;
        let answer = client.get(url.clone()).timeout(TIMEOUT).send().await;
        let answer = answer.map_err(|error| {
            if error.is_timeout() {
                format!("{url}: no answer in {TIMEOUT:?}")
            } else {
                format!("{url}: {}", root_cause(&error))
            }
        })?;
        if answer.status().is_success() {
            Ok(())
        } else {
            Err(format!("{url}: status {}", answer.status().as_u16()))
        }
    }
}
