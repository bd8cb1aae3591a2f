//! Parses, starts the log, dispatches, and turns what came of it into an exit status.

use std::process::ExitCode;

use clap::Parser;
use uptime_runner::cli::{Cli, Command};
use uptime_runner::runner::Ended;
use uptime_runner::shutdown::Shutdown;
use uptime_runner::{runner, sim, telemetry};

const FAILED: u8 = 1;
const BAD_INPUT: u8 = 2;
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = telemetry::start_log() {
        return complain(&error, BAD_INPUT);
    }
    match cli.command {
        Some(Command::Mock(options)) => match options.resolve() {
            Ok(mock) => status(block_on(async |shutdown| {
                sim::mock::run(mock, &shutdown).await
            })),
            Err(error) => complain(&error, BAD_INPUT),
        },
        Some(Command::Demo(options)) => status(block_on(async |shutdown| {
            sim::demo::run(&options, &shutdown).await
        })),
        None => match cli.runner.resolve() {
            Ok(config) => status(block_on(async |shutdown| {
                runner::run(config, &shutdown).await
            })),
            Err(error) => complain(&error, BAD_INPUT),
        },
    }
}

/// One thread does everything but write the output: at the rates that matter a second one would
/// cost more in waking and stealing than it gives, and jobs would leave less exactly.
fn block_on<F>(work: F) -> anyhow::Result<Ended>
where
    F: AsyncFnOnce(Shutdown) -> anyhow::Result<Ended>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async { work(Shutdown::on_signals()?).await });
    // An output that stalls, or a name that is being looked up, must not hold up the end.
    runtime.shutdown_background();
    ended
}

fn status(ended: anyhow::Result<Ended>) -> ExitCode {
    match ended {
        Ok(Ended::AsAsked(missed)) if missed.is_empty() => ExitCode::SUCCESS,
        Ok(Ended::AsAsked(missed)) => {
            for missed in missed {
                eprintln!("error: {missed}");
            }
            ExitCode::from(FAILED)
        }
        Ok(Ended::AtOnce) => ExitCode::from(INTERRUPTED),
        Err(error) => complain(&error, FAILED),
    }
}

fn complain(error: &anyhow::Error, status: u8) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::from(status)
}
