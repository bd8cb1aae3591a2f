//! A SQLite file that is taken away from under a ping system.

use std::fs;
use std::path::Path;

use crate::support::agents::Agents;
use crate::support::ping_system::PingSystemProcess;
use crate::support::wait_until;
use serde_json::Value;

const SELDOM: [&str; 2] = ["--base-interval", "15m"];
const FILES: [&str; 3] = ["ping-system.db", "ping-system.db-wal", "ping-system.db-shm"];

/// A ping system with an agent, and pings that it acknowledged.
struct Sut {
    folder: tempfile::TempDir,
    agents: Agents,
    system: PingSystemProcess,
    acknowledged: Vec<Value>,
}

impl Sut {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agents = Agents::start();
        let system = PingSystemProcess::start(folder.path(), &SELDOM);
        system.with_agent("a", &agents);
        let mut sut = Self {
            acknowledged: system.history("a"),
            folder,
            agents,
            system,
        };
        sut.acknowledge();
        sut
    }

    fn acknowledge(&mut self) {
        self.acknowledged.push(self.system.ping("a"));
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Nothing is acknowledged, and the cause is named.
    fn assert_not_writable(&self, cause: &str) {
        let (status, body) = self.system.ask_with("/health", "");
        assert_eq!(status, 503, "{body}");
        assert!(body.contains(cause), "{body}");
        let ping = "/ping-system/agents/a/ping";
        assert_eq!(self.system.request("POST", ping, "", "").0, 503);
        let register = format!(
            r#"{{"agent_id": "b", "agent_url": "{}"}}"#,
            self.agents.url("b")
        );
        let path = "/ping-system/agents/register";
        assert_eq!(self.system.request("POST", path, "", &register).0, 503);
        assert_eq!(
            self.system
                .request("DELETE", "/ping-system/agents/a", "", "")
                .0,
            503
        );
    }

    /// Nor is anything shown.
    fn assert_unavailable(&self, cause: &str) {
        self.assert_not_writable(cause);
        assert_eq!(self.system.ask_with("/ping-system/agents", "").0, 503);
    }

    /// It works again, with all that was acknowledged, also after a restart.
    fn assert_recovers(mut self) {
        wait_until("health", || {
            (self.system.ask_with("/health", "").0 == 200).then_some(())
        });
        self.acknowledge();
        assert_eq!(self.system.history("a"), self.acknowledged);
        self.system.kill();
        let system = PingSystemProcess::start(self.folder.path(), &SELDOM);
        assert_eq!(system.history("a"), self.acknowledged);
    }
}

fn copy(from: &Path, to: &Path) {
    for name in FILES {
        // SQLite creates the shared memory again.
        if !name.ends_with("-shm") && from.join(name).exists() {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
    }
}

fn rename(from: &Path, to: &Path) {
    for name in FILES {
        if from.join(name).exists() {
            fs::rename(from.join(name), to.join(name)).unwrap();
        }
    }
}

#[test]
fn a_file_that_is_moved_away_is_used_again_when_it_is_back() {
    let sut = Sut::start();
    // On the same disk, so that it stays the same file.
    let elsewhere = sut.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    rename(sut.path(), &elsewhere);
    sut.assert_unavailable("was deleted or moved away");
    rename(&elsewhere, sut.path());
    sut.assert_recovers();
}

#[test]
fn a_copy_in_its_place_is_used_only_if_it_holds_all_that_was_acknowledged() {
    let mut sut = Sut::start();
    let [early, late] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    copy(sut.path(), early.path());
    sut.acknowledge();
    copy(sut.path(), late.path());
    for name in FILES {
        fs::remove_file(sut.path().join(name)).unwrap();
    }
    sut.assert_unavailable("was deleted or moved away");
    copy(early.path(), sut.path());
    sut.assert_unavailable("lacks acknowledged pings");
    // Nor is another database, or no database.
    for name in FILES {
        let _ = fs::remove_file(sut.path().join(name));
    }
    fs::write(sut.path().join(FILES[0]), "no database at all").unwrap();
    sut.assert_unavailable("lacks acknowledged pings");
    fs::remove_file(sut.path().join(FILES[0])).unwrap();
    // Renamed into place, as a copy that was verified elsewhere would be.
    copy(late.path(), sut.path());
    sut.assert_recovers();
}

#[test]
fn a_log_that_is_deleted_costs_nothing() {
    let mut sut = Sut::start();
    sut.acknowledge();
    fs::remove_file(sut.path().join("ping-system.db-wal")).unwrap();
    sut.assert_not_writable("-wal was deleted or replaced");
    sut.system.kill();
    sut.system = PingSystemProcess::start(sut.folder.path(), &SELDOM);
    sut.assert_recovers();
}
