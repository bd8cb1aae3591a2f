//! Sums up what pings say of a time.

use chrono::{DateTime, Utc};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};

use super::super::{StoreError, Sum};
use super::{MICROS_PER_HOUR, SqlStore, in_time};

impl SqlStore {
    /// Whole hours from their sums, what stands before them from the pings themselves.
    pub(super) async fn sums(
        &self,
        since: DateTime<Utc>,
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        let from = since.timestamp_micros();
        let first_hour = from.div_euclid(MICROS_PER_HOUR) + 1;
        let before = [from, first_hour * MICROS_PER_HOUR];
        let up = "t.covered_seconds * COALESCE(t.uptime_percent, 0.0) / 100.0";
        let whole = [first_hour, i64::MAX];
        let mut sums = self
            .sums_of("hours", "hour", "t.up_seconds", whole, agent_keys)
            .await?;
        sums.extend(self.sums_of("pings", "at", up, before, agent_keys).await?);
        Ok(sums)
    }

    /// Sums of pings in `[from, until)`, given in microseconds.
    async fn sums_of(
        &self,
        table: &'static str,
        column: &'static str,
        up: &'static str,
        [from, until]: [i64; 2],
        agent_keys: Option<&[i64]>,
    ) -> Result<Vec<(i64, Sum)>, StoreError> {
        let mut sql = format!(
            "SELECT a.key AS key, SUM({up}) AS up_seconds, SUM(t.covered_seconds) AS covered_seconds \
             FROM agents a JOIN {table} t ON t.agent_key = a.key AND t.{column} >= $1 AND t.{column} < $2"
        );
        if let Some(keys) = agent_keys {
            let places: Vec<String> = (3..3 + keys.len()).map(|n| format!("${n}")).collect();
            sql.push_str(" WHERE a.key IN (");
            sql.push_str(&places.join(", "));
            sql.push(')');
        }
        sql.push_str(" GROUP BY a.key");
        let mut query = sqlx::query(AssertSqlSafe(sql)).bind(from).bind(until);
        for &key in agent_keys.unwrap_or_default() {
            query = query.bind(key);
        }
        let rows = in_time(query.fetch_all(&self.read)).await?;
        let sum = |row: &AnyRow| -> Result<(i64, Sum), StoreError> {
            let sum = Sum {
                up_seconds: row.try_get::<Option<f64>, _>("up_seconds")?.unwrap_or(0.0),
                covered_seconds: row.try_get("covered_seconds")?,
            };
            Ok((row.try_get("key")?, sum))
        };
        rows.iter().map(sum).collect()
    }
}
