-- From when on a ping speaks for its agent, and whether an answered one speaks for the same time. Both are unknown of
-- pings of releases up to 0.1.0, which keep their meaning.
ALTER TABLE pings ADD COLUMN covers_from BIGINT;
ALTER TABLE pings ADD COLUMN superseded BIGINT NOT NULL DEFAULT 0;

-- The counts of poor and good pings when the agent last answered, while it does not.
ALTER TABLE agents ADD COLUMN answered_poor BIGINT;
ALTER TABLE agents ADD COLUMN answered_good BIGINT;
