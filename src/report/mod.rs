//! `report`: what recorded runs say of agents, and what another policy would have done.

pub mod history;
pub mod replay;
pub mod summary;
mod text;

use std::path::PathBuf;

use anyhow::Context;

use self::history::History;
use self::summary::Report;
use crate::records;
use crate::runner::policy::Policy;
use crate::terminal;

/// `uptime-runner report`.
#[derive(Debug, clap::Args)]
pub struct ReportOptions {
    /// What --record wrote
    file: PathBuf,
    /// One JSON object in place of lines for people
    #[arg(long)]
    json: bool,
    /// What this policy would have done with the recorded uptime; may be repeated
    #[arg(long = "what-if", value_name = "POLICY")]
    what_if: Vec<Policy>,
}

/// Reads the file and prints what it says.
///
/// # Errors
/// A file that cannot be read, or standard output that takes no more.
pub fn run(options: &ReportOptions) -> anyhow::Result<()> {
    let file = options.file.display();
    let context = || format!("{file}: cannot be reported");
    let connection = records::open_to_read(&options.file).with_context(context)?;
    let history = History::read(&connection).with_context(context)?;
    let report = Report::of(&history, &options.what_if);
    let printed = if options.json {
        let mut json = serde_json::to_string(&report)?;
        json.push('\n');
        json
    } else {
        text::lines(&report)
    };
    terminal::print(printed.as_bytes())
}
