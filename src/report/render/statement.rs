//! Statements as lines for people, and as CSV.

use std::fmt::Write as _;

use csv::{Terminator, WriterBuilder};
use serde::Serialize;

use crate::money::Wei;
use crate::report::cost::CostSource;
use crate::report::statement::Statement;
use crate::text;
use crate::units::JobsPerMinute;

/// The columns of [`csv`].
const COLUMNS: [&str; 15] = [
    "agent_id",
    "line",
    "from",
    "until",
    "uptime_percent",
    "slots_asked",
    "jobs_sent",
    "jobs_succeeded",
    "slots_withheld",
    "reason",
    "rate",
    "base_rate",
    "price_wei",
    "seconds",
    "amount_wei",
];

/// A line of the CSV, in the order of [`COLUMNS`]; a field that has no value is empty. Numbers with
/// fractions are text here, so that a whole one has none.
#[derive(Default, Serialize)]
struct CsvRow<'a> {
    agent_id: &'a str,
    line: &'static str,
    from: &'a str,
    until: &'a str,
    uptime_percent: Option<String>,
    slots_asked: Option<String>,
    jobs_sent: Option<u64>,
    jobs_succeeded: Option<u64>,
    slots_withheld: Option<String>,
    reason: Option<&'static str>,
    rate: Option<JobsPerMinute>,
    base_rate: Option<JobsPerMinute>,
    price_wei: Option<&'a str>,
    seconds: Option<u64>,
    amount_wei: Option<&'a Wei>,
}

/// As CSV (RFC 4180): for each agent a line `total`, a line `charged` for each price, and a line
/// `withheld` for each time.
///
/// # Errors
/// When a value cannot be written as a field.
pub(crate) fn csv(statements: &[Statement]) -> csv::Result<Vec<u8>> {
    let mut out = WriterBuilder::new()
        .terminator(Terminator::CRLF)
        .has_headers(false)
        .from_writer(Vec::new());
    out.write_record(COLUMNS)?;
    for statement in statements {
        let agent_id = &*statement.agent_id;
        let (from, until) = (&*statement.from, &*statement.until);
        out.serialize(CsvRow {
            agent_id,
            line: "total",
            from,
            until,
            uptime_percent: statement
                .uptime_percent
                .map(|uptime| uptime.get().to_string()),
            slots_asked: Some(statement.slots_asked.to_string()),
            jobs_sent: Some(statement.jobs_sent),
            jobs_succeeded: Some(statement.jobs_succeeded),
            slots_withheld: Some(statement.slots_withheld.to_string()),
            amount_wei: statement.amount_wei.as_ref(),
            ..CsvRow::default()
        })?;
        for charged in &statement.charged {
            out.serialize(CsvRow {
                agent_id,
                line: "charged",
                from,
                until,
                jobs_sent: Some(charged.jobs),
                price_wei: Some(&charged.price_wei),
                seconds: Some(charged.seconds),
                amount_wei: Some(&charged.amount_wei),
                ..CsvRow::default()
            })?;
        }
        for withheld in &statement.withheld {
            out.serialize(CsvRow {
                agent_id,
                line: "withheld",
                from: &withheld.from,
                until: &withheld.until,
                slots_withheld: Some(withheld.slots.to_string()),
                reason: Some(withheld.reason),
                rate: Some(withheld.rate),
                base_rate: Some(withheld.base_rate),
                ..CsvRow::default()
            })?;
        }
    }
    out.into_inner().map_err(|error| error.into_error().into())
}

/// Lines for people.
#[must_use]
pub(crate) fn lines(statements: &[Statement]) -> String {
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
                CostSource::Price => "the price of each second begun",
                CostSource::Balance => "the balances in answers",
            }
        ),
        _ => writeln!(text, "  💰 Amount: unknown, no price and no balances\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::statement::{ChargedAt, WithheldInterval};
    use crate::report::timeline::utc;
    use crate::units::Percent;

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
            withheld: vec![WithheldInterval {
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
            amount_from: Some(CostSource::Price),
        };
        let text = String::from_utf8(csv(&[statement]).unwrap()).unwrap();
        let lines: Vec<&str> = text.split_terminator("\r\n").collect();
        assert_eq!(lines[0], COLUMNS.join(","));
        assert_eq!(
            lines[1],
            "\"a,b\",total,1970-01-01T00:00:00.000Z,1970-01-01T00:00:01.500Z,99.5,3.5,2,1,1.5,,,,,,21"
        );
        let columns = |line: &str| line.replace("\"a,b\"", "a").split(',').count();
        for line in &lines {
            assert_eq!(columns(line), COLUMNS.len(), "{line}");
        }
        assert!(lines[2].ends_with(",7,3,21") && lines[3].contains(",1.5,uptime,30,60,"));
    }

    #[test]
    fn no_statement_is_a_header() {
        let text = String::from_utf8(csv(&[]).unwrap()).unwrap();
        assert_eq!(text, COLUMNS.join(",") + "\r\n");
    }
}
