//! The README's commands, run as they stand there. A block of commands that needs something from
//! outside says so in a comment before it, and is left out.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::support::{free_port, wait_until};
use tempfile::TempDir;

/// A newcomer's shell: the program is in the path, and no port is taken.
struct Shell {
    folder: TempDir,
    ports: [(u16, u16); 3],
    background: Vec<Child>,
}

impl Shell {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = assert_cmd::cargo::cargo_bin!("uptime-runner");
        symlink(program, folder.path().join("uptime-runner")).unwrap();
        Self {
            folder,
            // Whoever tests may have something there.
            ports: [8000, 8001, 8888].map(|port| (port, free_port())),
            background: Vec::new(),
        }
    }

    fn port(&self, usual: u16) -> u16 {
        let mut ports = self.ports.iter();
        ports
            .find(|(port, _)| *port == usual)
            .expect("one of them")
            .1
    }

    fn command(&self, line: &str) -> Command {
        let mut line = line
            .replace(
                "cargo run --release -- demo",
                "uptime-runner demo --duration 5s",
            )
            .replace(
                "uptime-runner mock",
                &format!("uptime-runner mock --listen 127.0.0.1:{}", self.port(8888)),
            );
        for (usual, here) in self.ports {
            line = line.replace(&format!(":{usual}"), &format!(":{here}"));
        }
        let mut bash = Command::new("bash");
        let path = std::env::var("PATH").unwrap();
        bash.args(["-c", &format!("exec {line}")])
            .current_dir(self.folder.path())
            .env("PATH", format!("{}:{path}", self.folder.path().display()))
            .env("PING_LISTEN", format!("127.0.0.1:{}", self.port(8000)))
            .env("AGENT_LISTEN", format!("127.0.0.1:{}", self.port(8001)))
            .env(
                "UPTIME_RUNNER_PING_URL",
                format!("http://localhost:{}", self.port(8000)),
            )
            .stdin(Stdio::null());
        bash
    }

    fn run(&mut self, line: &str) {
        let line = line.split("  #").next().unwrap_or_default().trim();
        let Some(server) = line.strip_suffix('&') else {
            let output = self.command(line).output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(output.status.success(), "{line}: {said}");
            assert!(!said.contains("\"error\""), "{line}: {said}");
            return;
        };
        let started = self
            .command(server)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.background.push(started.unwrap());
        let usual = match server.split_whitespace().nth(1) {
            Some("ping-system") => 8000,
            Some("agent") => 8001,
            _ => 8888,
        };
        let address = ("127.0.0.1", self.port(usual));
        wait_until(line, || std::net::TcpStream::connect(address).ok());
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        for child in &mut self.background {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The lines that are typed in a block, with what its comment says it needs.
fn blocks(readme: &str) -> Vec<(Option<&str>, Vec<&str>)> {
    let mut blocks = Vec::new();
    for (before, rest) in readme
        .match_indices("```console\n")
        .map(|(at, fence)| (&readme[..at], &readme[at + fence.len()..]))
    {
        let block = rest.split("```").next().unwrap();
        let last_line = before.trim_end().lines().last().unwrap();
        let needs = last_line
            .strip_prefix("<!-- ")
            .and_then(|comment| comment.strip_suffix(" -->"));
        let typed = block.lines().filter_map(|line| line.strip_prefix("$ "));
        blocks.push((needs, typed.collect()));
    }
    blocks
}

#[test]
#[cfg_attr(no_curl, ignore = "needs curl (package curl)")]
fn every_command_that_needs_nothing_works() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let mut run = 0;
    for (needs, lines) in blocks(&readme) {
        assert!(!lines.is_empty());
        if let Some(needs) = needs {
            eprintln!("left out, {needs}: {lines:?}");
            continue;
        }
        let mut shell = Shell::new();
        for line in lines {
            eprintln!("$ {line}");
            shell.run(line);
            run += 1;
        }
    }
    assert!(run > 10, "only {run} commands were found");
}

#[test]
fn every_file_that_is_named_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    for (at, _) in readme.match_indices("](") {
        let target = readme[at + 2..].split(')').next().unwrap();
        if let Some(heading) = target.strip_prefix('#') {
            let heading = heading.replace('-', " ");
            let found = readme.lines().any(|line| {
                line.trim_start_matches('#').trim().to_lowercase() == heading
                    && line.starts_with('#')
            });
            assert!(found, "{target}");
        } else {
            assert!(root.join(target).exists(), "{target}");
        }
    }
}
