//! What survives a restart of the agent: a checkpoint, replaced atomically and synced to disk, and beside
//! it a watermark of how far the GPUs were observed, written at every check without waiting for the disk.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::ledger::Ledger;

const VERSION: u32 = 1;
/// The longest checkpoint that is read: 10000 transitions need a tenth of it.
const MAX_BYTES: u64 = 64 << 20;

/// The whole state of an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    version: u32,
    agent_id: String,
    ledger: Ledger,
    /// How far the GPUs had been observed when this was written.
    #[serde(rename = "note")]
    watermark: Watermark,
}

/// How far the GPUs have been observed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Watermark {
    /// The agent's start (process) to which this belongs.
    pub boot_id: Uuid,
    /// Until when the GPU was observed, since the agent's first start.
    pub watched_until: Duration,
    /// The wall-clock time of that.
    pub wall: DateTime<Utc>,
    /// The number of checks in the current segment.
    pub checks_so_far: u64,
    /// When the window of the next ping begins, since the agent's first start.
    pub window_begin: Duration,
    /// Whether a ping has begun a window.
    pub pinged: bool,
}

/// The state that a restart begins with.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// The history, up to the watermark.
    pub ledger: Ledger,
    /// How far the GPUs had been observed.
    pub watermark: Watermark,
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Not a checkpoint, or one that was cut.
    #[error("is damaged: {0}")]
    Damaged(String),
    /// The checkpoint of another agent.
    #[error("is that of agent '{0}'")]
    Foreign(String),
    /// The checkpoint of a later version of this program.
    #[error("has version {0}, expected {VERSION}")]
    Version(u32),
}

/// The one field that every version of a checkpoint has.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The files of an agent's checkpoint and watermark.
#[derive(Debug, Clone)]
pub struct CheckpointFile {
    path: PathBuf,
    agent_id: String,
}

impl CheckpointFile {
    /// The file of this agent.
    #[must_use]
    pub fn new(path: PathBuf, agent_id: String) -> Self {
        Self { path, agent_id }
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the checkpoint so that it survives power loss: the old file stays intact until the new one
    /// is complete.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, ledger: &Ledger, watermark: &Watermark) -> io::Result<()> {
        let checkpoint = Checkpoint {
            version: VERSION,
            agent_id: self.agent_id.clone(),
            ledger: ledger.clone(),
            watermark: watermark.clone(),
        };
        let json = serde_json::to_vec(&checkpoint)?;
        replace(&self.path, &json, true)?;
        // The new name itself must reach the disk.
        let folder = self
            .path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Writes how far the GPUs have been observed. This survives the end of the process, but not power
    /// loss.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_watermark(&self, watermark: &Watermark) -> io::Result<()> {
        replace(
            &self.watermark_path(),
            &serde_json::to_vec(watermark)?,
            false,
        )
    }

    /// Reads what was written last; `None` on the first start. A file that cannot be used is set
    /// aside under another name, with a warning.
    ///
    /// # Errors
    /// When it cannot be used and cannot be set aside either.
    pub fn read(&self) -> io::Result<Option<Restored>> {
        match self.read_checkpoint() {
            Ok(checkpoint) => Ok(checkpoint.map(|checkpoint| self.with_watermark(checkpoint))),
            Err(unusable) => {
                let aside = self.free_name();
                tracing::warn!(
                    "checkpoint {} {unusable}: set aside as {}, all time before now counts as unwatched",
                    self.path.display(),
                    aside.display(),
                );
                fs::rename(&self.path, aside)?;
                Ok(None)
            }
        }
    }

    fn read_checkpoint(&self) -> Result<Option<Checkpoint>, Unusable> {
        let json = match File::open(&self.path) {
            Ok(file) if file.metadata()?.len() > MAX_BYTES => {
                return Err(Unusable::Damaged(format!("over {} MiB", MAX_BYTES >> 20)));
            }
            Ok(_) => fs::read(&self.path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |error: &dyn std::fmt::Display| Unusable::Damaged(error.to_string());
        let Version { version } = serde_json::from_slice(&json).map_err(|e| damaged(&e))?;
        if version != VERSION {
            return Err(Unusable::Version(version));
        }
        let checkpoint: Checkpoint = serde_json::from_slice(&json).map_err(|e| damaged(&e))?;
        checkpoint.ledger.check_order().map_err(|e| damaged(&e))?;
        if checkpoint.agent_id != self.agent_id {
            return Err(Unusable::Foreign(checkpoint.agent_id));
        }
        Ok(Some(checkpoint))
    }

    /// Continues a checkpoint up to the watermark, if that belongs to it and can be read. A checkpoint is
    /// written at every transition, so until the watermark its last state held.
    fn with_watermark(&self, checkpoint: Checkpoint) -> Restored {
        let Checkpoint {
            mut ledger,
            watermark,
            ..
        } = checkpoint;
        let later = fs::read(self.watermark_path())
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok());
        let later = later.filter(|later: &Watermark| {
            later.boot_id == watermark.boot_id && later.watched_until >= watermark.watched_until
        });
        let watermark = later.unwrap_or(watermark);
        ledger.continue_until(watermark.watched_until, watermark.checks_so_far);
        Restored { ledger, watermark }
    }

    fn watermark_path(&self) -> PathBuf {
        with_suffix(&self.path, ".watched")
    }

    fn free_name(&self) -> PathBuf {
        let names = (1..).map(|n| with_suffix(&self.path, &format!(".unusable-{n}")));
        let mut free = names.filter(|name| !name.exists());
        free.next()
            .unwrap_or_else(|| with_suffix(&self.path, ".unusable"))
    }
}

fn replace(path: &Path, bytes: &[u8], safely: bool) -> io::Result<()> {
    let new = with_suffix(path, ".new");
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    if safely {
        file.sync_all()?;
    }
    fs::rename(new, path)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::super::ledger::GpuState;
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    const GAP: Duration = Duration::from_secs(10);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn watermark(watched_until: u64) -> Watermark {
        Watermark {
            boot_id: Uuid::from_u128(7),
            watched_until: s(watched_until),
            wall: DateTime::UNIX_EPOCH,
            checks_so_far: 5,
            window_begin: s(3),
            pinged: true,
        }
    }

    fn file(folder: &tempfile::TempDir) -> CheckpointFile {
        CheckpointFile::new(folder.path().join("a.json"), "agent-001".into())
    }

    fn ledger() -> Ledger {
        let mut ledger = Ledger::default();
        for at in [0, 5, 10] {
            ledger.observe(s(at), GpuState::Up, GAP, 100);
        }
        ledger
    }

    #[test]
    fn a_checkpoint_of_an_earlier_release_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = CheckpointFile::new(folder.path().join("a.json"), "a".to_owned());
        let written = r#"{"version":1,"agent_id":"a","ledger":{"folded":{"until":{"secs":10,"nanos":0},
            "up":{"secs":9,"nanos":0},"checks":2,"available":2},"spans":[{"until":{"secs":60,"nanos":0},
            "state":"up","checks":10}],"seen":"up","watched_until":{"secs":60,"nanos":0}},
            "note":{"boot_id":"6d9bcdb1-8d5e-4d1a-9d4c-1a2b3c4d5e6f","watched_until":{"secs":60,"nanos":0},
            "wall":"2026-11-01T00:00:00Z","checks_so_far":10,"window_begin":{"secs":5,"nanos":0},
            "pinged":true}}"#;
        fs::write(file.path(), written).unwrap();
        let restored = file.read().unwrap().unwrap();
        let minute = Duration::from_secs(60);
        let window = restored.ledger.window(minute, minute, minute);
        assert_eq!(window.up, Duration::from_secs(59));
        assert_eq!(restored.watermark.window_begin, Duration::from_secs(5));
        // What is written now is read by that release, too.
        file.write(&restored.ledger, &restored.watermark).unwrap();
        let value = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        let again = fs::read_to_string(file.path()).unwrap();
        assert_eq!(value(&again), value(written));
    }

    #[test]
    fn what_is_written_is_read_and_continued_up_to_the_watermark() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder);
        assert_eq!(file.read().unwrap(), None);
        file.write(&ledger(), &watermark(10)).unwrap();
        let restored = file.read().unwrap().unwrap();
        assert_eq!(
            (restored.ledger, restored.watermark),
            (ledger(), watermark(10))
        );
        file.write_watermark(&watermark(25)).unwrap();
        let restored = file.read().unwrap().unwrap();
        let window = restored.ledger.window(s(25), s(25), GAP);
        assert_eq!((window.up, window.checks_total), (s(25), 6));
        assert_eq!(restored.watermark, watermark(25));
    }

    #[test]
    fn a_watermark_that_does_not_belong_to_the_checkpoint_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder);
        file.write(&ledger(), &watermark(10)).unwrap();
        for other in [
            Watermark {
                boot_id: Uuid::nil(),
                ..watermark(25)
            },
            watermark(5),
        ] {
            file.write_watermark(&other).unwrap();
            assert_eq!(file.read().unwrap().unwrap().watermark, watermark(10));
        }
        fs::write(file.watermark_path(), "{").unwrap();
        assert_eq!(file.read().unwrap().unwrap().watermark, watermark(10));
    }

    #[test]
    fn an_unusable_file_is_set_aside_and_never_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder);
        file.write(&ledger(), &watermark(10)).unwrap();
        let good = fs::read_to_string(file.path()).unwrap();
        let half = &good[..good.len() / 2];
        let foreign = good.replace("agent-001", "agent-002");
        let later = good.replace("\"version\":1", "\"version\":2");
        let out_of_order = good.replacen("\"secs\":10", "\"secs\":1000000", 1);
        let contents = ["", half, "[]", "\0\0\0", &foreign, &later, &out_of_order];
        for (index, content) in contents.into_iter().enumerate() {
            fs::write(file.path(), content).unwrap();
            assert_eq!(file.read().unwrap(), None, "{content}");
            let aside = folder.path().join(format!("a.json.unusable-{}", index + 1));
            assert_eq!(fs::read_to_string(aside).unwrap(), content);
            assert!(!file.path().exists());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_set_aside(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let folder = tempfile::tempdir().unwrap();
            let file = file(&folder);
            fs::write(file.path(), &bytes).unwrap();
            prop_assert_eq!(file.read().unwrap(), None);
        }

        #[test]
        fn a_damaged_checkpoint_and_watermark_are_read_or_set_aside(
            damage in prop::collection::vec((any::<Index>(), any::<u8>()), 1..4),
            of_the_watermark in any::<bool>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let file = file(&folder);
            file.write(&ledger(), &watermark(10)).unwrap();
            file.write_watermark(&watermark(25)).unwrap();
            let damaged = if of_the_watermark { file.watermark_path() } else { file.path().to_owned() };
            let mut bytes = fs::read(&damaged).unwrap();
            for (place, byte) in damage {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            fs::write(&damaged, bytes).unwrap();
            if let Some(restored) = file.read().unwrap() {
                let window = restored.ledger.window(s(30), s(30), GAP);
                prop_assert!(window.up <= s(30));
            }
        }
    }
}
