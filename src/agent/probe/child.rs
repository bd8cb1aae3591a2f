//! The child process in which the driver's library is loaded: it may hang, crash, leak or write to any of its files, and
//! takes nothing down but itself.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::process::{getppid, getrlimit, set_parent_process_death_signal, setrlimit};

use super::gpu::GpuSnapshot;
use super::nvml;
use super::protocol::{ChildLine, MAX_LINE_BYTES};

/// More memory, or more files, are a leak.
const MAX_ADDRESS_SPACE_BYTES: u64 = 1 << 30;
const MAX_FILES: u64 = 256;

/// `uptime-runner probe`: started by the agent, and of no use to anybody else.
#[derive(Debug, clap::Args)]
pub struct ProbeOptions {
    /// NVIDIA's management library, if not the system's
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// The process that reads the answers
    #[arg(long, value_name = "PID")]
    parent: i32,
}

impl ProbeOptions {
    /// Answers until the agent closes the pipe, or ends.
    #[must_use]
    pub fn run(self) -> ExitCode {
        match self.serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                // Standard error leads nowhere; a person who starts this by hand may look there.
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        }
    }

    fn serve(self) -> io::Result<()> {
        limit()?;
        set_parent_process_death_signal(Some(Signal::TERM))?;
        // The agent may have ended before that took effect.
        if getppid() != Pid::from_raw(self.parent) {
            return Ok(());
        }
        // What the library prints must not be taken for an answer.
        let mut answers = File::from(rustix::io::dup(io::stdout())?);
        let nowhere = File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&nowhere)?;

        let mut requests = io::stdin().lock();
        let next = |requests: &mut io::StdinLock<'_>| -> io::Result<bool> {
            Ok(requests.read_until(b'\n', &mut Vec::new())? > 0)
        };
        if !next(&mut requests)? {
            return Ok(());
        }
        say(&mut answers, &ChildLine::Starting)?;
        let library = match nvml::load(self.library.as_deref()) {
            Ok(library) => library,
            Err(snapshot) => return say(&mut answers, &ChildLine::Snapshot { snapshot }),
        };
        let mut session = nvml::Session::new(&library);
        say(&mut answers, &ChildLine::Ready)?;
        loop {
            let snapshot = session.probe();
            say(&mut answers, &ChildLine::Snapshot { snapshot })?;
            if !next(&mut requests)? {
                // The library's own end may hang: it is not called.
                std::process::exit(0);
            }
        }
    }
}

fn limit() -> io::Result<()> {
    for (resource, most) in [
        (Resource::As, MAX_ADDRESS_SPACE_BYTES),
        (Resource::Nofile, MAX_FILES),
        (Resource::Core, 0),
    ] {
        // A stricter limit that is there already cannot be raised, and need not be.
        let most = getrlimit(resource).maximum.unwrap_or(most).min(most);
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}

fn say(answers: &mut File, line: &ChildLine) -> io::Result<()> {
    let mut json = serde_json::to_vec(line)?;
    if json.len() >= MAX_LINE_BYTES {
        let snapshot = GpuSnapshot::nothing("the driver tells more than can be believed");
        json = serde_json::to_vec(&ChildLine::Snapshot { snapshot })?;
    }
    json.push(b'\n');
    answers.write_all(&json)
}
