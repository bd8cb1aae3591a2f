//! Every command and option.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::agent::AgentConfig;
use crate::agent::options::AgentOptions;
use crate::ping_system::PingSystemConfig;
use crate::ping_system::options::PingSystemOptions;
use crate::report::ReportOptions;
use crate::runner::config::RunnerConfig;
use crate::runner::config::options::RunnerOptions;
use crate::sim::demo::DemoOptions;
use crate::sim::mock::{Mock, MockOptions};

/// Sends paced jobs to a Livepeer BYOC gateway, at the rate that a GPU agent's uptime has earned
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    allow_negative_numbers = true,
    mut_args = |arg| arg.hide_env(true),
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

const AFTER_HELP: &str = "\
Uptime and job rate: 99 % and over earn the whole rate, 95 % half, 90 % a tenth, below nothing.
A length of time T is a number of seconds, or as in 500ms, 2m, 1h30m.
Each option is also UPTIME_RUNNER_<NAME> in the environment, and a key in the file of --config:
flag beats environment beats file beats default. RUST_LOG sets what is logged to standard error.

Exit status: 0 ended as asked; 1 failed while running, or a --require threshold was missed;
2 bad input; 130 second interrupt.";

/// What else this binary is.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch the GPUs of this machine and answer the ping system
    Agent(AgentOptions),
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

/// What is to be done, checked.
#[derive(Debug)]
pub enum Task {
    /// Send jobs.
    Run(Box<RunnerConfig>),
    /// Watch GPUs.
    Agent(Box<AgentConfig>),
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
    /// Print a text.
    Print(Vec<u8>),
}

impl Cli {
    /// What was typed. `AGENT_MODE=true` without arguments means the agent (CONTRACT.md section 3).
    #[must_use]
    pub fn typed() -> Self {
        let agent_mode =
            std::env::var("AGENT_MODE").is_ok_and(|mode| mode == "true" || mode == "1");
        let mut arguments: Vec<_> = std::env::args_os().collect();
        if agent_mode && arguments.len() <= 1 {
            arguments = vec!["uptime-runner".into(), "agent".into()];
        }
        Self::parse_from(arguments)
    }

    /// Checks everything before anything is done.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the file's line.
    pub fn resolve(self) -> anyhow::Result<Task> {
        Ok(match self.command {
            None => Task::Run(Box::new(self.runner.resolve()?)),
            Some(Command::Agent(options)) => Task::Agent(Box::new(options.resolve()?)),
            Some(Command::PingSystem(options)) => Task::PingSystem(Box::new(options.resolve()?)),
            Some(Command::Mock(options)) => Task::Mock(options.resolve()?),
            Some(Command::Demo(options)) => Task::Demo(options),
            Some(Command::Check(options)) => Task::Check(Box::new(options.resolve()?)),
            Some(Command::Report(options)) => Task::Report(options.resolve()?),
            Some(Command::Completions { shell }) => Task::Print(completions(shell)),
            Some(Command::Man { command }) => Task::Print(manual(command.as_deref())?),
        })
    }
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

/// The job runner's command line.
#[derive(Debug, Args)]
pub struct RunnerArgs {
    /// TOML file with any of these options, further capabilities and agents
    #[arg(long, value_name = "FILE", env = "UPTIME_RUNNER_CONFIG")]
    pub config: Option<PathBuf>,
    /// What can stand in the file, too.
    #[command(flatten)]
    pub options: RunnerOptions,
}

impl RunnerArgs {
    /// Reads the file, where there is one, and checks everything.
    ///
    /// # Errors
    /// Bad input, in a message that names the option or the file's line.
    pub fn resolve(self) -> anyhow::Result<RunnerConfig> {
        match &self.config {
            Some(file) => self.options.resolve_with_file(file),
            None => self.options.resolve(),
        }
    }
}
