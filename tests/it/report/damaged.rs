//! Files of records that are not as the program wrote them: a disk, an editor or somebody's tool changed them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;
use rusqlite::types::Value as Cell;
use uptime_runner::records::open_to_write;

use super::figures;
use crate::support::{PingSystem, Runner, good_gateway};

/// What `report` can be asked for, which together read all of a file.
const REQUESTS: [&[&str]; 3] = [
    &["--json", "--forecast", "--suggest", "1000000000000"],
    &["--what-if", "linear:90..99", "--html", "page.html"],
    &[
        "--statement",
        "--csv",
        "--out",
        "s.csv",
        "--jobs",
        "jobs.csv",
    ],
];

/// A file with something in each table: a run as it is recorded, and one of before.
static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.db");
    figures::fixture(&file);
    let pings = PingSystem::start(96.0);
    let gateway = good_gateway();
    let record = ["--record", file.to_str().unwrap()];
    let run = ["--rate", "6000", "--price", "1000", "--max-jobs", "50"];
    let finished =
        Runner::start(&pings.url(), &gateway.url(), &[&record[..], &run].concat()).finish();
    assert!(finished.status.success(), "{}", finished.stderr);
    let connection = open_to_write(&file).unwrap();
    connection
        .execute_batch(
            "INSERT INTO jobs_in_flight SELECT x'01', run, sent_at, agent, capability FROM jobs ORDER BY sent_at DESC LIMIT 1;
             INSERT INTO claims SELECT run, sent_at, agent, 1, 99.5, 99, 60, 10, 1e-9 FROM jobs ORDER BY sent_at DESC LIMIT 1;
             INSERT INTO discoveries SELECT run, sent_at, agent, 'listed', 2, 1, '7', 'wei', 'fixed' FROM jobs ORDER BY sent_at DESC LIMIT 1;
             PRAGMA journal_mode = DELETE;",
        )
        .unwrap();
    drop(connection);
    std::fs::read(&file).unwrap()
});

/// `report` prints or refuses; it never crashes, hangs or takes all memory.
fn is_reported_or_refused(folder: &Path) -> Result<(), TestCaseError> {
    for request in REQUESTS {
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "ulimit -t 20; ulimit -v 4000000; exec \"$0\" report runs.db \"$@\"",
            ])
            .arg(assert_cmd::cargo::cargo_bin!("uptime-runner"))
            .args(request)
            .current_dir(folder);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let code = output.status.code();
        prop_assert!(matches!(code, Some(0..=2)), "{request:?}: {code:?} {said}");
        prop_assert!(
            code == Some(0) || said.contains("runs.db"),
            "{request:?}: {said}"
        );
    }
    Ok(())
}

fn cell() -> impl Strategy<Value = Cell> {
    prop_oneof![
        Just(Cell::Null),
        prop::sample::select(vec![i64::MIN, -1, 0, 1, 1 << 40, i64::MAX]).prop_map(Cell::Integer),
        prop::sample::select(vec![f64::INFINITY, -0.5, 1e300]).prop_map(Cell::Real),
        prop::sample::select(vec![
            "",
            "NaN",
            "-1",
            "\u{1b}[31m\u{202e}x",
            "99999999999999999999999999999999999999999999",
            "tiers:99=100",
            "withheld",
        ])
        .prop_map(|text| Cell::Text(text.to_owned())),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Cell::Blob),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_file_with_changed_bytes_is_reported_or_refused(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..20),
        cut in prop::option::weighted(0.2, any::<Index>()),
    ) {
        let mut bytes = GOOD.clone();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("runs.db"), bytes).unwrap();
        is_reported_or_refused(folder.path())?;
    }

    #[test]
    fn a_file_with_changed_values_is_reported_or_refused(
        changes in prop::collection::vec((any::<Index>(), any::<Index>(), any::<Index>(), cell()), 1..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("runs.db");
        std::fs::write(&file, &*GOOD).unwrap();
        let connection = rusqlite::Connection::open(&file).unwrap();
        let names = |query: &str| -> Vec<String> {
            let mut statement = connection.prepare(query).unwrap();
            let names = statement.query_map((), |row| row.get(0)).unwrap();
            names.collect::<Result<_, _>>().unwrap()
        };
        let tables = names("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'");
        for (table, column, row, cell) in changes {
            let table = table.get(&tables);
            let columns = names(&format!("SELECT name FROM pragma_table_info('{table}')"));
            let column = column.get(&columns);
            let rows = names(&format!("SELECT CAST(count(*) AS TEXT) FROM {table}"));
            let row = row.index(rows[0].parse::<usize>().unwrap().max(1));
            // What a constraint refuses cannot be in a file.
            let _ = connection.execute(
                &format!("UPDATE {table} SET {column} = ?1 WHERE ({column}) IN (SELECT {column} FROM {table} LIMIT 1 OFFSET {row})"),
                [cell],
            );
        }
        drop(connection);
        is_reported_or_refused(folder.path())?;
    }
}
