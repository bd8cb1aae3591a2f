//! A process of ours that answers at an address.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{PATIENCE, wait_until};

/// Killed when it is dropped.
pub(crate) struct Served {
    pub child: Child,
    pub address: String,
    stderr: Arc<Mutex<String>>,
}

impl Served {
    /// Starts it, and waits until it says in its log where it answers.
    pub(crate) fn spawn(command: Command) -> Self {
        Self::spawn_saying(command, "answers at http://", "\n")
    }

    /// The same, where its address stands between these in the log.
    pub(crate) fn spawn_saying(mut command: Command, before: &str, after: &str) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr: Arc<Mutex<String>> = Arc::default();
        let told = Arc::clone(&stderr);
        let mut pipe = child.stderr.take().unwrap();
        let mut reader = Some(std::thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(read) = pipe.read(&mut piece)
                && read > 0
            {
                told.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&piece[..read]));
            }
        }));
        let address = wait_until("its address", || {
            if let Some(status) = child.try_wait().unwrap() {
                if let Some(reader) = reader.take() {
                    let _ = reader.join();
                }
                let log = stderr.lock().unwrap().clone();
                panic!("it ended with {status}: {log}");
            }
            let log = stderr.lock().unwrap();
            let (_, rest) = log.split_once(before)?;
            rest.split_once(after)
                .map(|(address, _)| address.trim().to_owned())
        });
        Self {
            child,
            address,
            stderr,
        }
    }

    /// The status and body of an answer, or `None` where there is no whole one.
    pub(crate) fn try_request(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split_whitespace().nth(1)?.parse().ok()?;
        // Nothing is sent in pieces but what is long.
        let body = if head.contains("transfer-encoding: chunked") {
            unchunked(body)?
        } else {
            body.to_owned()
        };
        Some((status, body))
    }

    pub(crate) fn request(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> (u16, String) {
        self.try_request(method, path, headers, body)
            .unwrap_or_else(|| panic!("no answer to {method} {path}; {}", self.log()))
    }

    pub(crate) fn ask_with(&self, path: &str, headers: &str) -> (u16, String) {
        self.request("GET", path, headers, "")
    }

    pub(crate) fn ask(&self, path: &str) -> Value {
        let (status, body) = self.ask_with(path, "");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unchunked(mut body: &str) -> Option<String> {
    let mut whole = String::new();
    loop {
        let (length, rest) = body.split_once("\r\n")?;
        let length = usize::from_str_radix(length, 16).ok()?;
        if length == 0 {
            return Some(whole);
        }
        whole.push_str(rest.get(..length)?);
        body = rest.get(length + 2..)?;
    }
}
