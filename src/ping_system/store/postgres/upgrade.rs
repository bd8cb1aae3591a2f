//! Brings the tables up to date, and finds out whether a connection is a session of its own.

use deadpool_postgres::Client;
use tokio_postgres::{Error, SimpleQueryMessage};

use super::super::StoreError;
use super::super::schema::{self, Dialect, SELECT_LEGACY_VERSION, SELECT_VERSION, SchemaVersion};
use super::Failure;
use super::failure::store_error;

/// Serializes the upgrades of several ping systems; the number only has to differ from those of other programs.
const UPGRADE_LOCK: &str = "SELECT pg_advisory_xact_lock(7305804385)";

/// Brings the tables to the newest version. The version is read first: a role may have no right to create anything.
pub(super) async fn upgrade(client: &mut Client) -> Result<(), StoreError> {
    let upgraded = async {
        if pending_upgrade(version(client).await?)?.is_none() {
            return Ok(());
        }
        let transaction = client.transaction().await?;
        transaction.batch_execute(UPGRADE_LOCK).await?;
        // Another ping system may have been first.
        if let Some(script) = pending_upgrade(version(transaction.client()).await?)? {
            transaction.batch_execute(&script).await?;
        }
        transaction.commit().await?;
        Ok(())
    };
    upgraded.await.map_err(|failure| match failure {
        Failure::Postgres(error) => store_error(&error),
        Failure::Store(error) => error,
    })
}

fn pending_upgrade(found: Option<SchemaVersion>) -> Result<Option<String>, StoreError> {
    schema::upgrade(Dialect::Postgres, found)
        .map_err(|newer| StoreError::Unusable(newer.to_string()))
}

/// The version of the tables; `None` if there are none. Simple queries, since a pooler may refuse prepared ones.
pub(super) async fn version(
    client: &tokio_postgres::Client,
) -> Result<Option<SchemaVersion>, Failure> {
    let tables = client
        .simple_query("SELECT to_regclass('schema_version'), to_regclass('_sqlx_migrations')")
        .await?;
    let tables = rows(&tables).next();
    let exists = |column| tables.is_some_and(|row| row.get(column).is_some());
    let number = |text: Option<&str>| -> Result<i64, Failure> {
        let number = text.and_then(|text| text.parse().ok());
        number.ok_or_else(|| {
            StoreError::Unusable("its table schema_version holds no version".to_owned()).into()
        })
    };
    if exists(0) {
        let found = client.simple_query(SELECT_VERSION).await?;
        let row = rows(&found).next();
        return Ok(Some(SchemaVersion {
            version: number(row.and_then(|row| row.get(0)))?,
            compatible_with: number(row.and_then(|row| row.get(1)))?,
        }));
    }
    if !exists(1) {
        return Ok(None);
    }
    let found = client.simple_query(SELECT_LEGACY_VERSION).await?;
    Ok(Some(SchemaVersion::legacy(number(first_value(&found))?)))
}

/// Whether two connections that are open at once can have one session: then settings, prepared statements and
/// subscriptions are lost between two transactions.
pub(super) async fn is_pooled_by_transaction(
    one: &tokio_postgres::Client,
    other: &tokio_postgres::Client,
) -> Result<bool, Error> {
    const SESSION: &str = "SELECT pg_backend_pid()";
    let session = |answer: &[SimpleQueryMessage]| first_value(answer).map(str::to_owned);
    let before = session(&one.simple_query(SESSION).await?);
    other.batch_execute("BEGIN").await?;
    let others = session(&other.simple_query(SESSION).await?);
    let after = session(&one.simple_query(SESSION).await?);
    other.batch_execute("COMMIT").await?;
    Ok(before == others || before != after)
}

fn rows(answer: &[SimpleQueryMessage]) -> impl Iterator<Item = &tokio_postgres::SimpleQueryRow> {
    answer.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    })
}

pub(super) fn first_value(answer: &[SimpleQueryMessage]) -> Option<&str> {
    rows(answer).next()?.get(0)
}
