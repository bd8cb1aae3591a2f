//! What survives a restart of the agent: a checkpoint, replaced atomically and synced to disk, and beside
//! it a watermark of how far the GPUs were observed, written at every check without waiting for the disk.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::known_gpus::KnownGpus;
use super::ledger::Ledger;
use crate::clock::BootInstant;
use crate::private_files;

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
    /// Releases up to 0.1.0 do not know it.
    #[serde(default)]
    gpus: KnownGpus,
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
    /// The same by the machine's boot clock; releases up to 0.1.0 do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub booted: Option<BootInstant>,
    /// The number of checks in the current segment.
    pub checks_so_far: u64,
    /// When the window of the next ping begins, since the agent's first start.
    pub window_begin: Duration,
    /// Whether a ping has begun a window.
    pub pinged: bool,
}

impl Watermark {
    /// Whether an agent can have lived through it.
    fn is_plausible(&self) -> bool {
        let longest = Duration::from_hours(200 * 366 * 24);
        self.watched_until <= longest
            && self.window_begin <= longest
            && self.checks_so_far <= 1 << 50
            && self
                .booted
                .is_none_or(|booted| booted.since_boot <= longest)
    }

    /// The time from the watermark to an instant: within one boot by the clock that counts suspended time and cannot be
    /// set, else by the wall clock. If that was set back meanwhile, no time has passed.
    pub(crate) fn until(&self, wall: DateTime<Utc>, booted: BootInstant) -> Duration {
        match self.booted.filter(|then| then.boot_id == booted.boot_id) {
            Some(then) => booted.since_boot.saturating_sub(then.since_boot),
            None => (wall - self.wall).to_std().unwrap_or_default(),
        }
    }
}

/// The state that a restart begins with.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// The history, up to the watermark.
    pub ledger: Ledger,
    /// How far the GPUs had been observed.
    pub watermark: Watermark,
    pub gpus: KnownGpus,
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
#[derive(Debug)]
pub struct CheckpointFile {
    path: PathBuf,
    agent_id: String,
    /// Held for as long as the agent runs, so that no other one writes here.
    lock: Option<File>,
    /// Whether the file can be replaced by another. One that is mounted by itself cannot.
    can_rename: AtomicBool,
}

/// Why an agent may not use a checkpoint.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    #[error("{path} is used by another agent{holder}: give each its own --checkpoint")]
    Held {
        path: String,
        /// Its process, if that is known.
        holder: String,
    },
    #[error("{path} cannot be locked: {error}")]
    Io { path: String, error: io::Error },
}

impl CheckpointFile {
    /// The file of this agent, which is not locked.
    #[must_use]
    pub fn new(path: PathBuf, agent_id: String) -> Self {
        Self {
            path,
            agent_id,
            lock: None,
            can_rename: AtomicBool::new(true),
        }
    }

    /// The file of this agent where no other is named, in the current folder. Each id has a name of its own; the file of
    /// a release up to 0.1.0 is taken over.
    pub(crate) fn by_default(agent_id: String) -> Self {
        let file = Self::new(default_name(&agent_id).into(), agent_id);
        let legacy = Self::new(legacy_name(&file.agent_id).into(), file.agent_id.clone());
        if legacy.path != file.path && !file.path.exists() && legacy.is_own() {
            // If that fails, the history begins again, which the log says.
            let _ = fs::rename(&legacy.path, &file.path);
            let _ = fs::rename(legacy.watermark_path(), file.watermark_path());
        }
        file
    }

    /// Keeps other agents from the file until this one ends.
    ///
    /// # Errors
    /// When another agent holds it.
    pub(crate) fn lock(mut self) -> Result<Self, LockError> {
        let path = with_suffix(&self.path, ".lock");
        let open = |path: &Path| {
            let mut options = private_files::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(path)
        };
        // A folder that takes no new files: the file itself is as good, since it is never replaced there.
        let lock = open(&path).or_else(|error| {
            if self.path.exists() {
                open(&self.path)
            } else {
                Err(error)
            }
        });
        let shown = self.path.display().to_string();
        let Ok(mut lock) = lock else {
            // A folder that is still to come, or a disk that is read-only: nobody else can write there either.
            return Ok(self);
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = (&lock).take(20).read_to_string(&mut pid);
                let holder = pid.trim().parse::<u32>();
                let holder = holder.map_or(String::new(), |pid| format!(" (process {pid})"));
                return Err(LockError::Held {
                    path: shown,
                    holder,
                });
            }
            Err(TryLockError::Error(error)) => return Err(LockError::Io { path: shown, error }),
        }
        if path.exists() {
            // Only for the message above.
            let _ = lock.set_len(0);
            let _ = lock.write_all(std::process::id().to_string().as_bytes());
        }
        self.lock = Some(lock);
        Ok(self)
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is there. Somebody may have removed it, or its folder.
    pub(crate) fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Whether the file is written in place, since it cannot be replaced. Other files beside it may be lost at a restart.
    pub(crate) fn is_in_place(&self) -> bool {
        !self.can_rename.load(Ordering::Relaxed)
    }

    fn is_own(&self) -> bool {
        matches!(self.read_checkpoint(&self.path), Ok(Some(_)))
    }

    /// Writes the checkpoint so that it survives power loss: the old file stays intact until the new one
    /// is complete. A file that cannot be replaced is written in place, after a copy beside it.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn write(
        &self,
        ledger: &Ledger,
        watermark: &Watermark,
        gpus: &KnownGpus,
    ) -> io::Result<()> {
        let checkpoint = Checkpoint {
            version: VERSION,
            agent_id: self.agent_id.clone(),
            ledger: ledger.clone(),
            watermark: watermark.clone(),
            gpus: gpus.clone(),
        };
        let json = with_checksum(serde_json::to_vec(&checkpoint)?);
        if self.can_rename.load(Ordering::Relaxed) {
            match replace(&self.path, &json, true) {
                Ok(()) => return sync_folder(&self.path),
                Err(error) if is_mounted(&error) && self.path.exists() => {
                    self.can_rename.store(false, Ordering::Relaxed);
                    tracing::info!(
                        "checkpoint {} cannot be replaced ({error}): it is written in place",
                        self.path.display()
                    );
                }
                Err(error) => return Err(error),
            }
        }
        // One of the two is whole at any moment. The folder may take no file; then there is only the one.
        let _ = overwrite(&self.copy_path(), &json);
        overwrite(&self.path, &json)
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
        let checkpoint = match self.read_checkpoint(&self.path) {
            Err(Unusable::Damaged(_))
                if matches!(self.read_checkpoint(&self.copy_path()), Ok(Some(_))) =>
            {
                self.read_checkpoint(&self.copy_path())
            }
            read => read,
        };
        match checkpoint {
            Ok(checkpoint) => Ok(checkpoint.map(|checkpoint| self.with_watermark(checkpoint))),
            Err(unusable) => {
                let aside = self.free_name();
                tracing::warn!(
                    "checkpoint {} {unusable}: set aside as {}, all time before now counts as unwatched",
                    self.path.display(),
                    aside.display(),
                );
                match fs::rename(&self.path, &aside) {
                    Err(error) if is_mounted(&error) => {
                        fs::copy(&self.path, aside)?;
                        Ok(None)
                    }
                    renamed => renamed.map(|()| None),
                }
            }
        }
    }

    fn read_checkpoint(&self, path: &Path) -> Result<Option<Checkpoint>, Unusable> {
        let json = match File::open(path) {
            Ok(file) if file.metadata()?.len() > MAX_BYTES => {
                return Err(Unusable::Damaged(format!("over {} MiB", MAX_BYTES >> 20)));
            }
            Ok(_) => fs::read(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |error: &dyn std::fmt::Display| Unusable::Damaged(error.to_string());
        let Version { version } = serde_json::from_slice(&json).map_err(|e| damaged(&e))?;
        if version != VERSION {
            return Err(Unusable::Version(version));
        }
        if !is_whole(&json) {
            return Err(Unusable::Damaged("its checksum differs".to_owned()));
        }
        let checkpoint: Checkpoint = serde_json::from_slice(&json).map_err(|e| damaged(&e))?;
        checkpoint.ledger.check_order().map_err(|e| damaged(&e))?;
        if !checkpoint.watermark.is_plausible() {
            return Err(Unusable::Damaged("its times are beyond belief".to_owned()));
        }
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
            gpus,
            ..
        } = checkpoint;
        let later = fs::read(self.watermark_path())
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok());
        let later = later.filter(|later: &Watermark| {
            later.boot_id == watermark.boot_id
                && later.watched_until >= watermark.watched_until
                && later.is_plausible()
        });
        let watermark = later.unwrap_or(watermark);
        ledger.continue_until(watermark.watched_until, watermark.checks_so_far);
        Restored {
            ledger,
            watermark,
            gpus,
        }
    }

    fn watermark_path(&self) -> PathBuf {
        with_suffix(&self.path, ".watched")
    }

    fn copy_path(&self) -> PathBuf {
        with_suffix(&self.path, ".copy")
    }

    fn free_name(&self) -> PathBuf {
        let names = (1..).map(|n| with_suffix(&self.path, &format!(".unusable-{n}")));
        let mut free = names.filter(|name| !name.exists());
        free.next()
            .unwrap_or_else(|| with_suffix(&self.path, ".unusable"))
    }
}

/// The longest part of a file's name that comes from an id: suffixes are added to it.
const MAX_NAME_BYTES: usize = 180;

/// A name for each id: what a file's name cannot hold is escaped, and a long one ends in a hash of the whole.
fn default_name(agent_id: &str) -> String {
    const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-');
    let escaped = utf8_percent_encode(agent_id, ESCAPED).to_string();
    if escaped.len() <= MAX_NAME_BYTES {
        return format!("uptime-agent-{escaped}.json");
    }
    let hash = checksum(agent_id.as_bytes());
    format!(
        "uptime-agent-{}~{hash}.json",
        &escaped[..MAX_NAME_BYTES - 20]
    )
}

/// The name that releases up to 0.1.0 gave.
fn legacy_name(agent_id: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '_'
        }
    };
    let safe: String = agent_id.chars().map(safe).collect();
    format!("uptime-agent-{safe}.json")
}

const CHECKSUM: &[u8] = br#","checksum":""#;

/// A JSON object with a checksum of all before it as its last field.
fn with_checksum(mut json: Vec<u8>) -> Vec<u8> {
    // The brace that closes the object.
    json.pop();
    let sum = checksum(&json);
    json.extend_from_slice(CHECKSUM);
    json.extend_from_slice(sum.as_bytes());
    json.extend_from_slice(br#""}"#);
    json
}

/// Whether the checksum is right; releases up to 0.1.0 write none.
fn is_whole(json: &[u8]) -> bool {
    let at = json
        .windows(CHECKSUM.len())
        .rposition(|window| window == CHECKSUM);
    at.is_none_or(|at| {
        let rest = &json[at + CHECKSUM.len()..];
        rest.strip_suffix(br#""}"#) == Some(checksum(&json[..at]).as_bytes())
    })
}

/// FNV-1a, 64 bits: against files that were written by half, not against people.
fn checksum(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn replace(path: &Path, bytes: &[u8], safely: bool) -> io::Result<()> {
    let new = with_suffix(path, ".new");
    // What lies there is left from before, or put there by somebody else.
    if let Err(error) = fs::remove_file(&new)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut options = private_files::options();
    let mut file = options.write(true).create_new(true).open(&new)?;
    file.write_all(bytes)?;
    if safely {
        file.sync_all()?;
    }
    let renamed = fs::rename(&new, path);
    if renamed.is_err() {
        // It is of no use.
        let _ = fs::remove_file(new);
    }
    renamed
}

fn overwrite(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = private_files::options();
    options.write(true).create(true).truncate(false);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.set_len(bytes.len() as u64)?;
    file.sync_all()
}

/// The new name itself must reach the disk, where the file system can do that.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    match File::open(folder)?.sync_all() {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

/// Whether a file could not be replaced because it is mounted by itself.
fn is_mounted(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ResourceBusy | io::ErrorKind::CrossesDevices
    )
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
            booted: None,
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
        file.write(&restored.ledger, &restored.watermark, &restored.gpus)
            .unwrap();
        let value = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        let mut again = value(&fs::read_to_string(file.path()).unwrap());
        let fields = again.as_object_mut().unwrap();
        assert!(fields.remove("gpus").is_some() && fields.remove("checksum").is_some());
        assert_eq!(again, value(written));
    }

    #[test]
    fn what_is_written_is_read_and_continued_up_to_the_watermark() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(&folder);
        assert_eq!(file.read().unwrap(), None);
        file.write(&ledger(), &watermark(10), &KnownGpus::default())
            .unwrap();
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
        file.write(&ledger(), &watermark(10), &KnownGpus::default())
            .unwrap();
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
        file.write(&ledger(), &watermark(10), &KnownGpus::default())
            .unwrap();
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
            file.write(&ledger(), &watermark(10), &KnownGpus::default()).unwrap();
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
