//! Bearer tokens and root certificates: where they are read from, how they are compared, and when one
//! is required. No message and no `Debug` form shows a token.

use std::env::VarError;
use std::fs::OpenOptions;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use reqwest::header::HeaderValue;
use rustix::fs::OFlags;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use subtle::ConstantTimeEq;

/// The largest token, and the largest file of one.
const MAX_TOKEN_BYTES: u64 = 4 << 10;

/// A bearer token that a server requires. Never printed.
#[derive(Clone)]
pub struct Token(Arc<str>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    #[must_use]
    pub fn new(secret: &str) -> Self {
        Self(secret.into())
    }

    /// Whether an `Authorization` header carries it, compared in constant time.
    #[must_use]
    pub fn is_shown_by(&self, authorization: Option<&[u8]>) -> bool {
        let shown = authorization.and_then(|header| header.strip_prefix(b"Bearer "));
        shown.is_some_and(|shown| bool::from(shown.ct_eq(self.0.as_bytes())))
    }
}

/// The token in this environment variable, if it is set.
///
/// # Errors
/// A variable that is empty or not UTF-8: whoever set it meant to give a token.
fn token_in(variable: &str) -> anyhow::Result<Option<String>> {
    match std::env::var(variable) {
        Ok(token) => Ok(Some(token)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => bail!("{variable}: is not UTF-8, expected a token"),
    }
}

/// Reads a small file of tokens: a regular one, however it is named. Others may never end, or not even open.
///
/// # Errors
/// A file that cannot be read, is not a regular one, too large or not UTF-8.
pub(crate) fn read_token_file(file: &Path, max_bytes: u64) -> anyhow::Result<String> {
    // Without this flag a pipe would not open before somebody writes to it.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(file)
        .context("cannot be read")?;
    let metadata = opened.metadata().context("cannot be read")?;
    ensure!(
        metadata.is_file(),
        "is not a regular file, expected one with tokens"
    );
    let mut text = String::new();
    opened
        .take(max_bytes + 1)
        .read_to_string(&mut text)
        .context("cannot be read")?;
    ensure!(
        text.len() as u64 <= max_bytes,
        "is larger than {max_bytes} bytes, expected a token"
    );
    Ok(text)
}

/// Checks a token.
///
/// # Errors
/// One that is empty or has spaces or other than visible ASCII characters.
pub(crate) fn check_token(token: &str) -> anyhow::Result<()> {
    ensure!(!token.is_empty(), "is empty, expected a token");
    ensure!(
        token.bytes().all(|byte| byte.is_ascii_graphic()),
        "expected one token of visible ASCII characters without spaces"
    );
    Ok(())
}

/// The `Authorization` header for a token as [`secret`] finds it.
///
/// # Errors
/// Those of [`secret`].
pub(crate) fn bearer(
    option: &str,
    file: Option<PathBuf>,
    variable: &str,
) -> anyhow::Result<Option<HeaderValue>> {
    let Some(token) = secret(option, file, variable)? else {
        return Ok(None);
    };
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
        .expect("visible ASCII characters are what a header may have");
    header.set_sensitive(true);
    Ok(Some(header))
}

/// The token in `file`, or else in `variable`. `option` is what errors name; none shows the token.
///
/// # Errors
/// A file that cannot be read, is not a regular one or larger than 4 KiB; a variable that is empty or not UTF-8; a token that is
/// empty or has spaces or other than ASCII characters.
pub(crate) fn secret(
    option: &str,
    file: Option<PathBuf>,
    variable: &str,
) -> anyhow::Result<Option<String>> {
    let (source, token) = match file {
        Some(file) => {
            let source = format!("{option} {}", file.display());
            let token = read_token_file(&file, MAX_TOKEN_BYTES).with_context(|| source.clone())?;
            (source, token)
        }
        None => match token_in(variable)? {
            Some(token) => (variable.to_owned(), token),
            None => return Ok(None),
        },
    };
    let token = token.trim();
    check_token(token).context(source)?;
    ensure!(
        token.len() as u64 <= MAX_TOKEN_BYTES,
        "{variable}: is larger than {MAX_TOKEN_BYTES} bytes, expected a token"
    );
    Ok(Some(token.to_owned()))
}

/// Reads additional root certificates for https.
///
/// # Errors
/// A file that cannot be read, or holds no certificate in PEM form.
pub(crate) fn roots(file: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let source = format!("--ca-file {}", file.display());
    let pem = std::fs::read(file).with_context(|| format!("{source}: cannot be read"))?;
    let roots: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{source}: expected certificates in PEM form"))?;
    ensure!(
        !roots.is_empty(),
        "{source}: holds no certificate, expected some in PEM form"
    );
    Ok(roots)
}

/// Requires a token for an address beyond loopback, unless that was waived.
///
/// # Errors
/// When neither is the case.
pub(crate) fn check_exposure(
    listen: SocketAddr,
    allowed: bool,
    options: &str,
) -> anyhow::Result<()> {
    ensure!(
        allowed || listen.ip().is_loopback(),
        "--listen {listen}: everybody who reaches it could ask: expected a token ({options}), an address such as 127.0.0.1, or --allow-unauthenticated"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_is_the_token() {
        let token = Token::new("s3cret");
        assert!(token.is_shown_by(Some(b"Bearer s3cret")));
        for wrong in [
            "Bearer s3cre",
            "Bearer s3cret ",
            "Bearer ",
            "s3cret",
            "Basic s3cret",
            "",
        ] {
            assert!(!token.is_shown_by(Some(wrong.as_bytes())), "{wrong}");
        }
        assert!(!token.is_shown_by(None));
        assert!(!format!("{token:?}").contains("s3cret"));
    }
}
