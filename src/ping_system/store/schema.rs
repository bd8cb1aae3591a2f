//! The versions of the tables, and what brings a database to the newest one.
//!
//! A change must leave the statements of the previous release working, so that two releases can share a database
//! while one replaces the other. Releases up to 0.1.0 kept the version in `_sqlx_migrations`.

/// The kind of database, for what each spells differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

struct Migration {
    version: i64,
    /// Whether only SQLite needs it.
    sqlite_only: bool,
    sql: &'static str,
}

const MIGRATIONS: [Migration; 6] = [
    Migration {
        version: 1,
        sqlite_only: false,
        sql: include_str!("migrations/1_agents_and_pings.sql"),
    },
    Migration {
        version: 2,
        sqlite_only: false,
        sql: include_str!("migrations/2_health.sql"),
    },
    Migration {
        version: 3,
        sqlite_only: true,
        sql: include_str!("migrations/3_commits.sql"),
    },
    Migration {
        version: 4,
        sqlite_only: false,
        sql: include_str!("migrations/4_coverage.sql"),
    },
    Migration {
        version: 5,
        sqlite_only: false,
        sql: include_str!("migrations/5_observation.sql"),
    },
    Migration {
        version: 6,
        sqlite_only: false,
        sql: include_str!("migrations/6_departed_agents.sql"),
    },
];

/// The oldest version whose program works with the newest tables.
const COMPATIBLE_WITH: i64 = 2;

/// The version of a database, as it is stored in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SchemaVersion {
    pub(super) version: i64,
    /// The oldest version whose program works with these tables.
    pub(super) compatible_with: i64,
}

impl SchemaVersion {
    /// A version that was stored by a release up to 0.1.0, whose tables no other release reads.
    pub(super) fn legacy(version: i64) -> Self {
        Self {
            version,
            compatible_with: version,
        }
    }
}

/// The tables were made by a newer release, whose changes this one does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "its tables have version {found}, and this program knows versions up to {known}: use the newer \
     uptime-runner that made them, or restore a backup from before the upgrade"
)]
pub(super) struct NewerSchema {
    found: i64,
    known: i64,
}

/// Statements that select the version: from our own table, and from that of releases up to 0.1.0.
pub(super) const SELECT_VERSION: &str = "SELECT version, compatible_with FROM schema_version";
pub(super) const SELECT_LEGACY_VERSION: &str =
    "SELECT COALESCE(MAX(version), 0) FROM _sqlx_migrations WHERE success";

/// The newest version of a kind of database.
pub(super) fn newest(dialect: Dialect) -> i64 {
    let needed = migrations(dialect).map(|migration| migration.version);
    needed.max().unwrap_or_default()
}

fn migrations(dialect: Dialect) -> impl Iterator<Item = &'static Migration> {
    let all = MIGRATIONS.iter();
    all.filter(move |migration| dialect == Dialect::Sqlite || !migration.sqlite_only)
}

/// The script that brings a database to the newest version; `None` if it needs none. `found` is `None` for an
/// empty database.
///
/// # Errors
/// When the tables are newer than this program.
pub(super) fn upgrade(
    dialect: Dialect,
    found: Option<SchemaVersion>,
) -> Result<Option<String>, NewerSchema> {
    let known = newest(dialect);
    let from = found.map_or(0, |found| found.version);
    if let Some(found) = found
        && found.version > known
    {
        return if found.compatible_with <= known {
            Ok(None)
        } else {
            Err(NewerSchema {
                found: found.version,
                known,
            })
        };
    }
    if from == known {
        return Ok(None);
    }
    let (identity, clustered) = match dialect {
        Dialect::Sqlite => ("INTEGER PRIMARY KEY AUTOINCREMENT", " WITHOUT ROWID"),
        Dialect::Postgres => ("BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", ""),
    };
    let pending = migrations(dialect).filter(|migration| migration.version > from);
    let changes: String = pending
        .map(|migration| {
            migration
                .sql
                .replace("{{identity}}", identity)
                .replace("{{clustered}}", clustered)
        })
        .collect();
    Ok(Some(format!(
        "{changes}\n\
         CREATE TABLE IF NOT EXISTS schema_version (\
         version BIGINT NOT NULL, compatible_with BIGINT NOT NULL);\n\
         DELETE FROM schema_version;\n\
         INSERT INTO schema_version (version, compatible_with) \
         VALUES ({known}, {COMPATIBLE_WITH});\n"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(version: i64, compatible_with: i64) -> SchemaVersion {
        SchemaVersion {
            version,
            compatible_with,
        }
    }

    #[test]
    fn only_missing_changes_are_made() {
        let script = |dialect, found| upgrade(dialect, found).unwrap();
        let all = script(Dialect::Sqlite, None).unwrap();
        assert!(all.contains("CREATE TABLE agents") && all.contains("CREATE TABLE commits"));
        assert!(!all.contains("{{identity}}") && !all.contains("{{clustered}}"));
        let rest = script(Dialect::Sqlite, Some(SchemaVersion::legacy(2))).unwrap();
        assert!(!rest.contains("CREATE TABLE agents") && rest.contains("CREATE TABLE commits"));
        assert_eq!(script(Dialect::Sqlite, Some(version(6, 2))), None);
        // An up-to-date database is left alone: the role may have no right to change it.
        assert_eq!(script(Dialect::Postgres, Some(version(6, 2))), None);
        let rest = script(Dialect::Postgres, Some(SchemaVersion::legacy(2))).unwrap();
        assert!(rest.contains("covers_from") && !rest.contains("commits"));
    }

    #[test]
    fn newer_tables_are_used_only_if_they_allow_it() {
        assert_eq!(upgrade(Dialect::Sqlite, Some(version(9, 6))), Ok(None));
        let refused = upgrade(Dialect::Sqlite, Some(version(9, 7))).unwrap_err();
        assert!(refused.to_string().contains("version 9"), "{refused}");
    }
}
