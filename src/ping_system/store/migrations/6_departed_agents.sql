-- Agents that were removed, with their keys and their standing: whoever is registered again under the same id goes on with
-- its history. They are forgotten with their pings, after the retention.
CREATE TABLE departed_agents (
    agent_id TEXT PRIMARY KEY,
    key BIGINT NOT NULL,
    removed_at BIGINT NOT NULL,
    registered_at BIGINT NOT NULL,
    ping_interval_us BIGINT NOT NULL,
    total_pings BIGINT NOT NULL,
    consecutive_poor BIGINT NOT NULL,
    good_in_a_row BIGINT NOT NULL,
    last_ping_at BIGINT,
    last_success BIGINT,
    last_uptime_percent DOUBLE PRECISION,
    answered_poor BIGINT,
    answered_good BIGINT,
    status TEXT,
    status_seq BIGINT,
    details TEXT
);
