//! The whole system at work on loopback, with nothing else needed.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::Context;

use super::mock::Mock;
use super::script::UptimeScript;
use crate::config::options::RunnerOptions;
use crate::config::with_path;
use crate::runner::{self, Ended};
use crate::shutdown::Shutdown;
use crate::units::{JobsPerMinute, Percent, Span};

const AGENT: &str = "agent-001";

/// What the agent's uptime is after which share of the demo: each tier, none, and back.
const STORY: [(f64, f64); 5] = [
    (0.0, 99.5),
    (0.25, 96.2),
    (0.5, 92.0),
    (0.65, 85.0),
    (0.8, 99.5),
];

/// Jobs that full uptime would earn over the whole demo.
const JOBS: f64 = 120.0;

/// `uptime-runner demo`.
#[derive(Debug, clap::Args)]
pub struct DemoOptions {
    /// How long it takes
    #[arg(long, value_name = "T", default_value = "1m")]
    duration: Span,
}

/// Runs the mock and the real job runner against it.
///
/// # Errors
/// As [`runner::run`], or when no port is free.
pub async fn run(options: &DemoOptions, shutdown: &Shutdown) -> anyhow::Result<Ended> {
    let duration = options.duration.get();
    let mut steps = Vec::new();
    for (share, uptime) in STORY {
        steps.push((duration.mul_f64(share), Percent::new(uptime)?));
    }
    let mock = Mock {
        listen: ([127, 0, 0, 1], 0).into(),
        agents: vec![AGENT.to_owned()],
        uptime: UptimeScript::new(steps),
        latency: "45ms±10".parse().map_err(anyhow::Error::msg)?,
        failures: vec!["500:2%".parse().map_err(anyhow::Error::msg)?],
    };
    let (mock, address) = mock.bind().await?;
    let url = format!("http://{address}")
        .parse()
        .context("an address is a valid host")?;

    let mut config = RunnerOptions::for_agent(AGENT).resolve()?;
    config.ping.url = url;
    config.gateway.url = with_path(&config.ping.url, "gateway");
    config.duration = Some(duration);
    config.base_rate = base_rate(duration);
    // A question a second in a demo of a minute, so that a step shows soon.
    config.uptime_interval = (duration / 60).max(Duration::from_millis(20));

    writeln!(
        io::stdout(),
        "demo: {AGENT} has an uptime of 99.5, 96.2, 92, 85 and again 99.5 % within {duration:?}; \
         the whole rate is {} jobs/min\n",
        config.base_rate
    )
    .context("standard output takes no more")?;
    let stop_mock = shutdown.at_once.child_token();
    let (_, ended) = tokio::join!(mock.serve(stop_mock.clone()), async {
        let ended = runner::run(config, shutdown).await;
        stop_mock.cancel();
        ended
    });
    ended
}

/// The same number of jobs however long the demo is, but at least one a second.
fn base_rate(duration: Duration) -> JobsPerMinute {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped"
    )]
    let jobs = (JOBS * 60.0 / duration.as_secs_f64()).clamp(60.0, 60_000.0) as u32;
    JobsPerMinute::new(jobs)
}
