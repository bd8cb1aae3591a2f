//! Tokens of single agents: those with which each registers itself, and those that each is shown. Both are files of lines
//! that are reloaded when they change.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use ipnet::IpNet;
use reqwest::header::HeaderValue;

use super::address_policy::Network;
use crate::net::credentials::{Secret, read_token_file};
use crate::net::watched_file::WatchedFile;
use crate::text::foreign;
use crate::wire::agent::is_agent_id;

/// The largest file.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// A line of a file.
#[derive(Clone)]
struct Entry {
    secret: Secret,
    /// Where the agent's address must lie.
    network: Option<IpNet>,
}

type Entries = Arc<HashMap<String, Entry>>;

/// `--register-tokens`: lines `ID TOKEN [CIDR]`.
#[derive(Clone)]
pub(crate) struct RegisterTokens(Arc<WatchedFile<Entries>>);

/// An agent that has shown its own token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SelfRegistrar {
    pub agent_id: String,
    /// Where its address must lie; where it calls from if this is `None`.
    pub network: Option<IpNet>,
}

impl RegisterTokens {
    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, or has a line that is wrong; the message has its number and no token.
    pub(crate) fn open(file: PathBuf) -> anyhow::Result<Self> {
        let read = |files: &[PathBuf]| entries(&files[0], true);
        Ok(Self(Arc::new(WatchedFile::open(vec![file], read)?)))
    }

    /// The agent whose token an `Authorization` header shows. Each is compared, in constant time.
    #[must_use]
    pub(crate) fn registrar(&self, authorization: Option<&[u8]>) -> Option<SelfRegistrar> {
        let entries = self.0.get();
        let mut found = None;
        for (agent_id, entry) in entries.iter() {
            if entry.secret.is_shown_by(authorization) {
                found = Some(SelfRegistrar {
                    agent_id: agent_id.clone(),
                    network: entry.network,
                });
            }
        }
        found
    }
}

/// `--agent-tokens`: lines `ID TOKEN`.
#[derive(Clone)]
pub(crate) struct AgentTokens(Arc<WatchedFile<Entries>>);

impl AgentTokens {
    /// Reads a file.
    ///
    /// # Errors
    /// As [`RegisterTokens::open`].
    pub(crate) fn open(file: PathBuf) -> anyhow::Result<Self> {
        let read = |files: &[PathBuf]| entries(&files[0], false);
        Ok(Self(Arc::new(WatchedFile::open(vec![file], read)?)))
    }

    /// What an agent is shown, if it has a token of its own.
    #[must_use]
    pub(crate) fn header(&self, agent_id: &str) -> Option<HeaderValue> {
        let entries = self.0.get();
        entries.get(agent_id).map(|entry| entry.secret.header())
    }
}

impl fmt::Debug for RegisterTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegisterTokens")
    }
}

impl fmt::Debug for AgentTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentTokens")
    }
}

fn entries(file: &Path, with_networks: bool) -> anyhow::Result<Entries> {
    parse(&read_token_file(file, MAX_FILE_BYTES)?, with_networks)
}

fn parse(text: &str, with_networks: bool) -> anyhow::Result<Entries> {
    let mut entries: HashMap<String, Entry> = HashMap::new();
    let mut secrets = HashSet::new();
    let lines = text.lines().zip(1..);
    for (line, number) in lines.filter(|(line, _)| !line.trim().is_empty()) {
        let (agent_id, entry) =
            entry(line, with_networks).with_context(|| format!("line {number}"))?;
        let is_new = secrets.insert(entry.secret.header().as_bytes().to_vec());
        // Who shows it would be two agents.
        ensure!(
            is_new || !with_networks,
            "line {number}: has the token of another agent, expected one of its own"
        );
        ensure!(
            entries.insert(agent_id.clone(), entry).is_none(),
            "line {number}: '{agent_id}' stands twice, expected each agent once"
        );
    }
    Ok(Arc::new(entries))
}

/// Reads a line from its end: an id may have spaces.
fn entry(line: &str, with_networks: bool) -> anyhow::Result<(String, Entry)> {
    let expected = if with_networks {
        "expected ID TOKEN, or ID TOKEN CIDR"
    } else {
        "expected ID TOKEN"
    };
    let split = |text: &'_ str| -> Option<(String, String)> {
        let (rest, last) = text.trim().rsplit_once(char::is_whitespace)?;
        Some((rest.trim().to_owned(), last.to_owned()))
    };
    let (mut rest, mut last) = split(line).context(expected)?;
    let mut network = None;
    if with_networks && let Ok(Network(net)) = last.parse() {
        network = Some(net);
        (rest, last) = split(&rest).context(expected)?;
    }
    ensure!(
        is_agent_id(&rest),
        "{expected}, and '{}' is no agent's ID",
        foreign(&rest, 64)
    );
    let secret = Secret::new(&last)?;
    Ok((rest, Entry { secret, network }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutation::mutated;
    use proptest::prelude::*;

    fn registrar(text: &str, token: &str) -> Option<SelfRegistrar> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokens");
        std::fs::write(&file, text).unwrap();
        let tokens = RegisterTokens::open(file).unwrap();
        tokens.registrar(Some(format!("Bearer {token}").as_bytes()))
    }

    #[test]
    fn each_agent_is_known_by_its_own_token() {
        let text = "agent-001 one\n\n agent two  second 10.0.0.0/8 \nagent-003 third ::1\n";
        let found = |token: &str| {
            let found = registrar(text, token)?;
            Some((found.agent_id, found.network.map(|net| net.to_string())))
        };
        assert_eq!(found("one"), Some(("agent-001".to_owned(), None)));
        let network = Some("10.0.0.0/8".to_owned());
        assert_eq!(found("second"), Some(("agent two".to_owned(), network)));
        let network = Some("::1/128".to_owned());
        assert_eq!(found("third"), Some(("agent-003".to_owned(), network)));
        assert_eq!(found("on"), None);
        assert_eq!(found(""), None);
    }

    #[test]
    fn a_wrong_line_is_told_by_its_number_and_without_its_token() {
        for (text, told) in [
            ("a one\nb", "line 2"),
            ("a one\n\nb 10.0.0.0/8", "line 3"),
            ("a one\na two", "stands twice"),
            ("a one\nb one", "another agent"),
            (".. s3cret", "no agent's ID"),
            ("a s3crét", "visible ASCII"),
        ] {
            let error = parse(text, true).err().unwrap();
            let error = format!("{error:#}");
            assert!(error.contains(told) && !error.contains("s3cr"), "{error}");
        }
        // What agents are shown may be the same for several.
        assert_eq!(parse("a one\nb one", false).unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-z0-9./: \n]{0,60}|.{0,60}", networks in any::<bool>()) {
            let _ = parse(&text, networks);
        }

        #[test]
        fn nearly_right_lists_are_read_or_refused(bytes in mutated(&["agent-001 one\nagent two  second 10.0.0.0/8\na ::1 ::1\n"])) {
            let text = String::from_utf8_lossy(&bytes);
            let read = parse(&text, true);
            // Nobody is let in by a line that has no token.
            let agents = read.map(|entries| entries.len()).unwrap_or_default();
            prop_assert!(agents <= text.split_whitespace().count() / 2);
        }
    }
}
