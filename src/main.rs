//! Parses the command line, starts the log, dispatches, and turns the result into an exit status.

use std::process::ExitCode;
use std::time::Duration;

use uptime_runner::cli::{Cli, Task};
use uptime_runner::report::statement::verify::{self, Verified, VerifyOptions};
use uptime_runner::runner::Exit;
use uptime_runner::shutdown::Shutdown;
use uptime_runner::{agent, ping_system, report, runner, sim, telemetry, terminal};

const FAILED: u8 = 1;
const BAD_INPUT: u8 = 2;
const INTERRUPTED: u8 = 130;

/// How long a reader of standard error is waited for at the end.
const LOG_PATIENCE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let status = start();
    telemetry::flush(LOG_PATIENCE);
    status
}

fn start() -> ExitCode {
    let cli = Cli::typed();
    let task = match telemetry::start_log().and(cli).and_then(Cli::resolve) {
        Ok(task) => task,
        Err(error) => return complain(&format!("{error:#}"), BAD_INPUT),
    };
    let task = match task {
        // It must not start threads of ours before it limits itself.
        Task::Probe(options) => return options.run(),
        Task::Verify(options) => return verify(&options),
        task => task,
    };
    match run(task) {
        Ok(Exit::Completed) => ExitCode::SUCCESS,
        Ok(Exit::Missed) => ExitCode::from(FAILED),
        Ok(Exit::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) => complain(&format!("{error:#}"), FAILED),
    }
}

/// One thread does everything but write the output: at the rates that matter a second one would
/// cost more in waking and stealing than it gives, and jobs would leave less exactly.
fn run(task: Task) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::on_signals()?;
        match task {
            Task::Run(config) => runner::run(*config, &shutdown).await,
            Task::Probe(_) | Task::Verify(_) => unreachable!("they run without a runtime"),
            Task::Agent(config) => agent::run(*config, &shutdown).await.map(Exit::from),
            Task::PingSystem(config) => ping_system::run(*config, &shutdown).await.map(Exit::from),
            Task::Mock(mock) => sim::mock::run(mock, &shutdown).await,
            Task::Demo(options) => Box::pin(sim::demo::run(&options, &shutdown)).await,
            Task::Check(config) => runner::check::run(*config).await,
            Task::Report(options) => report::run(&options).map(Exit::from),
            Task::Print(text) => terminal::print(&text).map(Exit::from),
        }
    });
    // A stalled output or a pending name lookup must not delay the exit.
    runtime.shutdown_background();
    ended
}

fn verify(options: &VerifyOptions) -> ExitCode {
    match verify::run(options) {
        Ok(Verified::Equal) => print("equal", ExitCode::SUCCESS),
        Ok(Verified::Differs(difference)) => print(&difference, ExitCode::from(FAILED)),
        Err(error) => complain(&format!("{error:#}"), BAD_INPUT),
    }
}

fn print(line: &str, status: ExitCode) -> ExitCode {
    match terminal::print(format!("{line}\n").as_bytes()) {
        Ok(()) => status,
        Err(error) => complain(&format!("{error:#}"), FAILED),
    }
}

fn complain(message: &str, status: u8) -> ExitCode {
    telemetry::say(&format!("error: {message}"));
    ExitCode::from(status)
}
