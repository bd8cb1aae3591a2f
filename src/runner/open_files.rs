//! Each job in flight holds a connection, hence an open file.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Standard streams, the runtime's own files, metrics and ping system connections.
const OWN_FILES: u64 = 20;

/// A `--max-in-flight` that cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "--max-in-flight {asked}: needs {needed} open files, but the hard limit is {hard}: expected at most {carried}, or a higher limit (ulimit -Hn, LimitNOFILE= in a systemd unit)"
)]
pub struct TooFewFiles {
    asked: usize,
    needed: u64,
    hard: u64,
    carried: u64,
}

/// Sees to it that `max_in_flight` connections for so many agents can be open at once, by raising
/// the soft limit where it is too low. To be called before any thread starts.
///
/// # Errors
/// When the hard limit is too low.
pub fn allow(max_in_flight: usize, agents: usize) -> Result<(), TooFewFiles> {
    let own = OWN_FILES + 2 * agents as u64;
    let needed = (max_in_flight as u64).saturating_add(own);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|soft| soft >= needed) {
        reserve(needed);
        return Ok(());
    }
    let raised = Rlimit {
        current: Some(needed),
        maximum: limit.maximum,
    };
    match limit.maximum {
        Some(hard) if hard < needed => Err(hard),
        hard => setrlimit(Resource::Nofile, raised).map_err(|_| hard.unwrap_or(u64::MAX)),
    }
    .map_err(|hard| TooFewFiles {
        asked: max_in_flight,
        needed,
        hard,
        carried: hard.saturating_sub(own),
    })?;
    reserve(needed);
    Ok(())
}

/// Lets the kernel make its table of open files as large as it may become. Once there are threads,
/// each doubling of it would hold up the sending for over 10 ms (`expand_fdtable` in fs/file.c
/// waits for all processors).
fn reserve(files: u64) {
    let last = i32::try_from(files - 1).unwrap_or(i32::MAX);
    // Only the attempt matters: without it jobs are late a few times, not wrong.
    let _ = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), last);
}
