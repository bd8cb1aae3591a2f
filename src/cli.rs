//! The commands; each flattens the options of its part.

use std::ffi::OsString;

use anyhow::Context;
use clap::error::{ContextKind, ContextValue};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use crate::agent::AgentConfig;
use crate::agent::options::AgentOptions;
use crate::agent::probe::child::ProbeOptions;
use crate::option_values::without_credentials;
use crate::ping_system::PingSystemConfig;
use crate::ping_system::options::{PingSystemOptions, UnitVariables};
use crate::report::ReportOptions;
use crate::report::statement::verify::VerifyOptions;
use crate::runner::config::{Layers, RunnerArgs, RunnerConfig};
use crate::sim::demo::DemoOptions;
use crate::sim::mock::{Mock, MockOptions};

/// Sends paced jobs to a Livepeer BYOC gateway, at the rate that a GPU agent's uptime has earned
#[derive(Debug, Parser)]
#[command(
    version = env!("PROGRAM_VERSION"),
    args_conflicts_with_subcommands = true,
    allow_negative_numbers = true,
    override_usage = "uptime-runner --agent <ID>... [OPTIONS]\n       uptime-runner <COMMAND> [OPTIONS]",
    after_help = AFTER_HELP
)]
pub struct Cli {
    /// Without one, this is the job runner.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The job runner's options.
    #[command(flatten)]
    pub runner: RunnerArgs,
}

const CHECK: &str = "check";
const PING_SYSTEM: &str = "ping-system";

const AFTER_HELP: &str = "\
Uptime and job rate: 99 % and over earn the whole rate, 95 % half, 90 % a tenth, below nothing.
A length of time T is a number of seconds, or as in 500ms, 2m, 1h30m.
Each option is also UPTIME_RUNNER_<NAME> in the environment, and a key in the file of --config:
flag beats environment beats file beats default. RUST_LOG sets what is logged to standard error.

Exit status: 0 ended as asked; 1 failed while running, or a --require threshold was missed;
2 bad input; 130 second interrupt.";

/// The other parts that this binary plays.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch the GPUs of this machine and answer the ping system
    Agent(Box<AgentOptions>),
    /// Look at the GPUs for an agent
    #[command(hide = true)]
    Probe(ProbeOptions),
    /// Ask agents for their uptime, remember it, and answer questions about it
    PingSystem(Box<PingSystemOptions>),
    /// Play a ping system and a gateway on one port, by a script
    Mock(MockOptions),
    /// See it all at work: every part of the system on this machine, nothing else needed
    Demo(DemoOptions),
    /// Find out whether everything that the job runner needs works, without sending a job
    Check(Box<RunnerArgs>),
    /// Tell what recorded runs (--record) say: jobs, costs, claims, what another policy would have done
    /// and what may come
    Report(ReportOptions),
    /// Compute again what an agent earned, from a statement and the jobs that it lists
    Verify(VerifyOptions),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the manual page of the job runner, or of a command
    Man {
        /// Which command
        command: Option<String>,
    },
}

/// A command with its checked options.
#[derive(Debug)]
pub enum Task {
    /// Send jobs.
    Run(Box<RunnerConfig>),
    /// Watch GPUs.
    Agent(Box<AgentConfig>),
    /// Look at them for an agent.
    Probe(ProbeOptions),
    /// Ask agents.
    PingSystem(Box<PingSystemConfig>),
    /// Play the counterparts.
    Mock(Mock),
    /// Show it all.
    Demo(DemoOptions),
    /// Ask everything.
    Check(Box<RunnerConfig>),
    /// Tell of the past.
    Report(ReportOptions),
    /// Check a statement.
    Verify(VerifyOptions),
    /// Print a text.
    Print(Vec<u8>),
}

impl Cli {
    /// What was typed, with what environment and file say beside it. `AGENT_MODE=true`, with or without the agent's
    /// options, means the agent. Ends the program where the command line is wrong, or
    /// asks for help.
    ///
    /// # Errors
    /// Bad input in environment or file, in a message that names the variable or the line.
    pub fn typed() -> anyhow::Result<Self> {
        let mut arguments: Vec<OsString> = std::env::args_os().collect();
        let is_option = |argument: &OsString| argument.as_encoded_bytes().starts_with(b"-");
        if arguments.get(1).is_none_or(is_option) && agent_mode()? {
            arguments.splice(
                ..arguments.len().min(1),
                ["uptime-runner".into(), "agent".into()],
            );
        }
        let command = Self::command();
        let matches = parse(command.clone(), &arguments);
        match matches.subcommand() {
            None => Self::with_layers(&command, &matches, arguments, None),
            Some((CHECK, typed)) => Self::with_layers(&command, typed, arguments, Some(CHECK)),
            Some((PING_SYSTEM, _)) => {
                let variables = UnitVariables::read()?;
                let command =
                    command.mut_subcommand(PING_SYSTEM, |command| variables.prepare(command));
                Self::read(&parse(command, &arguments))
            }
            Some(_) => Self::read(&matches),
        }
    }

    fn read(matches: &ArgMatches) -> anyhow::Result<Self> {
        Self::from_arg_matches(matches).context("the command line cannot be read")
    }

    /// Reads the command line again, with the runner's options from environment and file.
    fn with_layers(
        command: &clap::Command,
        typed: &ArgMatches,
        mut arguments: Vec<OsString>,
        subcommand: Option<&'static str>,
    ) -> anyhow::Result<Self> {
        let runner = subcommand.and_then(|name| command.find_subcommand(name));
        let layers = Layers::read(runner.unwrap_or(command), typed)?;
        arguments.extend(layers.flags().cloned());
        let command = command.clone();
        let command = match subcommand {
            Some(name) => command.mut_subcommand(name, |runner| layers.prepare(runner)),
            None => layers.prepare(command),
        };
        let mut cli = Self::read(&parse(command, &arguments))?;
        match &mut cli.command {
            Some(Command::Check(runner)) => runner.add_file(layers),
            _ => cli.runner.add_file(layers),
        }
        Ok(cli)
    }

    /// Checks everything before anything is done.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the file's line.
    pub fn resolve(self) -> anyhow::Result<Task> {
        Ok(match self.command {
            None => Task::Run(Box::new(self.runner.resolve()?)),
            Some(Command::Agent(options)) => Task::Agent(Box::new(options.resolve()?)),
            Some(Command::Probe(options)) => Task::Probe(options),
            Some(Command::PingSystem(options)) => Task::PingSystem(Box::new(options.resolve()?)),
            Some(Command::Mock(options)) => Task::Mock(options.resolve()?),
            Some(Command::Demo(options)) => Task::Demo(options),
            Some(Command::Check(options)) => Task::Check(Box::new(options.resolve()?)),
            Some(Command::Report(options)) => Task::Report(options.resolve()?),
            Some(Command::Verify(options)) => Task::Verify(options),
            Some(Command::Completions { shell }) => Task::Print(completions(shell)),
            Some(Command::Man { command }) => Task::Print(manual(command.as_deref())?),
        })
    }
}

/// Whether the environment says that this is the agent.
fn agent_mode() -> anyhow::Result<bool> {
    let Some(mode) = std::env::var_os("AGENT_MODE") else {
        return Ok(false);
    };
    let text = mode.to_string_lossy();
    match text.trim().to_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "" | "false" | "0" | "no" | "off" => Ok(false),
        _ => anyhow::bail!(
            "AGENT_MODE='{}': expected true or false",
            text.escape_debug()
        ),
    }
}

/// Ends the program where the command line is wrong, or asks for help.
fn parse(command: clap::Command, arguments: &[OsString]) -> ArgMatches {
    command
        .try_get_matches_from(arguments)
        .unwrap_or_else(|mut error| {
            if let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue) {
                let shown = without_credentials(value).into_owned();
                error.insert(ContextKind::InvalidValue, ContextValue::String(shown));
            }
            error.exit()
        })
}

fn completions(shell: Shell) -> Vec<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "uptime-runner", &mut text);
    text
}

fn manual(of: Option<&str>) -> anyhow::Result<Vec<u8>> {
    let mut whole = Cli::command();
    // Commands get their full names and usage.
    whole.build();
    let command = match of {
        None => whole,
        Some(name) => whole.find_subcommand(name).cloned().with_context(|| {
            let names = whole.get_subcommands().map(clap::Command::get_name);
            let names: Vec<&str> = names.collect();
            format!("man '{name}': expected one of {}", names.join(", "))
        })?,
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    Ok(text)
}
