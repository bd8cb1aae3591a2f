//! TLS of our servers, with a certificate that is reloaded when it changes.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use super::watched_file::WatchedFile;

/// A server's certificate and its key.
#[derive(Clone)]
pub struct ServerTls(Arc<WatchedFile<Arc<ServerConfig>>>);

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerTls({:?})", self.0)
    }
}

impl ServerTls {
    /// From the files of `--tls-cert` and `--tls-key`, if they are given.
    ///
    /// # Errors
    /// One without the other, or files that hold no certificate and the key for it.
    pub(crate) fn from_files(
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
    ) -> anyhow::Result<Option<Self>> {
        let files = match (certificate, key) {
            (None, None) => return Ok(None),
            (Some(certificate), Some(key)) => vec![certificate, key],
            _ => bail!(
                "--tls-cert and --tls-key: expected both, a certificate and its key in PEM form"
            ),
        };
        Ok(Some(Self(Arc::new(WatchedFile::open(files, read)?))))
    }

    /// With the certificate as it is now.
    #[must_use]
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.get())
    }
}

fn read(files: &[PathBuf]) -> anyhow::Result<Arc<ServerConfig>> {
    let (certificate, key) = (&files[0], &files[1]);
    let of_certificate = || format!("--tls-cert {}", certificate.display());
    let chain = CertificateDer::pem_file_iter(certificate)
        .with_context(of_certificate)?
        .collect::<Result<Vec<_>, _>>()
        .with_context(of_certificate)?;
    ensure!(
        !chain.is_empty(),
        "{}: holds no certificate, expected some in PEM form",
        of_certificate()
    );
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("--tls-key {}: expected a key in PEM form", key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS cannot be set up")?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .context("--tls-cert and --tls-key: the key is not that of the certificate")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
