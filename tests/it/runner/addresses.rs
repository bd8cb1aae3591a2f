//! The addresses of a gateway's name, which may be dead and may move.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::support::names::{NAME, Names};
use crate::support::{PingSystem, RawServer, Runner, binary, free_port, respond, wait_until};
use rustix::net::{AddressFamily, SocketType};

const DONE: &str = "x-orchestrator-url: https://orch\r\n";

fn gateway(address: SocketAddr) -> RawServer {
    let listener = TcpListener::bind(address).unwrap();
    RawServer::listening(listener, |stream, _| respond(stream, 200, DONE, "{}"))
}

fn runner(names: &Names, pings: &PingSystem, port: u16, arguments: &[&str]) -> Runner {
    let mut command = binary();
    names.apply_to(&mut command);
    let gateway = format!("http://{NAME}:{port}");
    command.args(["--output", "json", "--agent", "agent-001"]);
    command.args(["--ping-url", &pings.url(), "--gateway-url", &gateway]);
    command.args(arguments);
    Runner::spawn(command)
}

/// An address at which nobody answers and nothing is refused: its queue of connections is full.
struct Dead {
    _listener: OwnedFd,
    _waiting: Vec<TcpStream>,
}

impl Dead {
    fn at(address: SocketAddr) -> Self {
        let listener = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(100)).ok();
        Self {
            _listener: listener,
            _waiting: std::iter::from_fn(connect).collect(),
        }
    }
}

#[test]
#[cfg_attr(no_cc, ignore = "needs a C compiler (package gcc)")]
fn a_dead_first_address_costs_a_job_no_more_than_a_moment() {
    let pings = PingSystem::start(99.5);
    let port = free_port();
    let _dead = Dead::at(([127, 0, 0, 3], port).into());
    let gateway = gateway(([127, 0, 0, 1], port).into());
    let folder = tempfile::tempdir().unwrap();
    let names = Names::in_folder(folder.path(), &["127.0.0.3", "127.0.0.1"]);
    let finished = runner(&names, &pings, port, &["--rate", "60", "--max-jobs", "3"]).finish();
    let jobs = finished.of_kind("job");
    assert_eq!(jobs.len(), 3);
    for job in &jobs {
        assert_eq!(job["outcome"], "success", "{job}");
        // A time-out would be 5 s.
        assert!(job["latency_ms"].as_f64().unwrap() < 2000.0, "{job}");
    }
    // The next address is tried after 250 ms; from then on it is the first.
    assert!(jobs[0]["connect_ms"].as_f64().unwrap() >= 249.0);
    assert!(jobs[1]["latency_ms"].as_f64().unwrap() < 249.0);
    assert_eq!(gateway.requests.lock().unwrap().len(), 3);
}

#[test]
#[cfg_attr(any(quick, no_cc), ignore = "long: runs in CI")]
fn a_name_that_moves_is_followed_within_a_minute() {
    let pings = PingSystem::start(99.5);
    let port = free_port();
    let old = gateway(([127, 0, 0, 1], port).into());
    let new = gateway(([127, 0, 0, 2], port).into());
    let folder = tempfile::tempdir().unwrap();
    let names = Names::in_folder(folder.path(), &["127.0.0.1"]);
    let mut runner = runner(&names, &pings, port, &["--rate", "600"]);
    runner.wait_for_event("job");
    // The old address goes on answering on connections that are never idle.
    names.set(&["127.0.0.2"]);
    wait_until("jobs at the new address", || {
        (new.requests.lock().unwrap().len() > 3).then_some(())
    });
    let before = old.requests.lock().unwrap().len();
    wait_until("more jobs at the new address", || {
        (new.requests.lock().unwrap().len() > 10).then_some(())
    });
    assert_eq!(old.requests.lock().unwrap().len(), before);
    for job in runner.events.iter().filter(|event| event["event"] == "job") {
        assert_eq!(job["outcome"], "success", "{job}");
    }
}
