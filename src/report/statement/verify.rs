//! `verify`: whether a statement follows from the jobs that it lists. It needs nothing but the two files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::jobs::{COLUMNS, sha256, text_of};
use super::sums::UNKNOWN;
use crate::money::Wei;
use crate::text::foreign;
use crate::wire::charge::ChargedPer;
use crate::wire::outcome::Outcome;

/// `uptime-runner verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyOptions {
    /// What `report --statement --json` wrote
    statement: PathBuf,
    /// What `report --statement --jobs` wrote with it
    #[arg(long, value_name = "FILE")]
    jobs: PathBuf,
}

/// What came of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verified {
    Equal,
    /// The first figure that differs.
    Differs(String),
}

/// Compares the files.
///
/// # Errors
/// A file that cannot be read.
pub fn run(options: &VerifyOptions) -> anyhow::Result<Verified> {
    let (statement, jobs) = (&options.statement, &options.jobs);
    let read = |file: &PathBuf| {
        std::fs::read(file).with_context(|| format!("{}: cannot be read", file.display()))
    };
    let text = read(statement)?;
    let parsed = serde_json::from_slice(&text)
        .with_context(|| format!("{}: is no statement in JSON", statement.display()))?;
    let csv = read(jobs)?;
    compare(&parsed, &csv).with_context(|| format!("{}: is no list of jobs", jobs.display()))
}

/// A job of the list.
#[derive(Debug, Deserialize)]
struct Job {
    agent_id: String,
    capability: String,
    sent_at: String,
    outcome: String,
    /// No job takes longer; so no sum overflows.
    seconds: u32,
    price_wei: String,
    amount_wei: String,
}

impl Job {
    /// What it costs at a price.
    fn amount(&self, price: &Wei, per: ChargedPer) -> Wei {
        let outcome = Outcome::named(&self.outcome);
        let is_charged = outcome.is_some_and(|outcome| outcome.is_charged(false));
        price.times(match per {
            ChargedPer::Second => self.seconds.into(),
            ChargedPer::Job => is_charged.into(),
        })
    }
}

/// By agent, capability and price: what the price is for, as the statement says.
struct StatedPrices(BTreeMap<(String, String, String), Vec<ChargedPer>>);

impl StatedPrices {
    fn of(statement: &Value) -> Self {
        let mut prices: BTreeMap<_, Vec<ChargedPer>> = BTreeMap::new();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for agent in statement["agents"].as_array().into_iter().flatten() {
            for charged in agent["charged"].as_array().into_iter().flatten() {
                let key = [
                    &agent["agent_id"],
                    &charged["capability"],
                    &charged["price_wei"],
                ]
                .map(text);
                let per = ChargedPer::named(&text(&charged["per"]));
                prices.entry(key.into()).or_default().extend(per);
            }
        }
        Self(prices)
    }

    /// What the price of a job is for. If it was charged by both, the one that fits.
    fn per(&self, job: &Job, fits: impl Fn(ChargedPer) -> bool) -> ChargedPer {
        let (agent, capability) = (text_of(&job.agent_id), text_of(&job.capability));
        let key = (
            agent.to_owned(),
            capability.to_owned(),
            job.price_wei.clone(),
        );
        let stated = self.0.get(&key).map_or(&[][..], Vec::as_slice);
        let fitting = stated.iter().find(|&&per| fits(per));
        let per = fitting.or(stated.first()).copied();
        per.unwrap_or(ChargedPer::Second)
    }
}

/// What an agent's jobs add up to.
#[derive(Debug, Default)]
struct Sums {
    sent: u64,
    succeeded: u64,
    unknown: u64,
    outcomes: BTreeMap<String, Sum>,
    days: BTreeMap<String, (u64, u64, Wei)>,
    /// By capability, price and what that is for.
    charged: BTreeMap<(String, String, &'static str), Sum>,
    amount: Wei,
}

#[derive(Debug, Default)]
struct Sum {
    jobs: u64,
    seconds: u64,
    amount: Wei,
}

impl Sum {
    fn add(&mut self, seconds: u32, amount: &Wei) {
        self.jobs += 1;
        self.seconds += u64::from(seconds);
        self.amount += amount;
    }

    fn json(&self) -> Value {
        json!({ "jobs": self.jobs, "seconds": self.seconds, "amount_wei": self.amount })
    }
}

/// Compares every figure that follows from the jobs.
///
/// # Errors
/// A file that is not a list of jobs.
pub(crate) fn compare(statement: &Value, csv: &[u8]) -> anyhow::Result<Verified> {
    let mut checks = Checks(None);
    checks.equal(
        "jobs_sha256",
        &statement["jobs_sha256"],
        &json!(sha256(csv)),
    );
    let head = &statement["statement"];
    checks.equal("statement.format", &head["format"], &json!(super::FORMAT));
    let prices = StatedPrices::of(statement);
    let mut agents: BTreeMap<String, Sums> = BTreeMap::new();
    let mut reader = csv::Reader::from_reader(csv);
    ensure!(
        reader.headers()? == COLUMNS.as_slice(),
        "expected the columns {}",
        COLUMNS.join(",")
    );
    for (job, line) in reader.deserialize().zip(2_u64..) {
        let job: Job = job.with_context(|| format!("line {line}"))?;
        let amount: Wei = job
            .amount_wei
            .parse()
            .map_err(|error| anyhow!("line {line}: amount_wei: {error}"))?;
        let price: Wei = match &*job.price_wei {
            "" => Wei::default(),
            price => price
                .parse()
                .map_err(|error| anyhow!("line {line}: price_wei: {error}"))?,
        };
        let per = prices.per(&job, |per| job.amount(&price, per) == amount);
        checks.equal(
            &format!("the amount of the job in line {line}"),
            &json!(amount),
            &json!(job.amount(&price, per)),
        );
        // Times in UTC with the same number of digits sort as text.
        let at = &*job.sent_at;
        let text = |key: &str| head[key].as_str().unwrap_or_default();
        if at < text("from") || at >= text("until") {
            checks.differs(&format!(
                "the job in line {line} was sent at {at}, outside of the period"
            ));
        }
        let sums = agents.entry(text_of(&job.agent_id).to_owned()).or_default();
        sums.add(&job, &amount, per);
    }
    let Some(stated) = statement["agents"].as_array() else {
        bail!("the statement has no agents");
    };
    for agent in stated {
        let name = agent["agent_id"].as_str().unwrap_or_default();
        let sums = agents.remove(name).unwrap_or_default();
        sums.compare(name, agent, &mut checks);
    }
    if let Some(name) = agents.keys().next() {
        checks.differs(&format!("{name} has jobs, but no statement"));
    }
    Ok(checks.0.map_or(Verified::Equal, Verified::Differs))
}

impl Sums {
    fn add(&mut self, job: &Job, amount: &Wei, per: ChargedPer) {
        let succeeded = u64::from(job.outcome == "success");
        self.sent += 1;
        self.succeeded += succeeded;
        self.unknown += u64::from(job.outcome == UNKNOWN);
        self.amount += amount;
        let of_outcome = self.outcomes.entry(job.outcome.clone()).or_default();
        of_outcome.add(job.seconds, amount);
        let day = job.sent_at.get(..10).unwrap_or_default().to_owned();
        let of_day = self.days.entry(day).or_default();
        of_day.0 += 1;
        of_day.1 += succeeded;
        of_day.2 += amount;
        if !job.price_wei.is_empty() {
            let capability = text_of(&job.capability).to_owned();
            let key = (capability, job.price_wei.clone(), per.name());
            self.charged
                .entry(key)
                .or_default()
                .add(job.seconds, amount);
        }
    }

    fn compare(&self, name: &str, stated: &Value, checks: &mut Checks) {
        let mut equal = |what: &str, stated: &Value, computed: Value| {
            checks.equal(&format!("{name}: {what}"), stated, &computed);
        };
        let jobs = &stated["jobs"];
        equal("jobs.sent", &jobs["sent"], json!(self.sent));
        equal("jobs.succeeded", &jobs["succeeded"], json!(self.succeeded));
        equal("jobs.unknown", &jobs["unknown"], json!(self.unknown));
        let outcomes = self.outcomes.iter();
        let outcomes: Map<String, Value> = outcomes
            .map(|(outcome, sum)| (outcome.clone(), sum.json()))
            .collect();
        equal("jobs.outcomes", &jobs["outcomes"], Value::Object(outcomes));
        let days = self.days.iter().map(|(day, (jobs, succeeded, amount))| {
            json!({ "day": day, "jobs": jobs, "succeeded": succeeded, "amount_wei": amount })
        });
        equal("days", &stated["days"], days.collect());
        let slots = &stated["slots"];
        equal("slots.sent", &slots["sent"], json!(self.sent));
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        let sum = |counts: &Value| {
            let counts = counts.as_object().into_iter().flatten();
            counts.map(|(_, number)| count(number)).sum::<u64>()
        };
        let asked = self.sent
            + sum(&slots["withheld"])
            + sum(&slots["dropped"])
            + count(&slots["unaccounted"]);
        equal("slots.asked", &slots["asked"], json!(asked));
        let charged = stated["charged"].as_array().into_iter().flatten();
        let amounts = charged.clone().map(|charged| {
            let key = |key: &str| charged[key].as_str().unwrap_or_default().to_owned();
            let per = ChargedPer::named(&key("per")).map_or("", ChargedPer::name);
            let sum = self
                .charged
                .get(&(key("capability"), key("price_wei"), per));
            let nothing = Sum::default();
            let sum = sum.unwrap_or(&nothing);
            equal("charged.seconds", &charged["seconds"], json!(sum.seconds));
            equal(
                "charged.amount_wei",
                &charged["amount_wei"],
                json!(sum.amount),
            );
            sum.amount.clone()
        });
        let amounts: Wei = amounts.collect::<Vec<_>>().into_iter().sum();
        if stated["amount_from"] == "price" {
            equal("the sum of charged", &json!(amounts), json!(self.amount));
            equal("amount_wei", &stated["amount_wei"], json!(self.amount));
        }
        let amount: Option<Wei> = stated["amount_wei"]
            .as_str()
            .and_then(|wei| wei.parse().ok());
        let eth = amount.map(|amount| amount.in_eth());
        equal("amount_eth", &stated["amount_eth"], json!(eth));
    }
}

/// How much of a difference is told.
const MAX_DIFFERENCE_CHARS: usize = 1000;

/// Keeps the first difference.
struct Checks(Option<String>);

impl Checks {
    fn equal(&mut self, what: &str, stated: &Value, computed: &Value) {
        if stated != computed {
            self.differs(&format!("{what}: stated {stated}, computed {computed}"));
        }
    }

    fn differs(&mut self, difference: &str) {
        // Both files are somebody else's.
        self.0
            .get_or_insert_with(|| foreign(difference, MAX_DIFFERENCE_CHARS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use crate::text::is_printable;
    use proptest::prelude::*;

    /// As `report --statement --json` and `--jobs` write them.
    const STATEMENT: &str = r#"{"statement":{"format":1,"from":"2026-11-24T00:00:00.000000Z","until":"2026-11-25T00:00:00.000000Z"},"jobs_sha256":"00","agents":[{"agent_id":"a","slots":{"asked":2,"sent":2,"withheld":{"uptime":0},"dropped":{"late":0},"unaccounted":0},"jobs":{"sent":2,"succeeded":1,"unknown":0,"outcomes":{"success":{"jobs":1,"seconds":1,"amount_wei":"7"}}},"charged":[{"capability":"c","price_wei":"7","per":"second","jobs":2,"seconds":2,"amount_wei":"14"}],"days":[{"day":"2026-11-24","jobs":2,"succeeded":1,"amount_wei":"14"}],"amount_from":"price","amount_wei":"14","amount_eth":"0.000000000000000014"}]}"#;
    const JOBS: &str = "job_id,agent_id,capability,orchestrator,sent_at,outcome,seconds,price_wei,amount_wei\r\n\
        604ece01-64f5-467d-835e-a26303a42e02,a,c,,2026-11-24T10:00:00.000000Z,success,1,7,7\r\n\
        604ece01-64f5-467d-835e-a26303a42e03,a,c,https://o,2026-11-24T11:00:00.000000Z,timeout,1,7,7\r\n";

    proptest! {
        /// An owner reads what the operator sent, and the operator what the owner says it was.
        #[test]
        fn nearly_right_files_are_compared_or_refused(
            statement in mutated(&[STATEMENT]),
            jobs in prop_oneof![mutated(&[JOBS]), prop::collection::vec(any::<u8>(), 0..100)],
        ) {
            if let Ok(statement) = serde_json::from_slice(&statement)
                && let Ok(Verified::Differs(difference)) = compare(&statement, &jobs)
            {
                prop_assert!(difference.chars().all(|c| c == ' ' || is_printable(c)), "{difference:?}");
            }
        }
    }
}
