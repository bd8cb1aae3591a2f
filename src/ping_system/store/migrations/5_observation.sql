-- Whether the ping system could see the agent at all; where it could not, the ping says nothing.
ALTER TABLE pings ADD COLUMN observed BIGINT NOT NULL DEFAULT 1;

-- The agent's status, and what else its last ping told, as JSON. Both are valid only while status_seq equals
-- total_pings: releases up to 0.1.0 store pings without them.
ALTER TABLE agents ADD COLUMN status TEXT;
ALTER TABLE agents ADD COLUMN status_seq BIGINT;
ALTER TABLE agents ADD COLUMN details TEXT;

-- Up to when time has passed for the retention, as far as a clock that cannot be set has measured it.
ALTER TABLE health ADD COLUMN retention_now BIGINT;
