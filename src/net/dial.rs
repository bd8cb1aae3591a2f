//! Connections to one server, whose name may have several addresses, of which some are dead or move away.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use url::{Host, Url};

/// The pause before the next address of a name is tried as well (RFC 8305).
const STAGGER: Duration = Duration::from_millis(250);
/// The longest wait for a connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a name's addresses are used before it is resolved again.
const FRESH: Duration = Duration::from_secs(20);
/// The number of consecutive answers without an address after which it is left.
const MISSING_ANSWERS: u32 = 2;

/// A connection, in clear text or TLS.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How to reach a server.
pub(crate) struct Dialer {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    known: Mutex<Known>,
}

/// What is known of the name.
#[derive(Debug, Default)]
struct Known {
    addresses: Vec<SocketAddr>,
    resolved_at: Option<Instant>,
    /// The address that was connected to last, and how many answers in a row lack it.
    last: Option<(SocketAddr, u32)>,
}

impl Known {
    /// Takes in an answer. Returns whether connections to the last address should be left.
    fn resolved(&mut self, addresses: Vec<SocketAddr>, now: Instant) -> bool {
        self.resolved_at = Some(now);
        self.addresses = addresses;
        let Some((last, missing)) = &mut self.last else {
            return false;
        };
        if self.addresses.contains(last) {
            *missing = 0;
            return false;
        }
        *missing += 1;
        let is_gone = *missing >= MISSING_ANSWERS;
        if is_gone {
            self.last = None;
        }
        is_gone
    }

    /// The addresses in the order in which they are tried: the last one that worked first.
    fn in_order(&self) -> Vec<SocketAddr> {
        let last = self.last.map(|(last, _)| last);
        let last = last.filter(|last| self.addresses.contains(last));
        let others = self
            .addresses
            .iter()
            .copied()
            .filter(|&other| Some(other) != last);
        last.into_iter().chain(others).collect()
    }
}

impl Dialer {
    /// For the host and port of a URL; `tls` is used if its scheme is https.
    ///
    /// # Errors
    /// A URL without a host, or with one that no certificate can be for if it is https.
    pub(crate) fn new(url: &Url, tls: Option<TlsConnector>) -> anyhow::Result<Self> {
        let host = match url.host() {
            Some(Host::Domain(name)) => name.to_owned(),
            Some(Host::Ipv4(address)) => address.to_string(),
            Some(Host::Ipv6(address)) => address.to_string(),
            None => anyhow::bail!("{url}: expected a URL with a host"),
        };
        let port = url.port_or_known_default().unwrap_or(80);
        // Clear text works with names that no certificate can have.
        let tls = match tls.filter(|_| url.scheme() == "https") {
            Some(tls) => Some((tls, ServerName::try_from(host.clone())?)),
            None => None,
        };
        Ok(Self {
            host,
            port,
            tls,
            known: Mutex::default(),
        })
    }

    /// A new connection, and how long it took.
    ///
    /// # Errors
    /// Why the last address could not be connected to, or that nothing came in 5 s.
    pub(crate) async fn connect(&self) -> io::Result<(Box<dyn Stream>, Duration)> {
        let began = Instant::now();
        let connected = timeout(CONNECT_TIMEOUT, self.connect_and_handshake()).await;
        let stream = connected.unwrap_or_else(|_| {
            let text = format!("no connection in {CONNECT_TIMEOUT:?}");
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        })?;
        Ok((stream, began.elapsed()))
    }

    async fn connect_and_handshake(&self) -> io::Result<Box<dyn Stream>> {
        let stream = race(self.addresses().await?).await?;
        // Without it answers are only slower, so a failure is ignored.
        let _ = stream.set_nodelay(true);
        let address = stream.peer_addr()?;
        self.known.lock().last = Some((address, 0));
        Ok(match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), stream).await?),
        })
    }

    async fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        {
            let known = self.known.lock();
            let is_fresh = known.resolved_at.is_some_and(|at| at.elapsed() < FRESH);
            if is_fresh && !known.addresses.is_empty() {
                return Ok(known.in_order());
            }
        }
        self.resolve().await?;
        Ok(self.known.lock().in_order())
    }

    /// Resolves the name again. Returns whether the address that is in use is not among its addresses any more.
    ///
    /// # Errors
    /// A name that cannot be resolved; the known addresses stay.
    pub(crate) async fn resolve(&self) -> io::Result<bool> {
        let found = tokio::net::lookup_host((&*self.host, self.port)).await?;
        let addresses: Vec<SocketAddr> = found.collect();
        if addresses.is_empty() {
            let text = format!("{} has no address", self.host);
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        Ok(self.known.lock().resolved(addresses, Instant::now()))
    }
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dialer({}:{})", self.host, self.port)
    }
}

/// Connects to the first address that answers: each next one is tried once the one before has failed, or has not answered
/// for a moment.
async fn race(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut waiting = addresses.into_iter();
    let mut trying = FuturesUnordered::new();
    let mut error = io::Error::from(io::ErrorKind::NotFound);
    trying.extend(waiting.next().map(TcpStream::connect));
    loop {
        tokio::select! {
            connected = trying.next() => match connected {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(failed)) => {
                    error = failed;
                    trying.extend(waiting.next().map(TcpStream::connect));
                }
                None => return Err(error),
            },
            () = sleep(STAGGER), if waiting.len() > 0 => {
                trying.extend(waiting.next().map(TcpStream::connect));
            }
        }
    }
}

/// Resolves the name of a server while its connections are in use, and tells when they should be left.
pub(crate) async fn watch_addresses(dialer: Arc<Dialer>, mut leave: impl FnMut()) {
    loop {
        sleep(FRESH).await;
        // A resolver that fails changes nothing.
        if dialer.resolve().await.unwrap_or(false) {
            leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_that_two_answers_lack_is_left() {
        let [old, new] = ["10.0.0.1:80", "10.0.0.2:80"].map(address);
        let mut known = Known::default();
        let now = Instant::now();
        assert!(!known.resolved(vec![old, new], now));
        known.last = Some((new, 0));
        assert_eq!(known.in_order(), [new, old]);
        assert!(!known.resolved(vec![old], now));
        assert_eq!(known.in_order(), [old]);
        // It came back.
        assert!(!known.resolved(vec![old, new], now));
        assert!(!known.resolved(vec![old], now));
        assert!(known.resolved(vec![old], now));
        assert!(!known.resolved(vec![old], now));
    }

    #[tokio::test]
    async fn a_dead_first_address_costs_no_more_than_a_moment() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let alive = listener.local_addr().unwrap();
        // Nobody answers there (RFC 5737), or it is refused at once.
        let dead = address("192.0.2.1:9");
        let began = Instant::now();
        let stream = race(vec![dead, alive]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), alive);
        assert!(
            began.elapsed() < Duration::from_secs(4),
            "{:?}",
            began.elapsed()
        );
        assert!(race(Vec::new()).await.is_err());
    }

    #[tokio::test]
    async fn the_last_address_that_worked_is_tried_first() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("http://localhost:{port}").parse().unwrap();
        let dialer = Dialer::new(&url, None).unwrap();
        dialer.connect().await.unwrap();
        let (last, _) = dialer.known.lock().last.unwrap();
        assert_eq!(last.port(), port);
        assert_eq!(dialer.addresses().await.unwrap()[0], last);
    }
}
