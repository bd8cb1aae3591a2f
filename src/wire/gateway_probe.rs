//! What answers a POST to a job's path that has no job header (`.github/docs/gateway.md`). Such a request reaches no
//! orchestrator and costs nothing.

/// Who answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probed {
    Gateway,
    /// An orchestrator in the gateway's place.
    Orchestrator,
    /// A node that has no such path: the prefix or the port is wrong.
    NoSuchPath,
    /// A server that speaks TLS, asked in clear text.
    NeedsTls,
    /// A proxy that wants another token, or one at all.
    TokenRefused,
    /// A proxy whose gateway does not answer.
    GatewayDown,
    /// A proxy or another server.
    SomethingElse,
}

/// Tells who answered. The text decides first: some proxies add the headers of a node to all that they answer.
#[must_use]
pub fn probed(status: u16, body: &[u8]) -> Probed {
    match status {
        400 if body.starts_with(b"Unable to parse job request, err=") => Probed::Gateway,
        400 if body.starts_with(b"Could not verify job creds") => Probed::Orchestrator,
        400 if wants_tls(body) => Probed::NeedsTls,
        404 if body == b"404 page not found\n" => Probed::NoSuchPath,
        401 | 403 | 407 => Probed::TokenRefused,
        502..=504 | 520..=530 => Probed::GatewayDown,
        _ => Probed::SomethingElse,
    }
}

/// The words in which Go's servers (Caddy among them), nginx and Apache refuse clear text on a port for TLS.
fn wants_tls(body: &[u8]) -> bool {
    let page = String::from_utf8_lossy(body);
    page.starts_with("Client sent an HTTP request to an HTTPS server.")
        || page.contains("The plain HTTP request was sent to HTTPS port")
        || page.contains("speaking plain HTTP to an SSL-enabled server port")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answers_is_known_by_the_text() {
        for (status, body, who) in [
            (
                400,
                "Unable to parse job request, err=unexpected end of JSON input\n",
                Probed::Gateway,
            ),
            (400, "Could not verify job creds\n", Probed::Orchestrator),
            (404, "404 page not found\n", Probed::NoSuchPath),
            (404, "404 page not found\n\n", Probed::SomethingElse),
            (
                400,
                "Client sent an HTTP request to an HTTPS server.\n",
                Probed::NeedsTls,
            ),
            (
                400,
                "<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>\r\n",
                Probed::NeedsTls,
            ),
            (
                400,
                "Reason: You're speaking plain HTTP to an SSL-enabled server port.<br />\n",
                Probed::NeedsTls,
            ),
            (401, "", Probed::TokenRefused),
            (502, "", Probed::GatewayDown),
            (522, "", Probed::GatewayDown),
            (200, "{}", Probed::SomethingElse),
            (400, "", Probed::SomethingElse),
        ] {
            assert_eq!(probed(status, body.as_bytes()), who, "{status} {body}");
        }
    }
}
