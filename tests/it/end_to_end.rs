//! The whole chain as separate processes: GPU → agent → ping system → runner → gateway, and what
//! becomes of it when a part is killed, frozen, cut off or lied to by its clock.
//!
//! The order of the faults comes from a seed that is printed, and taken from `SEED` where that is
//! set. `SOAK=10m` goes on with faults for so long.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::disk::Disk;
use crate::support::ping_system::{PingSystemProcess, is_same_ping};
use crate::support::proxy::Proxy;
use crate::support::served::Served;
use crate::support::wall_clock::WallClock;
use crate::support::{Finished, Runner, binary, fake_library, free_port, instant, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use uptime_runner::units::Span;

const AGENT: &str = "agent-001";
const RATE: u32 = 3000;
const RATES: [&str; 2] = ["--rate", "3000"];

/// All parts, each at an address that it keeps when it is started anew.
struct Chain {
    gpu: PathBuf,
    library: PathBuf,
    agent_at: SocketAddr,
    ping_system_at: SocketAddr,
    /// Between the ping system and the agent.
    to_agent: Proxy,
    /// Between the runner and the ping system.
    to_ping_system: Proxy,
    gateway: Served,
    agent: Served,
    ping_system: PingSystemProcess,
    runner: Option<Runner>,
    /// Pings that were seen in the history.
    seen: Vec<Value>,
    // After all that write to it, and before the folder that it is mounted in.
    disk: Disk,
    folder: TempDir,
}

impl Chain {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = fake_library::compile("nvml", folder.path());
        let gpu = folder.path().join("gpu");
        std::fs::write(&gpu, "ok").unwrap();
        let database = folder.path().join("disk");
        std::fs::create_dir(&database).unwrap();
        let disk = Disk::mount(&database);
        let [agent_at, ping_system_at] =
            [(); 2].map(|()| SocketAddr::from(([127, 0, 0, 1], free_port())));
        let to_agent = Proxy::before(agent_at);
        let to_ping_system = Proxy::before(ping_system_at);
        let chain = Self {
            agent: agent(folder.path(), &library, &gpu, agent_at),
            ping_system: ping_system(folder.path(), ping_system_at),
            gateway: gateway(),
            runner: None,
            seen: Vec::new(),
            gpu,
            library,
            agent_at,
            ping_system_at,
            to_agent,
            to_ping_system,
            disk,
            folder,
        };
        chain.ping_system.register(AGENT, &chain.to_agent.url());
        chain
    }

    fn run_jobs(&mut self) {
        let gateway = format!("http://{}", self.gateway.address);
        let arguments = [
            &RATES[..],
            &["--uptime-window", "3s", "--uptime-interval", "200ms"],
            &["--stale-after", "3s", "--gateway-prefix", ""],
        ];
        let runner = Runner::start(&self.to_ping_system.url(), &gateway, &arguments.concat());
        self.runner = Some(runner);
    }

    fn runner(&mut self) -> &mut Runner {
        self.runner.as_mut().expect("it was started")
    }

    fn restart_agent(&mut self) {
        self.agent = agent(self.folder.path(), &self.library, &self.gpu, self.agent_at);
    }

    fn restart_ping_system(&mut self) {
        self.ping_system = ping_system(self.folder.path(), self.ping_system_at);
    }

    /// Waits until the rate is this one now, not only at some time since the last look.
    fn rate_is(&mut self, rate: u32) {
        let asked_at = chrono::Utc::now();
        let runner = self.runner();
        let change =
            |event: &Value| (event["event"] == "rate_changed").then(|| event["to"].clone());
        let now = std::cell::RefCell::new(runner.events.iter().rev().find_map(change));
        let what = format!("rate of {rate} now");
        runner.wait_for(&what, |event| {
            let mut now = now.borrow_mut();
            if let Some(to) = change(event) {
                *now = Some(to);
            }
            *now == Some(json!(rate)) && instant(&event["ts"]) >= asked_at
        });
    }

    /// The newest ping.
    fn last_ping(&self) -> Value {
        let history = self.ping_system.history(AGENT);
        history.last().cloned().unwrap_or(Value::Null)
    }

    fn wait_for_ping(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        wait_until(what, || Some(self.last_ping()).filter(&fits))
    }

    /// Waits until the agent has missed a ping.
    fn is_unreachable(&self) {
        wait_until("a ping without answer", || {
            let agent = self.ping_system.agent(AGENT);
            (agent["status"] == "unreachable").then_some(())
        });
    }

    fn pings(&self) -> u64 {
        self.ping_system.agent(AGENT)["total_pings"]
            .as_u64()
            .unwrap()
    }

    /// Waits until jobs flow at the full rate and pings are good and at the base interval again,
    /// without a hand; nothing that was known before may be missing.
    fn recovers(&mut self) {
        let history = self.ping_system.history(AGENT);
        for ping in &self.seen {
            let kept = history
                .iter()
                .filter(|kept| is_same_ping(kept, ping))
                .count();
            assert_eq!(kept, 1, "{ping}");
        }
        self.seen = history;
        let before = self.pings();
        wait_until("good pings at the base interval", || {
            let agent = self.ping_system.agent(AGENT);
            let well = agent["status"] == "active" && agent["consecutive_poor_uptime"] == 0;
            (well && agent["total_pings"].as_u64().unwrap() > before + 3).then_some(())
        });
        self.rate_is(RATE);
        let since = chrono::Utc::now();
        self.runner().wait_for("a job at the full rate", |event| {
            let new = event["event"] == "job" && instant(&event["ts"]) >= since;
            new && event["rate"] == RATE && event["outcome"] == "success"
        });
    }

    /// Ends the runner gently, and checks all that it did.
    fn accounts_add_up(&mut self) {
        let runner = self.runner.take().expect("it was started");
        runner.signal(Signal::INT);
        let finished = runner.finish();
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
        finished.assert_accounts_add_up(RATE);
        assert_no_job_at_rate_0(&finished);
    }
}

fn agent(folder: &Path, library: &Path, gpu: &Path, at: SocketAddr) -> Served {
    let mut command = binary();
    command
        .args(["agent", "--agent-id", AGENT, "--listen", &at.to_string()])
        .args(["--check-interval", "100ms", "--nvml-library"])
        .arg(library)
        .env("FAKE_NVML_STATE", gpu)
        .current_dir(folder);
    Served::spawn(command)
}

fn ping_system(folder: &Path, at: SocketAddr) -> PingSystemProcess {
    let mut command = binary();
    command
        .args(["ping-system", "--listen", &at.to_string()])
        .args(["--base-interval", "300ms", "--max-interval", "1200ms"])
        .args(["--response-timeout", "1s"])
        .current_dir(folder.join("disk"));
    WallClock::in_folder(folder).apply_to(&mut command);
    PingSystemProcess::spawn(command)
}

fn gateway() -> Served {
    let mut command = binary();
    command
        .args(["mock", "--listen", "127.0.0.1:0", "--latency", "5ms"])
        .stdout(Stdio::null());
    Served::spawn(command)
}

fn assert_no_job_at_rate_0(finished: &Finished) {
    let changes = finished.of_kind("rate_changed");
    for (n, change) in changes
        .iter()
        .enumerate()
        .filter(|(_, change)| change["to"] == 0)
    {
        let from = instant(&change["ts"]);
        let until = changes.get(n + 1).map(|next| instant(&next["ts"]));
        for job in finished.of_kind("job") {
            let sent = instant(&job["ts"]);
            assert!(
                sent <= from || until.is_some_and(|until| sent >= until),
                "{job}"
            );
        }
    }
    assert!(finished.of_kind("job").iter().all(|job| job["rate"] != 0));
}

#[test]
#[cfg_attr(
    any(no_cc, no_faketime, no_root),
    ignore = "needs a C compiler (package gcc), faketime (package faketime), root"
)]
fn end_to_end() {
    let mut chain = Chain::start();
    chain.run_jobs();
    chain.runner().wait_for_rate(u64::from(RATE));
    chain.recovers();

    // Each station hears of it after the one before.
    let lost_at = chrono::Utc::now();
    fake_library::set(&chain.gpu, "lost");
    let peek = "/agent/uptime-since-last-ping?peek=true";
    let at_agent = wait_until("the agent to know", || {
        let report = chain.agent.ask(peek);
        (report["gpu_available"] == false).then_some(report)
    });
    let ping = chain.wait_for_ping("a poor ping", |ping| {
        ping["gpu_available"] == false && instant(&ping["timestamp"]) > lost_at
    });
    let stopped = chain.runner().wait_for_rate(0);
    assert!(instant(&at_agent["timestamp"]) >= lost_at);
    assert!(instant(&stopped["ts"]) >= lost_at);
    assert_eq!(stopped["reason"], "uptime");
    eprintln!(
        "lost; asked after {}, jobs stopped after {}",
        instant(&ping["timestamp"]) - lost_at,
        instant(&stopped["ts"]) - lost_at
    );
    wait_until("the longest interval", || {
        let agent = chain.ping_system.agent(AGENT);
        (agent["ping_interval_minutes"] == json!(0.02)).then_some(())
    });

    let back_at = chrono::Utc::now();
    fake_library::set(&chain.gpu, "ok");
    let full = chain.runner().wait_for_rate(u64::from(RATE));
    assert!(instant(&full["ts"]) > back_at);
    eprintln!("back; all jobs after {}", instant(&full["ts"]) - back_at);
    chain.recovers();
    assert_eq!(
        chain.ping_system.agent(AGENT)["ping_interval_minutes"],
        0.005
    );
    chain.accounts_add_up();
}

type Fault = (&'static str, fn(&mut Chain));

const FAULTS: [Fault; 12] = [
    ("agent killed", |chain| {
        chain.agent.kill();
        chain.restart_agent();
    }),
    ("ping system killed", |chain| {
        chain.ping_system.kill();
        chain.restart_ping_system();
    }),
    ("runner killed", |chain| {
        let runner = chain.runner.take().expect("it was started");
        drop(runner);
        chain.run_jobs();
    }),
    ("agent frozen", |chain| {
        chain.agent.signal(Signal::STOP);
        chain.is_unreachable();
        chain.agent.signal(Signal::CONT);
    }),
    ("ping system frozen", |chain| {
        chain.ping_system.signal(Signal::STOP);
        chain.rate_is(0);
        chain.ping_system.signal(Signal::CONT);
    }),
    ("runner frozen", |chain| {
        let before = chain.pings();
        chain.runner().signal(Signal::STOP);
        wait_until("pings meanwhile", || {
            (chain.pings() > before + 3).then_some(())
        });
        chain.runner().signal(Signal::CONT);
    }),
    ("agent away", |chain| {
        chain.agent.kill();
        chain.is_unreachable();
        chain.rate_is(0);
        chain.restart_agent();
    }),
    ("ping system away", |chain| {
        chain.ping_system.kill();
        chain.rate_is(0);
        chain.restart_ping_system();
    }),
    ("agent's answers cut", |chain| {
        chain.to_agent.cut(true);
        chain.is_unreachable();
        chain.to_agent.cut(false);
    }),
    ("ping system's answers cut", |chain| {
        chain.to_ping_system.cut(true);
        chain.rate_is(0);
        chain.to_ping_system.cut(false);
    }),
    ("clock set forward and back", |chain| {
        let clock = WallClock::in_folder(chain.folder.path());
        let _folder = chain.folder.path().to_owned();
        for (offset, hours) in [("+3600s", 1), ("-3600s", -1), ("+0s", 0)] {
            clock.set(offset);
            wait_until("pings by that clock", || {
                let agent = chain.ping_system.agent(AGENT);
                let ahead = instant(&agent["last_ping_at"]) - chrono::Utc::now();
                ((ahead.num_minutes() - hours * 60).abs() < 10).then_some(())
            });
        }
    }),
    ("database's disk full", |chain| {
        let disk = &chain.disk;
        disk.fill();
        wait_until("failing health", || {
            (chain.ping_system.ask_with("/health", "").0 == 503).then_some(())
        });
        disk.empty();
    }),
];

#[test]
#[cfg_attr(quick, ignore = "long: runs in CI")]
#[cfg_attr(
    any(no_cc, no_faketime, no_root),
    ignore = "needs a C compiler (package gcc), faketime (package faketime), root"
)]
fn after_each_fault_the_system_recovers_by_itself() {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let soak: Option<Span> = std::env::var("SOAK").ok().map(|soak| soak.parse().unwrap());
    let begun = Instant::now();
    let mut chain = Chain::start();
    chain.run_jobs();
    chain.recovers();
    loop {
        let mut faults = FAULTS;
        random.shuffle(&mut faults);
        for (name, fault) in faults {
            eprintln!("{name} …");
            let since = Instant::now();
            fault(&mut chain);
            let (broken, mended) = (since.elapsed(), Instant::now());
            chain.recovers();
            eprintln!(
                "{name}: {broken:.1?}, recovered after {:.1?}",
                mended.elapsed()
            );
        }
        chain.accounts_add_up();
        if begun.elapsed() >= soak.map_or(Duration::ZERO, Span::get) {
            break;
        }
        chain.run_jobs();
        chain.recovers();
    }
}
