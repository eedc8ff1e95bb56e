//! Makes many frames in the kernel: an eBPF program, run on live frames, redirects them into an interface.
//!
//! Every frame is a UDP datagram with its running number in it. The flows come in turn, so how often each one comes is
//! known beforehand:
//!
//! ```text
//! frame n: flow f = n mod flows; forwards if not both_directions or (n / flows) is even
//!   Ethernet 14 │ IPv4 20: 10.0.0.0 + f → 198.18.0.1 │ UDP 8: f·0x9e37 mod 65536 → 8192 │ n, 8 bytes big-endian │ 0…
//! ```
//!
//! On a veth they arrive on the RX queue numbered like the sending CPU, modulo the receiver's queues, if it has NAPI (an XDP
//! program or GRO) and its ring has room: it drops what comes faster than it can take. Accepted and refused frames are
//! counted by the veth driver itself (`ethtool -S`: `tx_queue_N_xdp_xmit`), so the report is exact as long as nobody
//! else redirects into the same queue, or, where the receiver has another number of queues than the sender, into the interface; a
//! contradiction is an error.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::unix::thread::JoinHandleExt;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use aya::maps::{Array, MapData};
use aya::programs::{ProgramError, TestRun, TestRunAttrs, TestRunOptions, Xdp};
use aya::{EbpfLoader, Pod, include_bytes_aligned};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde::Serialize;

use crate::command::{self, CommandError};
use crate::link::{Link, LinkError};
use crate::traffic;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/generate.bpf.o"));

/// Where a frame's running number stands: 8 bytes, big-endian.
pub const SEQUENCE_AT: usize = 42;
/// Shortest frame, in bytes without FCS.
pub const MIN_FRAME_BYTES: u16 = 60;
/// Longest frame, in bytes without FCS.
pub const MAX_FRAME_BYTES: u16 = 1514;
/// Most flows: as many as 10.0.0.0/8 has addresses.
pub const MAX_FLOWS: u32 = 1 << 24;
/// Slowest pace, in frames per second: until a frame is due, the kernel spins and does nothing else on that CPU.
pub const MIN_PACE: u64 = 1000;
/// The first client's address; flow f is this address and f.
pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 0);
/// The server's address.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The server's port.
pub const SERVER_PORT: u16 = 8192;

/// Frames in one go, at full speed: what NAPI takes at once.
const MAX_BATCH: u32 = 64;
/// At a given pace, bursts per second at most.
const BURSTS_PER_SECOND: u64 = 10_000;
/// Ends the test run early; it does nothing else.
const INTERRUPT: Signal = Signal::SIGUSR2;
const INTERRUPT_EVERY: Duration = Duration::from_millis(5);

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// After so many frames.
    Frames(u32),
    /// After so much time, or when told, or after 4,294,967,295 frames, whichever comes first.
    After(Duration),
}

/// What to send.
#[derive(Clone, Debug)]
pub struct Load {
    /// The sending interface, in the namespace of the calling thread.
    pub interface: String,
    /// Length of every frame, without FCS.
    pub frame_bytes: u16,
    /// Flows.
    pub flows: u32,
    /// Whether every other round over the flows goes from the server to the clients.
    pub both_directions: bool,
    /// Frames per second; none means as fast as possible.
    pub frames_per_second: Option<u64>,
    /// When to stop.
    pub end: End,
    /// The sending CPU; it decides about the receiving queue.
    pub cpu: usize,
}

impl Load {
    /// Frames of 64 bytes of 4,096 flows, as fast as possible, from CPU 0.
    pub fn onto(interface: &str, end: End) -> Self {
        Self {
            interface: interface.into(),
            frame_bytes: 64,
            flows: 4096,
            both_directions: false,
            frames_per_second: None,
            end,
            cpu: 0,
        }
    }
}

/// What was sent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Frames made; their numbers go from 0 to here.
    pub offered: u64,
    /// Frames the receiver took.
    pub sent: u64,
    /// Frames the receiver refused: it had no room, or no NAPI.
    pub refused: u64,
    /// Length of the frames sent, together.
    pub bytes: u64,
    /// From the first frame made to (within 512 frames) the last.
    pub seconds: f64,
    /// Frames offered per second, over that time.
    pub offered_per_second: f64,
    /// Times it fell a millisecond behind its pace, and did not catch up.
    pub late: u64,
    /// The interface's TX queue that counted them. It has the receiving queue's number if the
    /// receiver uses as many RX queues as the interface uses TX queues.
    pub queue: u32,
}

/// Why nothing was sent, or not known what.
#[derive(Debug, thiserror::Error)]
pub enum GeneratorError {
    /// A number is out of its range.
    #[error("{what} is {found}, but must be {least} to {most}")]
    Range {
        /// What it counts, with its unit.
        what: &'static str,
        /// What was asked for.
        found: u64,
        /// Smallest allowed.
        least: u64,
        /// Largest allowed.
        most: u64,
    },
    /// The interface is not there.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The interface does not tell what it sent.
    #[error("{0}; the counters of {1} are needed to tell what was sent")]
    Counters(CommandError, String),
    /// The interface has no such counters.
    #[error("{0} has no counters tx_queue_N_xdp_xmit, so it is no veth; what was sent could not be told")]
    NoVeth(String),
    /// The CPU is not there or not allowed.
    #[error("the generator cannot run on CPU {0}: it is offline or not allowed (taskset -p $$)")]
    Cpu(usize),
    /// The kernel does not take or run the program.
    #[error("the generator cannot run in the kernel, it needs root and Linux 5.18: {0}")]
    Kernel(String),
    /// The receiver took nothing at all.
    #[error(
        "the peer of {0} took none of {1} frames: it takes redirected frames only while it is up, with an XDP program \
         attached or GRO on (ethtool -K PEER gro on), and an MTU that fits"
    )]
    NothingTaken(String, u64),
    /// The counters moved more than we did.
    #[error(
        "{interface} counts {counted} frames for {offered} offered: somebody else redirects into it at the same time"
    )]
    NotAlone {
        /// The interface.
        interface: String,
        /// Frames by its counters.
        counted: u64,
        /// Frames made.
        offered: u64,
    },
}

/// `struct generator_config` in generate.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct Config {
    frames_per_second: u64,
    burst: u32,
    interface: u32,
    flows: u32,
    client_base: u32,
    server: u32,
    server_port: u32,
    checksum: u32,
    both_directions: u32,
}

/// `struct generator_state` in generate.bpf.c.
#[repr(C)]
#[derive(Clone, Copy)]
struct State {
    offered: u64,
    start_ns: u64,
    first_ns: u64,
    mark_ns: u64,
    mark: u64,
    late: u64,
    flow: u32,
    backwards: u32,
}

const _: () = assert!(size_of::<Config>() == 40 && size_of::<State>() == 56);

// SAFETY: integers only, without padding between or behind them (asserted above: the sum of their sizes).
unsafe impl Pod for Config {}
// SAFETY: as for `Config`.
unsafe impl Pod for State {}

/// A generator at work on a thread of its own. Dropping it stops it.
#[derive(Debug)]
pub struct Generator {
    thread: Option<JoinHandle<Result<Report, GeneratorError>>>,
}

/// Sends `load` to its end.
///
/// # Errors
/// As [`Generator::start`] and [`Generator::wait`].
pub fn run(load: &Load) -> Result<Report, GeneratorError> {
    let generator = Generator::start(load)?;
    match load.end {
        End::Frames(_) => generator.wait(),
        End::After(time) => {
            let begin = std::time::Instant::now();
            while begin.elapsed() < time && !generator.is_done() {
                std::thread::sleep(INTERRUPT_EVERY.min(time.saturating_sub(begin.elapsed())));
            }
            generator.stop()
        }
    }
}

impl Generator {
    /// Starts to send `load`; with [`End::After`] until it is told to [`stop`](Self::stop) (only [`run`] minds the time).
    ///
    /// # Errors
    /// A number is out of its range, or the interface is not there.
    pub fn start(load: &Load) -> Result<Self, GeneratorError> {
        check(load)?;
        let link = Link::named(&load.interface)?;
        let load = load.clone();
        ignore_interrupts();
        let thread = std::thread::Builder::new().name("generator".into());
        let thread = thread
            .spawn(move || generate(&load, &link))
            .map_err(|error| GeneratorError::Kernel(error.to_string()))?;
        Ok(Self { thread: Some(thread) })
    }

    /// Whether it has ended by itself.
    pub fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it and says what was sent.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn stop(mut self) -> Result<Report, GeneratorError> {
        self.interrupt();
        self.wait()
    }

    /// Waits for its end and says what was sent.
    ///
    /// # Errors
    /// The kernel did not run it, the peer took nothing, or what was sent cannot be told.
    pub fn wait(mut self) -> Result<Report, GeneratorError> {
        let thread = self.thread.take().expect("only `wait` and `drop` take it, and both consume");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Interrupts the test run until the thread has ended: a single signal may come before the run has begun.
    fn interrupt(&mut self) {
        while let Some(thread) = self.thread.as_ref().filter(|thread| !thread.is_finished()) {
            // SAFETY: the thread has not been joined, so its identity is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), INTERRUPT as libc::c_int) };
            std::thread::sleep(INTERRUPT_EVERY);
        }
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.interrupt();
    }
}

/// Gives the signal a handler that does nothing, so that it interrupts system calls and no more.
fn ignore_interrupts() {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it is safe in any context.
    unsafe { sigaction(INTERRUPT, &action) }.expect("the signal may be handled");
}

fn check(load: &Load) -> Result<(), GeneratorError> {
    let range = |what, found: u64, least: u64, most: u64| {
        let fits = (least..=most).contains(&found);
        if fits { Ok(()) } else { Err(GeneratorError::Range { what, found, least, most }) }
    };
    let (least, most) = (MIN_FRAME_BYTES.into(), MAX_FRAME_BYTES.into());
    range("the size of a frame, in bytes without FCS,", load.frame_bytes.into(), least, most)?;
    range("the number of flows", load.flows.into(), 1, MAX_FLOWS.into())?;
    if let Some(pace) = load.frames_per_second {
        range("the number of frames per second", pace, MIN_PACE, u64::from(u32::MAX))?;
    }
    if let End::Frames(frames) = load.end {
        range("the number of frames", frames.into(), 1, u64::from(u32::MAX))?;
    }
    Ok(())
}

fn generate(load: &Load, link: &Link) -> Result<Report, GeneratorError> {
    // Asked for first: core_affinity aborts the process for numbers beyond 1023.
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    let core = allowed.into_iter().find(|core| core.id == load.cpu);
    if !core.is_some_and(core_affinity::set_for_current) {
        return Err(GeneratorError::Cpu(load.cpu));
    }
    let kernel = |error: &dyn std::error::Error| {
        let cause = error.source().map(|source| format!(": {source}")).unwrap_or_default();
        GeneratorError::Kernel(format!("{error}{cause}"))
    };
    let frame = template(load);
    let batch = load.frames_per_second.map_or(u64::from(MAX_BATCH), |pace| pace / BURSTS_PER_SECOND);
    let batch = u32::try_from(batch).unwrap_or(MAX_BATCH).clamp(1, MAX_BATCH);
    let config = Config {
        frames_per_second: load.frames_per_second.unwrap_or(0),
        burst: batch,
        interface: link.index,
        flows: load.flows,
        client_base: CLIENTS.to_bits(),
        server: SERVER.to_bits(),
        server_port: SERVER_PORT.into(),
        checksum: frame[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum(),
        both_directions: load.both_directions.into(),
    };
    let mut object = EbpfLoader::new()
        .override_global("CONFIG", &config, true)
        .load(OBJECT)
        .map_err(|error| kernel(&error))?;
    let program: &mut Xdp = object
        .program_mut("generate")
        .expect("generate.bpf.c has this program")
        .try_into()
        .map_err(|error| kernel(&error))?;
    program.load().map_err(|error| kernel(&error))?;

    let before = accepted(link)?;
    // One call for all: each sets up and tears down a pool of pages, which takes 20 ms.
    let ran = program.test_run(TestRunOptions {
        data_in: Some(&frame),
        repeat: if let End::Frames(frames) = load.end { frames } else { u32::MAX },
        attrs: TestRunAttrs::new().xdp_live_frames(batch),
        ..TestRunOptions::default()
    });
    match ran {
        Ok(_) => {}
        Err(ProgramError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::Interrupted => {}
        Err(error) => return Err(kernel(&error)),
    }
    // The receiving queue, and so the one that counts, depends on how many the peer uses: mostly as many as the sender.
    let accepted = accepted(link)?.into_iter();
    let moved = accepted.map(|(queue, frames)| (queue, frames - before.get(&queue).unwrap_or(&0)));
    let moved: BTreeMap<_, _> = moved.filter(|(_, frames)| *frames > 0).collect();
    let alike = u32::try_from(load.cpu).unwrap_or(u32::MAX) % link.tx_queues.max(1);
    let (queue, sent) = match (moved.get(&alike), moved.keys().next()) {
        (Some(&frames), _) => (alike, frames),
        (None, Some(&queue)) => (queue, moved.values().sum()),
        (None, None) => (alike, 0),
    };

    let state = object.map(".bss").expect("generate.bpf.c has a global variable");
    let state = Array::<&MapData, State>::try_from(state).map_err(|error| kernel(&error))?;
    let state = state.get(&0, 0).map_err(|error| kernel(&error))?;
    report(load, queue, sent, &state)
}

fn report(load: &Load, queue: u32, sent: u64, state: &State) -> Result<Report, GeneratorError> {
    let (interface, offered) = (load.interface.clone(), state.offered);
    if sent > offered {
        return Err(GeneratorError::NotAlone { interface, counted: sent, offered });
    }
    if sent == 0 && offered > 0 {
        return Err(GeneratorError::NothingTaken(interface, offered));
    }
    let seconds = (state.mark_ns - state.first_ns) as f64 / 1e9;
    Ok(Report {
        offered,
        sent,
        refused: offered - sent,
        bytes: sent * u64::from(load.frame_bytes),
        seconds,
        offered_per_second: if seconds > 0.0 { state.mark as f64 / seconds } else { 0.0 },
        late: state.late,
        queue,
    })
}

/// A frame with all that is the same in every one; the IPv4 checksum is 0.
fn template(load: &Load) -> Vec<u8> {
    let udp_bytes = load.frame_bytes - 14 - 20;
    let mut frame = [traffic::SERVER_MAC, traffic::CLIENT_MAC].concat();
    frame.extend([0x08, 0x00]);
    let mut ip = traffic::ipv4_header(SERVER, udp_bytes);
    ip.header_checksum = 0;
    ip.write_raw(&mut frame).expect("a Vec takes all");
    frame.extend([0; 4]); // ports
    frame.extend(udp_bytes.to_be_bytes());
    frame.resize(load.frame_bytes.into(), 0); // without UDP checksum, as IPv4 allows
    frame
}

/// Frames that the peer has ever taken from redirects into the interface, by the queue that counts.
fn accepted(link: &Link) -> Result<BTreeMap<u32, u64>, GeneratorError> {
    let text = command::run(Command::new("ethtool").args(["-S", &link.name]))
        .map_err(|error| GeneratorError::Counters(error, link.name.clone()))?;
    let counter = |line: &str| {
        let (queue, frames) = line.trim().strip_prefix("tx_queue_")?.split_once("_xdp_xmit: ")?;
        Some((queue.parse().ok()?, frames.parse().ok()?))
    };
    let counters: BTreeMap<_, _> = text.lines().filter_map(counter).collect();
    if counters.is_empty() { Err(GeneratorError::NoVeth(link.name.clone())) } else { Ok(counters) }
}

/// The running number of a frame from a generator; `None` if it is not one.
pub fn sequence_of(frame: &[u8]) -> Option<u64> {
    let udp = frame.get(12..14)? == [0x08, 0x00] && *frame.get(23)? == 17;
    let ours = [frame.get(26..30)?, frame.get(30..34)?].contains(&&SERVER.octets()[..]);
    let number = frame.get(SEQUENCE_AT..)?.first_chunk()?;
    (udp && ours).then(|| u64::from_be_bytes(*number))
}
