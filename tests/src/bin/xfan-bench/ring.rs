//! The ring between two processes on two CPUs, beside the cost of a bare cache line between them.
//!
//! A round measures, one right after the other: line, two lines, ring's round trip, line, bursts of
//! 32, line, bursts of 64, line. Each figure thus has the line's round trip before and after it: on
//! a virtual machine the host moves CPUs nearer to and farther from each other within seconds. The
//! ratio is computed in each round, from neighbouring figures.

mod peer;

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use xfan_shm::clock::{ticks, ticks_per_ns};
use xfan_shm::ids::{LaneId, UmemOffset};
use xfan_shm::layout::{Down, Geometry, SharedRing, Up};
use xfan_shm::protocol::{self, MAX_REQUEST};
use xfan_shm::ring::{Consumer, Producer};
use xfan_shm::{Descriptor, segment};

use crate::Failure;
use crate::spread::Spread;
pub use peer::serve;
use peer::{LAST, SharedLine, Taken, Task};

/// Round trips of one sample.
const TRIPS: u64 = 20_000;

/// Free slots at which a full ring is filled further.
const REST: u32 = 256;

/// Options of `xfan-bench ring`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Seconds of each measurement of throughput
    #[arg(long, default_value_t = 0.2, value_name = "S")]
    seconds: f64,
    /// Rounds
    #[arg(long, default_value_t = 11, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Slots of the rings: a power of two
    #[arg(long, default_value_t = 2048, value_name = "N")]
    slots: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One round; times in nanoseconds, throughput in million descriptors per second.
#[derive(Debug, serde::Serialize)]
struct Round {
    /// Round trip of the line before and after each of the figures below, in their order.
    line_ns: [f64; 4],
    /// Round trip over two lines with one writer each: the bound for a ring whose ends write no
    /// memory in common.
    two_lines_ns: f64,
    /// Round trip of one descriptor, through two rings.
    rtt_ns: f64,
    /// The ring's round trip divided by the mean of the line's round trips before and after it.
    ratio: f64,
    /// Throughput in bursts of 32.
    burst32_mops: f64,
    /// Throughput in bursts of 64.
    burst64_mops: f64,
    /// Whether the two CPUs were near or far all the time, or neither.
    class: &'static str,
}

/// The results.
#[derive(Debug, serde::Serialize)]
struct Measured {
    slots: u32,
    line_ns: Spread,
    two_lines_ns: Spread,
    rtt_ns: Spread,
    ratio: Spread,
    burst32_mops: Spread,
    burst64_mops: Spread,
    /// Whether every descriptor arrived once, in order and unchanged, and came back once, in order.
    intact: bool,
    rounds: Vec<Round>,
}

/// Runs the benchmark on CPU 0 and, for the other process, CPU 1.
///
/// # Errors
/// A sentence that says what failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    let seconds = Duration::try_from_secs_f64(options.seconds)?;
    pin(0)?;
    let mut pair = Pair::start(Geometry { lanes: 1, slots: options.slots }.validated()?)?;
    pair.line()?; // warm up
    pair.round_trip()?;
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let first = pair.line()?;
        let two_lines_ns = pair.two_lines()?;
        let rtt_ns = pair.round_trip()?;
        let second = pair.line()?;
        let burst32_mops = pair.burst(32, seconds)?;
        let third = pair.line()?;
        let burst64_mops = pair.burst(64, seconds)?;
        let line_ns = [first, second, third, pair.line()?];
        let ratio = rtt_ns / f64::midpoint(first, second);
        let class = class(&line_ns);
        rounds.push(Round { line_ns, two_lines_ns, rtt_ns, ratio, burst32_mops, burst64_mops, class });
    }
    let of = |figure: fn(&Round) -> f64| Spread::of(rounds.iter().map(figure));
    let measured = Measured {
        slots: options.slots,
        line_ns: Spread::of(rounds.iter().flat_map(|round| round.line_ns)),
        two_lines_ns: of(|round| round.two_lines_ns),
        rtt_ns: of(|round| round.rtt_ns),
        ratio: of(|round| round.ratio),
        burst32_mops: of(|round| round.burst32_mops),
        burst64_mops: of(|round| round.burst64_mops),
        intact: pair.intact,
        rounds,
    };
    print(options.json, &measured)?;
    if measured.intact {
        Ok(())
    } else {
        Err("descriptors were lost, duplicated or changed in transit".into())
    }
}

/// Pins the calling thread.
fn pin(cpu: usize) -> Result<(), Failure> {
    if core_affinity::set_for_current(CoreId { id: cpu }) {
        Ok(())
    } else {
        Err(format!("cannot run on CPU {cpu}: this needs CPUs 0 and 1, and an affinity that allows them")
            .into())
    }
}

fn class(line_ns: &[f64]) -> &'static str {
    if line_ns.iter().all(|ns| *ns < 200.0) {
        "near"
    } else if line_ns.iter().all(|ns| *ns > 300.0) {
        "far"
    } else {
        "mixed"
    }
}

/// This process and the other one, and the memory they share.
struct Pair {
    process: Child,
    socket: OwnedFd,
    line: SharedLine,
    there: Producer<SharedRing>,
    back: Consumer<SharedRing>,
    /// The numbers of the next descriptor to send and of the next one to come back.
    sent: u32,
    returned: u32,
    intact: bool,
}

impl Pair {
    fn start(geometry: Geometry) -> Result<Self, Failure> {
        let create = |name, length| segment::create(name, length);
        let (down_there, up_there) =
            (create("down there", geometry.down_bytes())?, create("up there", geometry.up_bytes())?);
        let (down_back, up_back) =
            (create("down back", geometry.down_bytes())?, create("up back", geometry.up_bytes())?);
        let line_fd = create("line", SharedLine::BYTES)?;
        let line = SharedLine::map(&line_fd)?;
        let (down, up) = (Down::create(&down_there, geometry)?, Up::create(&up_there, geometry)?);
        let there = Producer::new(SharedRing::new(&down, &up, LaneId(0)));

        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let process = Command::new(std::env::current_exe()?)
            .arg("ring-peer")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        let down_there = segment::reopen_read_only(&down_there)?;
        protocol::send(&socket, &geometry, &[down_there.as_fd(), up_there.as_fd()])?;
        protocol::send(&socket, &geometry, &[down_back.as_fd(), up_back.as_fd()])?;
        protocol::send(&socket, &geometry, &[line_fd.as_fd()])?;
        protocol::receive::<()>(&socket, MAX_REQUEST)?; // the peer has made the ring back
        let (down, up) = (Down::open(&down_back, geometry)?, Up::open(&up_back, geometry)?);
        let back = Consumer::new(SharedRing::new(&down, &up, LaneId(0)));
        Ok(Pair { process, socket, line, there, back, sent: 0, returned: 0, intact: true })
    }

    /// Round trip of one cache line, in nanoseconds.
    fn line(&mut self) -> Result<f64, Failure> {
        protocol::send(&self.socket, &Task::Line { trips: TRIPS }, &[])?;
        Ok(middle_ns(|trip| self.line.ping(trip)))
    }

    /// Round trip over two cache lines with one writer each, in nanoseconds.
    fn two_lines(&mut self) -> Result<f64, Failure> {
        protocol::send(&self.socket, &Task::Lines { trips: TRIPS }, &[])?;
        Ok(middle_ns(|trip| self.line.ping_over_two(trip)))
    }

    /// Round trip of one descriptor, in nanoseconds.
    fn round_trip(&mut self) -> Result<f64, Failure> {
        protocol::send(&self.socket, &Task::Echo { trips: TRIPS }, &[])?;
        Ok(middle_ns(|_| {
            let sent = peer::numbered(self.sent);
            self.push(sent);
            let echo = loop {
                if let Some(echo) = self.back.peek(0) {
                    break echo;
                }
            };
            self.back.commit(1);
            self.intact &= echo == sent;
        }))
    }

    /// Million descriptors per second, in bursts.
    fn burst(&mut self, size: u32, time: Duration) -> Result<f64, Failure> {
        protocol::send(&self.socket, &Task::Take { first: self.sent, burst: size }, &[])?;
        let first = self.sent;
        let start = Instant::now();
        while start.elapsed() < time {
            for _ in 0..256 {
                for _ in 0..size {
                    self.push(peer::numbered(self.sent));
                }
            }
        }
        self.push(Descriptor { flags: LAST, ..peer::numbered(self.sent) });
        let (taken, _) = protocol::receive::<Taken>(&self.socket, MAX_REQUEST)?;
        let elapsed = start.elapsed();
        self.intact &= taken.intact && taken.next == self.sent;
        Ok(f64::from(self.sent.wrapping_sub(first)) / elapsed.as_secs_f64() / 1e6)
    }

    /// Pushes the next descriptor, once a slot is free.
    #[inline(always)]
    fn push(&mut self, descriptor: Descriptor) {
        while !self.there.push(descriptor) {
            let (returned, intact) = (&mut self.returned, &mut self.intact);
            let committed = self.there.take_back(|offset| {
                *intact &= offset == UmemOffset(*returned);
                *returned = returned.wrapping_add(1);
            });
            self.intact &= committed.is_ok();
            if self.there.free_slots() < REST {
                // Like a lane, which checks again a batch later: polling all the time would slow
                // down the commits.
                (0..32).for_each(|_| std::hint::spin_loop());
            }
        }
        self.sent = self.sent.wrapping_add(1);
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The time of a round trip in nanoseconds. Each trip is timed alone, and the mean of the middle
/// half is taken, since some processors count time in steps of 10 ns. `trip` gets the number of the
/// trip, from 1.
#[allow(clippy::cast_precision_loss)] // nanoseconds
fn middle_ns(mut trip: impl FnMut(u64)) -> f64 {
    let mut times: Vec<u64> = (1..=TRIPS)
        .map(|number| {
            let start = ticks();
            trip(number);
            ticks() - start
        })
        .collect();
    times.sort_unstable();
    let middle = &times[times.len() / 4..times.len() * 3 / 4];
    middle.iter().sum::<u64>() as f64 / ticks_per_ns() / middle.len() as f64
}

fn print(json: bool, measured: &Measured) -> Result<(), Failure> {
    if json {
        println!("{}", serde_json::to_string(measured)?);
        return Ok(());
    }
    println!("round  line ns (between)    two lines  ring ns  ratio  Mdesc/s, bursts of 32    of 64");
    for (number, round) in measured.rounds.iter().enumerate() {
        let [a, b, c, d] = round.line_ns;
        println!(
            "{:5}  {a:4.0} {b:4.0} {c:4.0} {d:4.0}  {:9.0}  {:7.0}  {:5.2}  {:21.0} {:8.0}  {}",
            number + 1,
            round.two_lines_ns,
            round.rtt_ns,
            round.ratio,
            round.burst32_mops,
            round.burst64_mops,
            round.class
        );
    }
    println!("{} slots; min / median / max of {} rounds:", measured.slots, measured.rounds.len());
    for (name, Spread { min, median, max }, digits) in [
        ("line round trip, ns", &measured.line_ns, 0),
        ("two lines, ns", &measured.two_lines_ns, 0),
        ("ring round trip, ns", &measured.rtt_ns, 0),
        ("ring / line", &measured.ratio, 2),
        ("bursts of 32, Mdesc/s", &measured.burst32_mops, 0),
        ("bursts of 64, Mdesc/s", &measured.burst64_mops, 0),
    ] {
        println!("  {name:22} {min:7.digits$} {median:7.digits$} {max:7.digits$}");
    }
    println!("  {}", if measured.intact { "every descriptor intact" } else { "DESCRIPTORS WERE DAMAGED" });
    Ok(())
}
