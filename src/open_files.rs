//! The limit on open files: each job in flight, each ping and each client holds one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Standard streams, the runtime's own files, metrics and ping system connections.
const OWN_FILES: u64 = 20;

/// More connections than the hard limit allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{option} {asked}: needs {needed} open files, but the hard limit is {hard}: expected at most {carried}, or a higher limit (ulimit -Hn, LimitNOFILE= in a systemd unit)"
)]
pub(crate) struct TooFewFiles {
    option: &'static str,
    asked: usize,
    needed: u64,
    hard: u64,
    carried: u64,
}

/// Sees to it that as many connections can be open at once as `option` says, beside `own` files, by
/// raising the soft limit where it is too low. To be called before any thread starts.
///
/// # Errors
/// When the hard limit is too low.
pub(crate) fn allow(option: &'static str, asked: usize, own: u64) -> Result<(), TooFewFiles> {
    let own = own.saturating_add(OWN_FILES);
    let needed = (asked as u64).saturating_add(own);
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
        option,
        asked,
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
    // Best effort: if it fails, jobs are late a few times, not wrong.
    let _ = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), last);
}
