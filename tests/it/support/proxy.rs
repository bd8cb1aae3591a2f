//! A proxy for connections that can be broken.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Passes connections on to an address.
pub(crate) struct Proxy {
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    target: Mutex<SocketAddr>,
    /// Whether answers are cut in the middle.
    cut: AtomicBool,
    /// The number of connections so far.
    connections: AtomicUsize,
    /// Connections with a smaller number stay open, but nothing passes through them.
    passing_from: AtomicUsize,
}

impl Proxy {
    pub(crate) fn before(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            target: Mutex::new(target),
            cut: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            passing_from: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let target = *shared.target.lock().unwrap();
                // If nobody listens, the client's connection is lost at once.
                let Ok(server) = TcpStream::connect(target) else {
                    continue;
                };
                let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                let (asked, answered) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                for (from, to, is_answer) in [(asked, server, false), (answered, client, true)] {
                    let state = Arc::clone(&shared);
                    std::thread::spawn(move || state.pass_on(from, to, number, is_answer));
                }
            }
        });
        Self { address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Whether answers are cut in the middle from now on.
    pub(crate) fn cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::SeqCst);
    }

    /// Leads new connections elsewhere.
    pub(crate) fn retarget(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap() = target;
    }

    /// From now on nothing passes through the connections that there are, and they stay open.
    pub(crate) fn swallow(&self) {
        let connections = self.state.connections.load(Ordering::SeqCst);
        self.state.passing_from.store(connections, Ordering::SeqCst);
    }

    /// Nothing passes through new connections either, until [`swallow`](Self::swallow).
    pub(crate) fn swallow_new_ones(&self) {
        self.state.passing_from.store(usize::MAX, Ordering::SeqCst);
    }
}

impl State {
    fn pass_on(&self, mut from: TcpStream, mut to: TcpStream, number: usize, is_answer: bool) {
        let mut piece = [0; 8 << 10];
        while let Ok(read) = from.read(&mut piece)
            && read > 0
        {
            if number < self.passing_from.load(Ordering::SeqCst) {
                continue;
            }
            let cut = is_answer && self.cut.load(Ordering::SeqCst);
            let passed = if cut { read / 2 } else { read };
            if to.write_all(&piece[..passed]).is_err() || cut {
                break;
            }
        }
        if number >= self.passing_from.load(Ordering::SeqCst) {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        // A connection that is swallowed does not even end.
        loop {
            std::thread::park();
        }
    }
}
