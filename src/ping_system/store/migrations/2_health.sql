-- One row, written to find out whether anything can be.
CREATE TABLE health (
    checked_at BIGINT NOT NULL
);

INSERT INTO health (checked_at) VALUES (0);
