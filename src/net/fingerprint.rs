//! The fingerprint of a certificate, by which a server is known that shows one that nobody vouches for.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};

const PREFIX: &str = "sha256:";

/// The SHA-256 of a whole certificate, as `openssl x509 -fingerprint -sha256` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    #[must_use]
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(Sha256::digest(certificate.as_ref()).into())
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.trim().strip_prefix(PREFIX).and_then(|hex| {
            let digits: Vec<u8> = hex.bytes().filter(|&byte| byte != b':').collect();
            let mut bytes = [0; 32];
            if digits.len() != 2 * bytes.len() {
                return None;
            }
            for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
                let pair = str::from_utf8(pair).ok()?;
                *byte = u8::from_str_radix(pair, 16).ok()?;
            }
            Some(Self(bytes))
        });
        parsed.ok_or_else(|| {
            format!("expected {PREFIX} and 64 hexadecimal digits; `uptime-runner check` shows the one of an orchestrator")
        })
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_is_shown_and_as_openssl_shows_it() {
        let fingerprint = Fingerprint::of(&CertificateDer::from(b"abc".to_vec()));
        let shown = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(fingerprint.to_string(), shown);
        assert_eq!(shown.parse(), Ok(fingerprint));
        let pairs: Vec<&str> = (0..32).map(|n| &shown[7 + 2 * n..9 + 2 * n]).collect();
        let openssl = format!("sha256:{}", pairs.join(":").to_uppercase());
        assert_eq!(openssl.parse(), Ok(fingerprint));
        for wrong in [&shown[7..], &shown[..70], "sha256:+a", "sha256:zz", ""] {
            assert!(wrong.parse::<Fingerprint>().is_err(), "{wrong}");
        }
    }
}
