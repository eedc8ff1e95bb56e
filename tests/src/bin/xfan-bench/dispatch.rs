//! The dispatch path alone: packets in memory → parse → hash → ring → worker process → commit.
//!
//! No interface is involved. Everything else is as in `xfan run`: the same lane, the same control
//! socket, and worker processes that attach and run as an unprivileged user.

use std::num::NonZeroU32;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xfan::config::Restart;
use xfan::config::{ControlAccess, OnEmpty, WorkerOutput, WorkerUser};
use xfan::control::access::Access;
use xfan::control::groups::GroupParts;
use xfan::control::ports::PortParts;
use xfan::control::primary::{Parts, Primary};
use xfan::control::resources::Resources;
use xfan::control::{client::ask_for_report, server::Listener};
use xfan::group::policy::Policy;
use xfan::host::random::random_bytes;
use xfan::lane::handle::LaneHandle;
use xfan::lane::{HashKey, LaneConfig, LaneParts};
use xfan::memory::frames::{Frames, Region};
use xfan::memory::umem::PacketMemory;
use xfan::port::source::{PacketSource, Received};
use xfan::process::cgroup::Limits;
use xfan::process::output::Output;
use xfan::process::spawn::WorkerCommand;
use xfan::report::Report;
use xfan_shm::ids::{PortId, QueueId, UmemOffset};
use xfan_shm::layout::Geometry;
use xfan_shm::segment::{self, Mapping};
use xfan_tests::primary::Folder;
use xfan_tests::process::binary;

use crate::Failure;
use crate::line::round_trip_ns;

/// Bytes of a frame; the packet begins at the same offset as with AF_XDP.
const FRAME: u32 = 2048;
const HEADROOM: u32 = 256;
/// Frames, each with its own flow. Half of them stand for the frames that a NIC holds, so that the
/// workers have at most the other half and no ring is ever full: when they have all of it, the lane
/// waits. There are no more frames than a cycle of lane and workers takes, so that no worker is
/// left without packets for long.
const FRAMES: NonZeroU32 = NonZeroU32::new(4096).expect("not 0");
const POSTED: u32 = FRAMES.get() / 2;
const BATCH: usize = 64;
/// The name of the group.
const GROUP: &str = "default";
/// The time to settle before the measurement.
const WARM_UP: Duration = Duration::from_millis(200);

/// Options of `xfan-bench dispatch`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Worker processes
    #[arg(long, default_value_t = 1, value_name = "N")]
    workers: usize,
    /// CPUs: one for everything, or the lane's and the workers'
    #[arg(long, default_value = "1", value_name = "LIST", value_delimiter = ',')]
    cpus: Vec<usize>,
    /// Seconds to measure
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    seconds: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The results.
#[derive(Debug, serde::Serialize)]
struct Measured {
    /// Million packets committed per second.
    mpps: f64,
    /// Busy nanoseconds of the lane per packet.
    lane_busy_ns: f64,
    /// Busy nanoseconds of all workers per packet.
    worker_busy_ns: f64,
    /// Round trip of a cache line between the two CPUs, before and after, in nanoseconds.
    line_rtt_ns: [f64; 2],
    /// Packets dropped or lost.
    lost: u64,
    /// Packets committed by each worker.
    per_worker: Vec<u64>,
}

/// An RX queue that never runs dry: every posted frame already holds a packet.
#[derive(Debug, Default)]
struct Endless {
    posted: Vec<UmemOffset>,
}

impl PacketSource for Endless {
    #[inline(always)]
    fn receive(&mut self, batch: &mut [Received]) -> usize {
        let held = POSTED as usize - BATCH;
        let count = batch.len().min(self.posted.len().saturating_sub(held));
        let rest = self.posted.len() - count;
        for (packet, frame) in batch.iter_mut().zip(self.posted.drain(rest..)) {
            *packet = Received { offset: UmemOffset(frame.0 + HEADROOM), length: 64 };
        }
        count
    }

    #[inline(always)]
    fn post(&mut self, frames: &mut Frames, count: u32) {
        self.posted.extend_from_slice(frames.post(count));
    }

    fn wait(&mut self, _: BorrowedFd<'_>, _: Duration) {
        std::thread::yield_now();
    }
}

/// UDP packets of 64 bytes, one per frame, each of another flow.
fn packets() -> std::io::Result<(OwnedFd, Mapping)> {
    let length = FRAME as usize * FRAMES.get() as usize;
    let fd = segment::create("xfan-bench", length)?;
    let mapping = Mapping::read_write(&fd, length)?;
    for frame in 0..FRAMES.get() {
        let mut packet = [0u8; 64];
        packet[12..16].copy_from_slice(&[0x08, 0x00, 0x45, 0]);
        packet[17] = 50; // total length
        packet[23] = 17;
        packet[26..34].copy_from_slice(&[10, 99, 0, 0, 10, 99, 0, 1]);
        let flow = u16::try_from(frame).unwrap_or(u16::MAX);
        packet[28..30].copy_from_slice(&flow.to_be_bytes());
        packet[34..36].copy_from_slice(&flow.wrapping_mul(0x9e37).to_be_bytes());
        packet[39] = 30; // UDP length
        let at = (frame * FRAME + HEADROOM) as usize;
        // SAFETY: the write is within the mapping, which nothing else refers to yet.
        unsafe { mapping.address().add(at).cast::<[u8; 64]>().write(packet) };
    }
    Ok((fd, mapping))
}

/// Runs the benchmark.
///
/// # Errors
/// A sentence that says what failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    let (&lane_cpu, &worker_cpu) = match &options.cpus[..] {
        [all] => (all, all),
        [lane, worker] => (lane, worker),
        other => return Err(format!("--cpus takes one CPU or two, not {}", other.len()).into()),
    };
    let shared = lane_cpu == worker_cpu || options.workers > 1;
    let before = round_trip_ns(0, 1);

    // The values that `xfan run` has.
    let slots = if shared { 8192 } else { 4096 };
    let (fd, mapping) = packets()?;
    let memory = Arc::new(PacketMemory::of_segment(&fd, mapping)?);
    let spin = Duration::from_millis(if shared { 0 } else { 1000 });
    let parts = LaneParts {
        port: PortId(0),
        queue: QueueId(0),
        core: lane_cpu,
        config: LaneConfig { batch: BATCH, posted: POSTED, spin, yields: Duration::from_secs(3600), shared },
        memory: memory.clone(),
        region: Region { base: UmemOffset(0), frame_size: FRAME, frames: FRAMES },
        key: HashKey::from_bytes(random_bytes()?),
        groups: 1,
        socket: None,
    };
    let lanes = vec![LaneHandle::spawn(parts, Endless::default())?];
    let members = (0..options.workers)
        .map(|index| Resources::new(format!("{GROUP}/{index}"), Some(worker_cpu), spin, 1))
        .collect();
    let folder = Folder::new()?;
    let user = WorkerUser::find(None)?;
    let access = Access::find(&ControlAccess::default(), &user)?;
    let listener = Listener::bind(&folder.socket(), access)?;
    let second = Duration::from_secs(1);
    let policy = xfan::config::Policy::No;
    let restart = Restart { policy, delay: second, limit_burst: 1, limit_interval: second };
    let policy = Policy {
        restart,
        hang_timeout: Duration::ZERO,
        hold: None,
        on_empty: OnEmpty::Drop,
        start_timeout: Duration::from_secs(10),
        stop_timeout: Duration::from_secs(5),
    };
    // Copied to where the workers' user can execute it: the checkout may be closed to other users.
    let program = folder.join("xfan-count");
    std::fs::copy(binary("xfan-count")?, &program)?;
    let limits = Limits { memory: None, processes: 1024, cpu_weight: 100, lanes: vec![] };
    let command = WorkerCommand {
        command: vec![program.display().to_string()],
        user,
        survive: false,
        own_session: false,
        limits,
        sandbox: None,
        output: Output::begin(WorkerOutput::Null, false, &[])?,
    };
    let group =
        GroupParts { name: GROUP.into(), members, initial: options.workers, policy, command: Some(command) };
    let parts = Parts {
        ports: vec![PortParts { name: "memory".into(), port: None }],
        groups: vec![group],
        memory,
        geometry: Geometry { lanes: 1, slots },
        lanes,
        yields: Duration::from_secs(3600),
    };

    let socket = listener.path().to_owned();
    let seconds = Duration::try_from_secs_f64(options.seconds)?;
    let workers = options.workers;
    let watch = std::thread::spawn(move || {
        let reports = measure(&socket, workers, seconds);
        // Ends it as an operator would.
        let _ = kill(Pid::this(), Signal::SIGTERM);
        reports
    });
    let outcome = Primary::run(parts, &listener)?;
    if let Some(error) = outcome.error {
        return Err(error.into());
    }
    let (start, end) = watch.join().map_err(|_| "the measuring thread panicked")??;
    if !outcome.imbalances.is_empty() {
        return Err(outcome.imbalances.join("; ").into());
    }
    print(options, &compare(&start, &end, [before, round_trip_ns(0, 1)]))
}

/// The reports at the beginning and the end of the measurement.
fn measure(
    socket: &std::path::Path,
    workers: usize,
    time: Duration,
) -> Result<(Report, Report), xfan_shm::protocol::ProtocolError> {
    loop {
        let report = ask_for_report(socket)?;
        if report.groups[0].members.iter().filter(|member| member.state == "running").count() == workers {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(WARM_UP);
    let start = ask_for_report(socket)?;
    std::thread::sleep(time);
    Ok((start, ask_for_report(socket)?))
}

#[allow(clippy::cast_precision_loss)] // figures for people
fn compare(start: &Report, end: &Report, line_rtt_ns: [f64; 2]) -> Measured {
    let sum = |report: &Report, field: fn(&xfan::report::Member) -> u64| -> u64 {
        report.groups[0].members.iter().map(field).sum()
    };
    let committed = sum(end, |member| member.committed) - sum(start, |member| member.committed);
    let (_, delivered_before, dropped_before) = start.totals();
    let (_, delivered, dropped) = end.totals();
    let delivered = delivered - delivered_before;
    let per = |ns: u64, packets: u64| ns as f64 / packets.max(1) as f64;
    let busy = |report: &Report| -> u64 { report.lanes().map(|lane| lane.busy_ns).sum() };
    Measured {
        mpps: committed as f64 * 1e3 / (end.uptime_ns - start.uptime_ns) as f64,
        lane_busy_ns: per(busy(end) - busy(start), delivered),
        worker_busy_ns: per(
            sum(end, |member| member.busy_ns) - sum(start, |member| member.busy_ns),
            committed,
        ),
        line_rtt_ns,
        lost: dropped - dropped_before + sum(end, |member| member.lost),
        per_worker: end.groups[0].members.iter().map(|member| member.committed).collect(),
    }
}

fn print(options: &Options, measured: &Measured) -> Result<(), Failure> {
    if options.json {
        println!("{}", serde_json::to_string(measured)?);
    } else {
        println!(
            "{:.1} Mpps; busy ns per packet: lane {:.2}, workers {:.2}; line {:.0}/{:.0} ns; lost {}; per worker {:?}",
            measured.mpps,
            measured.lane_busy_ns,
            measured.worker_busy_ns,
            measured.line_rtt_ns[0],
            measured.line_rtt_ns[1],
            measured.lost,
            measured.per_worker
        );
    }
    Ok(())
}
