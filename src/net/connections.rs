//! The connections of a server, of which no client can take so many that others are shut out.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

/// The longest time for which a client may take nothing of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// The connections that there are.
#[derive(Debug)]
pub(super) struct Connections {
    started: Instant,
    max: usize,
    max_per_address: usize,
    admitted: Mutex<Admitted>,
}

#[derive(Debug, Default)]
struct Admitted {
    next_id: u64,
    connections: HashMap<u64, Admission>,
    by_address: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Admission {
    address: IpAddr,
    /// Milliseconds since the server started: when bytes last went either way.
    active_at: Arc<AtomicU64>,
    evicted: CancellationToken,
}

impl Connections {
    #[must_use]
    pub(super) fn new(max: usize, max_per_address: usize) -> Self {
        Self {
            started: Instant::now(),
            max,
            max_per_address: max_per_address.clamp(1, max),
            admitted: Mutex::default(),
        }
    }

    /// Admits a connection. If there are too many, of its address or in all, the one that has been still for longest
    /// is closed: a client that does something is served, however many do nothing.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Place {
        let mut admitted = self.admitted.lock();
        if admitted.by_address.get(&address).copied().unwrap_or(0) >= self.max_per_address {
            admitted.evict_stillest(|of| of == address);
        }
        if admitted.connections.len() >= self.max {
            admitted.evict_stillest(|_| true);
        }
        let id = admitted.next_id;
        admitted.next_id += 1;
        let active_at = Arc::new(AtomicU64::new(self.now()));
        let evicted = CancellationToken::new();
        *admitted.by_address.entry(address).or_default() += 1;
        admitted.connections.insert(
            id,
            Admission {
                address,
                active_at: Arc::clone(&active_at),
                evicted: evicted.clone(),
            },
        );
        Place {
            connections: Arc::clone(self),
            id,
            active_at,
            evicted,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Admitted {
    fn evict_stillest(&mut self, may_go: impl Fn(IpAddr) -> bool) {
        let candidates = self.connections.iter();
        let candidates = candidates.filter(|(_, admission)| may_go(admission.address));
        // Of those that are equally still the oldest.
        let stillest = candidates
            .min_by_key(|(id, admission)| (admission.active_at.load(Ordering::Relaxed), **id))
            .map(|(id, _)| *id);
        if let Some(id) = stillest {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: u64) {
        let Some(admission) = self.connections.remove(&id) else {
            return;
        };
        admission.evicted.cancel();
        if let Some(count) = self.by_address.get_mut(&admission.address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&admission.address);
            }
        }
    }
}

/// The place of a connection, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    connections: Arc<Connections>,
    id: u64,
    active_at: Arc<AtomicU64>,
    evicted: CancellationToken,
}

impl Place {
    /// Cancelled when the connection must make room.
    #[must_use]
    pub(super) fn evicted(&self) -> CancellationToken {
        self.evicted.clone()
    }

    fn is_active(&self) {
        self.active_at
            .store(self.connections.now(), Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.admitted.lock().remove(self.id);
    }
}

/// A connection that fails if its client takes nothing of an answer for too long.
#[derive(Debug)]
pub(super) struct WatchedConnection<S> {
    stream: S,
    place: Place,
    /// When the answer that waits to be taken has waited for too long.
    overdue: Option<Pin<Box<Sleep>>>,
}

impl<S> WatchedConnection<S> {
    #[must_use]
    pub(super) fn new(stream: S, place: Place) -> Self {
        Self {
            stream,
            place,
            overdue: None,
        }
    }

    /// Takes in how a write went, and fails if none went for too long.
    fn written<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.overdue = None;
            self.place.is_active();
            return written;
        }
        let overdue = self
            .overdue
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_TIMEOUT)));
        ready!(overdue.as_mut().poll(context));
        let text = "the client takes nothing of its answer";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WatchedConnection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.place.is_active();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WatchedConnection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(written, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(written, context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[tokio::test(start_paused = true)]
    async fn the_stillest_connection_makes_room() {
        let connections = Arc::new(Connections::new(4, 2));
        let first = connections.admit(A);
        let second = connections.admit(A);
        tokio::time::advance(Duration::from_secs(1)).await;
        first.is_active();
        let third = connections.admit(A);
        assert!(second.evicted().is_cancelled());
        assert!(!first.evicted().is_cancelled() && !third.evicted().is_cancelled());
        // Another address has places of its own, as long as there are any.
        let others = [connections.admit(B), connections.admit(B)];
        tokio::time::advance(Duration::from_secs(1)).await;
        others.iter().for_each(Place::is_active);
        third.is_active();
        let last = connections.admit("10.0.0.3".parse().unwrap());
        assert!(first.evicted().is_cancelled());
        drop((first, second, third, others, last));
        let admitted = connections.admitted.lock();
        assert!(admitted.connections.is_empty() && admitted.by_address.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_left() {
        let connections = Arc::new(Connections::new(4, 2));
        let (client, server) = duplex(16);
        let mut server = WatchedConnection::new(server, connections.admit(A));
        let begun = Instant::now();
        let error = server.write_all(&[0; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= WRITE_TIMEOUT);
        drop(client);
        // One that takes a little now and then is served.
        let (mut client, server) = duplex(16);
        let mut server = WatchedConnection::new(server, connections.admit(A));
        let slow = async {
            let mut taken = [0; 16];
            for _ in 0..5 {
                tokio::time::sleep(WRITE_TIMEOUT / 2).await;
                client.read_exact(&mut taken).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(server.write_all(&[0; 80]), slow);
        written.unwrap();
    }
}
