//! How the certificates of servers are verified.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, Error, RootCertStore,
    SignatureScheme, client::WantsClientCert,
};

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Url;

use super::fingerprint::Fingerprint;

/// The longest wait for a certificate that is only looked at.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether a certificate must be valid for the name of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameCheck {
    Required,
    Skip,
}

/// A configuration that verifies by `verifier`, before the client's own certificate is chosen.
///
/// # Errors
/// When the provider has no TLS version in common with this program, which is a mistake in the build.
pub(crate) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
) -> anyhow::Result<ConfigBuilder<ClientConfig, WantsClientCert>> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS cannot be set up")?;
    Ok(builder
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

/// Accepts certificates issued by `roots`, or by the system's roots. A certificate that is itself one of `roots` is
/// accepted whatever it may be used for: self-signed ones are often marked as authorities.
///
/// # Errors
/// No usable root certificate.
pub(crate) fn verifier(
    roots: Option<Vec<CertificateDer<'static>>>,
    name_check: NameCheck,
) -> anyhow::Result<Arc<dyn ServerCertVerifier>> {
    let mut store = RootCertStore::empty();
    let pinned = roots.unwrap_or_default();
    if pinned.is_empty() {
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        ensure!(
            !store.is_empty(),
            "the system has no root certificates: install them (package ca-certificates), or name a file"
        );
    } else {
        let (_, ignored) = store.add_parsable_certificates(pinned.clone());
        ensure!(ignored == 0, "a root certificate cannot be read");
    }
    issued_by(store, pinned, name_check)
}

fn issued_by(
    store: RootCertStore,
    pinned: Vec<CertificateDer<'static>>,
    name_check: NameCheck,
) -> anyhow::Result<Arc<dyn ServerCertVerifier>> {
    let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider());
    let webpki = webpki.build().context("TLS cannot be set up")?;
    Ok(Arc::new(IssuedByRoots {
        webpki,
        pinned,
        name_check,
    }))
}

/// A client that trusts the system's roots and further ones.
///
/// # Errors
/// No usable root certificate.
pub(crate) fn trusting(extra_roots: Vec<CertificateDer<'static>>) -> anyhow::Result<ClientConfig> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let (_, ignored) = store.add_parsable_certificates(extra_roots.clone());
    ensure!(ignored == 0, "--ca-file: a certificate cannot be read");
    ensure!(
        !store.is_empty(),
        "the system has no root certificates: install them (package ca-certificates), or name a file (--ca-file)"
    );
    let verifier = issued_by(store, extra_roots, NameCheck::Required)?;
    Ok(client_config(verifier)?.with_no_client_auth())
}

/// Accepts every certificate: the connection is encrypted, but to whom is unknown.
pub(crate) fn accept_any() -> Arc<dyn ServerCertVerifier> {
    Arc::new(Unverified {
        provider: provider(),
        pinned: None,
    })
}

/// Accepts one certificate, whatever it says and no matter who issued it.
pub(crate) fn pinned(fingerprint: Fingerprint) -> Arc<dyn ServerCertVerifier> {
    Arc::new(Unverified {
        provider: provider(),
        pinned: Some(fingerprint),
    })
}

/// The fingerprint of the certificate that a server shows, trusted or not; `None` if it shows none.
pub(crate) async fn shown_certificate(url: &Url) -> Option<Fingerprint> {
    let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
    let port = url.port_or_known_default()?;
    let config = client_config(accept_any()).ok()?.with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let shown = async {
        let stream = TcpStream::connect((host.as_str(), port)).await.ok()?;
        let name = ServerName::try_from(host.clone()).ok()?;
        let stream = connector.connect(name, stream).await.ok()?;
        let (_, session) = stream.get_ref();
        session.peer_certificates()?.first().map(Fingerprint::of)
    };
    tokio::time::timeout(HANDSHAKE_TIMEOUT, shown).await.ok()?
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[derive(Debug)]
struct IssuedByRoots {
    webpki: Arc<WebPkiServerVerifier>,
    pinned: Vec<CertificateDer<'static>>,
    name_check: NameCheck,
}

impl ServerCertVerifier for IssuedByRoots {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.pinned.iter().any(|pinned| pinned == end_entity) {
            if self.name_check == NameCheck::Required {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        let verified = self.webpki.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // The name is verified last: all else is right.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.name_check == NameCheck::Skip => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Takes no issuer's word: one certificate is accepted, or any.
#[derive(Debug)]
struct Unverified {
    provider: Arc<CryptoProvider>,
    pinned: Option<Fingerprint>,
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = Fingerprint::of(end_entity);
        match self.pinned {
            Some(pinned) if pinned != found => Err(Error::General(format!(
                "the server shows the certificate {found}, expected {pinned}"
            ))),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
