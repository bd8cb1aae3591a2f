-- SQLite only. Counts the transactions that were acknowledged, so that a file that was put back can be told from
-- one that lacks some of them.
CREATE TABLE commits (
    -- Tells apart databases that count alike.
    database_id TEXT NOT NULL,
    acknowledged BIGINT NOT NULL
);

INSERT INTO commits (database_id, acknowledged) VALUES (lower(hex(randomblob(16))), 0);
