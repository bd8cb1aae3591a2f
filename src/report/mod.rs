//! `report`: what recorded runs say of agents, what they cost, and what another policy would have done.

pub(crate) mod balance;
pub(crate) mod claims;
pub(crate) mod cost;
pub(crate) mod discovery;
pub(crate) mod drops;
pub(crate) mod effect;
pub(crate) mod forecast;
pub mod history;
pub mod period;
pub(crate) mod render;
pub(crate) mod replay;
pub mod statement;
pub(crate) mod suggest;
pub mod summary;
pub(crate) mod tally;
pub(crate) mod timeline;

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use chrono::Utc;
use serde::Serialize;

use self::history::{ReadOptions, RecordedRuns};
use self::period::{Moment, Period};
use self::statement::jobs::JobsFile;
use self::statement::{StatementFile, StatementQuery};
use self::summary::{Queries, Report};
use crate::money::Wei;
use crate::records::{self, RecordsError};
use crate::runner::rate::policy::Policy;
use crate::terminal;

/// Into how many parts the time of a page's charts is cut.
const SLICES: usize = 96;
/// How many agents have charts.
const CHARTED: usize = 60;

/// `uptime-runner report`.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags, as they are typed")]
pub struct ReportOptions {
    /// What --record wrote; several files, which may hold parts of the same run, with --statement
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// One JSON object in place of lines for people
    #[arg(long)]
    json: bool,
    /// Write a page with charts, too
    #[arg(long, value_name = "OUT", conflicts_with = "statement")]
    html: Option<PathBuf>,
    /// Only what happened from then on: a time (2026-11-24T10:00:00Z), a date, or how long ago (24h)
    #[arg(long, value_name = "WHEN")]
    from: Option<Moment>,
    /// Only what happened before
    #[arg(long, value_name = "WHEN")]
    until: Option<Moment>,
    /// What this policy would have done with the recorded uptime; may be repeated
    #[arg(long = "what-if", value_name = "POLICY")]
    what_if: Vec<Policy>,
    /// Which tiers would have been worth most, if a good job is worth so many wei
    #[arg(long, value_name = "WEI")]
    suggest: Option<Wei>,
    /// How likely each agent is to be at or over each tier in an hour and in a day
    #[arg(long)]
    forecast: bool,
    /// What each agent earned, to send to its owner
    #[arg(long, conflicts_with_all = ["what_if", "suggest", "forecast"])]
    statement: bool,
    /// The statement as CSV
    #[arg(long, requires = "statement", conflicts_with = "json")]
    csv: bool,
    /// Only this agent's statement; may be repeated
    #[arg(long, value_name = "ID", requires = "statement")]
    agent: Vec<String>,
    /// Write the statement to this file
    #[arg(long, value_name = "FILE", requires = "statement")]
    out: Option<PathBuf>,
    /// Write the jobs behind the statement to this file as CSV
    #[arg(long, value_name = "FILE", requires = "statement")]
    jobs: Option<PathBuf>,
}

impl ReportOptions {
    /// Checks what no single option tells.
    ///
    /// # Errors
    /// A period that ends before it begins.
    pub fn resolve(self) -> anyhow::Result<Self> {
        let Period { from, until } = self.period();
        ensure!(
            from < until,
            "--from is not before --until: expected a time before it"
        );
        ensure!(
            self.statement || self.files.len() == 1,
            "{} files: expected one, or --statement",
            self.files.len()
        );
        Ok(self)
    }

    fn period(&self) -> Period {
        let whole = Period::default();
        Period {
            from: self.from.map_or(whole.from, Moment::micros),
            until: self.until.map_or(whole.until, Moment::micros),
        }
    }
}

/// Reads the file and prints what it says.
///
/// # Errors
/// A file that cannot be read, a page that cannot be written, or standard output that takes no more.
pub fn run(options: &ReportOptions) -> anyhow::Result<()> {
    if options.statement {
        return state(options);
    }
    let file = &options.files[0];
    let context = || format!("{}: cannot be reported", file.display());
    let reading = ReadOptions {
        period: options.period(),
        pictures: options.html.is_some().then_some((SLICES, CHARTED)),
    };
    let connection = records::open_to_read(file).with_context(context)?;
    records::check_times(&connection, records::REPORT_TIMES).with_context(context)?;
    let history = RecordedRuns::read(&connection, reading).with_context(context)?;
    let report = Report::of(
        &history,
        &Queries {
            policies: &options.what_if,
            value: options.suggest.as_ref(),
            forecast: options.forecast,
        },
    );
    if let Some(out) = &options.html {
        let page = render::html::page(&report, &history);
        std::fs::write(out, page)
            .with_context(|| format!("--html {}: cannot be written", out.display()))?;
    }
    if options.json {
        return print_json(&report);
    }
    terminal::print(render::text::lines(&report).as_bytes())
}

fn state(options: &ReportOptions) -> anyhow::Result<()> {
    let open = |path: &PathBuf| -> anyhow::Result<StatementFile> {
        // Before it is opened as a database, whose locks closing another handle would end.
        let is_written = records::is_written(path);
        let read = || -> Result<_, RecordsError> {
            let connection = records::open_to_read(path)?;
            let times = records::REPORT_TIMES.into_iter();
            records::check_times(&connection, times.chain(records::STATEMENT_TIMES))?;
            Ok(connection)
        };
        let connection =
            read().with_context(|| format!("{}: cannot be reported", path.display()))?;
        Ok(StatementFile {
            path: path.clone(),
            connection,
            is_written,
        })
    };
    let files: Vec<StatementFile> = options.files.iter().map(open).collect::<Result<_, _>>()?;
    let query = StatementQuery {
        period: options.period(),
        agents: options.agent.clone(),
        now: Utc::now(),
    };
    let jobs = options.jobs.as_ref().map(|path| {
        let create =
            || -> anyhow::Result<_> { Ok(JobsFile::new(BufWriter::new(File::create(path)?))?) };
        create().with_context(|| format!("--jobs {}: cannot be written", path.display()))
    });
    let statements = statement::read(&files, &query, jobs.transpose()?)?;
    let text = if options.json {
        let mut json = serde_json::to_string(&statements)?;
        json.push('\n');
        json.into_bytes()
    } else if options.csv {
        render::statement::csv(&statements)?
    } else {
        render::statement::lines(&statements).into_bytes()
    };
    match &options.out {
        Some(out) => std::fs::write(out, text)
            .with_context(|| format!("--out {}: cannot be written", out.display())),
        None => terminal::print(&text),
    }
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut json = serde_json::to_string(value)?;
    json.push('\n');
    terminal::print(json.as_bytes())
}
