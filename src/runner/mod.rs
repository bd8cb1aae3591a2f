//! The job runner: asks for agents' uptimes, turns them into job rates, sends paced jobs to the
//! gateway and accounts for every one.

pub(crate) mod agents;
pub mod check;
pub(crate) mod config;
mod deadline;
pub(crate) mod discovery;
pub(crate) mod events;
pub(crate) mod rate;
pub(crate) mod roster;
pub(crate) mod send;
#[cfg(test)]
mod testing;
pub(crate) mod uptime;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use axum::routing::get;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::agents::destinations::Destinations;
use self::agents::fleet::{Fleet, terms};
use self::agents::setup;
use self::agents::submitter::SubmitterContext;
use self::config::{MetricsConfig, RunnerConfig};
use self::discovery::Discovery;
use self::events::database::RunDescription;
use self::events::dispatcher::EventDispatcher;
use self::events::event::Event;
use self::events::output::Output;
use self::events::output::text::TextOutput;
use self::events::output::writer::Writer;
use self::events::recorder::RunRecorder;
use self::events::require::Evaluated;
use self::events::run_clock::RunClock;
use self::rate::controller::Sharing;
use crate::option_values::OutputFormat;
use crate::runner::roster::Roster;
use crate::shutdown::Shutdown;
use crate::{net, telemetry, terminal};

/// The time between two status lines.
const STATUS_INTERVAL: Duration = Duration::from_millis(250);
/// How long a second signal waits for standard output to take the final accounts.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// As asked.
    Completed,
    /// Not with the result that was required, which has been told.
    Missed,
    /// By a second signal.
    Interrupted,
}

impl From<()> for Exit {
    fn from((): ()) -> Self {
        Self::Completed
    }
}

/// Runs until the first signal, `--duration` or `--max-jobs`.
///
/// # Errors
/// What cannot be set up, standard output that takes no more, a task that panicked.
pub async fn run(config: RunnerConfig, shutdown: &Shutdown) -> anyhow::Result<Exit> {
    let stop = shutdown.gently.child_token();
    let output_failed = CancellationToken::new();
    let mut run = Run::set_up(config, stop.clone(), output_failed.clone()).await?;

    let mut broken = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            () = output_failed.cancelled() => break,
            () = deadline::reached(run.ends_at) => break,
            panic = first_panic(&mut run.fleet.tasks) => {
                broken = Some(panic);
                break;
            }
            Some(listed) = run.listed.recv() => run.fleet.follow_listed(&listed),
        }
    }
    stop.cancel();
    run.events.record(&Event::Stopping {
        ts: run.events.now(),
    });

    if shutdown.gently.is_cancelled() {
        tracing::info!(
            jobs_under_way = run.shared.jobs.len(),
            "stopping: no new job is sent, answers are waited for, at most {:?}; a second signal abandons these jobs",
            run.config.longest_timeout()
        );
    }
    run.shared.jobs.close();
    let mut at_once = false;
    let is_finished = tokio::select! {
        () = run.finished() => true,
        () = output_failed.cancelled() => false,
        () = shutdown.at_once.cancelled() => {
            at_once = true;
            false
        }
    };
    if !is_finished {
        run.abandon_jobs().await;
    }
    let total = tokio::select! {
        closed = run.events.close() => closed.context("standard output cannot be written")?,
        () = drain_timed_out(at_once, shutdown) => return Ok(Exit::Interrupted),
    };
    if let Some(panic) = broken {
        bail!("a task of the runner failed: {panic}");
    }
    if at_once {
        return Ok(Exit::Interrupted);
    }
    let requirements = &run.config.output.requirements;
    let evaluated: Vec<Evaluated> = requirements.iter().map(|r| r.evaluate(&total)).collect();
    for each in &evaluated {
        telemetry::say(&each.to_string());
    }
    ensure!(
        !run.events.has_agents() || run.events.has_known_uptime(),
        "no agent's uptime was ever known, so no job was sent: `uptime-runner check` tells why"
    );
    Ok(if evaluated.iter().all(|each| each.is_met) {
        Exit::Completed
    } else {
        Exit::Missed
    })
}

/// All that lives as long as a run.
struct Run {
    config: Arc<RunnerConfig>,
    events: Arc<EventDispatcher>,
    shared: Arc<SubmitterContext>,
    fleet: Fleet,
    /// Who is to be followed, where that is not known from the start.
    listed: mpsc::Receiver<agents::fleet::Listed>,
    ends_at: Option<Instant>,
    /// Metrics, status line, and what looks at all agents together: ended when dropped.
    _helpers: JoinSet<()>,
}

impl Run {
    async fn set_up(
        config: RunnerConfig,
        stop: CancellationToken,
        output_failed: CancellationToken,
    ) -> anyhow::Result<Self> {
        let metrics_listener = listen_for_metrics(&config).await?;
        let client = setup::client(&config)?;

        let text = TextOutput {
            colour: terminal::wants_colour(&std::io::stdout()),
        };
        let events = Arc::new(dispatcher(&config, text, output_failed)?);
        events.record(&Event::Started { ts: events.now() });
        config.warn();

        let shared = Arc::new(setup::shared(&config, &events, stop));
        let destinations = Arc::new(Destinations::new(&config)?);
        let discovery = Arc::new(Discovery::default());
        let ping_system = Arc::new(setup::ping_system(&config, client));
        let ends_at = config
            .limits
            .duration
            .map(|duration| Instant::now() + duration);
        let config = Arc::new(config);

        let mut helpers = JoinSet::new();
        let in_flight = Arc::clone(&shared.in_flight);
        let in_flight = move || in_flight.in_flight();
        if let (Some(listener), Some(metrics)) = (metrics_listener, &config.output.metrics) {
            let events = Arc::clone(&events);
            let served = serve_metrics(listener, metrics.clone(), events, in_flight.clone())?;
            helpers.spawn(served);
        }
        if config.output.format == OutputFormat::Text && terminal::columns().is_some() {
            helpers.spawn(show_status(Arc::clone(&events), text, in_flight, ends_at));
        }
        let interval = config.ping.interval;
        if config.rate.sharing != Sharing::Own {
            helpers.spawn(agents::fleet::rebalance(
                Arc::clone(&shared.rates),
                interval,
            ));
        }
        let tended = Arc::clone(&destinations);
        helpers.spawn(async move { tended.tend().await });
        let watched = (
            Arc::clone(&discovery),
            Arc::clone(&destinations),
            Arc::clone(&events),
        );
        helpers.spawn(async move {
            let (discovery, destinations, events) = watched;
            discovery.watch(destinations.orchestrators(), &events).await;
        });
        let rates = Arc::clone(&shared.rates);
        helpers.spawn(async move { rates.end_throttling().await });
        let (sender, listed) = mpsc::channel(1);
        if config.agents.all {
            let ping_system = Arc::clone(&ping_system);
            helpers.spawn(agents::fleet::watch_list(ping_system, interval, sender));
        }
        let mut fleet = Fleet::new(
            Arc::clone(&config),
            Arc::clone(&shared),
            ping_system,
            destinations,
            discovery,
        );
        fleet.follow_configured();
        Ok(Self {
            config,
            events,
            shared,
            fleet,
            listed,
            ends_at,
            _helpers: helpers,
        })
    }

    /// Waits for the submitters, then for the jobs that they have sent, each at most its timeout.
    async fn finished(&mut self) {
        while self.fleet.tasks.join_next().await.is_some() {}
        self.shared.jobs.wait().await;
    }

    /// Ends the jobs under way without their answers, and waits until that is recorded. What has no capacity to print it
    /// is not waited for.
    async fn abandon_jobs(&mut self) {
        let jobs = self.shared.jobs.len();
        self.shared.abandon.cancel();
        if jobs > 0 && self.config.uses_gateway() {
            tracing::warn!(
                "{jobs} jobs are abandoned: they are charged, and the place that each has at its orchestrator stays taken \
                 until its capability is registered again; only live runners free it"
            );
        } else if jobs > 0 {
            tracing::warn!("{jobs} jobs are abandoned: they are charged");
        }
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, self.finished()).await;
    }
}

fn dispatcher(
    config: &RunnerConfig,
    text: TextOutput,
    output_failed: CancellationToken,
) -> anyhow::Result<EventDispatcher> {
    let output = match config.output.format {
        OutputFormat::Text => Output::Text(text),
        OutputFormat::Json => Output::Json,
    };
    let roster = Roster {
        agents: config
            .agents
            .at_start()
            .iter()
            .map(|agent| agent.id.as_str().into())
            .collect(),
        capabilities: config
            .gateway
            .capabilities
            .iter()
            .map(|c| c.name.as_str().into())
            .collect(),
        base_rate: config.rate.base,
    };
    let clock = RunClock::start();
    let recording = config
        .record
        .file
        .clone()
        .map(|file| RunRecorder::start(file, description(config), clock))
        .transpose()?;
    let writer = Writer::start(std::io::stdout(), output_failed)
        .context("the output thread cannot be started")?;
    Ok(EventDispatcher::new(
        roster,
        output,
        config.output.stats_every,
        writer,
        recording,
        clock,
    )?)
}

/// What is recorded of the run itself.
fn description(config: &RunnerConfig) -> RunDescription {
    let agents = config.agents.at_start().iter();
    let capabilities = config.gateway.capabilities.iter();
    RunDescription {
        agents: agents.map(|agent| terms(agent, config)).collect(),
        capabilities: capabilities.map(|c| c.name.as_str().into()).collect(),
        policy: config.rate.policy.to_string(),
        id: Uuid::new_v4(),
        uptime_window: config.ping.window,
        stale_after: config.ping.stale_after,
        ping_urls: vec![config.ping.endpoint.url.to_string()],
        gateway_urls: config.gateway.urls().map(ToString::to_string).collect(),
        terms: run_terms(config),
        keep: config.record.keep,
    }
}

/// What else decides which jobs are sent, for the record.
fn run_terms(config: &RunnerConfig) -> Value {
    let sharing = match config.rate.sharing {
        Sharing::Own => json!(null),
        Sharing::Total {
            rate,
            split,
            redistribute,
        } => json!({ "total_rate": rate, "split": split.name(), "redistribute": redistribute }),
    };
    let agents = config.agents.at_start().iter().map(|agent| {
        let budget = agent.budget.as_ref();
        (
            agent.id.clone(),
            json!({ "rate": config.base_rate(agent), "budget_wei": budget }),
        )
    });
    let capabilities = config.gateway.capabilities.iter().map(|capability| {
        let terms =
            json!({ "timeout_seconds": capability.timeout_seconds, "weight": capability.weight });
        (capability.name.clone(), terms)
    });
    json!({
        "rate": config.rate.base,
        "sharing": sharing,
        "agents": agents.collect::<Map<_, _>>(),
        "capabilities": capabilities.collect::<Map<_, _>>(),
        "budget_wei": config.limits.budget,
        "max_in_flight": config.limits.max_in_flight,
        "timeout_seconds": config.gateway.timeout.map(|timeout| timeout.as_secs_f64()),
        "random_seed": config.gateway.random_seed,
    })
}

async fn listen_for_metrics(config: &RunnerConfig) -> anyhow::Result<Option<TcpListener>> {
    Ok(match &config.output.metrics {
        Some(metrics) => Some(net::server::listen("--metrics-listen", metrics.listen).await?),
        None => None,
    })
}

/// Serves metrics until it is dropped: the last figures stay readable while answers are awaited.
fn serve_metrics(
    listener: TcpListener,
    config: MetricsConfig,
    events: Arc<EventDispatcher>,
    in_flight: impl Fn() -> usize + Send + Sync + 'static,
) -> anyhow::Result<impl Future<Output = ()>> {
    let (scheme, address) = (config.server.scheme(), listener.local_addr()?);
    tracing::info!("metrics at {scheme}://{address}/metrics");
    let routes = net::metrics::metrics_routes(move || events.metrics_text(in_flight()));
    let tokens = config.token.into_iter().collect();
    Ok(net::server::serve(
        listener,
        net::server::guard(routes, tokens).route("/health", get(async || "ok\n")),
        config.server,
        CancellationToken::new(),
    ))
}

async fn show_status(
    events: Arc<EventDispatcher>,
    text: TextOutput,
    in_flight: impl Fn() -> usize,
    ends_at: Option<Instant>,
) {
    let mut ticks = tokio::time::interval(STATUS_INTERVAL);
    loop {
        ticks.tick().await;
        let left = ends_at.map(|at| at.saturating_duration_since(Instant::now()));
        // Asked for each time: a window's width changes.
        events.show_status(text, terminal::columns().unwrap_or(80), in_flight(), left);
    }
}

/// Waits for a task that panics; one that ends otherwise was told to.
async fn first_panic(tasks: &mut JoinSet<()>) -> JoinError {
    while let Some(ended) = tasks.join_next().await {
        if let Err(panic) = ended {
            return panic;
        }
    }
    std::future::pending().await
}

/// Returns when no more can be waited for standard output.
async fn drain_timed_out(at_once: bool, shutdown: &Shutdown) {
    if !at_once {
        shutdown.at_once.cancelled().await;
    }
    tokio::time::sleep(DRAIN_TIMEOUT).await;
}
