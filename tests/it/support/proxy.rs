//! A connection between two parts that can be broken.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Passes connections on to an address.
pub(crate) struct Proxy {
    pub address: SocketAddr,
    cut: Arc<AtomicBool>,
}

impl Proxy {
    pub(crate) fn before(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let whether = Arc::clone(&cut);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // Where nobody listens, the client's connection is lost at once.
                let Ok(server) = TcpStream::connect(target) else {
                    continue;
                };
                let (asked, answered) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let whether = Arc::clone(&whether);
                std::thread::spawn(move || pass_on(asked, server, None));
                std::thread::spawn(move || pass_on(answered, client, Some(&whether)));
            }
        });
        Self { address, cut }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Whether answers are cut in the middle from now on.
    pub(crate) fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, cut: Option<&AtomicBool>) {
    let mut piece = [0; 8 << 10];
    while let Ok(read) = from.read(&mut piece)
        && read > 0
    {
        let cut = cut.is_some_and(|cut| cut.load(Ordering::Relaxed));
        let passed = if cut { read / 2 } else { read };
        if to.write_all(&piece[..passed]).is_err() || cut {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
