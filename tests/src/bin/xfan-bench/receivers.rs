//! The receivers of `xfan-bench net`: how they start, how they end, and what they received. All run
//! on one CPU.

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
    /// AF_PACKET fanout to this many processes.
    Fanout(usize),
    /// xfan with this many workers.
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
    /// Packets that were read and, by workers, committed.
    pub packets: u64,
    /// Nanoseconds for which the lane was busy.
    pub lane_busy_ns: u64,
    /// Nanoseconds for which the readers of the packets were busy.
    pub reader_busy_ns: u64,
}

/// A running receiver.
pub enum Running {
    /// Programs of this crate that print at their end what they received.
    Tools(Vec<Process>),
    /// `xfan run`.
    Xfan(Box<Primary>),
}

impl Receiver {
    /// Starts the receiver on `rx0`.
    ///
    /// # Errors
    /// It ends before it is ready; the error contains its output.
    pub fn start(self, namespace: &Netns) -> Result<Running, Failure> {
        // Without an XDP program, only GRO gives a veth the NAPI that it needs to accept redirected
        // frames.
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
    /// Ends the receiver after `sent` packets were sent to it.
    ///
    /// # Errors
    /// It does not report what it received.
    pub fn end(self, sent: u64) -> Result<Received, Failure> {
        let mut received = Received::default();
        match self {
            Running::Tools(processes) => {
                // AF_PACKET hands a block over at least 10 ms after its first packet.
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
