//! Starting things and waiting for them.
pub(crate) mod agents;
pub(crate) mod browser;
pub(crate) mod disk;
pub(crate) mod fake_library;
pub(crate) mod names;
pub(crate) mod ping_system;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod recorded;
pub(crate) mod records;
pub(crate) mod served;
pub(crate) mod wall_clock;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Far longer than anything takes on the slowest machine: only a defect waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// The binary, with an environment that cannot change what it does.
pub(crate) fn binary() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("uptime-runner"));
    for (name, _) in std::env::vars() {
        let ours = ["UPTIME_RUNNER_", "AGENT_", "PING_"];
        if ours.iter().any(|prefix| name.starts_with(prefix))
            || name == "RUST_LOG"
            || name == "NO_COLOR"
        {
            command.env_remove(name);
        }
    }
    command
}

/// A job runner whose JSON events can be waited for.
pub(crate) struct Runner {
    child: Child,
    lines: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    stderr_end: Option<JoinHandle<()>>,
    pub events: Vec<Value>,
}

impl Runner {
    pub(crate) fn start(ping: &str, gateway: &str, arguments: &[&str]) -> Self {
        let mut command = binary();
        command.args([
            "--ping-url",
            ping,
            "--gateway-url",
            gateway,
            "--output",
            "json",
        ]);
        if !arguments.contains(&"--config") && !arguments.contains(&"--agent") {
            command.args(["--agent", "agent-001"]);
        }
        command.args(arguments);
        Self::spawn(command)
    }

    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let pipe = BufReader::new(child.stderr.take().unwrap());
        let stderr: Arc<Mutex<String>> = Arc::default();
        let told = Arc::clone(&stderr);
        let stderr_end = std::thread::spawn(move || {
            for line in pipe.lines().map_while(Result::ok) {
                let mut told = told.lock().unwrap();
                told.push_str(&line);
                told.push('\n');
            }
        });
        Self {
            child,
            lines,
            stderr,
            stderr_end: Some(stderr_end),
            events: Vec::new(),
        }
    }

    /// The next event that fits, while all are kept.
    pub(crate) fn wait_for(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                let _ = self.child.kill();
                panic!(
                    "no {what} among {:#?}\n{}",
                    self.events,
                    self.stderr.lock().unwrap()
                );
            };
            let event: Value = serde_json::from_str(&line).expect("each line is one JSON object");
            self.events.push(event.clone());
            if fits(&event) {
                return event;
            }
        }
    }

    pub(crate) fn wait_for_event(&mut self, kind: &str) -> Value {
        self.wait_for(kind, |event| event["event"] == kind)
    }

    pub(crate) fn wait_for_rate(&mut self, to: u64) -> Value {
        self.wait_for(&format!("rate of {to}"), |event| {
            event["event"] == "rate_changed" && event["to"] == to
        })
    }

    /// Waits for what comes after `before` in a line of the log.
    pub(crate) fn wait_for_log(&self, before: &str) -> String {
        wait_until(before, || {
            let log = self.stderr.lock().unwrap();
            log.lines()
                .find_map(|line| line.split_once(before).map(|(_, after)| after.to_owned()))
        })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end.
    pub(crate) fn finish(mut self) -> Finished {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.events
                        .push(serde_json::from_str(&line).expect("each line is one JSON object"));
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!(
                        "no end after {:#?}\n{}",
                        self.events,
                        self.stderr.lock().unwrap()
                    );
                }
            }
        }
        let status = self.child.wait().unwrap();
        self.stderr_end.take().unwrap().join().unwrap();
        let stderr = self.stderr.lock().unwrap().clone();
        Finished {
            status,
            events: std::mem::take(&mut self.events),
            stderr,
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `kill -9`, while others still use it.
pub(crate) fn kill_9(child: &Child) {
    signal(child, Signal::KILL);
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// A port that nobody listens at, and below those that the system gives to whoever does not ask for
/// a certain one: they could be somebody else's at any moment.
pub(crate) fn free_port() -> u16 {
    wait_until("a free port", || {
        let port = fastrand::u16(10_000..32_768);
        TcpListener::bind(("127.0.0.1", port)).ok().map(|_| port)
    })
}

/// Asks again and again until there is an answer.
pub(crate) fn wait_until<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    wait_until_or(ask, || format!("{what} did not come"))
}

/// The same, with more to say about what did not come.
pub(crate) fn wait_until_or<T>(
    mut ask: impl FnMut() -> Option<T>,
    complaint: impl FnOnce() -> String,
) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{}", complaint());
        // What is waited for needs the processor, too.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// All that a run has left.
pub(crate) struct Finished {
    pub status: ExitStatus,
    pub events: Vec<Value>,
    pub stderr: String,
}

impl Finished {
    pub(crate) fn of_kind(&self, kind: &str) -> Vec<&Value> {
        self.events
            .iter()
            .filter(|event| event["event"] == kind)
            .collect()
    }

    pub(crate) fn summary(&self) -> &Value {
        let last = self.events.last().expect("some output");
        assert_eq!(last["event"], "summary", "the summary comes last");
        last
    }

    /// Checks that all counts agree with each other and with the slots of the base rate, and gives
    /// the sums over capabilities: attempts, delayed, dropped.
    pub(crate) fn assert_accounts_add_up(&self, base_rate: u32) -> [u64; 3] {
        let count = |value: &Value| value.as_u64().expect("a count");
        let summary = self.summary();
        let mut sums = [0; 3];
        for (name, account) in summary["capabilities"].as_object().unwrap() {
            let [attempts, successful, failed, delayed, dropped] =
                ["attempts", "successful", "failed", "delayed", "dropped"]
                    .map(|field| count(&account[field]));
            assert_eq!(attempts, successful + failed, "{name}");
            let outcomes = account["outcomes"].as_object().unwrap();
            assert_eq!(
                outcomes.values().map(count).sum::<u64>(),
                attempts,
                "{name}"
            );
            let jobs = self
                .of_kind("job")
                .into_iter()
                .filter(|job| job["capability"] == **name);
            assert_eq!(jobs.count() as u64, attempts, "{name}");
            sums = [sums[0] + attempts, sums[1] + delayed, sums[2] + dropped];
        }
        assert_eq!(count(&summary["jobs_sent"]), sums[0]);

        let changes = self.of_kind("rate_changed");
        let Some(first) = changes.first() else {
            assert_eq!(sums, [0; 3]);
            return sums;
        };
        // A run may end long after its last slot, but not before it. A job leaves after its slot.
        let slots_of = |event: &Value| match event["event"].as_str() {
            Some("job") => {
                let lag = event["send_lag_ms"].as_f64().expect("a number") / 1e3;
                let lag = std::time::Duration::from_secs_f64(lag);
                Some(instant(&event["ts"]) - lag)
            }
            Some("rate_changed") => Some(instant(&event["ts"])),
            _ => None,
        };
        let last_slot = self.events.iter().filter_map(slots_of).max();
        let last_slot = last_slot.expect("the first change of rate");
        let slots = |until: chrono::DateTime<chrono::Utc>| {
            let milliseconds = (until - instant(&first["ts"])).num_milliseconds();
            f64::from(i32::try_from(milliseconds).unwrap()) / 60e3 * f64::from(base_rate)
        };
        let ended = instant(&summary["ts"]);
        let slack = f64::from(u32::try_from(changes.len()).unwrap()) + 1.0;
        let all = f64::from(u32::try_from(sums.iter().sum::<u64>()).unwrap());
        assert!(
            all >= slots(last_slot) - slack && all <= slots(ended) + slack,
            "{sums:?} within {} to {} slots",
            slots(last_slot),
            slots(ended)
        );
        sums
    }
}

pub(crate) fn instant(ts: &Value) -> chrono::DateTime<chrono::Utc> {
    ts.as_str()
        .and_then(|ts| ts.parse().ok())
        .expect("RFC 3339")
}

/// A request's head and body.
pub(crate) type Request = (String, Vec<u8>);

/// A server that reads each request whole and lets `answer` do what it wants with the connection.
pub(crate) struct RawServer {
    pub address: SocketAddr,
    /// The requests so far.
    pub requests: Arc<Mutex<Vec<Request>>>,
}

impl RawServer {
    pub(crate) fn start(answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static) -> Self {
        Self::start_at(0, answer)
    }

    pub(crate) fn start_at(
        port: u16,
        answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static,
    ) -> Self {
        Self::listening(TcpListener::bind(("127.0.0.1", port)).unwrap(), answer)
    }

    pub(crate) fn listening(
        listener: TcpListener,
        answer: impl Fn(&mut TcpStream, &str) + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let requests: Arc<Mutex<Vec<_>>> = Arc::default();
        let answer = Arc::new(answer);
        let kept = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, kept) = (Arc::clone(&answer), Arc::clone(&kept));
                std::thread::spawn(move || serve(stream, answer.as_ref(), &kept));
            }
        });
        Self { address, requests }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn serve(
    mut stream: TcpStream,
    answer: &(impl Fn(&mut TcpStream, &str) + ?Sized),
    kept: &Mutex<Vec<Request>>,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).is_ok_and(|read| read > 0) {
                continue;
            }
            return;
        }
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length: ")?
                .parse()
                .ok()
        });
        let mut body = vec![0; length.unwrap_or(0)];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        kept.lock().unwrap().push((head.clone(), body));
        answer(&mut stream, &head);
    }
}

/// A GET that is answered with 200.
pub(crate) fn get(url: &str) -> String {
    let (address, path) = url
        .strip_prefix("http://")
        .unwrap()
        .split_once('/')
        .unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(
        stream,
        "GET /{path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    answer
}

/// Writes a whole answer.
/// The headers that tell a gateway's own errors from a proxy's.
pub(crate) const OWN: &str =
    "Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n";

pub(crate) fn respond(stream: &mut TcpStream, status: u16, headers: &str, body: &str) {
    let length = body.len();
    let answer = format!("HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\n\r\n{body}");
    let _ = stream.write_all(answer.as_bytes());
}

/// A ping system that lists agent-001 and agent-002 with an uptime that can be changed, or breaks
/// in a given way.
pub(crate) struct PingSystem {
    pub server: RawServer,
    answers: Arc<Mutex<Answers>>,
}

/// What comes in place of good answers.
type Break = Arc<dyn Fn(&mut TcpStream) + Send + Sync>;

struct Answers {
    uptime: f64,
    broken: Option<Break>,
}

impl PingSystem {
    pub(crate) fn start(uptime: f64) -> Self {
        let answers = Arc::new(Mutex::new(Answers {
            uptime,
            broken: None,
        }));
        let shared = Arc::clone(&answers);
        let server = RawServer::start(move |stream, head| {
            let (uptime, broken) = {
                let answers = shared.lock().unwrap();
                (answers.uptime, answers.broken.clone())
            };
            match broken {
                Some(broken) => broken(stream),
                None => respond(stream, 200, "", &good_answer(head, uptime)),
            }
        });
        Self { server, answers }
    }

    pub(crate) fn url(&self) -> String {
        self.server.url()
    }

    pub(crate) fn set_uptime(&self, uptime: f64) {
        self.answers.lock().unwrap().uptime = uptime;
    }

    pub(crate) fn break_with(&self, answer: impl Fn(&mut TcpStream) + Send + Sync + 'static) {
        self.answers.lock().unwrap().broken = Some(Arc::new(answer));
    }

    pub(crate) fn mend(&self) {
        self.answers.lock().unwrap().broken = None;
    }
}

fn good_answer(head: &str, uptime: f64) -> String {
    let now = chrono::Utc::now().to_rfc3339();
    if head.contains("/history?hours=") {
        return format!(
            r#"{{"pings":[{{"timestamp":"{now}","success":true,"uptime_percent":{uptime},"window_seconds":900}}]}}"#
        );
    }
    let agent = |id: &str| {
        format!(
            r#"{{"agent_id":"{id}","total_pings":8,"consecutive_poor_uptime":1,"ping_interval_minutes":15,"last_ping_at":"{now}","last_uptime_percent":{uptime}}}"#
        )
    };
    for id in ["agent-001", "agent-002"] {
        if head.contains(&format!("/ping-system/agents/{id} ")) {
            return agent(id);
        }
    }
    format!(
        r#"{{"agents":[{},{}],"count":2}}"#,
        agent("agent-001"),
        agent("agent-002")
    )
}

/// A gateway that answers every job with success.
pub(crate) fn good_gateway() -> RawServer {
    RawServer::start(|stream, _| {
        respond(
            stream,
            200,
            "X-Orchestrator-Url: https://orch-1.example:8935\r\nLivepeer-Balance: -12345678901234567890\r\n",
            r#"{"status":"success"}"#,
        );
    })
}
