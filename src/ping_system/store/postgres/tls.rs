//! TLS to a PostgreSQL server, with the root certificates and the strictness that its URL asks for.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use anyhow::{Context, ensure};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Socket;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_rustls::TlsConnector;

use crate::net::tls::{self, NameCheck};

/// How connections to a server are encrypted.
#[derive(Clone)]
pub(super) enum Tls {
    None,
    Rustls(Rustls),
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
    /// `sslrootcert`: the trusted roots; `system` for the system's.
    pub(super) roots: Option<PathBuf>,
    /// `--ca-file`: the trusted roots where `sslrootcert` names none. Without either they are the system's.
    pub(super) default_roots: Option<PathBuf>,
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
    let roots = match (&files.roots, &files.default_roots) {
        _ if files.roots_of_the_system() => None,
        (Some(path), _) => Some(certificates("sslrootcert", path)?),
        (None, Some(path)) => Some(certificates("--ca-file", path)?),
        (None, None) => None,
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
    Ok(Tls::Rustls(Rustls(TlsConnector::from(Arc::new(config)))))
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

/// Connects tokio-postgres to rustls. Without channel binding, for which the server's certificate would have to be
/// parsed: it is verified instead.
#[derive(Clone)]
pub(super) struct Rustls(TlsConnector);

/// The handshake with one server.
pub(super) struct Handshake {
    connector: TlsConnector,
    name: ServerName<'static>,
}

/// An encrypted connection.
pub(super) struct RustlsStream(tokio_rustls::client::TlsStream<Socket>);

impl MakeTlsConnect<Socket> for Rustls {
    type Stream = RustlsStream;
    type TlsConnect = Handshake;
    type Error = rustls::pki_types::InvalidDnsNameError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Handshake, Self::Error> {
        Ok(Handshake {
            connector: self.0.clone(),
            name: ServerName::try_from(host.to_owned())?,
        })
    }
}

impl TlsConnect<Socket> for Handshake {
    type Stream = RustlsStream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<RustlsStream>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        let handshake = self.connector.connect(self.name, socket);
        Box::pin(async { Ok(RustlsStream(handshake.await?)) })
    }
}

impl TlsStream for RustlsStream {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl AsyncRead for RustlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for RustlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
