//! Who receives in `xfan-bench net`: started, ended, and asked what they received. All run on one CPU.

use std::fmt;

use nix::sys::signal::Signal;
use xfan_tests::netns::Netns;
use xfan_tests::primary::{Launch, Primary};
use xfan_tests::process::Process;

use crate::Failure;
use crate::raw;
use crate::tally::{READY, Tally};

/// The CPU of all receivers; the sender and the kernel's receive path have CPU 0.
pub const CPU: usize = 1;

/// A way to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receiver {
    /// Raw AF_XDP: the floor.
    Raw,
    /// AF_PACKET fanout to so many processes.
    Fanout(usize),
    /// xfan with so many workers.
    Xfan(usize),
}

impl fmt::Display for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Receiver::Raw => f.pad("raw"),
            Receiver::Fanout(processes) => f.pad(&format!("fanout/{processes}")),
            Receiver::Xfan(workers) => f.pad(&format!("xfan/{workers}")),
        }
    }
}

/// What was received.
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    /// Packets that were read, and by workers committed.
    pub packets: u64,
    /// Time the lane was busy, in nanoseconds.
    pub lane_busy_ns: u64,
    /// Time that those who read the packets were busy, in nanoseconds.
    pub reader_busy_ns: u64,
}

/// A receiver at work.
pub enum Running {
    /// Programs of our own that say at their end what they received.
    Tools(Vec<Process>),
    /// `xfan run`.
    Xfan(Box<Primary>),
}

impl Receiver {
    /// Starts it on `rx0`.
    ///
    /// # Errors
    /// It ends before it is ready; then the error holds what it wrote.
    pub fn start(self, namespace: &Netns) -> Result<Running, Failure> {
        // Without an XDP program it is GRO that gives a veth the NAPI without which it takes no redirected frames.
        let gro = if matches!(self, Receiver::Fanout(_)) { "on" } else { "off" };
        namespace.ethtool(&format!("-K rx0 gro {gro}"))?;
        let tool = |name: &str| -> Result<Process, Failure> {
            let mut command = namespace.command(std::env::current_exe()?);
            command.args([name, "-i", "rx0", "--cpu", &CPU.to_string()]);
            let process = Process::spawn(command)?;
            process.wait_for_line(READY)?;
            Ok(process)
        };
        match self {
            Receiver::Raw => Ok(Running::Tools(vec![tool("raw")?])),
            Receiver::Fanout(processes) => {
                Ok(Running::Tools((0..processes).map(|_| tool("fanout")).collect::<Result<_, _>>()?))
            }
            Receiver::Xfan(workers) => {
                let flags = format!("--queues 0 --cores {CPU} -n {workers}");
                let primary = Launch::on(namespace)?
                    .config(&format!("rx_ring = {}", raw::RX_RING))?
                    .with(&flags)
                    .worker("xfan-count", "")?
                    .start()?;
                primary.report_when(|report| {
                    report.groups[0].members.iter().all(|member| member.state == "running")
                });
                Ok(Running::Xfan(Box::new(primary)))
            }
        }
    }
}

impl Running {
    /// Ends it after it was sent `sent` packets.
    ///
    /// # Errors
    /// It does not say what it received.
    pub fn end(self, sent: u64) -> Result<Received, Failure> {
        let mut received = Received::default();
        match self {
            Running::Tools(processes) => {
                // A block of AF_PACKET's ring is handed over 10 ms after its first packet, or later.
                std::thread::sleep(std::time::Duration::from_millis(50));
                for process in processes {
                    let exit = process.end(Signal::SIGTERM);
                    let line = exit.stdout.last().ok_or_else(|| exit.stderr.join("\n"))?;
                    let tally: Tally = serde_json::from_str(line)?;
                    received.packets += tally.packets - tally.other;
                    received.reader_busy_ns += tally.busy_ns;
                }
            }
            Running::Xfan(primary) => {
                let report = primary.report_after(sent, true);
                let members = &report.groups[0].members;
                received.packets = members.iter().map(|member| member.committed).sum();
                received.reader_busy_ns = members.iter().map(|member| member.busy_ns).sum();
                received.lane_busy_ns = report.lanes().map(|lane| lane.busy_ns).sum();
                let (exit, _) = primary.stop();
                if exit.code != Some(0) {
                    return Err(format!("xfan ended with {:?}: {}", exit.code, exit.stderr.join("\n")).into());
                }
            }
        }
        Ok(received)
    }
}
