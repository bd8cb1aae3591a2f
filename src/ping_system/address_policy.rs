//! Which agent addresses are allowed: this program calls every registered address.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// The longest wait for the addresses of a name that is registered.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest address that is kept.
const MAX_URL_BYTES: usize = 2048;

/// Why an agent's address is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AddressRejected {
    /// Not a valid http or https URL.
    #[error(
        "agent_url: expected http://HOST[:PORT] or https://HOST[:PORT], with or without a path, up to 2048 bytes, without credentials, ? and #"
    )]
    Form,
    /// The ping system's own.
    #[error("agent_url: that is this ping system itself, expected the address of an agent")]
    Itself,
    /// Outside the allowed networks.
    #[error("agent_url leads to {0}, which --allow-agents does not allow")]
    NotAllowed(IpAddr),
    /// No address of an agent, unless somebody says so.
    #[error(
        "agent_url leads to {0}: link-local, metadata, multicast and unspecified addresses are refused, unless --allow-agents names a network of such"
    )]
    Special(IpAddr),
    /// A name that resolves to no address.
    #[error("agent_url: its host has no address")]
    NoAddress,
}

/// Whether a request failed because an [`AddressPolicy`] does not allow where a name leads.
pub(crate) fn is_refusal(error: &reqwest::Error) -> bool {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(AddressRejected::NotAllowed(_) | AddressRejected::Special(_)) =
            error.downcast_ref()
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Where no agent is: link-local addresses, which clouds use for their metadata, the metadata of AWS over IPv6 and of
/// Alibaba, multicast and broadcast, and no address at all.
static SPECIAL: LazyLock<[IpNet; 9]> = LazyLock::new(|| {
    [
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::254/128",
        "100.100.100.200/32",
        "224.0.0.0/4",
        "ff00::/8",
        "255.255.255.255/32",
        "0.0.0.0/32",
        "::/128",
    ]
    .map(|net| net.parse().expect("each of them is a network"))
});

/// The address that is reached: of an IPv6 address that stands for one of IPv4 (mapped, compatible, or translated by the
/// well-known prefix of RFC 6052), that one.
fn reached(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else { return ip };
    match v6.segments() {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => IpAddr::V4(embedded(high, low)),
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => IpAddr::V4(embedded(high, low)),
        _ => ip.to_canonical(),
    }
}

fn embedded(high: u16, low: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))
}

/// Which agent addresses are allowed.
#[derive(Debug, Clone)]
pub(crate) struct AddressPolicy {
    allowed: Arc<[IpNet]>,
    own: SocketAddr,
}

impl AddressPolicy {
    /// Allows the networks in `allowed`, or all if it is empty; never `own`, where the ping system listens.
    #[must_use]
    pub(crate) fn new(allowed: &[IpNet], own: SocketAddr) -> Self {
        Self {
            allowed: allowed.into(),
            own,
        }
    }

    /// Checks an address as it is registered.
    ///
    /// # Errors
    /// Why the address is rejected.
    pub(crate) async fn check_registration(&self, text: &str) -> Result<Url, AddressRejected> {
        let url = form(text)?;
        self.check(&url)?;
        let port = url.port_or_known_default().ok_or(AddressRejected::Form)?;
        let host = url.host_str().ok_or(AddressRejected::Form)?;
        let host = host.trim_matches(['[', ']']).to_owned();
        let looked_up = tokio::net::lookup_host((host, port));
        // A name that cannot be resolved now may be resolvable later: it is checked at each connection.
        let found: Vec<SocketAddr> = match tokio::time::timeout(RESOLVE_TIMEOUT, looked_up).await {
            Ok(Ok(found)) => found.collect(),
            _ => return Ok(url),
        };
        if found.iter().any(|&address| self.is_own(address)) {
            return Err(AddressRejected::Itself);
        }
        let mut checked = found.iter().map(|address| self.check_ip(address.ip()));
        let special = |checked| match checked {
            Err(special @ AddressRejected::Special(_)) => Some(special),
            _ => None,
        };
        checked.find_map(special).map_or(Ok(url), Err)
    }

    /// Whether all that a URL's host stands for lies in a network.
    pub(crate) async fn leads_into(&self, url: &Url, network: Option<IpNet>) -> bool {
        let (Some(network), Some(host)) = (network, url.host_str()) else {
            return false;
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        let looked_up = tokio::net::lookup_host((host, 0));
        let Ok(Ok(found)) = tokio::time::timeout(RESOLVE_TIMEOUT, looked_up).await else {
            return false;
        };
        let mut found = found.peekable();
        found.peek().is_some() && found.all(|address| network.contains(&reached(address.ip())))
    }

    /// Checks what needs no name resolution; names are checked when they are resolved.
    ///
    /// # Errors
    /// Why the address is rejected.
    pub(crate) fn check(&self, url: &Url) -> Result<(), AddressRejected> {
        match url.host() {
            Some(Host::Ipv4(ip)) => self.check_ip(ip.into()),
            Some(Host::Ipv6(ip)) => self.check_ip(ip.into()),
            Some(Host::Domain(_)) => Ok(()),
            None => Err(AddressRejected::Form),
        }
    }

    fn check_ip(&self, ip: IpAddr) -> Result<(), AddressRejected> {
        let ip = reached(ip);
        let special = SPECIAL.iter().find(|net| net.contains(&ip));
        // A wide network does not open what lies in it by accident.
        let opens =
            |net: &IpNet| net.contains(&ip) && special.is_none_or(|special| special.contains(net));
        match (self.allowed.iter().any(opens), special) {
            (true, _) => Ok(()),
            (false, Some(_)) => Err(AddressRejected::Special(ip)),
            (false, None) if self.allowed.is_empty() => Ok(()),
            (false, None) => Err(AddressRejected::NotAllowed(ip)),
        }
    }

    fn is_own(&self, address: SocketAddr) -> bool {
        let (ip, own) = (address.ip().to_canonical(), self.own.ip().to_canonical());
        address.port() == self.own.port()
            && (ip == own
                || (own.is_loopback() && ip.is_unspecified())
                || (own.is_unspecified() && is_of_this_machine(ip)))
    }
}

/// Only addresses of this machine can be bound to.
fn is_of_this_machine(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok()
}

fn form(text: &str) -> Result<Url, AddressRejected> {
    let url = Url::parse(text).map_err(|_| AddressRejected::Form)?;
    let plain = url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    let usable =
        matches!(url.scheme(), "http" | "https") && url.has_host() && url.port() != Some(0);
    if plain && usable && text.len() <= MAX_URL_BYTES {
        Ok(url)
    } else {
        Err(AddressRejected::Form)
    }
}

/// Resolves names as the system does, and returns only allowed addresses. The address that is checked is
/// the one that is connected to, so a name that changes in between (DNS rebinding) gains nothing.
impl Resolve for AddressPolicy {
    fn resolve(&self, name: Name) -> Resolving {
        let address_policy = self.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let mut refused = AddressRejected::NoAddress;
            let mut allowed = Vec::new();
            for address in found {
                match address_policy.check_ip(address.ip()) {
                    Ok(()) => allowed.push(address),
                    Err(why) => refused = why,
                }
            }
            if allowed.is_empty() {
                return Err(Box::new(refused) as Box<dyn Error + Send + Sync>);
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// A network as `--allow-agents` names it: a single address stands for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Network(pub IpNet);

impl std::str::FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let net = text
            .parse()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(Self)
            .map_err(|_| "expected a network such as 10.0.0.0/8 or fd00::/8, or an address")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address_policy(allowed: &[&str], own: &str) -> AddressPolicy {
        let nets: Vec<IpNet> = allowed
            .iter()
            .map(|net| net.parse::<Network>().unwrap().0)
            .collect();
        AddressPolicy::new(&nets, own.parse().unwrap())
    }

    #[tokio::test]
    async fn only_plain_http_addresses_are_agents() {
        let address_policy = address_policy(&[], "127.0.0.1:8000");
        for good in [
            "http://127.0.0.1:8001",
            "https://agent.example/behind/a/proxy/",
            "http://[::1]:8001",
            "http://10.1.2.3:8000",
        ] {
            assert!(
                address_policy.check_registration(good).await.is_ok(),
                "{good}"
            );
        }
        let long = format!("http://x/{}", "a".repeat(3000));
        for bad in [
            "",
            "agent:8001",
            "ftp://agent",
            "file:///etc/passwd",
            "http://",
            "http://user@agent",
            "http://user:secret@agent",
            "http://agent/?x=1",
            "http://agent/#x",
            "http://agent:0/",
            "http://agent:99999/",
            "gopher://agent",
            &long,
        ] {
            let got = address_policy.check_registration(bad).await;
            assert_eq!(got, Err(AddressRejected::Form), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_ping_system_does_not_call_itself() {
        for (own, itself) in [
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("127.0.0.1:8000", "http://localhost:8000/x"),
            ("127.0.0.1:8000", "http://[::ffff:127.0.0.1]:8000"),
            ("0.0.0.0:8000", "http://127.0.0.1:8000"),
            ("0.0.0.0:8000", "http://127.8.8.8:8000"),
            ("[::]:8000", "http://[::1]:8000"),
            ("127.0.0.1:80", "http://127.0.0.1"),
        ] {
            let got = address_policy(&[], own).check_registration(itself).await;
            assert_eq!(got, Err(AddressRejected::Itself), "{itself} at {own}");
        }
        for (own, other) in [
            ("127.0.0.1:8000", "http://127.0.0.2:8000"),
            ("127.0.0.1:8000", "http://127.0.0.1:8001"),
            ("0.0.0.0:8000", "http://192.0.2.7:8000"),
        ] {
            let got = address_policy(&[], own).check_registration(other).await;
            assert!(got.is_ok(), "{other} at {own}");
        }
    }

    #[tokio::test]
    async fn only_allowed_networks_are_called() {
        let address_policy =
            address_policy(&["10.0.0.0/8", "fd00::/8", "192.0.2.7"], "127.0.0.1:8000");
        for good in [
            "http://10.9.9.9",
            "http://[fd00::1]",
            "http://192.0.2.7",
            "http://[::ffff:10.0.0.1]",
            "http://by-name.example",
        ] {
            assert!(
                address_policy.check_registration(good).await.is_ok(),
                "{good}"
            );
        }
        for bad in [
            "http://127.0.0.1:9000",
            "http://192.0.2.8",
            "http://[::ffff:127.0.0.1]",
            "http://2130706433",
        ] {
            let got = address_policy.check_registration(bad).await;
            assert!(
                matches!(got, Err(AddressRejected::NotAllowed(_))),
                "{bad}: {got:?}"
            );
        }
        // Names are checked by what they lead to.
        let looked_up = address_policy.resolve("localhost".parse().unwrap()).await;
        let refused = looked_up.err().unwrap().to_string();
        assert!(refused.contains("--allow-agents"), "{refused}");
    }

    /// In any notation, and in a wide network that is allowed.
    #[tokio::test]
    async fn addresses_where_no_agent_is_are_refused_unless_they_are_named() {
        for allowed in [&[][..], &["0.0.0.0/0", "::/0", "169.0.0.0/8", "fd00::/8"]] {
            let address_policy = address_policy(allowed, "127.0.0.1:8000");
            for bad in [
                "http://169.254.169.254/latest/meta-data",
                "http://2852039166",
                "http://0xA9FEA9FE",
                "http://0251.0376.0251.0376",
                "http://169.254.43518",
                "http://[::ffff:169.254.169.254]",
                "http://[::169.254.169.254]",
                "http://[64:ff9b::a9fe:a9fe]",
                "http://[fe80::1]",
                "http://[fd00:ec2::254]",
                "http://100.100.100.200",
                "http://224.0.0.1",
                "http://[ff02::1]",
                "http://0.0.0.0:8000",
                "http://[::]",
                "http://255.255.255.255",
            ] {
                let got = address_policy.check_registration(bad).await;
                assert!(
                    matches!(got, Err(AddressRejected::Special(_))),
                    "{bad}: {got:?}"
                );
            }
        }
        let named = address_policy(&["169.254.7.0/24", "10.0.0.0/8"], "127.0.0.1:8000");
        for (url, is_allowed) in [
            ("http://169.254.7.1", true),
            ("http://169.254.8.1", false),
            ("http://10.0.0.1", true),
        ] {
            let got = named.check_registration(url).await;
            assert_eq!(got.is_ok(), is_allowed, "{url}");
        }
    }

    #[test]
    fn networks_are_read_as_people_write_them() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            (" ::1 ", "::1/128"),
            ("192.0.2.7", "192.0.2.7/32"),
        ] {
            assert_eq!(text.parse::<Network>().unwrap().0.to_string(), shown);
        }
        for bad in ["", "10.0.0.0/33", "localhost", "10.0.0", "*"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
