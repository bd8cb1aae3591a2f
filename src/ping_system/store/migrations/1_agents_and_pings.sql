-- Read by SQLite and PostgreSQL alike; what they spell differently stands in {{braces}}.
-- Instants are microseconds since 1970, truth values 0 or 1.

CREATE TABLE agents (
    key {{identity}},
    agent_id TEXT NOT NULL UNIQUE,
    agent_url TEXT NOT NULL,
    capabilities TEXT NOT NULL,
    metadata TEXT NOT NULL,
    registered_at BIGINT NOT NULL,
    next_ping_at BIGINT NOT NULL,
    ping_interval_us BIGINT NOT NULL,
    total_pings BIGINT NOT NULL DEFAULT 0,
    consecutive_poor BIGINT NOT NULL DEFAULT 0,
    good_in_a_row BIGINT NOT NULL DEFAULT 0,
    last_ping_at BIGINT,
    last_success BIGINT,
    last_uptime_percent DOUBLE PRECISION,
    -- Who pings the agent now, and until when nobody else does.
    lease TEXT,
    lease_until BIGINT
);

CREATE INDEX agents_due ON agents (next_ping_at);

-- The key holds one agent's pings together, in order of time.
CREATE TABLE pings (
    agent_key BIGINT NOT NULL,
    at BIGINT NOT NULL,
    -- Which one of the agent's pings; tells apart those of one instant.
    seq BIGINT NOT NULL,
    success BIGINT NOT NULL,
    uptime_percent DOUBLE PRECISION,
    window_seconds DOUBLE PRECISION,
    gpu_available BIGINT,
    first_ping BIGINT NOT NULL,
    response_time_ms DOUBLE PRECISION,
    error TEXT,
    -- What it weighs in a mean.
    covered_seconds DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (agent_key, at, seq)
){{clustered}};

-- Sums of an agent's pings by hours since 1970, from which means over days are made.
CREATE TABLE hours (
    agent_key BIGINT NOT NULL,
    hour BIGINT NOT NULL,
    up_seconds DOUBLE PRECISION NOT NULL,
    covered_seconds DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (agent_key, hour)
){{clustered}};

-- Agents that were deleted, whose pings are yet to be.
CREATE TABLE removed_agents (
    key BIGINT PRIMARY KEY
);
