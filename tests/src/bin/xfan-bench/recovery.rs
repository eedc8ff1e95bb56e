//! The time until other workers have a killed worker's packets, and the cost of joins and leaves.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::control::client;
use xfan::control::history::{Entry, Page};
use xfan::report::Report;
use xfan_shm::protocol::{Reply, Request};
use xfan_tests::generator::{End, Generator, Load};
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::proc::stop;
use xfan_tests::traffic;
use xfan_tests::tx::{TxError, TxSocket};
use xfan_tests::veth::{Veth, VethConfig};
use xfan_worker::{Received, RecvError, Worker};

use crate::Failure;

/// Slots of each ring, all used when a worker is killed.
const SLOTS: u64 = 2048;

/// Frames per second, half of them for each of the two workers.
const PACE: u64 = 200_000;

/// The CPU that the lane and the workers share: the generator takes all of CPU 0.
const CPU: usize = 1;

/// Options of `xfan-bench recovery`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Workers killed, and workers that join and leave
    #[arg(long, default_value_t = 200)]
    rounds: usize,
}

/// Runs the measurement and prints it.
///
/// # Errors
/// The setup fails, or a sum does not hold.
pub fn run(options: &Options) -> Result<(), Failure> {
    let (namespace, _veth) = Veth::in_namespace(&VethConfig::queues(1)).map_err(|error| error.to_string())?;
    let primary = configured(Launch::on(&namespace)?)?.start_until_it_answers()?;
    primary.report_when(|report| report.groups[0].members.iter().all(|member| member.state == "running"));
    let load = Load { frames_per_second: Some(PACE), ..Load::onto("tx0", End::After(Duration::MAX)) };
    let generator = namespace.run(|| Generator::start(&load))?;
    primary.report_when(|report| report.totals().0 > 10_000);

    let (mut noticed, mut redelivered) = (Vec::new(), Vec::new());
    let mut lost = 0;
    for _ in 0..options.rounds {
        let round = kill_one(&primary)?;
        noticed.push(round.noticed);
        redelivered.push(round.redelivered);
        lost += round.lost;
    }
    let before = drops(&primary.report());
    let (mut joins, mut leaves) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let (join, leave) = join_and_leave(&primary)?;
        joins.push(join);
        leaves.push(leave);
    }
    let dropped = drops(&primary.report()) - before;
    let sent = generator.stop()?.sent;
    let report = primary.report_after(sent, true);

    println!(
        "a worker with {SLOTS} packets is killed under {PACE} packets a second; {} rounds; µs",
        options.rounds
    );
    println!("{:<34} {:>7} {:>7} {:>7} {:>7}", "from SIGKILL until", "least", "p50", "p99", "most");
    print_row("its death is noticed", &mut noticed);
    print_row("the last packet is redelivered", &mut redelivered);
    println!("lost because the other's ring was full: {lost}");
    println!("\nothers join and leave; {} times; µs", options.rounds);
    print_row("join, until it gets packets", &mut joins);
    print_row("leave, until all is committed", &mut leaves);
    println!("packets dropped meanwhile, by lanes and kernel: {dropped}");
    if !report.imbalances().is_empty() {
        return Err(report.imbalances().join("\n").into());
    }

    let (primary, mut gaps) = under_a_trickle(&namespace, || {
        let (mut primary, mut gaps) = (primary, Vec::new());
        for _ in 0..options.rounds.div_ceil(10) {
            let (gap, next) = replace(&namespace, primary)?;
            gaps.push(gap);
            primary = next;
        }
        Ok((primary, gaps))
    })?;
    println!("\nthe primary is killed, and another started; {} times; µs", gaps.len());
    println!("{:<34} {:>7} {:>7} {:>7} {:>7}", "from SIGKILL until", "least", "p50", "p99", "most");
    print_row("a worker commits under the next", &mut gaps);
    let (exit, _) = primary.stop();
    if exit.code != Some(0) {
        return Err(exit.stderr.join("\n").into());
    }
    Ok(())
}

fn configured(launch: Launch<'_>) -> Result<Launch<'_>, Failure> {
    let config = format!(
        "ring_slots = {SLOTS}\nmax_workers = 3\nrestart_delay = '1ms'\nstart_limit_burst = 1000000\n\
         start_limit_interval = '1ms'\n[log]\nlevel = 'error'"
    );
    Ok(launch.with(&format!("-n 2 --cores {CPU}")).config(&config)?.worker("xfan-count", "")?)
}

/// Runs `work` while a packet arrives every 100 µs. The generator would not do: it never yields its
/// CPU, so the kernel could not end the RCU grace periods there that loading and removing XDP
/// programs need.
fn under_a_trickle<T>(namespace: &Netns, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let mut socket = namespace.run(|| TxSocket::open("tx0", 0))?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let server = SocketAddr::from(([10, 0, 0, 2], 53));
            let clients = (1024..u16::MAX).map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
            for client in clients.cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                socket.send(&traffic::udp(client, server, b"one of a trickle"))?;
                std::thread::sleep(Duration::from_micros(100));
            }
            Ok::<_, TxError>(())
        });
        let done = work();
        over.store(true, Ordering::Relaxed);
        sender.join().expect("the sender does not panic")?;
        done
    })
}

/// Kills the primary and starts the next. Returns the time until a guest commits a packet under the
/// next.
fn replace(namespace: &Netns, primary: Primary) -> Result<(Duration, Primary), Failure> {
    let mut worker = Worker::attach_to(primary.socket())?;
    while !commit_one(&mut worker)? {}
    let start = Instant::now();
    let (_, folder) = primary.end(Signal::SIGKILL);
    let next = configured(Launch::within(namespace, folder))?.spawn()?;
    loop {
        match commit_one(&mut worker) {
            Ok(_) => {}
            Err(RecvError::PrimaryGone) => break,
            Err(error) => return Err(error.into()),
        }
    }
    worker.reattach(Duration::from_secs(30))?;
    while !commit_one(&mut worker)? {}
    let gap = start.elapsed();
    leave(worker, &next)?;
    Ok((gap, next))
}

/// Commits until the worker's connection closes, then waits until the member is vacant. Returns the
/// time of the former.
fn leave(mut worker: Worker, primary: &Primary) -> Result<Duration, RecvError> {
    let start = Instant::now();
    worker.request_detach()?;
    loop {
        match worker.recv(Duration::from_millis(100))? {
            Received::Packets(batch) => batch.commit(),
            Received::Idle => {}
            Received::Closed => break,
        }
    }
    let left = start.elapsed();
    drop(worker);
    primary.report_when(|report| {
        report.groups[0].members.iter().all(|member| member.id != "default/2" || member.pid == 0)
    });
    Ok(left)
}

/// Commits what the ring has; returns whether there was a packet.
fn commit_one(worker: &mut Worker) -> Result<bool, RecvError> {
    match worker.recv(Duration::from_millis(10))? {
        Received::Packets(batch) => {
            batch.commit();
            Ok(true)
        }
        _ => Ok(false),
    }
}

struct Round {
    noticed: Duration,
    redelivered: Duration,
    lost: u64,
}

/// Lets a worker's ring fill up, kills the worker, and waits until it has been restarted.
fn kill_one(primary: &Primary) -> Result<Round, Failure> {
    const ID: &str = "default/0";
    let victim = primary.report().member(ID).cloned().ok_or("no member")?;
    let pid = Pid::from_raw(victim.pid.cast_signed());
    let last = history(primary, 0)?.last().map_or(0, |entry| entry.number);
    stop(victim.pid);
    primary.report_when(|report| report.member(ID).is_some_and(|member| member.backlog == SLOTS));
    let killed = SystemTime::now().duration_since(UNIX_EPOCH)?;
    kill(pid, Signal::SIGKILL)?;
    let report = primary.report_when(|report| {
        report.member(ID).is_some_and(|now| now.state == "running" && now.pid != victim.pid)
    });
    let now = report.member(ID).ok_or("no member")?;
    let (requeued, lost) = (now.requeued - victim.requeued, now.lost - victim.lost);
    if requeued + lost != SLOTS {
        return Err(
            format!("the worker had {SLOTS} packets, but {requeued} were requeued and {lost} lost").into()
        );
    }
    // Once it commits, it runs on its CPU.
    primary.report_when(|report| report.member(ID).is_some_and(|later| later.committed > now.committed));
    let entries = history(primary, last)?;
    let since = |event: &str| -> Result<Duration, Failure> {
        let entry = entries.iter().find(|entry| entry.member.as_deref() == Some(ID) && entry.event == event);
        let entry = entry.ok_or_else(|| format!("no {event} in {entries:#?}"))?;
        Ok(Duration::from_nanos(entry.time_ns).saturating_sub(killed))
    };
    Ok(Round { noticed: since("died")?, redelivered: since("uncommitted")?, lost })
}

/// Joins, takes packets, and leaves.
fn join_and_leave(primary: &Primary) -> Result<(Duration, Duration), Failure> {
    let start = Instant::now();
    let mut worker = Worker::attach_to(primary.socket())?;
    let mut taken = 0;
    let mut joined = Duration::ZERO;
    while taken < 1000 {
        if let Received::Packets(batch) = worker.recv(Duration::from_millis(100))? {
            if taken == 0 {
                joined = start.elapsed();
            }
            taken += batch.len();
            batch.commit();
        }
    }
    Ok((joined, leave(worker, primary)?))
}

fn history(primary: &Primary, after: u64) -> Result<Vec<Entry>, Failure> {
    match client::ask(&primary.socket(), &Request::Events(after))? {
        Reply::Events(page) => Ok(serde_json::from_value::<Page>(page)?.entries),
        other => Err(format!("{other:?}").into()),
    }
}

fn drops(report: &Report) -> u64 {
    let kernel: u64 = report.lanes().map(|lane| lane.kernel.rx_dropped + lane.kernel.rx_ring_full).sum();
    kernel + report.totals().2
}

fn print_row(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |part: f64| {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a rank within the list
        let rank = ((times.len() as f64 * part).ceil() as usize).clamp(1, times.len());
        times[rank - 1].as_micros()
    };
    println!("{what:<34} {:>7} {:>7} {:>7} {:>7}", at(0.0), at(0.5), at(0.99), at(1.0));
}
