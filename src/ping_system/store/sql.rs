//! The statements that both databases run as they stand here. Parameters are bound by position: each statement
//! mentions `$1`, `$2`, … for the first time in this order, since SQLite numbers them by that.

use super::{PruneCursor, Pruned};

/// The columns of an [`AgentRow`](super::rows::AgentRow), in its order.
macro_rules! agent_columns {
    () => {
        "key, agent_id, agent_url, capabilities, metadata, registered_at, next_ping_at, \
         ping_interval_us, total_pings, consecutive_poor, good_in_a_row, last_ping_at, \
         last_success, last_uptime_percent, answered_poor, answered_good, status, status_seq, details"
    };
}

/// The columns of a [`PingRow`](super::rows::PingRow), in its order.
macro_rules! ping_columns {
    () => {
        "at, seq, success, uptime_percent, window_seconds, gpu_available, first_ping, \
         response_time_ms, error, covers_from, superseded, observed"
    };
}

/// Id, URL, capabilities, metadata, registration, first ping, interval, and whether capabilities and metadata are told: if
/// not, those that are known stay. An agent at a new address is due at once.
pub(super) const REGISTER: &str = concat!(
    "INSERT INTO agents (agent_id, agent_url, capabilities, metadata, registered_at, \
     next_ping_at, ping_interval_us) VALUES ($1, $2, $3, $4, $5, $6, $7) \
     ON CONFLICT (agent_id) DO UPDATE SET next_ping_at = CASE \
     WHEN agents.agent_url = excluded.agent_url THEN agents.next_ping_at \
     ELSE excluded.next_ping_at END, agent_url = excluded.agent_url, \
     capabilities = CASE WHEN $8 = 1 THEN excluded.capabilities ELSE agents.capabilities END, \
     metadata = CASE WHEN $9 = 1 THEN excluded.metadata ELSE agents.metadata END RETURNING ",
    agent_columns!()
);

pub(super) const REMOVE: &str = "DELETE FROM agents WHERE agent_id = $1 RETURNING key";

/// What an agent keeps from one registration to the next.
macro_rules! kept_columns {
    () => {
        "registered_at, ping_interval_us, total_pings, consecutive_poor, good_in_a_row, \
         last_ping_at, last_success, last_uptime_percent, answered_poor, answered_good, status, \
         status_seq, details"
    };
}

/// Now, id: keeps what is known of an agent that is being removed.
pub(super) const DEPART: &str = concat!(
    "INSERT INTO departed_agents (agent_id, key, removed_at, ",
    kept_columns!(),
    ") SELECT agent_id, key, $1, ",
    kept_columns!(),
    " FROM agents WHERE agent_id = $2 ON CONFLICT (agent_id) DO NOTHING"
);

/// Id, URL, next ping: gives back what is kept of an agent that is not registered. `overriding` lets a database that
/// counts keys take one.
pub(super) fn come_back(overriding: &str) -> String {
    format!(
        "INSERT INTO agents (key, agent_id, agent_url, capabilities, metadata, next_ping_at, {kept}) \
         {overriding}SELECT key, $1, $2, '[]', '{{}}', $3, {kept} FROM departed_agents \
         WHERE agent_id = $1 ON CONFLICT (agent_id) DO NOTHING",
        kept = kept_columns!()
    )
}

/// Id: nothing is kept of an agent any more.
pub(super) const NOT_DEPARTED: &str =
    "DELETE FROM departed_agents WHERE agent_id = $1 RETURNING key";

/// Before: agents that departed longer ago are forgotten, as those that were removed for good.
pub(super) const EXPIRE_DEPARTED: &str =
    "INSERT INTO removed_agents (key) SELECT key FROM departed_agents WHERE removed_at < $1";
pub(super) const FORGET_DEPARTED: &str = "DELETE FROM departed_agents WHERE removed_at < $1";

pub(super) const REMEMBER_REMOVED: &str = "INSERT INTO removed_agents (key) VALUES ($1)";

pub(super) const AGENT: &str = concat!(
    "SELECT ",
    agent_columns!(),
    " FROM agents WHERE agent_id = $1"
);

/// After, due at, limit. The plus sign keeps the order by id cheap: SQLite must not use the index of due agents.
pub(super) const AGENTS: &str = concat!(
    "SELECT ",
    agent_columns!(),
    " FROM agents WHERE agent_id > $1 AND +next_ping_at <= $2 ORDER BY agent_id LIMIT $3"
);

/// Now.
pub(super) const TOTALS: &str = "SELECT COUNT(*), COUNT(*) FILTER (WHERE last_success = 0), \
    COUNT(*) FILTER (WHERE last_success = 1 AND status = 'no_gpu' AND status_seq = total_pings), \
    COUNT(*) FILTER (WHERE last_success = 1 AND status = 'unobserved' AND status_seq = total_pings), \
    COUNT(*) FILTER (WHERE last_success IS NULL), COUNT(*) FILTER (WHERE next_ping_at <= $1), \
    COUNT(*) FILTER (WHERE consecutive_poor > 0), \
    CAST(COALESCE(SUM(total_pings), 0) AS BIGINT) FROM agents";

/// Token, end of the lease, id, now. A lease with the same token is taken again, so that a repetition after a
/// lost answer succeeds.
pub(super) const CLAIM: &str = concat!(
    "UPDATE agents SET lease = $1, lease_until = $2 WHERE agent_id = $3 \
     AND (lease_until IS NULL OR lease_until <= $4 OR lease = $1) RETURNING ",
    agent_columns!()
);

/// Token, end of the lease, now, limit. A repetition takes what the first attempt took, as in [`CLAIM`].
pub(super) fn claim_due(locking: &str) -> String {
    format!(
        "UPDATE agents SET lease = $1, lease_until = $2 WHERE key IN (\
         SELECT key FROM agents WHERE next_ping_at <= $3 \
         AND (lease_until IS NULL OR lease_until <= $3 OR lease = $1) \
         ORDER BY next_ping_at LIMIT $4{locking}) RETURNING {}",
        agent_columns!()
    )
}

/// Now.
pub(super) const NEXT_DUE: &str = "SELECT next_ping_at FROM agents \
    WHERE lease_until IS NULL OR lease_until <= $1 ORDER BY next_ping_at LIMIT 1";

/// Key, instant and number of the cursor, limit.
pub(super) const HISTORY: &str = concat!(
    "SELECT ",
    ping_columns!(),
    " FROM pings WHERE agent_key = $1 AND (at, seq) > ($2, $3) ORDER BY at, seq LIMIT $4"
);

/// Key: when the agent was last pinged with an answer.
pub(super) const LAST_ANSWERED: &str = "SELECT at FROM pings WHERE agent_key = $1 AND success = 1 \
    ORDER BY at DESC, seq DESC LIMIT 1";

/// Key, limit.
pub(super) const LATEST: &str = concat!(
    "SELECT ",
    ping_columns!(),
    " FROM pings WHERE agent_key = $1 ORDER BY at DESC, seq DESC LIMIT $2"
);

/// Key, instant, number: whether the ping is stored.
pub(super) const IS_STORED: &str =
    "SELECT COUNT(*) FROM pings WHERE agent_key = $1 AND at = $2 AND seq = $3";

/// Now. A tenth more than the interval is beyond any jitter.
pub(super) const RESCHEDULE_OVERDUE: &str = "UPDATE agents SET next_ping_at = $1 \
    WHERE next_ping_at > $1 + ping_interval_us + ping_interval_us / 10";

/// The latest end of a lease that is believed.
pub(super) const FREE_LEASES: &str =
    "UPDATE agents SET lease = NULL, lease_until = NULL WHERE lease_until > $1";

/// Reason, key, instant: the failed pings since then say nothing.
pub(super) const VOID_FAILURES: &str = "UPDATE pings SET observed = 0, window_seconds = 0.0, \
    covered_seconds = 0.0, covers_from = NULL, first_ping = 0, error = $1 \
    WHERE agent_key = $2 AND at >= $3 AND success = 0 AND observed = 1 AND superseded = 0";

/// Key, instant: what those pings weighed is taken from the sums of their hours.
pub(super) const TAKE_VOID_FROM_HOURS: &str = "INSERT INTO hours \
    (agent_key, hour, up_seconds, covered_seconds) \
    SELECT agent_key, at / 3600000000, 0.0, -SUM(covered_seconds) FROM pings \
    WHERE agent_key = $1 AND at >= $2 AND success = 0 AND observed = 1 AND superseded = 0 \
    GROUP BY 1, 2 ON CONFLICT (agent_key, hour) DO UPDATE SET \
    covered_seconds = hours.covered_seconds + excluded.covered_seconds";

pub(super) const RETENTION_NOW: &str = "SELECT retention_now FROM health";

pub(super) const SET_RETENTION_NOW: &str = "UPDATE health SET retention_now = $1";

/// The key to go on after, limit.
pub(super) const PRUNE_AGENTS: &str = "SELECT key, removed FROM (\
    SELECT key, 0 AS removed FROM agents UNION ALL SELECT key, 1 AS removed FROM removed_agents\
    ) AS a WHERE key > $1 ORDER BY key LIMIT $2";

/// Key, end of what is deleted, number of pings.
pub(super) const PRUNE_PINGS: &str = "DELETE FROM pings WHERE agent_key = $1 AND at < $2 \
    AND at <= COALESCE((SELECT at FROM pings WHERE agent_key = $1 AND at < $2 \
    ORDER BY at LIMIT 1 OFFSET $3), $2)";

/// Key, end of what is deleted.
pub(super) const PRUNE_HOURS: &str = "DELETE FROM hours WHERE agent_key = $1 AND hour < $2";

pub(super) const FORGET_REMOVED: &str = "DELETE FROM removed_agents WHERE key = $1";

/// Now.
pub(super) const CHECK_WRITE: &str = "UPDATE health SET checked_at = $1";

/// Agents per step of pruning, and pings per agent.
pub(super) const PRUNED_AGENTS: i64 = 100;
pub(super) const PRUNED_PINGS_PER_AGENT: i64 = 1000;

impl Pruned {
    /// Adds what was deleted of one agent.
    pub(super) fn add(&mut self, deleted: u64) {
        self.pings += deleted;
        self.more |= deleted > PRUNED_PINGS_PER_AGENT.unsigned_abs();
    }
}

/// Where pruning goes on after a step over these agents; `None` after the last ones.
pub(super) fn next_step(agents: impl ExactSizeIterator<Item = i64>) -> Option<PruneCursor> {
    let full = i64::try_from(agents.len()) == Ok(PRUNED_AGENTS);
    agents.last().filter(|_| full).map(PruneCursor)
}

pub(super) const MICROS_PER_HOUR: i64 = 3_600_000_000;

/// A statement that sums up a table, `pings` or `hours`: begin, end, and one parameter per key if there are
/// `keys`.
pub(super) struct SumSql {
    pub(super) sql: String,
    pub(super) from: i64,
    pub(super) until: i64,
}

/// The statements whose sums add up to those since `since_micros`: whole hours from their sums, what comes
/// before them from the pings. `filter` restricts `a.key`.
pub(super) fn sums(since_micros: i64, filter: &str) -> [SumSql; 2] {
    let first_hour = since_micros.div_euclid(MICROS_PER_HOUR) + 1;
    let up = "t.covered_seconds * COALESCE(t.uptime_percent, 0.0) / 100.0";
    let statement = |table, column, up, from, until| {
        let sql = format!(
            "SELECT a.key, COALESCE(SUM({up}), 0.0), COALESCE(SUM(t.covered_seconds), 0.0) \
             FROM agents a JOIN {table} t ON t.agent_key = a.key AND t.{column} >= $1 \
             AND t.{column} < $2{filter} GROUP BY a.key"
        );
        SumSql { sql, from, until }
    };
    [
        statement("hours", "hour", "t.up_seconds", first_hour, i64::MAX),
        statement(
            "pings",
            "at",
            up,
            since_micros,
            first_hour * MICROS_PER_HOUR,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise SQLite would bind values to other parameters than PostgreSQL.
    #[test]
    fn parameters_are_first_mentioned_in_order() {
        let [hours, pings] = sums(0, "");
        let claim_due = claim_due("");
        for sql in [
            REGISTER,
            REMOVE,
            DEPART,
            &come_back(""),
            NOT_DEPARTED,
            EXPIRE_DEPARTED,
            FORGET_DEPARTED,
            REMEMBER_REMOVED,
            AGENT,
            AGENTS,
            TOTALS,
            CLAIM,
            &claim_due,
            NEXT_DUE,
            HISTORY,
            LAST_ANSWERED,
            LATEST,
            IS_STORED,
            RESCHEDULE_OVERDUE,
            FREE_LEASES,
            VOID_FAILURES,
            TAKE_VOID_FROM_HOURS,
            SET_RETENTION_NOW,
            PRUNE_AGENTS,
            PRUNE_PINGS,
            PRUNE_HOURS,
            FORGET_REMOVED,
            CHECK_WRITE,
            &hours.sql,
            &pings.sql,
        ] {
            let mut known = 0;
            for rest in sql.split('$').skip(1) {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                let number: usize = digits.parse().unwrap();
                assert!(number <= known + 1, "{sql}");
                known = known.max(number);
            }
        }
    }
}
