//! TLS to a PostgreSQL server, with the root certificates and the strictness that its URL asks for.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::net::tls::{self, NameCheck};

/// How connections to a server are encrypted.
#[derive(Clone)]
pub(super) enum Tls {
    None,
    Rustls(MakeRustlsConnect),
}

/// What a server's certificate must prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verify {
    Nothing,
    /// That a trusted root issued it.
    Issuer,
    /// The same, and that it is valid for the server's name.
    IssuerAndName,
}

/// Files in PEM format.
#[derive(Debug, Clone, Default)]
pub(super) struct Files {
    /// `sslrootcert`: the trusted roots; `system` for the system's, which are the default.
    pub(super) roots: Option<PathBuf>,
    /// `sslcert`: our own certificate.
    pub(super) certificate: Option<PathBuf>,
    /// `sslkey`: its key.
    pub(super) key: Option<PathBuf>,
}

impl Files {
    pub(super) fn roots_of_the_system(&self) -> bool {
        self.roots.as_deref() == Some(Path::new("system"))
    }
}

/// # Errors
/// A file that cannot be read, or holds no certificate or key.
pub(super) fn connector(verify: Verify, files: &Files) -> anyhow::Result<Tls> {
    let roots = match &files.roots {
        Some(path) if !files.roots_of_the_system() => Some(certificates("sslrootcert", path)?),
        _ => None,
    };
    let verifier = match verify {
        Verify::Nothing => tls::accept_any(),
        Verify::Issuer => tls::verifier(roots, NameCheck::Skip)?,
        Verify::IssuerAndName => tls::verifier(roots, NameCheck::Required)?,
    };
    let config = tls::client_config(verifier)?;
    let config = match (&files.certificate, &files.key) {
        (Some(certificate), Some(key)) => {
            let chain = certificates("sslcert", certificate)?;
            let key = PrivateKeyDer::from_pem_file(key)
                .with_context(|| format!("sslkey {}: expected a private key", key.display()))?;
            config
                .with_client_auth_cert(chain, key)
                .context("sslcert and sslkey: expected a certificate and its own key")?
        }
        (None, None) => config.with_no_client_auth(),
        _ => anyhow::bail!("sslcert and sslkey: expected both"),
    };
    Ok(Tls::Rustls(MakeRustlsConnect::new(config)))
}

fn certificates(parameter: &str, path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let shown = path.display();
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("{parameter} {shown}: expected certificates in PEM format"))?;
    ensure!(
        !certificates.is_empty(),
        "{parameter} {shown}: expected a certificate"
    );
    Ok(certificates)
}
