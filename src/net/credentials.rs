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
use url::{Host, Url};

use super::watched_file::WatchedFile;

/// The largest token, and the largest file of one.
const MAX_TOKEN_BYTES: u64 = 4 << 10;

/// A bearer token, which a server requires or a client shows. Never printed. One of a file is replaced when that changes.
#[derive(Clone)]
pub struct Token(TokenSource);

#[derive(Clone)]
enum TokenSource {
    Fixed(Secret),
    File(Arc<WatchedFile<Secret>>),
}

/// A token as requests carry it. Never printed.
#[derive(Clone)]
pub(crate) struct Secret(HeaderValue);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Checks a token.
    ///
    /// # Errors
    /// One that is empty, over 4 KiB, or has spaces or other than visible ASCII characters.
    pub(crate) fn new(token: &str) -> anyhow::Result<Self> {
        ensure!(!token.is_empty(), "is empty, expected a token");
        ensure!(
            token.len() as u64 <= MAX_TOKEN_BYTES,
            "is larger than {MAX_TOKEN_BYTES} bytes, expected a token"
        );
        ensure!(
            token.bytes().all(|byte| byte.is_ascii_graphic()),
            "expected one token of visible ASCII characters without spaces"
        );
        let mut header = HeaderValue::try_from(format!("Bearer {token}"))
            .expect("visible ASCII characters are what a header may have");
        header.set_sensitive(true);
        Ok(Self(header))
    }

    /// The `Authorization` header that shows it.
    #[must_use]
    pub(crate) fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    /// Whether an `Authorization` header shows it, compared in constant time.
    #[must_use]
    pub(crate) fn is_shown_by(&self, authorization: Option<&[u8]>) -> bool {
        authorization.is_some_and(|shown| bool::from(shown.ct_eq(self.0.as_bytes())))
    }
}

impl Token {
    /// One that never changes.
    #[must_use]
    pub(crate) fn fixed(secret: Secret) -> Self {
        Self(TokenSource::Fixed(secret))
    }

    fn secret(&self) -> Secret {
        match &self.0 {
            TokenSource::Fixed(secret) => secret.clone(),
            TokenSource::File(file) => file.get(),
        }
    }

    /// The `Authorization` header that shows it.
    #[must_use]
    pub(crate) fn header(&self) -> HeaderValue {
        self.secret().header()
    }

    /// Whether an `Authorization` header shows it, compared in constant time.
    #[must_use]
    pub fn is_shown_by(&self, authorization: Option<&[u8]>) -> bool {
        self.secret().is_shown_by(authorization)
    }
}

/// The token in this environment variable, if it is set.
///
/// # Errors
/// A variable that is empty or not UTF-8: it was meant to hold a token.
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

/// The token in `file`, or else in `variable`. `option` is what errors name; none shows the token.
///
/// # Errors
/// A file that cannot be read, is not a regular one or larger than 4 KiB; a variable that is empty or not UTF-8; a token
/// that is empty or has spaces or other than ASCII characters.
pub(crate) fn token(
    option: &str,
    file: Option<PathBuf>,
    variable: &str,
) -> anyhow::Result<Option<Token>> {
    if let Some(file) = file {
        let place = format!("{option} {}", file.display());
        let watched = WatchedFile::open(vec![file], read_secret).context(place)?;
        return Ok(Some(Token(TokenSource::File(Arc::new(watched)))));
    }
    let Some(token) = token_in(variable)? else {
        return Ok(None);
    };
    let secret = Secret::new(token.trim()).with_context(|| variable.to_owned())?;
    Ok(Some(Token::fixed(secret)))
}

fn read_secret(files: &[PathBuf]) -> anyhow::Result<Secret> {
    let text = read_token_file(&files[0], MAX_TOKEN_BYTES)?;
    Secret::new(text.trim())
}

/// Warns where a token would be sent over a network in clear text.
pub(crate) fn warn_of_clear_text(option: &str, url: &Url) {
    let is_loopback = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
        None => true,
    };
    if url.scheme() == "http" && !is_loopback {
        tracing::warn!(
            "{option} {url}: its token crosses the network in clear text, expected https://"
        );
    }
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
    use crate::mutation::mutated;
    use proptest::prelude::*;

    #[test]
    fn only_the_whole_token_is_the_token() {
        let token = Token::fixed(Secret::new("s3cret").unwrap());
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

    proptest! {
        /// What is taken for a token can be shown, and is what the file says.
        #[test]
        fn any_file_is_a_token_or_refused(bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            prop::collection::vec(Just(b'x'), 4090..4100),
            mutated(&["s3cret-token_0123456789abcdef\n"]),
        ]) {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &bytes).unwrap();
            if let Ok(secret) = read_secret(&[file.path().to_owned()]) {
                let text = String::from_utf8(bytes).unwrap();
                let shown = format!("Bearer {}", text.trim());
                prop_assert!(secret.is_shown_by(Some(shown.as_bytes())) && shown.len() <= 7 + 4096);
            }
        }
    }
}
