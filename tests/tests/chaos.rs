//! Four workers under traffic suffer random faults; one of them misbehaves in random ways. Every
//! packet must be accounted for.
//!
//! XFAN_CHAOS_SECONDS is the run time (60, half of it for each `on_loss`), XFAN_CHAOS_SEED the seed
//! of the random numbers. `scripts/chaos` sets them.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::control::client;
use xfan::report::{Member, Report};
use xfan_shm::protocol::{ENV_SOCKET, Reply, Request, WorkersOrder};
use xfan_tests::balance::assert_balanced;
use xfan_tests::e2e_or_skip;
use xfan_tests::generator::{End, Generator, Load};
use xfan_tests::leftovers::processes_of;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::process::Process;
use xfan_tests::veth::network;
use xfan_tests::witness::testimony;

const CONFIG: &str = "max_workers = 8\nring_slots = 1024\nrestart = 'always'\nrestart_delay = '1ms'\nstart_limit_burst = 1000000\n\
                      start_limit_interval = '1ms'\nhang_timeout = '500ms'\nstop_timeout = '500ms'\n[log]\nlevel = 'error'";

/// Marsaglia's xorshift64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

fn signal(pid: u32, signal: Signal) {
    // The process may have ended meanwhile.
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
}

struct Chaos {
    primary: Primary,
    dice: Dice,
    done: BTreeMap<&'static str, u64>,
    /// Workers that attached by themselves.
    guests: Vec<Process>,
    /// Stopped processes, and when to continue them.
    stopped: Vec<(u32, Instant)>,
}

impl Chaos {
    fn count(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    /// A random worker that receives packets.
    fn any(&mut self) -> Option<Member> {
        let report = self.primary.report();
        let running = |member: &&Member| matches!(member.state.as_str(), "running" | "unhealthy");
        let members: Vec<_> = report.groups[0].members.iter().filter(running).cloned().collect();
        (!members.is_empty()).then(|| members[self.dice.below(members.len())].clone())
    }

    fn order(&mut self, what: &'static str, order: WorkersOrder) {
        if let Ok(Reply::Ordered(_)) = client::ask(&self.primary.socket(), &Request::Workers(order)) {
            self.count(what);
        }
    }

    fn join(&mut self, program: &str, arguments: &[&str]) -> u32 {
        let mut command = Command::new(self.primary.folder().join(program));
        command.args(arguments).env(ENV_SOCKET, self.primary.socket());
        let guest = Process::spawn(command).unwrap();
        let pid = guest.pid().as_raw().cast_unsigned();
        self.guests.push(guest);
        pid
    }

    fn one_thing(&mut self) {
        match self.dice.below(10) {
            0 | 1 => {
                if let Some(member) = self.any() {
                    signal(member.pid, Signal::SIGKILL);
                    self.count("killed");
                }
            }
            2 | 3 => {
                if let Some(member) = self.any() {
                    signal(member.pid, Signal::SIGSTOP);
                    // Some pauses are longer than `hang_timeout`.
                    let pause = Duration::from_millis(self.dice.below(900) as u64);
                    self.stopped.push((member.pid, Instant::now() + pause));
                    self.count("stopped");
                }
            }
            4 => {
                if let Some(member) = self.any() {
                    self.order("drained", WorkersOrder::Drain(member.id));
                }
            }
            5 => {
                if let Some(member) = self.any() {
                    self.order("restarted", WorkersOrder::Restart(member.id));
                }
            }
            6 | 7 if self.guests.len() < 4 => {
                let folder = self.primary.folder().display().to_string();
                let socket = self.primary.socket().display().to_string();
                self.join("xfan-witness", &["--attach", &socket, &folder]);
                self.count("joined");
            }
            8 if self.guests.len() < 4 => {
                let seed = self.dice.below(1000).to_string();
                let pid = self.join("xfan-hostile", &["noise", &seed]);
                let attached =
                    |report: &Report| report.groups[0].members.iter().any(|member| member.pid == pid);
                // All members may have a worker.
                for _ in 0..100 {
                    if attached(&self.primary.report()) {
                        signal(pid, Signal::SIGUSR1);
                        self.count("lied");
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            _ if !self.guests.is_empty() => {
                let guest = self.guests.swap_remove(self.dice.below(self.guests.len()));
                let how = if self.dice.below(2) == 0 { Signal::SIGTERM } else { Signal::SIGKILL };
                signal(guest.pid().as_raw().cast_unsigned(), Signal::SIGCONT);
                guest.end(how);
                self.count("left");
            }
            _ => {}
        }
        let now = Instant::now();
        for (pid, _) in self.stopped.extract_if(.., |(_, until)| *until <= now) {
            signal(pid, Signal::SIGCONT);
        }
        // Sometimes a drained member is restarted.
        if self.dice.below(4) == 0 {
            self.bring_back();
        }
    }

    fn bring_back(&mut self) {
        let report = self.primary.report();
        for member in report.groups[0].members.iter().filter(|member| member.supervised && member.pid == 0) {
            self.order("brought back", WorkersOrder::Restart(member.id.clone()));
        }
    }

    /// Ends all faults in progress and waits until the four workers run as at the beginning.
    fn calm(&mut self) {
        for (pid, _) in self.stopped.drain(..) {
            signal(pid, Signal::SIGCONT);
        }
        for guest in self.guests.drain(..) {
            guest.end(Signal::SIGTERM);
        }
        loop {
            // The member no longer exists once its worker has left.
            let hostile = WorkersOrder::Remove("default/0".into());
            let _ = client::ask(&self.primary.socket(), &Request::Workers(hostile));
            self.bring_back();
            let report = self.primary.report();
            let calm = |member: &Member| {
                if member.supervised {
                    member.state == "running"
                } else {
                    member.pid == 0 && member.state != "running"
                }
            };
            if report.groups[0].members.iter().all(calm) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn descriptors(primary: &Primary) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", primary.process.pid())).unwrap().count()
}

fn segments(primary: &Primary) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", primary.process.pid())).unwrap();
    maps.lines().filter(|line| line.contains("memfd:xfan-")).count()
}

/// Each of the two tests needs the whole machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn random_faults_lose_no_packet_uncounted() {
    run("on_loss = 'requeue'");
}

#[test]
fn random_faults_lose_no_held_packet_uncounted() {
    // Sometimes the successor arrives in time. Sometimes it does not: it stood still, or none was
    // due.
    run("on_loss = 'hold'\nhold_timeout = '50ms'");
}

fn run(policy: &str) {
    let seconds = setting("XFAN_CHAOS_SECONDS", 60).div_ceil(2);
    let seed = setting("XFAN_CHAOS_SEED", u64::from(std::process::id()));
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = e2e_or_skip!(seconds + 120);
    println!("{policy}; seed {seed}");
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 4").config(&format!("{policy}\n{CONFIG}")).unwrap();
    launch.within_reach("xfan-witness").unwrap();
    let launch = launch.worker("xfan-hostile", &format!("riot {seed} FOLDER")).unwrap();
    let primary = launch.start_until_it_answers().unwrap();
    let runs = |report: &Report| report.groups[0].members.iter().all(|member| member.state == "running");
    primary.report_when(runs);
    let (open, mapped) = (descriptors(&primary), segments(&primary));

    // Two lanes, each with its own stream; the length of its frames identifies the stream.
    let generators: Vec<_> = [(0, 64), (1, 96)]
        .into_iter()
        .map(|(cpu, frame_bytes)| {
            let end = End::After(Duration::MAX);
            let load = Load { frames_per_second: Some(50_000), frame_bytes, cpu, ..Load::onto("tx0", end) };
            namespace.run(|| Generator::start(&load)).unwrap()
        })
        .collect();
    let mut chaos = Chaos {
        primary,
        // The state must not be zero, and must differ between seeds.
        dice: Dice((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        done: BTreeMap::new(),
        guests: Vec::new(),
        stopped: Vec::new(),
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        chaos.one_thing();
        let pause = chaos.dice.below(100) as u64;
        std::thread::sleep(Duration::from_millis(pause));
    }
    chaos.calm();
    let sent: u64 = generators.into_iter().map(|generator| generator.stop().unwrap().sent).sum();
    let Chaos { primary, done, .. } = chaos;
    let report = primary.report_after(sent, true);
    assert_balanced(&report, sent);

    let members = || report.groups[0].members.iter();
    let sum = |field: fn(&Member) -> u64| members().map(field).sum::<u64>();
    let kernel: u64 = report.lanes().map(|lane| lane.kernel.rx_dropped + lane.kernel.rx_ring_full).sum();
    let dropped = report.totals().2;
    let (lost, requeued) = (sum(|member| member.lost), sum(|member| member.requeued));
    let seen = testimony(primary.folder());
    println!("done: {done:?}");
    println!(
        "sent {sent}, dropped by the kernel {kernel}, by lanes {dropped}, lost {lost}, requeued {requeued}"
    );
    println!(
        "{} workers saw {} packets, {} again; {} redelivered",
        seen.witnesses, seen.packets, seen.again, seen.redelivered
    );
    assert!(
        seen.wrong.is_empty(),
        "{} faults, such as {:#?}",
        seen.wrong.len(),
        &seen.wrong[..10.min(seen.wrong.len())]
    );
    // A worker saw each packet, or a counter has it. A lost packet may have been seen, uncommitted.
    let sightings = seen.packets + seen.again;
    let committed = sum(|member| member.committed);
    assert!(sightings >= committed, "{committed} packets were committed, but {sightings} seen");
    let at_least = (kernel + dropped + lost).saturating_sub(sightings - committed);
    let (missing, at_least) = (sent - seen.packets, at_least.max(kernel + dropped));
    println!("{missing} packets reached no worker; expected {at_least} to {}", kernel + dropped + lost);
    assert!((at_least..=kernel + dropped + lost).contains(&missing));
    assert!(report.lanes().all(|lane| lane.frames.lent == 0));
    // The hostile worker, one of the four, is gone.
    let mapped = mapped / 4 * 3;
    while descriptors(&primary) > open || segments(&primary) > mapped {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(segments(&primary), mapped);
    let folder = primary.folder().to_owned();
    assert_eq!(processes_of(&folder.join("xfan-hostile")), [0; 0], "its children are gone, too");
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}
