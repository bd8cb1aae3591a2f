//! What every store of the ping system promises, on SQLite and on a PostgreSQL server of our own.

use std::path::Path;
use std::time::Duration;

use crate::support::postgres::Postgres;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use uptime_runner::ping_system::evaluate::{PingAttempt, PingOutcome, PingPolicy};
use uptime_runner::ping_system::store::{
    AgentPage, AgentRecord, Claim, Claimed, Cursor, Failures, Lease, PingRecord, PruneCursor,
    Registration, Store, StoreError, Sum, Totals,
    postgres::{self, PostgresOptions, PostgresStore},
    sqlite::{self, Location, SqliteStore},
};
use uptime_runner::ping_system::stretch::BootInstant;
use uptime_runner::units::Percent;
use uptime_runner::wire::agent::Reported;
use uptime_runner::wire::ping_system::served::{Ping, Status};
use uuid::Uuid;

const ODD_NAMES: [&str; 7] = [
    "<img src=x onerror=alert(1)>",
    "it's",
    "\"",
    "a/b",
    "ä",
    "%_",
    "A",
];

fn utc(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

fn noon() -> DateTime<Utc> {
    utc("2026-01-01T12:00:00Z")
}

fn minutes(minutes: i64) -> TimeDelta {
    TimeDelta::minutes(minutes)
}

fn registration(agent_id: &str, at: DateTime<Utc>) -> Registration {
    Registration {
        agent_id: agent_id.to_owned(),
        agent_url: "http://127.0.0.1:8001".to_owned(),
        capabilities: Some(vec!["gpu-check".to_owned()]),
        metadata: json!({"region": "eu"}).as_object().cloned(),
        at,
        interval: Duration::from_mins(15),
    }
}

fn lease(now: DateTime<Utc>) -> Lease {
    Lease {
        now,
        until: now + minutes(1),
    }
}

fn judged(claim: &Claim, at: DateTime<Utc>, uptime: Option<f64>) -> PingRecord {
    let outcome = match uptime {
        Some(uptime) => answer(uptime, true),
        None => PingOutcome::Failed("no answer, \"said\" 'they'".to_owned()),
    };
    evaluated(claim, at, outcome)
}

fn answer(uptime: f64, gpu_available: bool) -> PingOutcome {
    PingOutcome::Answered(Reported {
        uptime_percent: Percent::new(uptime).ok(),
        window_seconds: Some(900.5),
        gpu_available: Some(gpu_available),
        ..Reported::default()
    })
}

fn evaluated(claim: &Claim, at: DateTime<Utc>, outcome: PingOutcome) -> PingRecord {
    let attempt = PingAttempt {
        at,
        began: BootInstant {
            boot_id: Uuid::nil(),
            since_boot: (at - utc("2025-01-01T00:00:00Z")).to_std().unwrap(),
        },
        took: Duration::from_millis(12),
        clock_offset_seconds: Some(7.5),
        also_reported: Vec::new(),
        outcome,
    };
    PingPolicy::default().evaluate(&claim.known, attempt, 0.5)
}

async fn claimed(store: &dyn Store, agent_id: &str, now: DateTime<Utc>) -> Claim {
    match store.claim(lease(now), agent_id).await.unwrap() {
        Claimed::Ours(claim) => *claim,
        other => panic!("{other:?}"),
    }
}

async fn ping(
    store: &dyn Store,
    agent_id: &str,
    at: DateTime<Utc>,
    uptime: Option<f64>,
) -> PingRecord {
    let claim = claimed(store, agent_id, at).await;
    let new = judged(&claim, at, uptime);
    record(store, claim, new.clone()).await;
    new
}

async fn record(store: &dyn Store, claim: Claim, new: PingRecord) {
    assert_eq!(store.record([(claim, new)].into()).await.unwrap(), [true]);
}

async fn remove(store: &dyn Store, agent_id: &str) -> Result<bool, StoreError> {
    store.remove(agent_id, noon(), true).await
}

async fn known(store: &dyn Store, agent_id: &str) -> AgentRecord {
    store.agent(agent_id).await.unwrap().unwrap()
}

async fn history(store: &dyn Store, agent_id: &str, since: DateTime<Utc>) -> Vec<Ping> {
    let key = known(store, agent_id).await.key;
    let pings = store
        .history(key, Cursor::before(since), 1000)
        .await
        .unwrap();
    pings.into_iter().map(|(_, ping)| ping).collect()
}

fn all_agents() -> AgentPage<'static> {
    AgentPage {
        after: "",
        due_at: None,
        limit: 1000,
    }
}

async fn names_due(store: &dyn Store, now: DateTime<Utc>, limit: usize) -> Vec<Claim> {
    store.claim_due(lease(now), limit).await.unwrap()
}

/// Every store passes this, one part after the other on the same store.
async fn contract(store: &dyn Store) {
    registered_agents_are_known(store).await;
    pings_are_kept_as_they_were(store).await;
    an_agent_is_claimed_once(store).await;
    who_is_due_longest_comes_first(store).await;
    sums_are_exact(store).await;
    what_is_old_or_removed_is_pruned(store).await;
    a_clock_that_was_set_back_delays_nobody(store).await;
    what_was_not_observed_says_nothing(store).await;
    failures_are_made_unobserved(store).await;
    an_agent_that_comes_back_has_its_past(store).await;
    times_are_kept(store).await;
    agents_are_listed_by_pages(store).await;
    assert!(store.health().await.unwrap().schema_version >= 6);
}

async fn registered_agents_are_known(store: &dyn Store) {
    assert_eq!(store.agent("a").await.unwrap(), None);
    assert_eq!(store.next_due_at(noon()).await.unwrap(), None);
    let new = store.register(&registration("a", noon())).await.unwrap();
    assert_eq!(new.agent.registered_at, noon());
    assert_eq!(new.agent.next_ping_at, noon());
    assert!((new.agent.ping_interval_minutes - 15.0).abs() < 1e-9);
    assert_eq!(new.agent.status, Status::Unknown);
    assert_eq!(known(store, "a").await, new);
    ping(store, "a", noon(), Some(100.0)).await;

    // Again: what is said of it changes, what it did stays.
    let again = Registration {
        agent_url: "http://127.0.0.1:9".to_owned(),
        capabilities: Some(vec![]),
        metadata: None,
        ..registration("a", noon() + minutes(5))
    };
    let updated = store.register(&again).await.unwrap();
    assert_eq!(updated.key, new.key);
    assert_eq!(updated.agent.agent_url, "http://127.0.0.1:9");
    assert_eq!(updated.agent.registered_at, noon());
    assert_eq!(updated.agent.total_pings, 1);
    assert!(updated.agent.capabilities.is_empty());
    assert_eq!(
        updated.agent.metadata, new.agent.metadata,
        "it was not told"
    );
    // At a new address it is due at once.
    assert_eq!(updated.agent.next_ping_at, noon() + minutes(5));
    let same = Registration {
        at: noon() + minutes(7),
        ..again
    };
    let same = store.register(&same).await.unwrap();
    assert_eq!(same.agent.next_ping_at, noon() + minutes(5));

    for name in ODD_NAMES {
        store.register(&registration(name, noon())).await.unwrap();
        assert_eq!(known(store, name).await.agent.agent_id, name);
    }
    assert_eq!(store.agents(all_agents()).await.unwrap().len(), 8);
    for name in ODD_NAMES {
        assert!(remove(store, name).await.unwrap());
        assert!(!remove(store, name).await.unwrap());
    }
    assert_eq!(store.agents(all_agents()).await.unwrap().len(), 1);
    assert!(remove(store, "a").await.unwrap());
}

async fn pings_are_kept_as_they_were(store: &dyn Store) {
    store.register(&registration("b", noon())).await.unwrap();
    let at = |n: i64| noon() + TimeDelta::microseconds(n * 900_000_001);
    let mut kept = Vec::new();
    for (n, uptime) in [
        Some(100.0),
        Some(97.123_456_789),
        None,
        Some(0.0),
        Some(99.0),
    ]
    .into_iter()
    .enumerate()
    {
        kept.push(ping(store, "b", at(i64::try_from(n).unwrap()), uptime).await);
    }
    let mut pings: Vec<Ping> = kept.iter().map(|new| new.ping.clone()).collect();
    let failures = Failures {
        from: at(2),
        after_seq: 2,
    };
    assert_eq!(kept[3].supersedes, Some(failures));
    // The failed one is superseded by the next, which covers the same time.
    assert_eq!(pings[2].window_seconds, Some(900.000_001));
    (pings[2].superseded, pings[2].window_seconds) = (true, Some(0.0));
    assert_eq!(history(store, "b", noon()).await, pings);
    assert_eq!(history(store, "b", at(3)).await, pings[3..]);
    let after = known(store, "b").await;
    assert_eq!(after, kept.last().unwrap().after);
    assert_eq!(after.streak.good_in_a_row, 1);
    assert_eq!(store.latest(after.key, 2).await.unwrap(), pings[3..]);

    // Page by page, and with two pings of one instant.
    let twice = ping(store, "b", at(4), Some(50.0)).await.ping;
    let mut place = Cursor::before(noon());
    let mut paged = Vec::new();
    loop {
        let page = store.history(after.key, place, 2).await.unwrap();
        let Some((last, _)) = page.last() else { break };
        place = *last;
        paged.extend(page.into_iter().map(|(_, ping)| ping));
    }
    assert_eq!(paged[..5], pings);
    assert_eq!(paged[5..], [twice]);
    let after = store
        .history(after.key, Cursor::after(at(3)), 9)
        .await
        .unwrap();
    assert_eq!(after.len(), 2);
    assert_eq!(after[0].1, pings[4]);
    assert!(remove(store, "b").await.unwrap());
}

async fn an_agent_is_claimed_once(store: &dyn Store) {
    store.register(&registration("c", noon())).await.unwrap();
    let claim = claimed(store, "c", noon()).await;
    assert!(matches!(
        store.claim(lease(noon()), "c").await.unwrap(),
        Claimed::Taken
    ));
    assert!(matches!(
        store.claim(lease(noon()), "nobody").await.unwrap(),
        Claimed::Unknown
    ));
    assert!(
        names_due(store, noon() + minutes(1) - TimeDelta::microseconds(1), 9)
            .await
            .is_empty()
    );
    assert_eq!(store.next_due_at(noon()).await.unwrap(), None);

    // The lease ends: somebody else takes over, and what the first one brings is too late.
    let took_over = names_due(store, noon() + minutes(1), 9).await;
    assert_eq!(took_over.len(), 1);
    let late = judged(&claim, noon(), Some(12.0));
    assert_eq!(
        store.record([(claim.clone(), late)].into()).await.unwrap(),
        [false]
    );
    store.release(&[claim]).await.unwrap();
    assert!(matches!(
        store.claim(lease(noon()), "c").await.unwrap(),
        Claimed::Taken
    ));
    let in_time = judged(&took_over[0], noon() + minutes(1), Some(99.0));
    let recorded = store.record([(took_over[0].clone(), in_time)].into()).await;
    assert_eq!(recorded.unwrap(), [true]);
    assert_eq!(history(store, "c", noon()).await.len(), 1);

    // Released, it is free at once; removed, nothing of it is recorded.
    let claim = claimed(store, "c", noon()).await;
    store.release(&[claim]).await.unwrap();
    let claim = claimed(store, "c", noon()).await;
    assert!(remove(store, "c").await.unwrap());
    let new = judged(&claim, noon(), Some(99.0));
    assert_eq!(store.record([(claim, new)].into()).await.unwrap(), [false]);
}

async fn who_is_due_longest_comes_first(store: &dyn Store) {
    for (name, due) in [("late", -5), ("latest", -9), ("now", 0), ("soon", 1)] {
        let due = registration(name, noon() + minutes(due));
        store.register(&due).await.unwrap();
    }
    let due = AgentPage {
        due_at: Some(noon()),
        ..all_agents()
    };
    let due = store.agents(due).await.unwrap();
    let due: Vec<_> = due
        .iter()
        .map(|known| known.agent.agent_id.as_str())
        .collect();
    assert_eq!(due, ["late", "latest", "now"]);
    assert_eq!(
        store.next_due_at(noon()).await.unwrap(),
        Some(noon() - minutes(9))
    );
    let first = names_due(store, noon(), 1).await;
    assert_eq!(first[0].known.agent.agent_id, "latest");
    assert_eq!(
        store.next_due_at(noon()).await.unwrap(),
        Some(noon() - minutes(5))
    );
    let mut rest: Vec<String> = names_due(store, noon(), 9)
        .await
        .into_iter()
        .map(|claim| claim.known.agent.agent_id)
        .collect();
    rest.sort();
    assert_eq!(rest, ["late", "now"]);
    assert_eq!(
        store.next_due_at(noon()).await.unwrap(),
        Some(noon() + minutes(1))
    );
    for name in ["late", "latest", "now", "soon"] {
        remove(store, name).await.unwrap();
    }
}

async fn sums_are_exact(store: &dyn Store) {
    // Over several hours, at odd minutes, with failures.
    let uptimes = |n: i32| (n % 7 != 3).then_some(90.0 + f64::from(n % 10));
    for name in ["d", "e"] {
        store.register(&registration(name, noon())).await.unwrap();
        for n in 0..40 {
            ping(store, name, noon() + minutes(i64::from(13 * n)), uptimes(n)).await;
        }
    }
    let key = known(store, "d").await.key;
    for since in [0, 7, 13, 61, 120, 121, 240, 519, 600] {
        let since = noon() + minutes(since);
        let mut expected = Sum::default();
        for ping in history(store, "d", since).await {
            let seconds = match (ping.first_ping, ping.window_seconds) {
                (true, _) => 0.0,
                (false, seconds) => seconds.unwrap_or(13.0 * 60.0),
            };
            expected.covered_seconds += seconds;
            expected.up_seconds += seconds * ping.uptime_percent.map_or(0.0, f64::from) / 100.0;
        }
        let all = store.sums_since(since, None).await.unwrap();
        let one = store.sums_since(since, Some(&[key])).await.unwrap();
        for sums in [all, one] {
            let parts = sums.iter().filter(|(of, _)| *of == key);
            let [up, covered] = parts.fold([0.0, 0.0], |[up, covered], (_, sum)| {
                [up + sum.up_seconds, covered + sum.covered_seconds]
            });
            assert!((up - expected.up_seconds).abs() < 1e-6, "{since}");
            assert!((covered - expected.covered_seconds).abs() < 1e-6, "{since}");
        }
    }
    let one = store.sums_since(noon(), Some(&[key])).await.unwrap();
    assert!(one.iter().all(|(of, _)| *of == key));
}

/// Goes on with the agents of the sums.
async fn what_is_old_or_removed_is_pruned(store: &dyn Store) {
    let before = noon() + minutes(130);
    let mut deleted = 0;
    let mut from = Some(PruneCursor::default());
    while let Some(here) = from {
        let pruned = store.prune(before, here).await.unwrap();
        deleted += pruned.pings;
        from = pruned.next;
    }
    // Those of the agents that were removed before, too.
    assert!(deleted >= 20, "{deleted}");
    for name in ["d", "e"] {
        assert_eq!(history(store, name, noon()).await.len(), 30);
        assert_eq!(known(store, name).await.agent.total_pings, 40);
    }
    let key = known(store, "d").await.key;
    remove(store, "d").await.unwrap();
    // Its name again is another agent, without history.
    let new = store.register(&registration("d", noon())).await.unwrap();
    assert_ne!(new.key, key);
    assert!(history(store, "d", noon()).await.is_empty());
    assert_eq!(
        store
            .prune(before, PruneCursor::default())
            .await
            .unwrap()
            .pings,
        30
    );
    assert_eq!(
        store
            .prune(before, PruneCursor::default())
            .await
            .unwrap()
            .pings,
        0
    );
    assert_eq!(history(store, "e", noon()).await.len(), 30);
}

/// Goes on with them.
async fn a_clock_that_was_set_back_delays_nobody(store: &dyn Store) {
    let before = known(store, "e").await.agent.next_ping_at;
    let now = before - minutes(15);
    store.reschedule_overdue(now, now).await.unwrap();
    assert_eq!(known(store, "e").await.agent.next_ping_at, before);
    let now = before - minutes(24 * 60 * 3);
    store.reschedule_overdue(now, now).await.unwrap();
    assert_eq!(known(store, "e").await.agent.next_ping_at, now);

    // A lease that was taken by a clock that was ahead ends, and no other.
    let claim = claimed(store, "e", now + minutes(60)).await;
    let is_taken = async |latest_end| {
        store.reschedule_overdue(now, latest_end).await.unwrap();
        let claimed = store.claim(lease(now), "e").await.unwrap();
        matches!(claimed, Claimed::Taken)
    };
    assert!(is_taken(now + minutes(61)).await);
    assert!(!is_taken(now + minutes(60)).await);
    let late = judged(&claim, now, None);
    assert_eq!(store.record([(claim, late)].into()).await.unwrap(), [false]);
    store.reschedule_overdue(now, now).await.unwrap();
}

async fn what_was_not_observed_says_nothing(store: &dyn Store) {
    store.register(&registration("g", noon())).await.unwrap();
    ping(store, "g", noon(), Some(100.0)).await;
    let at = noon() + minutes(15);
    let claim = claimed(store, "g", at).await;
    let no_gpu = evaluated(&claim, at, answer(50.0, false));
    record(store, claim, no_gpu.clone()).await;
    let before = known(store, "g").await;
    assert_eq!(before, no_gpu.after);
    assert_eq!(before.agent.status, Status::NoGpu);
    assert_eq!(before.agent.clock_offset_seconds, Some(7.5));
    assert_eq!(before.agent.warnings.len(), 1);

    let at = noon() + minutes(30);
    let claim = claimed(store, "g", at).await;
    let unseen = PingOutcome::Unobserved("our own network".to_owned());
    let unseen = evaluated(&claim, at, unseen);
    record(store, claim, unseen.clone()).await;
    let after = known(store, "g").await;
    assert_eq!(after, unseen.after);
    assert_eq!(after.agent.status, Status::Unobserved);
    assert_eq!(after.agent.last_ping_at, before.agent.last_ping_at);
    assert_eq!(after.agent.last_error.as_deref(), Some("our own network"));
    assert_eq!(history(store, "g", at).await, [unseen.ping]);
    // The next answer covers the time since the one before, and leaves it as it is.
    let at = noon() + minutes(45);
    let third = ping(store, "g", at, Some(100.0)).await;
    assert_eq!(third.ping.covers_from, before.agent.last_ping_at);
    let pings = history(store, "g", noon()).await;
    assert!(!pings[2].observed && !pings[2].superseded);
    remove(store, "g").await.unwrap();
}

async fn failures_are_made_unobserved(store: &dyn Store) {
    let key = store
        .register(&registration("h", noon()))
        .await
        .unwrap()
        .key;
    let sum = async || {
        let parts = store.sums_since(noon(), Some(&[key])).await.unwrap();
        let sums = parts.iter().map(|(_, sum)| sum.covered_seconds);
        sums.sum::<f64>()
    };
    ping(store, "h", noon(), Some(100.0)).await;
    let answered = ping(store, "h", noon() + minutes(10), Some(100.0)).await;
    for minute in [20, 21] {
        ping(store, "h", noon() + minutes(minute), None).await;
    }
    assert!((sum().await - 1260.0).abs() < 1e-6);
    let now = noon() + minutes(22);
    let since = noon() + minutes(20);
    let claim = claimed(store, "h", now).await;
    let latest = store.latest(key, 10).await.unwrap();
    let policy = PingPolicy::default();
    let after = policy.without_failures(&claim.known, &latest, since, now, "own network");
    assert!(
        store
            .void_failures(&claim, since, "own network", &after)
            .await
            .unwrap()
    );
    assert!((sum().await - 600.0).abs() < 1e-6);
    let agent = known(store, "h").await;
    assert_eq!(agent.agent.status, Status::Unobserved);
    assert_eq!(agent.streak, answered.after.streak);
    assert_eq!(agent.agent.last_ping_at, Some(answered.ping.timestamp));
    assert_eq!(agent.agent.next_ping_at, now);
    for ping in &history(store, "h", since).await {
        assert!(!ping.observed && !ping.success && ping.window_seconds == Some(0.0));
        assert_eq!(ping.error.as_deref(), Some("own network"));
    }
    // The claim ended by that.
    assert!(
        !store
            .void_failures(&claim, since, "own network", &after)
            .await
            .unwrap()
    );
    remove(store, "h").await.unwrap();
}

async fn an_agent_that_comes_back_has_its_past(store: &dyn Store) {
    store.register(&registration("i", noon())).await.unwrap();
    for (minute, uptime) in [(0, Some(100.0)), (10, Some(50.0)), (20, None)] {
        ping(store, "i", noon() + minutes(minute), uptime).await;
    }
    let before = known(store, "i").await;
    let pings = history(store, "i", noon()).await;
    let removed_at = noon() + minutes(30);
    assert!(store.remove("i", removed_at, false).await.unwrap());
    assert!(!store.remove("i", removed_at, false).await.unwrap());
    assert_eq!(store.agent("i").await.unwrap(), None);
    let again = registration("i", noon() + minutes(40));
    let after = store.register(&again).await.unwrap();
    assert_eq!((after.key, after.streak), (before.key, before.streak));
    assert_eq!(after.agent.total_pings, 3);
    assert_eq!(after.agent.status, Status::Unreachable);
    assert_eq!(after.agent.next_ping_at, again.at);
    assert_eq!(after.agent.capabilities, ["gpu-check"]);
    assert_eq!(history(store, "i", noon()).await, pings);
    // After the retention it is another one, as it is when it is to be forgotten.
    assert!(store.remove("i", removed_at, false).await.unwrap());
    prune_all(store, noon() + minutes(31)).await;
    let later = store.register(&again).await.unwrap();
    assert_ne!(later.key, before.key);
    assert_eq!(later.agent.total_pings, 0);
    assert!(store.remove("i", removed_at, false).await.unwrap());
    assert!(store.remove("i", removed_at, true).await.unwrap());
    assert_ne!(store.register(&again).await.unwrap().key, later.key);
    remove(store, "i").await.unwrap();
}

async fn prune_all(store: &dyn Store, before: DateTime<Utc>) {
    let mut from = Some(PruneCursor::default());
    while let Some(here) = from {
        from = store.prune(before, here).await.unwrap().next;
    }
}

async fn times_are_kept(store: &dyn Store) {
    assert_eq!(store.retention_now().await.unwrap(), None);
    store.set_retention_now(noon()).await.unwrap();
    assert_eq!(store.retention_now().await.unwrap(), Some(noon()));
    let off = store.now().await.unwrap() - Utc::now();
    assert!(off.abs() < TimeDelta::seconds(5), "{off}");
}

/// Goes on with an agent and three pings of it, and another one that was never pinged.
async fn agents_are_listed_by_pages(store: &dyn Store) {
    for name in ["é", "z", "B", "it's"] {
        store.register(&registration(name, noon())).await.unwrap();
    }
    ping(store, "z", noon(), None).await;
    let all = store.agents(all_agents()).await.unwrap();
    let mut paged = Vec::new();
    let mut after = String::new();
    loop {
        let page = AgentPage {
            after: &after,
            due_at: None,
            limit: 2,
        };
        let page = store.agents(page).await.unwrap();
        let Some(last) = page.last() else { break };
        // An agent that goes does not shift the others.
        let gone = remove(store, &last.agent.agent_id).await.unwrap();
        assert!(gone);
        after = last.agent.agent_id.clone();
        paged.extend(page);
    }
    assert_eq!(paged, all);
    let names: std::collections::HashSet<_> = all.iter().map(|r| &r.agent.agent_id).collect();
    assert_eq!(names.len(), all.len());

    for name in ["é", "z", "B", "it's"] {
        remove(store, name).await.unwrap();
        store.register(&registration(name, noon())).await.unwrap();
    }
    ping(store, "z", noon(), None).await;
    for (name, outcome) in [
        ("B", answer(100.0, false)),
        ("é", PingOutcome::Unobserved("our own network".to_owned())),
    ] {
        ping(store, name, noon(), Some(100.0)).await;
        let claim = claimed(store, name, noon()).await;
        let new = evaluated(&claim, noon(), outcome);
        record(store, claim, new).await;
    }
    let known = store.agents(all_agents()).await.unwrap();
    let of_all = |count: fn(&AgentRecord) -> u64| known.iter().map(count).sum::<u64>();
    let expected = Totals {
        agents: known.len() as u64,
        unreachable: of_all(|known| u64::from(known.agent.status == Status::Unreachable)),
        due: of_all(|known| u64::from(known.agent.next_ping_at <= noon())),
        poor: of_all(|known| u64::from(known.agent.consecutive_poor_uptime > 0)),
        no_gpu: of_all(|known| u64::from(known.agent.status == Status::NoGpu)),
        unobserved: of_all(|known| u64::from(known.agent.status == Status::Unobserved)),
        unknown: of_all(|known| u64::from(known.agent.status == Status::Unknown)),
        pings: of_all(|known| known.agent.total_pings),
    };
    assert_eq!(store.totals(noon()).await.unwrap(), expected);
    assert!(expected.unreachable > 0 && expected.due > 0);
    for status in Status::ALL.into_iter().skip(1) {
        assert!(expected.of(status) > 0, "{status:?}");
    }
}

async fn open_file(path: &Path) -> anyhow::Result<SqliteStore> {
    sqlite::open(Location::File(path.to_owned())).await
}

async fn open_url(url: &str) -> anyhow::Result<PostgresStore> {
    postgres::open(PostgresOptions::parse(url, None).unwrap()).await
}

#[tokio::test]
async fn sqlite_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("with a space.db");
    let store = open_file(&path).await.unwrap();
    contract(&store).await;

    // Another process would be refused; the next one finds all that was stored, and no lease.
    let refused = format!("{:#}", open_file(&path).await.unwrap_err());
    assert!(refused.contains("another ping system"), "{refused}");
    claimed(&store, "e", noon()).await;
    drop(store);
    let store = open_file(&path).await.unwrap();
    assert_eq!(history(&store, "e", noon()).await.len(), 30);
    claimed(&store, "e", noon()).await;
}

/// A database that was made by release 0.1.0 is used as it is.
async fn is_taken_over(store: &dyn Store) {
    let agents = store.agents(all_agents()).await.unwrap();
    let ids: Vec<&str> = agents.iter().map(|r| r.agent.agent_id.as_str()).collect();
    assert_eq!(ids, ["agent-001", "it's <odd>", "unreachable"]);
    let long_ago = utc("2026-01-01T00:00:00Z");
    for record in &agents {
        let agent = &record.agent;
        let pings = history(store, &agent.agent_id, long_ago).await;
        assert_eq!(pings.len() as u64, agent.total_pings, "{agent:?}");
        assert!(pings.len() >= 5, "{agent:?}");
        let newest = pings.last().unwrap();
        assert_eq!(Some(newest.timestamp), agent.last_ping_at);
        assert_eq!(newest.uptime_percent, agent.last_uptime_percent);
        assert_eq!(newest.success, agent.status == Status::Active);
        let sums = store.sums_since(long_ago, Some(&[record.key])).await;
        let sums = sums.unwrap();
        let covered: f64 = sums.iter().map(|(_, sum)| sum.covered_seconds).sum();
        assert!(covered > 5.0, "{agent:?}: {covered}");
        let at = newest.timestamp + minutes(1);
        let last_answered = pings.iter().rfind(|ping| ping.success);
        let from = last_answered.unwrap_or(newest).timestamp;
        let new = ping(store, &agent.agent_id, at, Some(99.0)).await;
        assert_eq!(new.ping.covers_from, Some(from), "{agent:?}");
        let pings_now = history(store, &agent.agent_id, long_ago).await;
        assert_eq!(pings_now.len(), pings.len() + 1);
    }
    // Keys are not used again, not even that of the agent that was removed.
    let new = store.register(&registration("gone", noon())).await.unwrap();
    assert!(new.key > 4, "{}", new.key);
    assert!(history(store, "gone", long_ago).await.is_empty());
}

#[tokio::test]
async fn a_sqlite_file_of_0_1_0_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.db");
    let dump = include_str!("../../fixtures/databases/0.1.0-sqlite.sql");
    let made = rusqlite::Connection::open(&path).unwrap();
    made.execute_batch(dump).unwrap();
    drop(made);
    let store = open_file(&path).await.unwrap();
    is_taken_over(&store).await;
    assert_eq!(store.health().await.unwrap().schema_version, 6);
    drop(store);
    // The second start finds it up to date.
    let store = open_file(&path).await.unwrap();
    assert_eq!(store.agents(all_agents()).await.unwrap().len(), 4);
}

#[tokio::test]
async fn a_sqlite_file_of_a_newer_release_is_refused_unless_it_allows_older_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("newer.db");
    drop(open_file(&path).await.unwrap());
    let change = |sql: &str| {
        let database = rusqlite::Connection::open(&path).unwrap();
        database.execute_batch(sql).unwrap();
    };
    change("UPDATE schema_version SET version = 99, compatible_with = 99");
    let error = format!("{:#}", open_file(&path).await.unwrap_err());
    assert!(error.contains("version 99"), "{error}");
    change("UPDATE schema_version SET compatible_with = 6");
    open_file(&path).await.unwrap();
}

#[tokio::test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
async fn a_postgres_database_of_0_1_0_is_taken_over() {
    let server = Postgres::start();
    let url = server.database("old");
    let dump = include_str!("../../fixtures/databases/0.1.0-postgres.sql");
    server.run_script("old", dump);
    let store = open_url(&url).await.unwrap();
    is_taken_over(&store).await;
    assert_eq!(store.health().await.unwrap().schema_version, 6);
}

#[tokio::test]
async fn sqlite_in_memory_keeps_the_contract() {
    let store = sqlite::open(Location::Memory).await.unwrap();
    contract(&store).await;
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("not.db");
    std::fs::write(
        &path,
        "this is no database, but text that is long enough to be looked at",
    )
    .unwrap();
    let error = format!("{:#}", open_file(&path).await.unwrap_err());
    assert!(error.contains("not a database"), "{error}");
}

#[tokio::test]
#[cfg_attr(no_postgres, ignore = "needs PostgreSQL (package postgresql)")]
async fn postgres_keeps_the_contract() {
    let server = Postgres::start();
    let store = open_url(&server.database("contract")).await.unwrap();
    contract(&store).await;
}
