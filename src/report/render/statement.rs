//! Statements as lines for people, and as CSV.

use std::fmt::Write as _;

use csv::{Terminator, WriterBuilder};

use crate::report::statement::jobs::cell;
use crate::report::statement::{AgentStatement, AmountSource, Statements};
use crate::text::{self, foreign_name};
use crate::wire::charge::ChargedPer;

/// The columns of [`csv`].
const COLUMNS: [&str; 19] = [
    "agent_id",
    "line",
    "name",
    "from",
    "until",
    "uptime_percent",
    "slots_asked",
    "slots_withheld",
    "slots_dropped",
    "slots_unaccounted",
    "rate",
    "base_rate",
    "jobs",
    "jobs_succeeded",
    "jobs_unknown",
    "price_wei",
    "seconds",
    "amount_wei",
    "amount_eth",
];

/// A line of the CSV by column; what is not set is empty.
struct CsvRow([String; COLUMNS.len()]);

impl CsvRow {
    fn new(agent_id: &str, line: &str, name: &str) -> Self {
        let mut row = Self(Default::default());
        row.set("agent_id", agent_id);
        row.set("line", line);
        row.set("name", name);
        row
    }

    fn set(&mut self, column: &str, value: impl std::fmt::Display) -> &mut Self {
        if let Some(index) = COLUMNS.iter().position(|known| *known == column) {
            self.0[index] = value.to_string();
        }
        self
    }

    fn period(&mut self, from: &str, until: &str) -> &mut Self {
        self.set("from", from).set("until", until)
    }
}

/// As CSV (RFC 4180): for each agent a line `total`, and one for each price (`charged`), outcome, day and time without
/// jobs (`withheld`).
///
/// # Errors
/// When a value cannot be written as a field.
pub(crate) fn csv(statements: &Statements) -> csv::Result<Vec<u8>> {
    let mut out = WriterBuilder::new()
        .terminator(Terminator::CRLF)
        .from_writer(Vec::new());
    out.write_record(COLUMNS)?;
    for agent in &statements.agents {
        for CsvRow(row) in rows(statements, agent) {
            out.write_record(
                row.iter()
                    .map(|text| cell(text))
                    .map(std::borrow::Cow::into_owned),
            )?;
        }
    }
    out.into_inner().map_err(|error| error.into_error().into())
}

fn rows(statements: &Statements, agent: &AgentStatement) -> Vec<CsvRow> {
    let (from, until) = (&statements.statement.from, &statements.statement.until);
    let row = |line: &str, name: &str| CsvRow::new(&agent.agent_id, line, name);
    let mut total = row("total", "");
    total
        .period(from, until)
        .set("slots_asked", agent.slots.asked)
        .set("slots_withheld", agent.slots.withheld.values().sum::<u64>())
        .set("slots_dropped", agent.slots.dropped.values().sum::<u64>())
        .set("slots_unaccounted", agent.slots.unaccounted)
        .set("jobs", agent.jobs.sent)
        .set("jobs_succeeded", agent.jobs.succeeded)
        .set("jobs_unknown", agent.jobs.unknown)
        .set("amount_wei", &agent.amount_wei)
        .set("amount_eth", &agent.amount_eth);
    if let Some(uptime) = agent.uptime_percent {
        total.set("uptime_percent", uptime.get());
    }
    let mut all = vec![total];
    for charged in &agent.charged {
        let mut line = row("charged", &charged.capability);
        line.period(&charged.from, &charged.until)
            .set("price_wei", &charged.price_wei)
            .set("jobs", charged.jobs)
            .set("seconds", charged.seconds)
            .set("amount_wei", &charged.amount_wei);
        all.push(line);
    }
    for (outcome, sum) in &agent.jobs.outcomes {
        let mut line = row("outcome", outcome);
        line.set("jobs", sum.jobs)
            .set("seconds", sum.seconds)
            .set("amount_wei", &sum.amount_wei);
        all.push(line);
    }
    for day in &agent.days {
        let mut line = row("day", &day.day);
        line.set("jobs", day.jobs)
            .set("jobs_succeeded", day.succeeded)
            .set("amount_wei", &day.amount_wei);
        all.push(line);
    }
    for (reason, slots) in &agent.slots.dropped {
        let mut line = row("dropped", reason);
        line.set("slots_dropped", slots);
        all.push(line);
    }
    for withheld in &agent.withheld {
        let mut line = row("withheld", &withheld.reason);
        line.period(&withheld.from, &withheld.until)
            .set("slots_withheld", withheld.slots)
            .set("rate", withheld.rate)
            .set("base_rate", withheld.base_rate);
        all.push(line);
    }
    all
}

/// Lines for people.
#[must_use]
pub(crate) fn lines(statements: &Statements) -> String {
    text::build(|text| {
        let head = &statements.statement;
        for agent in &statements.agents {
            write_one(statements, agent, text)?;
        }
        if statements.agents.is_empty() {
            writeln!(text, "🧾 No agent from {} until {}", head.from, head.until)?;
        }
        for because in &head.incomplete_because {
            writeln!(text, "⚠️  Incomplete: {because}")?;
        }
        for gap in &head.gaps {
            writeln!(text, "➖ No run from {} until {}", gap.from, gap.until)?;
        }
        if let Some(hash) = &statements.jobs_sha256 {
            writeln!(text, "🔑 SHA-256 of the jobs: {hash}")?;
        }
        Ok(())
    })
}

fn write_one(
    statements: &Statements,
    agent: &AgentStatement,
    text: &mut String,
) -> std::fmt::Result {
    let head = &statements.statement;
    let uptime = agent.uptime_percent;
    let sum = |counts: &std::collections::BTreeMap<String, u64>| counts.values().sum::<u64>();
    writeln!(text, "🧾 STATEMENT FOR {}", foreign_name(&agent.agent_id))?;
    writeln!(text, "=====================================")?;
    writeln!(text, "  🕐 From {} until {}", head.from, head.until)?;
    writeln!(
        text,
        "  📈 Mean Uptime: {}",
        uptime.map_or_else(|| "unknown".to_owned(), |u| format!("{}%", u.floored(2)))
    )?;
    writeln!(
        text,
        "  📤 {} slots asked = {} jobs sent + {} withheld + {} dropped + {} unaccounted",
        agent.slots.asked,
        agent.slots.sent,
        sum(&agent.slots.withheld),
        sum(&agent.slots.dropped),
        agent.slots.unaccounted
    )?;
    for withheld in &agent.withheld {
        writeln!(
            text,
            "     ⏳ {} – {}: {} of {} jobs/min ({}), {} slots",
            withheld.from,
            withheld.until,
            withheld.rate,
            withheld.base_rate,
            withheld.reason,
            withheld.slots
        )?;
    }
    for (outcome, sum) in &agent.jobs.outcomes {
        writeln!(
            text,
            "     📊 {outcome}: {} jobs, {} s, {} wei",
            sum.jobs, sum.seconds, sum.amount_wei
        )?;
    }
    for charged in &agent.charged {
        let seconds = match charged.per {
            per if per == ChargedPer::Job.name() => String::new(),
            _ => format!(", {} s", charged.seconds),
        };
        writeln!(
            text,
            "     💶 {}: {} jobs{seconds} × {} wei = {} wei",
            foreign_name(&charged.capability),
            charged.jobs,
            charged.price_wei,
            charged.amount_wei
        )?;
    }
    if let Some(balances) = &agent.balances {
        writeln!(
            text,
            "     🏦 From balances: {} wei spent, which differs by {} wei",
            balances.spent_wei, balances.differs_by_wei
        )?;
    }
    let source = match agent.amount_from {
        AmountSource::Price => {
            let is_for = |per: ChargedPer| {
                agent
                    .charged
                    .iter()
                    .any(|charged| charged.per == per.name())
            };
            match (is_for(ChargedPer::Second), is_for(ChargedPer::Job)) {
                (_, false) => "from the price of each second begun",
                (false, true) => "from the price of each job",
                (true, true) => "from the prices of seconds begun and of jobs",
            }
        }
        AmountSource::Balance => "from the balances in answers",
        AmountSource::None => "no price and no balances are known",
    };
    writeln!(
        text,
        "  💰 Amount: {} wei ({} ETH), {source}\n",
        agent.amount_wei, agent.amount_eth
    )
}
