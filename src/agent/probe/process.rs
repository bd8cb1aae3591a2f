//! The agent's end of a probe's child process. Nothing here waits for the child: one that is inside a call of the kernel
//! cannot even be killed.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::protocol::{ChildLine, MAX_LINE_BYTES};

/// What the driver's library must not see, nor answer in the agent's place.
const SECRETS: [&str; 3] = ["AGENT_TOKEN", "AGENT_REGISTER_TOKEN", "NOTIFY_SOCKET"];
/// Between the polite signal and the other.
const TERM_PATIENCE: Duration = Duration::from_secs(1);
/// The longest wait for the status of a child whose pipe has ended.
const STATUS_PATIENCE: Duration = Duration::from_millis(200);
const POLL: Duration = Duration::from_millis(5);
const REAP_POLL: Duration = Duration::from_millis(100);

/// Starts children from a thread of its own: a child gets a signal when the *thread* that started it ends.
#[derive(Debug)]
pub(super) struct Spawner {
    requests: mpsc::Sender<oneshot::Sender<io::Result<Child>>>,
}

impl Spawner {
    /// Of children that load this library, or the system's.
    pub(super) fn new(library: Option<PathBuf>) -> io::Result<Self> {
        let (requests, asked) = mpsc::channel::<oneshot::Sender<io::Result<Child>>>();
        std::thread::Builder::new()
            .name("probe-parent".into())
            .spawn(move || {
                for answer in asked {
                    // If nobody waits any more, the child ends with its pipes.
                    let _ = answer.send(spawn(library.as_ref()));
                }
            })?;
        Ok(Self { requests })
    }

    async fn spawn(&self) -> io::Result<Child> {
        let gone = || io::Error::other("the thread that starts probes ended");
        let (answer, answered) = oneshot::channel();
        self.requests.send(answer).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

fn spawn(library: Option<&PathBuf>) -> io::Result<Child> {
    // The file may have been replaced by a newer release: this is the one that runs.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("uptime-runner")
        .args(["probe", "--parent", &std::process::id().to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if let Some(library) = library {
        command.arg("--library").arg(library);
    }
    for secret in SECRETS {
        command.env_remove(secret);
    }
    command.spawn()
}

/// A running child.
#[derive(Debug)]
pub(super) struct ProbeProcess {
    child: Child,
    requests: Sender,
    answers: Receiver,
    /// What was read of the next line.
    line: Vec<u8>,
    pub(super) born: Instant,
}

/// Why a child gives no more answers.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeEnded {
    #[error("{0}")]
    Exited(String),
    #[error("the probe's answer cannot be read: {0}")]
    Garbage(String),
    #[error("the probe cannot be asked: {0}")]
    Io(#[from] io::Error),
}

impl ProbeProcess {
    pub(super) async fn start(spawner: &Spawner) -> io::Result<Self> {
        let mut child = spawner.spawn().await?;
        let missing = || io::Error::other("the probe has no pipes");
        let requests = OwnedFd::from(child.stdin.take().ok_or_else(missing)?);
        let answers = OwnedFd::from(child.stdout.take().ok_or_else(missing)?);
        Ok(Self {
            child,
            requests: Sender::from_owned_fd(requests)?,
            answers: Receiver::from_owned_fd(answers)?,
            line: Vec::new(),
            born: Instant::now(),
        })
    }

    /// Asks for a probe. Cancel-safe.
    pub(super) async fn request(&self) -> Result<(), ProbeEnded> {
        loop {
            self.requests.writable().await?;
            match self.requests.try_write(b"\n") {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A child that has ended shows itself when its answer is read.
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
                _ => return Ok(()),
            }
        }
    }

    /// The next line. Cancel-safe.
    pub(super) async fn next_line(&mut self) -> Result<ChildLine, ProbeEnded> {
        let mut piece = [0; 4096];
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let rest = self.line.split_off(end + 1);
                let line = std::mem::replace(&mut self.line, rest);
                return serde_json::from_slice(&line)
                    .map_err(|error| ProbeEnded::Garbage(error.to_string()));
            }
            if self.line.len() > MAX_LINE_BYTES {
                return Err(ProbeEnded::Garbage(format!(
                    "over {} KiB",
                    MAX_LINE_BYTES >> 10
                )));
            }
            self.answers.readable().await?;
            match self.answers.try_read(&mut piece) {
                Ok(0) => return Err(self.ended().await),
                Ok(read) => self.line.extend_from_slice(&piece[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn ended(&mut self) -> ProbeEnded {
        let deadline = Instant::now() + STATUS_PATIENCE;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return ProbeEnded::Exited(describe(status));
            }
            sleep(POLL).await;
        }
        ProbeEnded::Exited("the probe closed its pipe".to_owned())
    }

    /// Closes the pipes, and sees to it in the background that the child ends and is reaped. Until then it counts in
    /// `unreaped`.
    pub(super) fn give_up(self, unreaped: &Arc<AtomicUsize>) {
        let Self { mut child, .. } = self;
        unreaped.fetch_add(1, Ordering::Relaxed);
        let unreaped = Arc::clone(unreaped);
        tokio::spawn(async move {
            let given_up = Instant::now();
            let mut signals = [Signal::TERM, Signal::KILL].into_iter();
            let mut signal_at = given_up;
            // A status that cannot be had will not be had later.
            while matches!(child.try_wait(), Ok(None)) {
                if Instant::now() >= signal_at
                    && let Some(signal) = signals.next()
                {
                    // It may have ended just now.
                    let _ = kill_process(Pid::from_child(&child), signal);
                    signal_at = Instant::now() + TERM_PATIENCE;
                }
                sleep(REAP_POLL).await;
            }
            unreaped.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("the driver's library crashed ({})", signal_name(signal)),
        None => format!("the probe ended with {status}"),
    }
}

fn signal_name(number: i32) -> String {
    let names = [
        (Signal::SEGV, "SIGSEGV"),
        (Signal::ABORT, "SIGABRT"),
        (Signal::BUS, "SIGBUS"),
        (Signal::ILL, "SIGILL"),
        (Signal::FPE, "SIGFPE"),
        (Signal::KILL, "SIGKILL"),
        (Signal::TERM, "SIGTERM"),
        (Signal::SYS, "SIGSYS"),
        (Signal::TRAP, "SIGTRAP"),
    ];
    let found = names.iter().find(|(signal, _)| signal.as_raw() == number);
    found.map_or_else(
        || format!("signal {number}"),
        |(_, name)| (*name).to_owned(),
    )
}
