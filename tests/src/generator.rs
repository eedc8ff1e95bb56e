//! Generates many frames in the kernel: an eBPF program, run on live frames, redirects them into an
//! interface.
//!
//! Every frame is a UDP datagram with a sequence number. The flows take turns, so the number of
//! frames of each flow is known beforehand:
//!
//! ```text
//! frame n: flow f = n mod flows; forwards if not both_directions or (n / flows) is even
//!   Ethernet 14 │ IPv4 20: 10.0.0.0 + f → 198.18.0.1 │ UDP 8: f·0x9e37 mod 65536 → 8192
//!   │ n, 8 bytes big-endian │ 0…
//! ```
//!
//! On a veth the frames arrive on the RX queue with the number of the sending CPU, modulo the
//! receiver's queues. The receiver must have NAPI (an XDP program or GRO), and drops frames when
//! its ring is full. The veth driver counts accepted and refused frames (`ethtool -S`:
//! `tx_queue_N_xdp_xmit`). The report is therefore exact as long as nothing else redirects into the
//! same queue, or, if the receiver's number of queues differs from the sender's, into the
//! interface. A contradiction is an error.

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

/// The offset of a frame's sequence number: 8 bytes, big-endian.
pub const SEQUENCE_AT: usize = 42;
/// The shortest frame, in bytes without FCS.
pub const MIN_FRAME_BYTES: u16 = 60;
/// The longest frame, in bytes without FCS.
pub const MAX_FRAME_BYTES: u16 = 1514;
/// The most flows: the number of addresses in 10.0.0.0/8.
pub const MAX_FLOWS: u32 = 1 << 24;
/// The slowest pace, in frames per second: the kernel spins until a frame is due and does nothing
/// else on that CPU.
pub const MIN_PACE: u64 = 1000;
/// The address of flow 0's client; flow f has this address plus f.
pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 0);
/// The server's address.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// The server's port.
pub const SERVER_PORT: u16 = 8192;

/// Frames per batch at full speed: the NAPI budget.
const MAX_BATCH: u32 = 64;
/// The most bursts per second at a given pace.
const BURSTS_PER_SECOND: u64 = 10_000;
/// The signal that ends the test run early; its handler does nothing.
const INTERRUPT: Signal = Signal::SIGUSR2;
const INTERRUPT_EVERY: Duration = Duration::from_millis(5);

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// After this many frames.
    Frames(u32),
    /// After this time, when told, or after 4,294,967,295 frames, whichever is first.
    After(Duration),
}

/// What to send.
#[derive(Clone, Debug)]
pub struct Load {
    /// The sending interface, in the namespace of the calling thread.
    pub interface: String,
    /// The length of every frame in bytes, without FCS.
    pub frame_bytes: u16,
    /// The number of flows.
    pub flows: u32,
    /// Whether every other round over the flows goes from the server to the clients.
    pub both_directions: bool,
    /// Frames per second; none means as fast as possible.
    pub frames_per_second: Option<u64>,
    /// When to stop.
    pub end: End,
    /// The sending CPU, which determines the receiving queue.
    pub cpu: usize,
}

impl Load {
    /// Frames of 64 bytes in 4,096 flows, as fast as possible, from CPU 0.
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
    /// Frames made; their sequence numbers are 0 up to this one.
    pub offered: u64,
    /// Frames the receiver accepted.
    pub sent: u64,
    /// Frames the receiver refused: its ring was full, or it had no NAPI.
    pub refused: u64,
    /// The sum of the lengths of the frames sent, in bytes.
    pub bytes: u64,
    /// Seconds from the first frame made to (within 512 frames) the last.
    pub seconds: f64,
    /// Frames offered per second over that time.
    pub offered_per_second: f64,
    /// How many times it fell a millisecond behind its pace and gave up the backlog.
    pub late: u64,
    /// The TX queue of the interface that counted the frames. It equals the receiving queue's
    /// number if the receiver uses as many RX queues as the interface uses TX queues.
    pub queue: u32,
}

/// Why nothing was sent, or the number of frames sent is unknown.
#[derive(Debug, thiserror::Error)]
pub enum GeneratorError {
    /// A number is out of range.
    #[error("{what} is {found}, but must be {least} to {most}")]
    Range {
        /// What the number is, with its unit.
        what: &'static str,
        /// The requested value.
        found: u64,
        /// The smallest value allowed.
        least: u64,
        /// The largest value allowed.
        most: u64,
    },
    /// The interface does not exist.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The interface's counters cannot be read.
    #[error("{0}; the counters of {1} are needed to tell what was sent")]
    Counters(CommandError, String),
    /// The interface has no such counters.
    #[error(
        "{0} has no counters tx_queue_N_xdp_xmit, so it is no veth; the frames sent could not be counted"
    )]
    NoVeth(String),
    /// The CPU is offline or not allowed.
    #[error("the generator cannot run on CPU {0}: it is offline or not allowed (taskset -p $$)")]
    Cpu(usize),
    /// The kernel does not load or run the program.
    #[error("the generator cannot run in the kernel (it needs root and Linux 5.18): {0}")]
    Kernel(String),
    /// The receiver accepted no frame.
    #[error(
        "the peer of {0} took none of {1} frames: it takes redirected frames only while it is up, with an XDP program \
         attached or GRO on (ethtool -K PEER gro on), and an MTU that fits"
    )]
    NothingTaken(String, u64),
    /// The counters show more frames than were made.
    #[error(
        "{interface} counts {counted} frames for {offered} offered: somebody else redirects into it at the same time"
    )]
    NotAlone {
        /// The interface.
        interface: String,
        /// Frames according to its counters.
        counted: u64,
        /// Frames made.
        offered: u64,
    },
}

/// The layout of `struct generator_config` in generate.bpf.c.
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

/// The layout of `struct generator_state` in generate.bpf.c.
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

// SAFETY: the type has only integers and no padding: the assertion above compares the sum of their
// sizes.
unsafe impl Pod for Config {}
// SAFETY: as for `Config`.
unsafe impl Pod for State {}

/// A running generator with its own thread. Dropping it stops it.
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
    /// Starts to send `load`. With [`End::After`] it runs until [`stop`](Self::stop); only [`run`]
    /// observes the time.
    ///
    /// # Errors
    /// A number is out of range, or the interface does not exist.
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

    /// Whether the generator has ended by itself.
    pub fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops the generator and reports what it sent.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn stop(mut self) -> Result<Report, GeneratorError> {
        self.interrupt();
        self.wait()
    }

    /// Waits for the generator's end and reports what it sent.
    ///
    /// # Errors
    /// The kernel did not run the program, the peer accepted nothing, or the frames sent cannot be
    /// counted.
    pub fn wait(mut self) -> Result<Report, GeneratorError> {
        let thread = self.thread.take().expect("only `wait` and `drop` take it, and both consume");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Interrupts the test run until the thread ends: one signal may arrive before the run has
    /// begun.
    fn interrupt(&mut self) {
        while let Some(thread) = self.thread.as_ref().filter(|thread| !thread.is_finished()) {
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
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

/// Installs a handler that does nothing, so that the signal only interrupts system calls.
fn ignore_interrupts() {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it is safe in any context.
    unsafe { sigaction(INTERRUPT, &action) }.expect("SIGUSR2 accepts a handler");
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
    // The affinity is checked first: core_affinity aborts the process for CPU numbers beyond 1023.
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
    // A single call sends everything: each one sets up and tears down a page pool, which takes 20
    // ms.
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
    // The receiving queue, which is the one that counts, depends on how many queues the peer uses:
    // usually as many as the sender.
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

/// A frame with everything that is the same in all frames; the IPv4 checksum is 0.
fn template(load: &Load) -> Vec<u8> {
    let udp_bytes = load.frame_bytes - 14 - 20;
    let mut frame = [traffic::SERVER_MAC, traffic::CLIENT_MAC].concat();
    frame.extend([0x08, 0x00]);
    let mut ip = traffic::ipv4_header(SERVER, udp_bytes);
    ip.header_checksum = 0;
    ip.write_raw(&mut frame).expect("writing to a Vec cannot fail");
    frame.extend([0; 4]); // ports
    frame.extend(udp_bytes.to_be_bytes());
    frame.resize(load.frame_bytes.into(), 0); // without UDP checksum, as IPv4 allows
    frame
}

/// Frames that the peer has accepted from redirects into the interface so far, by the queue that
/// counts them.
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

/// The sequence number of a generator's frame; `None` for any other frame.
pub fn sequence_of(frame: &[u8]) -> Option<u64> {
    let udp = frame.get(12..14)? == [0x08, 0x00] && *frame.get(23)? == 17;
    let ours = [frame.get(26..30)?, frame.get(30..34)?].contains(&&SERVER.octets()[..]);
    let number = frame.get(SEQUENCE_AT..)?.first_chunk()?;
    (udp && ours).then(|| u64::from_be_bytes(*number))
}
