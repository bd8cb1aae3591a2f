//! Checks of options against each other and against the file's tables.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail, ensure};
use reqwest::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    TRANSFER_ENCODING,
};

use super::file::{AgentTable, CapabilityEntry, FileCapabilities, FileText};
use super::options::RateOptions;
use super::{AgentSettings, RecordConfig, RunnerAddress, RunnerConfig};
use crate::option_values::{BaseRate, Budget, OrchestratorAddress, RunnerUrl, Weight};
use crate::records;
use crate::runner::rate::controller::Sharing;
use crate::runner::send::capability::{self, Capability};
use crate::wire::agent::AgentId;
use crate::wire::expectation::Expectation;
use crate::wire::gateway::JOB_HEADER;

pub(super) fn agents(
    flags: Option<Vec<String>>,
    all: bool,
    entries: Option<Vec<AgentTable>>,
    source: &FileText,
) -> anyhow::Result<Vec<AgentSettings>> {
    let entries = entries.unwrap_or_default();
    ensure!(
        !(all && flags.is_some()),
        "--agent and --all-agents: expected one of them; [[agents]] in the file say how single agents are followed"
    );
    let ids = match flags {
        Some(flags) => flags
            .iter()
            .map(|id| {
                id.parse()
                    .map_err(|error| anyhow::anyhow!("--agent '{id}': {error}"))
            })
            .collect::<anyhow::Result<Vec<AgentId>>>()?,
        None => entries.iter().map(|entry| entry.id.clone()).collect(),
    };
    ensure!(
        all || !ids.is_empty(),
        "no agent to follow: expected --agent ID, --all-agents, or [[agents]] with an id in the file that --config names"
    );
    let mut agents: Vec<AgentSettings> = Vec::with_capacity(ids.len());
    for AgentId(id) in ids {
        ensure!(
            agents.iter().all(|agent| agent.id != id),
            "agent '{id}' is named twice by --agent or in {}: expected each once",
            if source.name.is_empty() {
                "the file"
            } else {
                &source.name
            },
        );
        let entry = entries.iter().find(|entry| entry.id.0 == id);
        agents.push(match entry {
            Some(entry) => {
                agent(entry).with_context(|| format!("{}: [[agents]] '{id}'", source.name))?
            }
            None => AgentSettings::named(&id),
        });
    }
    tie(&mut agents);
    Ok(agents)
}

/// An agent as the file describes it; [`tie`] decides whether it is tied.
fn agent(entry: &AgentTable) -> anyhow::Result<AgentSettings> {
    let AgentId(id) = entry.id.clone();
    let orchestrators = entry.orchestrators.iter().flatten();
    Ok(AgentSettings {
        id,
        runner: runner(entry)?,
        orchestrators: orchestrators
            .map(|OrchestratorAddress(address)| address.clone())
            .collect(),
        base_rate: entry.rate.map(|BaseRate(rate)| rate),
        capabilities: entry.capabilities.clone(),
        price: entry.price.clone(),
        budget: entry.budget_wei.clone().map(|Budget(budget)| budget),
        is_tied: false,
    })
}

fn runner(entry: &AgentTable) -> anyhow::Result<Option<RunnerAddress>> {
    let fingerprint = entry.orchestrator_fingerprint;
    let Some(RunnerUrl(url)) = entry.runner.clone() else {
        ensure!(
            fingerprint.is_none(),
            "orchestrator_fingerprint is that of a live runner's orchestrator: expected runner = \"https://…\" with it"
        );
        return Ok(None);
    };
    ensure!(
        entry.orchestrators.is_none(),
        "runner and orchestrators: expected one of them, a live runner or the orchestrators that a gateway may choose"
    );
    ensure!(
        fingerprint.is_none() || url.scheme() == "https",
        "orchestrator_fingerprint with runner = \"{url}\": expected an https address, in clear text there is no certificate"
    );
    Ok(Some(RunnerAddress { url, fingerprint }))
}

/// Marks the agents whose orchestrators, or live runner, no other agent uses.
fn tie(agents: &mut [AgentSettings]) {
    let mut users: BTreeMap<String, usize> = BTreeMap::new();
    for agent in &*agents {
        for form in agent.destinations().collect::<BTreeSet<_>>() {
            *users.entry(form).or_default() += 1;
        }
    }
    for agent in agents {
        let destinations: Vec<String> = agent.destinations().collect();
        let alone = destinations.iter().all(|form| users[form] == 1);
        agent.is_tied = !destinations.is_empty() && alone;
    }
}

/// Whether each agent has its own rate, or all share one.
pub(super) fn sharing(options: &RateOptions, agents: &[AgentSettings]) -> anyhow::Result<Sharing> {
    let split = options.split;
    let redistribute = options.redistribute.unwrap_or(false);
    let Some(BaseRate(rate)) = options.total_rate else {
        ensure!(
            split.is_none() && !redistribute,
            "{} says how a total is shared out: expected --total-rate N with it",
            if split.is_some() {
                "--split"
            } else {
                "--redistribute"
            }
        );
        return Ok(Sharing::Own);
    };
    ensure!(
        options.rate.is_none() && agents.iter().all(|agent| agent.base_rate.is_none()),
        "--total-rate and --rate (or rate in [[agents]]): expected one of them, a rate that all share or one for each"
    );
    Ok(Sharing::Total {
        rate,
        split: split.unwrap_or_default(),
        redistribute,
    })
}

/// A budget needs a price for each agent that it bounds.
pub(super) fn prices(config: &RunnerConfig) -> anyhow::Result<()> {
    let agents = config.agents.configured.iter();
    let mut unpriced = agents.filter(|agent| config.price(agent).is_none());
    let missing = if config.limits.budget.is_some() {
        let anybody = (config.agents.all && config.limits.price.is_none())
            .then(|| "the agents that are listed".to_owned());
        unpriced.next().map(|agent| agent.id.clone()).or(anybody)
    } else {
        unpriced
            .find(|agent| agent.budget.is_some())
            .map(|agent| agent.id.clone())
    };
    if let Some(agent) = missing {
        bail!(
            "--budget-wei (or budget_wei in [[agents]]): no price is known for {agent}: expected --price N, or price in [[agents]]"
        );
    }
    Ok(())
}

/// What could never be recorded to is refused before anything is sent; what may pass by itself is tried again in the run.
pub(super) fn record(config: &RecordConfig) -> anyhow::Result<()> {
    if let Some(file) = &config.file {
        records::check_usable(file)
            .with_context(|| format!("--record '{}': cannot be used", file.display()))?;
    }
    Ok(())
}

/// Each agent must have at least one capability, and only capabilities of the run.
pub(super) fn agents_capabilities(
    agents: &[AgentSettings],
    capabilities: &[Capability],
    source: &FileText,
) -> anyhow::Result<()> {
    for agent in agents {
        let Some(wanted) = &agent.capabilities else {
            continue;
        };
        let known: Vec<&str> = capabilities.iter().map(|c| c.name.as_str()).collect();
        let unknown = wanted.iter().find(|name| !known.contains(&name.as_str()));
        ensure!(
            unknown.is_none() && !wanted.is_empty(),
            "{}: [[agents]] '{}': capabilities has {}: expected some of those that are asked for, {}",
            source.name,
            agent.id,
            unknown.map_or("nothing".to_owned(), |name| format!("'{name}'")),
            known.join(", ")
        );
    }
    Ok(())
}

pub(super) fn capabilities(
    flags: Option<Vec<String>>,
    file: FileCapabilities,
    source: &FileText,
) -> anyhow::Result<Vec<Capability>> {
    let mut known = Capability::built_in();
    let mut wanted: Vec<(String, String)> = vec![];
    match file {
        FileCapabilities::Silent => {}
        FileCapabilities::Names(names) => {
            for name in names {
                let place = format!("{} line {}", source.name, source.line(name.span().start));
                wanted.push((name.into_inner(), place));
            }
        }
        FileCapabilities::Tables(tables) => {
            wanted.push((capability::DEFAULT.to_owned(), String::new()));
            for (name, entry) in tables {
                define(&mut known, &name, entry)
                    .with_context(|| format!("{}: [capabilities.{name}]", source.name))?;
                if name != capability::DEFAULT {
                    wanted.push((name, String::new()));
                }
            }
        }
    }
    if let Some(flags) = flags {
        let names = flags
            .iter()
            .flat_map(|flag| flag.split([',', ' ', '\t', '\n']));
        let names = names.filter(|name| !name.is_empty());
        wanted = names
            .map(|name| (name.to_owned(), "--capabilities".to_owned()))
            .collect();
        ensure!(
            !wanted.is_empty(),
            "--capabilities: expected at least one name"
        );
    }
    if wanted.is_empty() {
        wanted.push((capability::DEFAULT.to_owned(), String::new()));
    }
    let mut chosen: Vec<Capability> = Vec::with_capacity(wanted.len());
    for (name, place) in wanted {
        let Some(capability) = known.iter().find(|capability| capability.name == name) else {
            let names: Vec<&str> = known.iter().map(|c| c.name.as_str()).collect();
            bail!(
                "{place}: unknown capability '{name}': expected one of {}",
                names.join(", ")
            );
        };
        ensure!(
            !chosen.contains(capability),
            "{place}: capability '{name}' is named twice: expected each once; weight = 2 in the file's [capabilities.{name}] makes it twice as frequent"
        );
        chosen.push(capability.clone());
    }
    Ok(chosen)
}

fn define(known: &mut Vec<Capability>, name: &str, entry: CapabilityEntry) -> anyhow::Result<()> {
    ensure!(
        !name.is_empty()
            && !name.contains(|c: char| c == ',' || c.is_whitespace() || c.is_control()),
        "expected a name without spaces and commas"
    );
    let index = known
        .iter()
        .position(|capability| capability.name == name)
        .unwrap_or_else(|| {
            known.push(Capability::named(name));
            known.len() - 1
        });
    let capability = &mut known[index];
    let text = |key: &str, new: Option<String>, slot: &mut String| -> anyhow::Result<()> {
        if let Some(new) = new {
            ensure!(!new.trim().is_empty(), "{key} is empty: expected a name");
            *slot = new;
        }
        Ok(())
    };
    text("route", entry.route, &mut capability.route)?;
    text("capability", entry.capability, &mut capability.capability)?;
    text("run", entry.run, &mut capability.run)?;
    if let Some(seconds) = entry.timeout_seconds {
        capability.timeout_seconds = seconds.get();
    }
    if let Some(Weight(weight)) = entry.weight {
        capability.weight = weight;
    }
    if let Some(new) = entry.headers {
        capability.headers = headers(&new)?;
    }
    if let Some(payload) = entry.payload {
        capability.payload = payload;
    }
    if let Some(expect) = entry.expect {
        capability.expect = Expectation::new(expect);
    }
    Ok(())
}

/// Additional headers of a request. Their values may be secret.
fn headers(entries: &BTreeMap<String, String>) -> anyhow::Result<HeaderMap> {
    const SET_BY_THE_RUNNER: [HeaderName; 6] = [
        HeaderName::from_static(JOB_HEADER),
        CONTENT_TYPE,
        AUTHORIZATION,
        CONTENT_LENGTH,
        TRANSFER_ENCODING,
        CONNECTION,
    ];
    let mut headers = HeaderMap::new();
    for (name, value) in entries {
        let Ok(header) = HeaderName::try_from(name) else {
            bail!(
                "headers has '{}': expected a header's name, such as X-Tenant",
                name.escape_debug()
            );
        };
        ensure!(
            !SET_BY_THE_RUNNER.contains(&header),
            "headers has '{name}', which the runner sets itself: expected another header, such as X-Tenant \
             (--gateway-token-file sets Authorization)"
        );
        let Ok(mut value) = HeaderValue::try_from(value) else {
            bail!(
                "headers: the value of '{name}' has line breaks or other control characters: expected printable text"
            );
        };
        value.set_sensitive(true);
        ensure!(
            headers.insert(header, value).is_none(),
            "headers has '{name}' twice, in different case: expected each once"
        );
    }
    Ok(headers)
}
