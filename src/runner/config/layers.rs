//! Where option values come from: a flag beats the environment, which beats the file, which beats the
//! default. What environment and file say is appended to the command line as flags, so that one
//! declaration ([`super::options`]) reads, checks and describes all of them.

use std::any::TypeId;
use std::error::Error;
use std::ffi::{OsStr, OsString};

use anyhow::{anyhow, bail, ensure};
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::file::FileText;
use crate::option_values::without_credentials;

/// The prefix of all variables.
const PREFIX: &str = "UPTIME_RUNNER_";
/// Bearer tokens that the environment may hold themselves. There they beat a token file that the file
/// names.
pub(super) const PING_TOKEN: &str = "UPTIME_RUNNER_PING_TOKEN";
pub(super) const GATEWAY_TOKEN: &str = "UPTIME_RUNNER_GATEWAY_TOKEN";
pub(super) const METRICS_TOKEN: &str = "UPTIME_RUNNER_METRICS_TOKEN";
const TOKENS: [(&str, &str); 3] = [
    ("ping_token_file", PING_TOKEN),
    ("gateway_token_file", GATEWAY_TOKEN),
    ("metrics_token_file", METRICS_TOKEN),
];
/// Options that are no keys of the file: `capabilities` is a table there.
const NOT_IN_FILE: [&str; 2] = ["config", "capabilities"];

/// The environment variable of an option.
fn variable(option: &Arg) -> String {
    format!("{PREFIX}{}", option.get_id().as_str().to_uppercase())
}

/// The options of a command, without help and version.
fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    command
        .get_arguments()
        .filter(|arg| !["help", "version"].contains(&arg.get_id().as_str()))
}

/// The name of the file, from flag or environment.
pub(super) fn config_file(
    typed: &ArgMatches,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Option<OsString> {
    let flag = typed.get_raw("config").and_then(|mut raw| raw.next());
    flag.map(OsStr::to_owned)
        .or_else(|| environment("UPTIME_RUNNER_CONFIG"))
}

/// The flags for variables that are set, except for options that `typed` sets.
///
/// # Errors
/// A value that its option does not accept, in a message that names the variable.
pub(super) fn environment_flags(
    command: &Command,
    typed: &ArgMatches,
    environment: impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<Vec<OsString>> {
    let mut flags = Vec::new();
    for option in options(command) {
        let variable = variable(option);
        let Some(value) = environment(&variable) else {
            continue;
        };
        let place = format!(
            "{variable}='{}'",
            without_credentials(&value.to_string_lossy()).escape_debug()
        );
        let flag = checked(option, &value, &place)?;
        if !is_set(typed, option) {
            flags.push(flag);
        }
    }
    Ok(flags)
}

/// Checks that each of `names` with our prefix is the variable of an option or of a token.
///
/// # Errors
/// The first one that is not.
pub(super) fn check_variables(
    command: &Command,
    names: impl Iterator<Item = OsString>,
) -> anyhow::Result<()> {
    let known: Vec<String> = options(command).map(variable).collect();
    for name in names {
        let name = name.to_string_lossy();
        let is_known = known.iter().any(|known| *known == name)
            || TOKENS.iter().any(|&(_, variable)| variable == name);
        ensure!(
            !name.starts_with(PREFIX) || is_known,
            "{}: unknown variable: expected {PREFIX} and the name of an option, such as UPTIME_RUNNER_RATE for --rate",
            name.escape_debug()
        );
    }
    Ok(())
}

/// The flags for keys of the file, except for options that `typed` or the environment sets.
///
/// # Errors
/// A key that is no option, or a value that its option does not accept, in a message that names the line.
pub(super) fn file_flags(
    command: &Command,
    typed: &ArgMatches,
    file: &FileText,
    environment: impl Fn(&str) -> Option<OsString>,
) -> anyhow::Result<Vec<OsString>> {
    let keys =
        || options(command).filter(|option| !NOT_IN_FILE.contains(&option.get_id().as_str()));
    let table = DeTable::parse(&file.text)
        .map_err(|error| anyhow!("--config {}: {}", file.name, error.to_string().trim_end()))?;
    let mut flags = Vec::new();
    for (key, value) in table.get_ref() {
        let name: &str = key.get_ref();
        if ["agents", "capabilities"].contains(&name) {
            continue;
        }
        let line = file.line(key.span().start);
        let Some(option) = keys().find(|option| option.get_id().as_str() == name) else {
            let mut known: Vec<String> = keys().map(|key| format!("`{}`", key.get_id())).collect();
            known.extend(["`agents`".to_owned(), "`capabilities`".to_owned()]);
            bail!(
                "--config {} line {line}: unknown key `{}`: expected one of {}",
                file.name,
                name.escape_debug(),
                known.join(", ")
            );
        };
        let is_overridden = is_set(typed, option)
            || environment(&variable(option)).is_some()
            || TOKENS.iter().any(|&(id, variable)| {
                id == name && environment(variable).is_some_and(|token| !token.is_empty())
            });
        let values = match value.get_ref() {
            DeValue::Array(items) if takes_many(option) => items.iter().collect(),
            _ => vec![value],
        };
        for value in values {
            let place = format!(
                "--config {} line {}: {name} = {}",
                file.name,
                file.line(value.span().start),
                without_credentials(file.text[value.span()].lines().next().unwrap_or_default())
            );
            let text = scalar(value, option).ok_or_else(|| {
                let expected = match (is_bool(option), takes_many(option)) {
                    (true, _) => "true or false",
                    (_, true) => "text or an array of texts",
                    _ => "text or a number",
                };
                anyhow!("{place}: expected {expected}")
            })?;
            let flag = checked(option, OsStr::new(&text), &place)?;
            if !is_overridden {
                flags.push(flag);
            }
        }
    }
    Ok(flags)
}

/// Takes the values of repeatable options whole, as the file writes them: only flags and variables
/// separate them by commas.
pub(super) fn without_delimiters(command: Command, file_flags: &[OsString]) -> Command {
    command.mut_args(|arg| {
        let begin = format!("--{}=", arg.get_long().unwrap_or_default());
        let is_from_file = file_flags
            .iter()
            .any(|flag| flag.as_encoded_bytes().starts_with(begin.as_bytes()));
        if is_from_file {
            arg.value_delimiter(None)
        } else {
            arg
        }
    })
}

fn is_set(typed: &ArgMatches, option: &Arg) -> bool {
    typed.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine)
}

fn is_bool(option: &Arg) -> bool {
    option.get_value_parser().type_id() == TypeId::of::<bool>()
}

fn takes_many(option: &Arg) -> bool {
    matches!(option.get_action(), clap::ArgAction::Append)
}

/// A value as text for a flag; `None` for a table, an array or a date.
fn scalar(value: &Spanned<DeValue<'_>>, option: &Arg) -> Option<String> {
    match value.get_ref() {
        DeValue::Boolean(value) if is_bool(option) => Some(value.to_string()),
        _ if is_bool(option) => None,
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Integer(number) => {
            let number = i128::from_str_radix(number.as_str(), number.radix());
            number.ok().map(|number| number.to_string())
        }
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        _ => None,
    }
}

/// The flag of a value, if its option accepts it.
fn checked(option: &Arg, value: &OsStr, place: &str) -> anyhow::Result<OsString> {
    let mut flag = OsString::from(format!("--{}=", option.get_long().unwrap_or_default()));
    flag.push(value);
    // Parsed alone, so that an error is about this value.
    let parsed = Command::new("uptime-runner")
        .no_binary_name(true)
        .arg(option.clone())
        .try_get_matches_from([&flag]);
    match parsed {
        Ok(_) => Ok(flag),
        Err(error) => {
            let expected = match error.source() {
                Some(source) => source.to_string(),
                None if is_bool(option) => "expected true or false".to_owned(),
                None => "expected a value".to_owned(),
            };
            bail!("{place}: {expected}")
        }
    }
}
