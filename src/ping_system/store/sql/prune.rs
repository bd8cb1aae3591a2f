//! Deletes what is old, a little at a time.

use sqlx::Row;

use super::super::{PruneCursor, Pruned};
use super::{MICROS_PER_HOUR, SqlStore};

/// How much one step does at most.
const PRUNED_AGENTS: i64 = 100;
const PRUNED_PINGS_PER_AGENT: i64 = 1000;

impl SqlStore {
    pub(super) async fn prune_step(
        &self,
        before: i64,
        from: PruneCursor,
    ) -> Result<Pruned, sqlx::Error> {
        let mut transaction = self.write.begin().await?;
        let due = sqlx::query(
            "SELECT key, removed FROM (SELECT key, 0 AS removed FROM agents UNION ALL \
             SELECT key, 1 AS removed FROM removed_agents) AS a \
             WHERE key > $1 ORDER BY key LIMIT $2",
        )
        .bind(from.0)
        .bind(PRUNED_AGENTS)
        .fetch_all(&mut *transaction)
        .await?;
        let mut pruned = Pruned {
            pings: 0,
            next: None,
            more: false,
        };
        for row in &due {
            let key: i64 = row.try_get("key")?;
            let removed = row.try_get::<i32, _>("removed")? != 0;
            let before = if removed { i64::MAX } else { before };
            let deleted = sqlx::query(
                "DELETE FROM pings WHERE agent_key = $1 AND at < $2 AND at <= COALESCE((\
                 SELECT at FROM pings WHERE agent_key = $1 AND at < $2 \
                 ORDER BY at LIMIT 1 OFFSET $3), $2)",
            )
            .bind(key)
            .bind(before)
            .bind(PRUNED_PINGS_PER_AGENT)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
            pruned.pings += deleted;
            pruned.more |= deleted > PRUNED_PINGS_PER_AGENT.unsigned_abs();
            if deleted > 0 || removed {
                sqlx::query("DELETE FROM hours WHERE agent_key = $1 AND hour < $2")
                    .bind(key)
                    .bind(before.div_euclid(MICROS_PER_HOUR))
                    .execute(&mut *transaction)
                    .await?;
            }
            if removed && deleted == 0 {
                sqlx::query("DELETE FROM removed_agents WHERE key = $1")
                    .bind(key)
                    .execute(&mut *transaction)
                    .await?;
            }
        }
        transaction.commit().await?;
        if i64::try_from(due.len()) == Ok(PRUNED_AGENTS) {
            let last = due.last().map(|row| row.try_get("key")).transpose()?;
            pruned.next = last.map(PruneCursor);
        }
        Ok(pruned)
    }
}
