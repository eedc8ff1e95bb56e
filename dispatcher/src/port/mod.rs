//! A port: an interface, its XDP program and its sockets.

pub mod mode;
pub mod rings;
pub mod socket;
pub mod source;
pub mod watch;

use std::os::fd::OwnedFd;

use xfan_shm::ids::{PortId, QueueId};
use xfan_xdp::{AttachError, LoadError, MapError, PassRule, QueueCounters, SteerProgram, XdpMode};

use crate::config::{FrameBudget, ModeChoice};
use crate::host::interface::{Interface, InterfaceError, NoMerging};
use crate::memory::umem::PacketMemory;
use crate::port::mode::{Mode, largest_mtu, max_length};
use crate::port::socket::{BindError, XskSource};
use crate::port::watch::Expected;
use crate::report;

/// A port could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The XDP program cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It cannot be attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A socket cannot be registered.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A socket cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An offload of the interface cannot be read or turned off.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No descriptors are left.
    #[error("cannot make another descriptor of a socket: {0}")]
    Descriptor(#[from] std::io::Error),
}

/// An interface that this process dispatches.
#[derive(Debug)]
pub struct Port {
    /// Its number, by which descriptors name it.
    pub id: PortId,
    /// The interface.
    pub interface: Interface,
    queues: Vec<QueueId>,
    /// The sockets of `queues`, in the same order.
    sockets: Vec<OwnedFd>,
    program: SteerProgram,
    mode: Mode,
    /// How the program is, or was, attached.
    attached: Option<XdpMode>,
    /// In generic mode: keeps GRO and LRO off.
    no_merging: Option<NoMerging>,
}

impl Port {
    /// Prepares a port in one mode without touching the NIC: loads the XDP program, and binds a
    /// socket on `memory` to each queue. Zero-copy drivers take frames when the program is
    /// [attached](Self::attach); the FILL rings should be full by then.
    ///
    /// # Errors
    /// [`PortError`]
    pub fn bind(
        id: PortId,
        interface: Interface,
        queues: Vec<QueueId>,
        pass: &[PassRule],
        mode: Mode,
        budget: &FrameBudget,
        memory: &PacketMemory,
    ) -> Result<(Self, Vec<XskSource>), PortError> {
        let name = &interface.name;
        let program = SteerProgram::load(interface.rx_queues, pass, max_length(mode.frame_size))?;
        program.check_unoccupied(interface.index, name)?;
        let bind = |&queue| XskSource::bind(name, queue, memory, budget, mode.bind);
        let sources = queues.iter().map(bind).collect::<Result<Vec<_>, _>>()?;
        let sockets = sources.iter().map(XskSource::second_descriptor).collect::<Result<_, _>>()?;
        let port = Port { id, interface, queues, sockets, program, mode, attached: None, no_merging: None };
        Ok((port, sources))
    }

    /// Attaches the XDP program. It passes every packet to the kernel until the port is
    /// [opened](Self::open). Most drivers reset the link when a program is attached. The kernel
    /// accepts one program per interface, so this process is then its only primary.
    ///
    /// # Errors
    /// [`PortError::Attach`]
    pub fn attach(&mut self) -> Result<(), PortError> {
        let (index, name) = (self.interface.index, self.interface.name.as_str());
        if self.mode.xdp != ModeChoice::Generic {
            match self.program.attach(index, name, XdpMode::Native) {
                Ok(()) => {
                    self.attached = Some(XdpMode::Native);
                    return Ok(());
                }
                Err(error @ AttachError::NoNativeMode { .. }) if self.mode.xdp == ModeChoice::Auto => {
                    tracing::warn!(
                        interface = name,
                        "{error}. Attaching in generic mode, in which the kernel first allocates a socket buffer for \
                         every packet"
                    );
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.attach_generic()
    }

    /// Turns GRO and LRO off, on interfaces below too, and attaches in generic mode. Generic XDP
    /// would see merged packets, which fit no frame.
    fn attach_generic(&mut self) -> Result<(), PortError> {
        let (index, name) = (self.interface.index, self.interface.name.as_str());
        let no_merging = NoMerging::of(&self.interface)?;
        if !no_merging.names().is_empty() {
            tracing::warn!(
                interface = name,
                turned_off = ?no_merging.names(),
                "generic XDP would see merged packets, which fit no frame: merging is off until xfan ends (ethtool -K)"
            );
        }
        self.program.attach(index, name, XdpMode::Generic)?;
        (self.attached, self.no_merging) = (Some(XdpMode::Generic), Some(no_merging));
        Ok(())
    }

    /// Redirects the queues' packets to their sockets from now on.
    ///
    /// # Errors
    /// [`PortError::Map`]
    pub fn open(&self) -> Result<(), PortError> {
        for (queue, socket) in self.queues.iter().zip(&self.sockets) {
            self.program.insert_socket(queue.0, socket)?;
        }
        Ok(())
    }

    /// Passes all packets to the kernel until the port is opened again.
    ///
    /// # Errors
    /// [`PortError::Map`]
    pub fn shut(&self) -> Result<(), PortError> {
        for queue in &self.queues {
            self.program.remove_socket(queue.0)?;
        }
        Ok(())
    }

    /// Gives the interface back to the kernel. Counters can still be read.
    pub fn close(&mut self) {
        self.program.detach();
        self.no_merging = None;
    }

    /// The mode, for logs and reports: XDP mode and bind mode.
    pub fn mode(&self) -> String {
        let xdp = self.attached.map_or_else(|| "not attached".to_owned(), |xdp| xdp.to_string());
        format!("{xdp}, {}", self.mode.bind)
    }

    /// The settings that the interface needs for all its packets to arrive.
    pub fn expected(&self) -> Expected {
        Expected { queues: self.queues.clone(), max_mtu: largest_mtu(self.mode.frame_size, self.mode.bind) }
    }

    /// The XDP program's counters: of each served queue, in order, and the sum of all other queues.
    pub fn counters(&self) -> (Vec<report::Xdp>, report::Xdp) {
        let counters = self.program.counters().unwrap_or_default();
        let served = |queue: &QueueId| counters.get(queue.index()).map_or_else(report::Xdp::default, xdp);
        let mut unserved =
            self.program.counters_of_new_queues().as_ref().map_or_else(|_| report::Xdp::default(), xdp);
        for queue in self.interface.without_lane(&self.queues) {
            unserved.add(served(&queue));
        }
        (self.queues.iter().map(served).collect(), unserved)
    }
}

fn xdp(counters: &QueueCounters) -> report::Xdp {
    report::Xdp {
        redirect: counters.redirect,
        pass: counters.passed(),
        pass_non_ip: counters.pass_non_ip,
        pass_nd: counters.pass_nd,
        pass_rule: counters.pass_rule,
        pass_no_socket: counters.pass_no_socket,
        drop_too_long: counters.drop_too_long,
    }
}
