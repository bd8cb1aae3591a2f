-- Stores a batch of pings, one per element of the arrays, in one statement, so that a batch costs one round trip and
-- one commit. A ping whose claim is no longer valid is left out; the result has those that were stored.
WITH input AS (
    SELECT * FROM unnest(
        $1::bigint[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[],
        $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::double precision[],
        $12::bigint[], $13::double precision[], $14::double precision[], $15::bigint[],
        $16::bigint[], $17::double precision[], $18::text[], $19::double precision[], $20::text[],
        $21::bigint[], $22::bigint[], $23::bigint[], $24::bigint[], $25::bigint[], $26::bigint[],
        $27::text[], $28::text[]
    ) AS input (
        key, lease, next_ping_at, ping_interval_us, total_pings, consecutive_poor,
        good_in_a_row, at, last_ping_at, last_success, last_uptime_percent, success,
        uptime_percent, window_seconds, gpu_available, first_ping,
        response_time_ms, error, covered_seconds, event, covers_from,
        supersedes_from, supersedes_after_seq, answered_poor, answered_good, observed, status, details
    )
),
updated AS (
    UPDATE agents SET
        next_ping_at = input.next_ping_at,
        ping_interval_us = input.ping_interval_us,
        total_pings = input.total_pings,
        consecutive_poor = input.consecutive_poor,
        good_in_a_row = input.good_in_a_row,
        last_ping_at = input.last_ping_at,
        last_success = input.last_success,
        last_uptime_percent = input.last_uptime_percent,
        answered_poor = input.answered_poor,
        answered_good = input.answered_good,
        status = input.status,
        status_seq = input.total_pings,
        details = input.details,
        lease = NULL,
        lease_until = NULL
    FROM input
    WHERE agents.key = input.key AND agents.lease = input.lease
    RETURNING agents.key, input.lease
),
stored AS (
    SELECT input.* FROM input JOIN updated ON updated.key = input.key AND updated.lease = input.lease
),
inserted AS (
    INSERT INTO pings (
        agent_key, at, seq, success, uptime_percent, window_seconds, gpu_available, first_ping,
        response_time_ms, error, covered_seconds, covers_from, observed
    )
    SELECT
        key, at, total_pings, success, uptime_percent, window_seconds, gpu_available, first_ping,
        response_time_ms, error, covered_seconds, covers_from, observed
    FROM stored
),
-- Failed pings whose time an answered one covers now, as they were before.
failed AS (
    SELECT pings.agent_key, pings.at, pings.seq, pings.covered_seconds
    FROM pings JOIN stored ON pings.agent_key = stored.key
        AND pings.at >= stored.supersedes_from AND pings.seq > stored.supersedes_after_seq AND pings.success = 0
        AND pings.observed = 1
),
superseded AS (
    UPDATE pings SET superseded = 1, window_seconds = 0.0, covered_seconds = 0.0
    FROM failed
    WHERE pings.agent_key = failed.agent_key AND pings.at = failed.at AND pings.seq = failed.seq
),
changes AS (
    SELECT
        key AS agent_key, at, covered_seconds * COALESCE(uptime_percent, 0.0) / 100.0 AS up_seconds,
        covered_seconds
    FROM stored WHERE covered_seconds > 0.0
    UNION ALL
    SELECT agent_key, at, 0.0, -covered_seconds FROM failed WHERE covered_seconds > 0.0
),
summed AS (
    INSERT INTO hours (agent_key, hour, up_seconds, covered_seconds)
    SELECT agent_key, floor(at / 3600000000.0)::bigint, SUM(up_seconds), SUM(covered_seconds)
    FROM changes GROUP BY 1, 2
    ON CONFLICT (agent_key, hour) DO UPDATE SET
        up_seconds = hours.up_seconds + excluded.up_seconds,
        covered_seconds = hours.covered_seconds + excluded.covered_seconds
)
SELECT key, lease, pg_notify('uptime_runner_pings', event) IS NULL FROM stored
