//! What an error of PostgreSQL means for the connection, and for the operation that it ended.

use std::error::Error as _;

use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use super::super::StoreError;

/// The consequence of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Consequence {
    /// The server did not do it, and this connection never will: it has become read-only.
    ReadOnly,
    /// The connection is lost, and whether the server did it is unknown.
    Lost,
    /// The server did not do it, and may do it when asked again.
    Conflict,
    /// Asking again is of no use now.
    Refused,
    /// Asking again is of no use until somebody changes something.
    Unusable,
}

/// Classifies by SQLSTATE (PostgreSQL's manual, appendix A).
pub(super) fn consequence(error: &Error) -> Consequence {
    let Some(state) = error.code() else {
        return if error.is_closed() || is_io(error) {
            Consequence::Lost
        } else if is_tls(error) {
            Consequence::Unusable
        } else {
            Consequence::Refused
        };
    };
    if *state == SqlState::READ_ONLY_SQL_TRANSACTION {
        return Consequence::ReadOnly;
    }
    if [
        SqlState::T_R_SERIALIZATION_FAILURE,
        SqlState::T_R_DEADLOCK_DETECTED,
    ]
    .contains(state)
    {
        return Consequence::Conflict;
    }
    match state.code() {
        // Shut down by an administrator, crashed, starting up, its database dropped, idle for too long.
        "57P01" | "57P02" | "57P03" | "57P04" | "57P05" => Consequence::Lost,
        code if code.starts_with("08") => Consequence::Lost,
        // No rights; no such role or database; a schema that is not there.
        "42501" | "3D000" | "3F000" => Consequence::Unusable,
        code if code.starts_with("28") => Consequence::Unusable,
        // A prepared statement that another session prepared, or that this one did not: a pooler.
        "26000" | "42P05" => Consequence::Unusable,
        _ => Consequence::Refused,
    }
}

fn is_io(error: &Error) -> bool {
    let cause = error.source();
    cause.is_some_and(<dyn std::error::Error>::is::<std::io::Error>) && !is_tls(error)
}

/// The error of a handshake is an I/O error in tokio-postgres' TLS error; its text is stable.
fn is_tls(error: &Error) -> bool {
    error
        .to_string()
        .starts_with("error performing TLS handshake")
}

/// The error in one sentence.
pub(super) fn describe(error: &Error) -> String {
    let Some(database) = error.as_db_error() else {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            let inner_text = inner.to_string();
            if !text.contains(&inner_text) {
                text = format!("{text}: {inner_text}");
            }
            cause = inner.source();
        }
        return text;
    };
    let state = database.code();
    let advice = match state.code() {
        "26000" | "42P05" => POOLER,
        "42501" => {
            ": grant the role CREATE on the schema, or start once as the owner of the tables; this role \
            then needs SELECT, INSERT, UPDATE and DELETE on them"
        }
        _ => "",
    };
    format!("{} (SQLSTATE {}){advice}", database.message(), state.code())
}

/// Why a pooler cannot be used.
pub(super) const POOLER: &str = ": it is reached through a pooler that gives each transaction another session \
    (pgbouncer in transaction mode); use session mode, or the server's own address";

/// As the store reports it.
pub(super) fn store_error(error: &Error) -> StoreError {
    match consequence(error) {
        Consequence::Unusable => StoreError::Unusable(describe(error)),
        _ => StoreError::Unavailable(describe(error)),
    }
}
