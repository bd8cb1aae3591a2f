//! The commands of the README and of the pages of `.github/docs`, run as they stand there, and their links. A
//! block of commands that needs something from outside says so in a comment before it, and is left out.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
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

/// README.md and the pages of `.github/docs`, with their texts.
fn pages() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_dir(root.join(".github/docs")).unwrap();
    let docs = docs.map(|file| file.unwrap().path());
    let paths = docs.chain([root.join("README.md")]);
    let pages: Vec<_> = paths
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            (path, text)
        })
        .collect();
    assert!(pages.len() >= 6, "{pages:?}");
    pages
}

/// The lines that are typed in a block, with what its comment says it needs.
fn blocks(page: &str) -> Vec<(Option<&str>, Vec<&str>)> {
    let mut blocks = Vec::new();
    for (before, rest) in page
        .match_indices("```console\n")
        .map(|(at, fence)| (&page[..at], &page[at + fence.len()..]))
    {
        let block = rest.split("```").next().unwrap();
        let last_line = before.trim_end().lines().last().unwrap().trim();
        let needs = last_line
            .strip_prefix("<!-- ")
            .and_then(|comment| comment.strip_suffix(" -->"));
        let typed = block
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("$ "));
        blocks.push((needs, typed.collect()));
    }
    blocks
}

#[test]
#[cfg_attr(no_curl, ignore = "needs curl (package curl)")]
#[cfg_attr(quick, ignore = "long: runs in CI")]
fn every_command_that_needs_nothing_works() {
    let mut run = 0;
    for (page, text) in pages() {
        for (needs, lines) in blocks(&text) {
            assert!(!lines.is_empty(), "{}", page.display());
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
    }
    assert!(run > 10, "only {run} commands were found");
}

/// A heading as a link names it.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let words = heading.chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
        _ => None,
    });
    words.collect()
}

#[test]
fn every_link_leads_somewhere() {
    let pages = pages();
    let mut followed = 0;
    for (page, text) in &pages {
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            if target.starts_with("http") {
                continue;
            }
            followed += 1;
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let path = match file {
                "" => page.clone(),
                _ => page.parent().unwrap().join(file),
            };
            let from = page.display();
            assert!(path.exists(), "{from}: {target}");
            if !heading.is_empty() {
                let there = std::fs::read_to_string(&path).unwrap();
                let mut headings = there.lines().filter(|line| line.starts_with('#'));
                let found = headings.any(|line| anchor(line) == heading);
                assert!(found, "{from}: {target}");
            }
        }
    }
    assert!(followed > 10, "only {followed} links were found");
}

#[test]
fn the_readme_is_short() {
    let pages = pages();
    let (_, readme) = pages.last().unwrap();
    assert!(readme.lines().count() <= 180);
}

/// A comment that cites a document must not lead out of the repository.
#[test]
fn what_comments_cite_is_in_the_repository() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src"), root.join("tests/it")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Ok(text) = std::fs::read_to_string(&path) else {
                continue;
            };
            let cited = text.split([' ', '`', '(', ')', '"', '\n', '[', ']', ',']);
            for page in cited.filter(|word| word.starts_with(".github/docs/")) {
                let page = page.trim_end_matches(['.', ':', ';']);
                assert!(root.join(page).exists(), "{}: {page}", path.display());
            }
        }
    }
}
