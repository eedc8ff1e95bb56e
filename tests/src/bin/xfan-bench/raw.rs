//! The floor: one AF_XDP socket, whose packets one thread receives, reads and gives back. Nothing
//! is hashed, handed over or accounted for.
//!
//! Interface, socket, packet memory, XDP program and rings are the dispatcher's own code, so the
//! difference is the cost of dispatching.

use std::num::NonZeroU32;

use xfan::config::{Config, FrameBudget, Sizes};
use xfan::host::interface::Interface;
use xfan::memory::umem::PacketMemory;
use xfan::port::Port;
use xfan::port::mode::modes;
use xfan::port::rings;
use xfan::port::source::Received;
use xfan_shm::clock::ticks;
use xfan_shm::ids::{PortId, QueueId, UmemOffset};

use crate::Failure;
use crate::tally::{self, Tally};

const BATCH: usize = 64;

/// Frames posted to the kernel, here and by xfan in the same comparison: enough for a millisecond
/// without the CPU.
pub const RX_RING: u32 = 4096;

/// Options of `xfan-bench raw`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Interface
    #[arg(short, long, value_name = "IFACE")]
    interface: String,
    /// RX queue
    #[arg(long, default_value_t = 0, value_name = "Q")]
    queue: u32,
    /// CPU to run on
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpu: usize,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// A sentence that says what failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    let mut meter = tally::begin(options.cpu)?;
    let settings = format!("interface = {:?}\nrx_ring = {RX_RING}", options.interface);
    let config = Config::from_toml_str(&settings, "the command line")?;
    let interface = Interface::find(&options.interface)?;
    let mode = *modes(&config, &interface)?.last().ok_or("no mode is possible")?;
    let sizes = Sizes { frame_size: mode.frame_size, nic_ring: 0 };
    let budget = FrameBudget::plan(1, 1, &config, true, sizes)?;
    let frames = NonZeroU32::new(budget.frames_per_lane).ok_or("the budget has no frames")?;
    let memory = PacketMemory::of_sockets(mode.frame_size, frames, budget.fill_ring)?;
    let queues = vec![QueueId(options.queue)];
    let (mut port, mut sources) =
        Port::bind(PortId(0), interface, queues, &config.port.pass, mode, &budget, &memory)?;
    let source = sources.first_mut().ok_or("no socket was opened")?;
    let socket = source.second_descriptor()?;
    let (rx, fill) = source.rings();
    for frame in 0..budget.rx_ring {
        fill.push(UmemOffset(frame * mode.frame_size));
    }
    fill.publish();
    port.attach()?;
    port.open()?;
    tally::say(tally::READY)?;

    let start_of_frame = !(mode.frame_size - 1);
    let (mut tally, mut batch) = (Tally::default(), [Received::default(); BATCH]);
    while tally::goes_on() {
        let start = ticks();
        let count = rx.receive(&mut batch);
        if count == 0 {
            std::thread::yield_now();
            continue;
        }
        for &Received { offset, length } in &batch[..count] {
            // SAFETY: the kernel has handed the frame over and gets it back below, after `publish`.
            if let Some(packet) = unsafe { memory.packet(offset, length) } {
                tally.count(packet);
            }
            // The FILL ring has two entries per frame, so it is never full.
            fill.push(UmemOffset(offset.0 & start_of_frame));
        }
        fill.publish();
        if fill.needs_wakeup() {
            rings::kick(&socket);
        }
        #[allow(clippy::cast_possible_truncation)] // at most BATCH
        meter.add(start, ticks(), count as u32);
    }
    let kernel = rings::statistics(&socket)?;
    tally.finish(&meter, kernel.rx_dropped + kernel.rx_ring_full)
}
