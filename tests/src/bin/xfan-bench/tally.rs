//! What the receivers that xfan is compared with have in common: how they read a packet, when they
//! end, and what they print then.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use core_affinity::CoreId;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde::{Deserialize, Serialize};
use xfan_shm::clock::{BusyMeter, ticks_to_ns};

use crate::Failure;

/// Ethertype, version and header length of the packets that are read: IPv4 without options.
const IPV4: [u8; 3] = [0x08, 0x00, 0x45];

/// The line that a receiver prints before its first packet.
pub const READY: &str = "READY";

static ASKED_TO_END: AtomicBool = AtomicBool::new(false);

/// What a receiver saw; the line it prints at its end.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub packets: u64,
    pub bytes: u64,
    /// Packets that are not plain IPv4, or too short to read.
    pub other: u64,
    /// The sum of addresses and ports, as proof that they were read.
    pub checksum: u64,
    /// Nanoseconds in iterations that found packets …
    pub busy_ns: u64,
    /// … without the iterations in which another process had the CPU; these are counted here.
    pub preempted: u64,
    /// Packets that the kernel dropped because the ring was full.
    pub kernel_drops: u64,
}

impl Tally {
    /// Reads a packet's headers and counts it, as `xfan-count` does.
    #[inline(always)]
    pub fn count(&mut self, packet: &[u8]) {
        self.packets += 1;
        self.bytes += packet.len() as u64;
        match packet.first_chunk::<38>() {
            Some(header) if header[12..15] == IPV4 => {
                let word = |at: usize| {
                    u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
                };
                let [source, destination, ports] = [word(26), word(30), word(34)].map(u64::from);
                self.checksum = self.checksum.wrapping_add(source + destination + ports);
            }
            _ => self.other += 1,
        }
    }

    /// Prints it.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn finish(mut self, meter: &BusyMeter, kernel_drops: u64) -> Result<(), Failure> {
        self.busy_ns = ticks_to_ns(meter.busy_ticks());
        self.preempted = meter.preempted();
        self.kernel_drops = kernel_drops;
        say(&serde_json::to_string(&self)?)
    }
}

/// Pins a receiver and makes signals end it. Returns its meter.
///
/// # Errors
/// There is no such CPU.
pub fn begin(cpu: usize) -> Result<BusyMeter, Failure> {
    let core = CoreId { id: cpu };
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    if !allowed.contains(&core) || !core_affinity::set_for_current(core) {
        return Err(format!("cannot run on CPU {cpu}: it is offline or not allowed (taskset -p $$)").into());
    }
    heed_signals()?;
    Ok(BusyMeter::new())
}

/// From now on SIGTERM and SIGINT only make [`goes_on`] return false.
///
/// # Errors
/// sigaction(2) fails.
pub fn heed_signals() -> nix::Result<()> {
    extern "C" fn ask(_: libc::c_int) {
        ASKED_TO_END.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(ask), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler stores to an atomic, which is safe in any context.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether no signal has asked this process to end.
#[inline(always)]
pub fn goes_on() -> bool {
    !ASKED_TO_END.load(Ordering::Relaxed)
}

/// Prints a line immediately.
///
/// # Errors
/// Standard output is closed.
pub fn say(line: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
