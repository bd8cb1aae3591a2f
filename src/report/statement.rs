//! What an agent earned in a period, for its owner: all that both need to come to the same amount from
//! the same records.

use std::fmt::Write as _;

use chrono::{DateTime, SecondsFormat};
use serde::Serialize;

use super::cost::{Source, cost};
use super::history::{AgentHistory, History};
use super::timeline::{Held, Micros, Slots, Timeline, UptimeIntegral, cause};
use crate::money::Wei;
use crate::text;
use crate::units::{JobsPerMinute, Percent};

/// What an agent earned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statement {
    /// Who.
    pub agent_id: String,
    /// From when, in UTC.
    pub from: String,
    /// Until before when, in UTC.
    pub until: String,
    /// The mean of the uptimes that it reported, over the time in which one was known.
    pub uptime_percent: Option<Percent>,
    /// The slots that full uptime would have earned.
    pub slots_asked: f64,
    /// The jobs that it was sent.
    pub jobs_sent: u64,
    /// Of these, those that succeeded.
    pub jobs_succeeded: u64,
    /// The slots that were withheld.
    pub slots_withheld: f64,
    /// When, and why.
    pub withheld: Vec<Withheld>,
    /// What was charged by each price that there was.
    pub charged: Vec<ChargedAt>,
    /// What it earned, where that is known.
    pub amount_wei: Option<Wei>,
    /// From what.
    pub amount_from: Option<Source>,
}

/// A time in which slots were withheld.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Withheld {
    /// From when, in UTC.
    pub from: String,
    /// Until before when, in UTC.
    pub until: String,
    /// Why.
    pub reason: &'static str,
    /// The rate in jobs per minute.
    pub rate: JobsPerMinute,
    /// The rate that full uptime would have earned.
    pub base_rate: JobsPerMinute,
    /// The slots between the two.
    pub slots: f64,
}

/// Jobs that were charged by the same price.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChargedAt {
    /// Wei for each second begun.
    pub price_wei: String,
    /// How many jobs.
    pub jobs: u64,
    /// Their seconds.
    pub seconds: u64,
    /// Price times seconds.
    pub amount_wei: Wei,
}

/// What each agent earned.
#[must_use]
pub fn statements(history: &History) -> Vec<Statement> {
    let agents = history.agents.iter();
    agents
        .map(|(name, agent)| statement(name, agent, history.from, history.until))
        .collect()
}

fn statement(name: &str, agent: &AgentHistory, from: Micros, until: Micros) -> Statement {
    let held = || agent.runs.iter().flat_map(Timeline::held);
    let cost = cost(&agent.jobs, Slots::default());
    Statement {
        agent_id: name.to_owned(),
        from: utc(from),
        until: utc(until),
        uptime_percent: UptimeIntegral::of(&agent.runs).mean(from, until),
        slots_asked: held().map(|held| held.slots()).sum::<Slots>().rounded(),
        jobs_sent: agent.jobs.all(),
        jobs_succeeded: agent.jobs.good(),
        slots_withheld: held().map(|held| held.withheld()).sum::<Slots>().rounded(),
        withheld: withheld(held()),
        charged: agent
            .jobs
            .charged
            .iter()
            .map(|charged| ChargedAt {
                price_wei: charged.price.to_string(),
                jobs: charged.jobs,
                seconds: charged.seconds,
                amount_wei: charged.amount(),
            })
            .collect(),
        amount_from: cost.as_ref().map(|cost| cost.source),
        amount_wei: cost.map(|cost| cost.spent_wei),
    }
}

/// Times that follow each other at the same rates for the same reason are one.
fn withheld(held: impl Iterator<Item = Held>) -> Vec<Withheld> {
    let mut joined: Vec<Held> = Vec::new();
    for held in held.filter(|held| held.withheld() > Slots::default()) {
        let terms = |held: &Held| (cause(held.step.reason), held.step.rate, held.step.base);
        match joined.last_mut() {
            Some(last) if last.until == held.from && terms(last) == terms(&held) => {
                last.until = held.until;
            }
            _ => joined.push(held),
        }
    }
    let times = joined.iter();
    times
        .map(|held| Withheld {
            from: utc(held.from),
            until: utc(held.until),
            reason: cause(held.step.reason),
            rate: held.step.rate,
            base_rate: held.step.base,
            slots: held.withheld().rounded(),
        })
        .collect()
}

/// An instant as RFC 3339 in UTC, to the millisecond.
#[must_use]
pub fn utc(at: Micros) -> String {
    let time = DateTime::from_timestamp_micros(at);
    time.map_or_else(
        || at.to_string(),
        |time| time.to_rfc3339_opts(SecondsFormat::Millis, true),
    )
}

/// The columns of [`csv`].
const COLUMNS: &str = "agent_id,line,from,until,uptime_percent,slots_asked,jobs_sent,jobs_succeeded,\
                       slots_withheld,reason,rate,base_rate,price_wei,seconds,amount_wei";

/// As CSV (RFC 4180): for each agent a line `total`, a line `charged` for each price, and a line
/// `withheld` for each time.
#[must_use]
pub fn csv(statements: &[Statement]) -> String {
    let mut text = format!("{COLUMNS}\r\n");
    for statement in statements {
        let agent = quoted(&statement.agent_id);
        let or_empty = |value: Option<String>| value.unwrap_or_default();
        let uptime = or_empty(
            statement
                .uptime_percent
                .map(|uptime| uptime.get().to_string()),
        );
        let amount = or_empty(statement.amount_wei.as_ref().map(ToString::to_string));
        let Statement {
            from,
            until,
            slots_asked,
            jobs_sent,
            jobs_succeeded,
            slots_withheld,
            ..
        } = statement;
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "{agent},total,{from},{until},{uptime},{slots_asked},{jobs_sent},{jobs_succeeded},{slots_withheld},,,,,,{amount}\r\n"
        );
        for charged in &statement.charged {
            let ChargedAt {
                price_wei,
                jobs,
                seconds,
                amount_wei,
            } = charged;
            let _ = write!(
                text,
                "{agent},charged,{from},{until},,,{jobs},,,,,,{price_wei},{seconds},{amount_wei}\r\n"
            );
        }
        for withheld in &statement.withheld {
            let Withheld {
                from,
                until,
                reason,
                rate,
                base_rate,
                slots,
            } = withheld;
            let _ = write!(
                text,
                "{agent},withheld,{from},{until},,,,,{slots},{reason},{rate},{base_rate},,,\r\n"
            );
        }
    }
    text
}

/// In quotes, where it holds what would end a field.
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\r', '\n']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

/// Lines for people.
#[must_use]
pub fn lines(statements: &[Statement]) -> String {
    text::build(|text| {
        let mut statements = statements.iter();
        statements.try_for_each(|statement| write_one(statement, text))
    })
}

fn write_one(statement: &Statement, text: &mut String) -> std::fmt::Result {
    let uptime = statement.uptime_percent;
    writeln!(text, "🧾 STATEMENT FOR {}", statement.agent_id)?;
    writeln!(text, "=====================================")?;
    writeln!(
        text,
        "  🕐 From {} until {}",
        statement.from, statement.until
    )?;
    writeln!(
        text,
        "  📈 Mean Uptime: {}",
        uptime.map_or_else(|| "unknown".to_owned(), |u| format!("{}%", u.floored(2)))
    )?;
    writeln!(
        text,
        "  📤 {} slots asked, {} jobs sent, {} succeeded, {} slots withheld",
        statement.slots_asked,
        statement.jobs_sent,
        statement.jobs_succeeded,
        statement.slots_withheld
    )?;
    for withheld in &statement.withheld {
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
    for charged in &statement.charged {
        writeln!(
            text,
            "     💶 {} jobs, {} s × {} wei = {} wei",
            charged.jobs, charged.seconds, charged.price_wei, charged.amount_wei
        )?;
    }
    match (&statement.amount_wei, statement.amount_from) {
        (Some(amount), Some(source)) => writeln!(
            text,
            "  💰 Amount: {amount} wei ({} ETH), from {}\n",
            amount.in_eth(),
            match source {
                Source::Price => "the price of each second begun",
                Source::Balance => "the balances that answers told",
            }
        ),
        _ => writeln!(text, "  💰 Amount: unknown, no price and no balances\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        assert_eq!(quoted("agent-001"), "agent-001");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }

    #[test]
    fn each_line_of_csv_has_all_columns() {
        let statement = Statement {
            agent_id: "a,b".to_owned(),
            from: utc(0),
            until: utc(1_500_000),
            uptime_percent: Percent::new(99.5).ok(),
            slots_asked: 3.5,
            jobs_sent: 2,
            jobs_succeeded: 1,
            slots_withheld: 1.5,
            withheld: vec![Withheld {
                from: utc(0),
                until: utc(1),
                reason: "uptime",
                rate: JobsPerMinute::new(30),
                base_rate: JobsPerMinute::new(60),
                slots: 1.5,
            }],
            charged: vec![ChargedAt {
                price_wei: "7".to_owned(),
                jobs: 2,
                seconds: 3,
                amount_wei: "21".parse().unwrap(),
            }],
            amount_wei: "21".parse().ok(),
            amount_from: Some(Source::Price),
        };
        let text = csv(&[statement]);
        let lines: Vec<&str> = text.split_terminator("\r\n").collect();
        assert_eq!(
            lines[1],
            "\"a,b\",total,1970-01-01T00:00:00.000Z,1970-01-01T00:00:01.500Z,99.5,3.5,2,1,1.5,,,,,,21"
        );
        let columns = |line: &str| line.replace("\"a,b\"", "a").split(',').count();
        for line in &lines {
            assert_eq!(columns(line), columns(COLUMNS), "{line}");
        }
        assert!(lines[2].ends_with(",7,3,21") && lines[3].contains(",1.5,uptime,30,60,"));
    }
}
