//! The sums of a report against brute force, on random records.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use uptime_runner::money::Wei;
use uptime_runner::records::{open_to_read, open_to_write};
use uptime_runner::report::history::{ReadOptions, RecordedRuns};
use uptime_runner::report::period::Period;
use uptime_runner::report::summary::{Queries, Report};
use uptime_runner::wire::outcome::Outcome;

/// The length of a run in seconds; everything happens at whole seconds.
const LENGTH: i64 = 400;
const SECOND: i64 = 1_000_000;

/// One agent in one run.
#[derive(Debug, Clone)]
struct Life {
    price: Option<u64>,
    /// When a rate took hold: rate, base, reason.
    rates: Vec<(i64, u32, u32, &'static str)>,
    /// When an uptime was told, in whole percent.
    polls: Vec<(i64, Option<u8>)>,
    /// When a job was sent: outcome, latency in milliseconds, lag in milliseconds.
    jobs: Vec<(i64, Outcome, i64, i64)>,
}

fn life() -> impl Strategy<Value = Life> {
    let reasons = prop::sample::select(vec!["uptime", "stale", "unknown", "evidence", "budget"]);
    let rate = (0..LENGTH, 0_u32..=60, 0_u32..=60, reasons);
    let outcome = prop::sample::select(Outcome::ALL.to_vec());
    (
        prop::option::of(0_u64..1_000_000),
        prop::collection::vec(rate, 0..12),
        prop::collection::vec((0..LENGTH, prop::option::of(0_u8..=100)), 0..20),
        prop::collection::vec((0..LENGTH, outcome, 0_i64..5000, 0_i64..300), 0..40),
    )
        .prop_map(|(price, rates, mut polls, jobs)| {
            let mut rates: Vec<_> = rates
                .into_iter()
                .map(|(at, rate, more, reason)| (at, rate, rate + more, reason))
                .collect();
            rates.sort_by_key(|step| step.0);
            polls.sort_by_key(|poll| poll.0);
            Life {
                price,
                rates,
                polls,
                jobs,
            }
        })
}

/// Writes each life as an agent of a run of its own.
fn record(file: &std::path::Path, lives: &[Life]) {
    let connection = open_to_write(file).unwrap();
    connection
        .execute("INSERT INTO capabilities VALUES (1, 'gpu-check')", ())
        .unwrap();
    for (n, life) in (1_i64..).zip(lives) {
        let begin = n * 10_000 * SECOND;
        let run = "INSERT INTO runs (run, started_at, ended_at, version, policy, records_dropped) VALUES (?1, ?2, ?3, '1', 'tiers:99=100', 0)";
        connection
            .execute(run, (n, begin, begin + LENGTH * SECOND))
            .unwrap();
        let agent = format!("agent-{n}");
        connection
            .execute("INSERT INTO agents VALUES (?1, ?2)", (n, &agent))
            .unwrap();
        let price = life.price.map(|price| price.to_string());
        let terms = "INSERT INTO run_agents (run, agent, price_wei, orchestrators) VALUES (?1, ?1, ?2, NULL)";
        connection.execute(terms, (n, price)).unwrap();
        for &(at, rate, base, reason) in &life.rates {
            let step = "INSERT INTO rates VALUES (?1, ?2, ?1, 0, ?3, ?4, 50, ?5)";
            let at = begin + at * SECOND;
            connection
                .execute(step, (n, at, rate, base, reason))
                .unwrap();
        }
        for &(at, uptime) in &life.polls {
            let state = if uptime.is_some() { "fresh" } else { "unknown" };
            let poll = "INSERT INTO polls (run, at, agent, state, uptime_percent, pings) VALUES (?1, ?2, ?1, ?3, ?4, 1)";
            let at = begin + at * SECOND;
            connection.execute(poll, (n, at, state, uptime)).unwrap();
        }
        for &(at, outcome, latency, lag) in &life.jobs {
            let job = "INSERT INTO jobs (run, sent_at, agent, capability, job_id, outcome, status, latency_us, send_lag_us, rate, uptime_percent, orchestrator, balance_wei, error) VALUES (?1, ?2, ?1, 1, x'00', ?3, 200, ?4, ?5, 60, 50, NULL, NULL, NULL)";
            let (latency, lag) = ((latency + lag) * 1000, lag * 1000);
            let at = begin + at * SECOND;
            connection
                .execute(job, (n, at, outcome.name(), latency, lag))
                .unwrap();
        }
    }
}

/// The last of what was told at or before a second.
fn at<T: Copy>(told: impl Iterator<Item = (i64, T)>, second: i64) -> Option<T> {
    told.filter(|&(at, _)| at <= second)
        .last()
        .map(|(_, what)| what)
}

fn check(
    life: &Life,
    name: &str,
    report: &Report,
    from: i64,
    until: i64,
) -> Result<(), TestCaseError> {
    let seconds = from.max(0)..until.min(LENGTH);
    let in_period = |at: i64| (from..until).contains(&at);
    let Some(agent) = report.agents.get(name) else {
        prop_assert!(life.rates.is_empty() && life.polls.is_empty());
        prop_assert!(!life.jobs.iter().any(|job| in_period(job.0)));
        return Ok(());
    };
    let (mut slots, mut withheld, mut followed, mut suspended) = (0, BTreeMap::new(), 0, 0);
    let (mut uptime, mut known) = (0_u32, 0_u32);
    for second in seconds {
        let rates = life
            .rates
            .iter()
            .map(|&(at, rate, base, why)| (at, (rate, base, why)));
        if let Some((rate, base, why)) = at(rates, second) {
            slots += base;
            if rate < base {
                *withheld.entry(why).or_insert(0) += base - rate;
            }
            followed += i32::from(base > 0);
            suspended += i32::from(base > 0 && rate == 0);
        }
        if let Some(Some(percent)) = at(life.polls.iter().copied(), second) {
            uptime += u32::from(percent);
            known += 1;
        }
    }
    let close = |got: f64, expected: u32| (got - f64::from(expected) / 60.0).abs() <= 0.0501;
    prop_assert!(close(agent.slots, slots), "{} {}", agent.slots, slots);
    prop_assert!(close(agent.slots_withheld, withheld.values().sum()));
    prop_assert_eq!(agent.withheld_by_reason.len(), withheld.len());
    for (why, slots) in withheld {
        prop_assert!(close(agent.withheld_by_reason[why], slots), "{}", why);
    }
    prop_assert!((agent.seconds_followed - f64::from(followed)).abs() < 1e-6);
    prop_assert!((agent.seconds_suspended - f64::from(suspended)).abs() < 1e-6);
    prop_assert_eq!(agent.uptime_percent.is_some(), known > 0);
    if let Some(percent) = agent.uptime_percent {
        prop_assert!((percent.get() - f64::from(uptime) / f64::from(known)).abs() < 1e-6);
    }

    let jobs: Vec<_> = life.jobs.iter().filter(|job| in_period(job.0)).collect();
    let mut outcomes: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, outcome, ..) in &jobs {
        *outcomes.entry(outcome.name()).or_default() += 1;
    }
    let good = outcomes.get("success").copied().unwrap_or(0);
    match agent.capabilities.get("gpu-check") {
        Some(got) => {
            let mut millis: Vec<i64> = jobs
                .iter()
                .map(|(.., latency, lag)| latency + lag)
                .collect();
            millis.sort_unstable();
            let latency = got.latency_ms.unwrap();
            for (quantile, got) in [(0.5, latency.p50), (0.9, latency.p90), (0.99, latency.p99)] {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    clippy::cast_precision_loss,
                    reason = "few"
                )]
                let rank = (millis.len() as f64 * quantile).ceil() as usize;
                let exact = f64::from(i32::try_from(millis[rank.max(1) - 1]).unwrap());
                prop_assert!(
                    (got - exact).abs() <= exact / 500.0 + 0.001,
                    "{} {}",
                    got,
                    exact
                );
            }
            prop_assert_eq!((got.jobs, got.successful), (jobs.len() as u64, good));
            prop_assert_eq!(&got.outcomes, &outcomes);
        }
        None => prop_assert!(jobs.is_empty()),
    }
    let charged: u64 = jobs
        .iter()
        .filter(|(_, outcome, ..)| outcome.is_charged(*outcome == Outcome::Unpaid))
        .map(|(_, outcome, latency, _)| {
            let latency = Duration::from_millis(latency.unsigned_abs());
            // Only a stream that was answered with 200 is unpaid.
            if *outcome == Outcome::Unpaid {
                u128::from(latency.as_secs() / 5 * 5)
            } else {
                latency.as_millis().div_ceil(1000).max(1)
            }
        })
        .map(|seconds| u64::try_from(seconds).unwrap())
        .sum();
    match (&agent.cost, life.price.filter(|_| !jobs.is_empty())) {
        (Some(cost), Some(price)) => {
            let spent: Wei = (u128::from(charged) * u128::from(price))
                .to_string()
                .parse()
                .unwrap();
            prop_assert_eq!(&cost.spent_wei, &spent);
            prop_assert_eq!(cost.seconds_charged, Some(charged));
        }
        (cost, price) => prop_assert!(cost.is_none() && price.is_none()),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn sums_are_those_of_brute_force(lives in prop::collection::vec(life(), 1..4), cut in 0..LENGTH, length in 1..LENGTH) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("runs.db");
        record(&file, &lives);
        let connection = open_to_read(&file).unwrap();
        let report_of = |period| {
            let reading = ReadOptions { period, pictures: Some((7, 2)) };
            let history = RecordedRuns::read(&connection, reading).unwrap();
            let queries = Queries { policies: &[], value: None, forecast: true };
            Report::of(&history, &queries)
        };
        let whole = report_of(Period::default());
        for (n, life) in (1_i64..).zip(&lives) {
            let name = format!("agent-{n}");
            check(life, &name, &whole, i64::MIN, i64::MAX)?;
            // Each run by itself, and a part of it.
            let begin = n * 10_000;
            let period = Period { from: (begin + cut) * SECOND, until: (begin + cut + length) * SECOND };
            let part = report_of(period);
            check(life, &name, &part, cut, cut + length)?;
        }
    }
}
