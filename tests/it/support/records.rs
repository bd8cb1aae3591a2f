//! What a file of records holds.

use std::path::Path;

use serde_json::{Value, json};
use uptime_runner::records::open_to_read;

/// The rows of a query, each as its columns.
pub(crate) fn rows(file: &Path, query: &str) -> Vec<Vec<Value>> {
    let connection = open_to_read(file).unwrap();
    let mut statement = connection.prepare(query).unwrap();
    let columns = statement.column_count();
    let cell = |value: rusqlite::types::Value| match value {
        rusqlite::types::Value::Null => Value::Null,
        rusqlite::types::Value::Integer(number) => json!(number),
        rusqlite::types::Value::Real(number) => json!(number),
        rusqlite::types::Value::Text(text) => json!(text),
        rusqlite::types::Value::Blob(bytes) => json!(bytes),
    };
    let row = |row: &rusqlite::Row| (0..columns).map(|n| row.get(n).map(cell)).collect();
    let rows = statement.query_map((), row).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}
