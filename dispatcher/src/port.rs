//! A port: an interface, its XDP program and its sockets.

use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use xfan_xdp::{AttachError, LoadError, MapError, QueueCounters, SteerProgram, XdpMode};

use crate::config::{BindMode, Config, FrameBudget};
use crate::interface::Interface;
use crate::report;
use crate::umem::{PacketMemory, UmemError};
use crate::xsk::{BindError, CopyMode, XskSource};

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
    /// The packet memory cannot be made.
    #[error(transparent)]
    Umem(#[from] UmemError),
    /// A socket cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No descriptors are left.
    #[error("cannot make another descriptor of a socket: {0}")]
    Descriptor(#[from] std::io::Error),
}

/// An interface that this process dispatches.
#[derive(Debug)]
pub struct Port {
    /// The interface.
    pub interface: Interface,
    queues: Vec<u32>,
    /// Of the queues, in order.
    sockets: Vec<OwnedFd>,
    program: SteerProgram,
    xdp_mode: XdpMode,
    copy_mode: CopyMode,
}

impl Port {
    /// Takes the interface: loads and attaches the XDP program, which leaves every packet to the kernel for now, makes the
    /// packet memory, and binds a socket to each queue. That the program can be attached to an
    /// interface only once makes this process its only primary.
    ///
    /// # Errors
    /// [`PortError`]
    pub fn take(
        interface: Interface,
        queues: Vec<u32>,
        config: &Config,
        budget: &FrameBudget,
        node: Option<usize>,
    ) -> Result<(Self, Arc<PacketMemory>, Vec<XskSource>), PortError> {
        let name = &interface.name;
        let mut program = SteerProgram::load(interface.rx_queues, &config.pass)?;
        let xdp_mode = program.attach(interface.index, name, config.xdp_mode)?;
        if xdp_mode == XdpMode::Generic {
            tracing::warn!(
                interface = name,
                "the driver cannot run XDP: attached in generic mode, in which the kernel allocates a buffer for every packet first"
            );
        }
        let lanes = u32::try_from(queues.len()).unwrap_or(u32::MAX);
        let count = NonZeroU32::new(lanes.saturating_mul(budget.frames_per_lane)).unwrap_or(NonZeroU32::MIN);
        let make_memory = || PacketMemory::of_sockets(config.frame_size, count, budget.fill_ring);
        let memory = match node {
            Some(node) => crate::topology::with_memory_bound_to(node, make_memory)?,
            None => make_memory()?,
        };
        let mut copy_mode = match config.bind_mode {
            BindMode::Auto | BindMode::ZeroCopy => CopyMode::ZeroCopy,
            BindMode::Copy => CopyMode::Copy,
        };
        // A driver does zero-copy in native mode only.
        if xdp_mode == XdpMode::Generic && config.bind_mode == BindMode::Auto {
            copy_mode = CopyMode::Copy;
        }
        let mut sources = Vec::with_capacity(queues.len());
        for &queue in &queues {
            let bind = |mode| XskSource::bind(name, queue, &memory, budget.rx_ring, budget.fill_ring, mode);
            let source = match bind(copy_mode) {
                Err(BindError::NoZeroCopy { .. })
                    if config.bind_mode == BindMode::Auto && sources.is_empty() =>
                {
                    copy_mode = CopyMode::Copy;
                    tracing::warn!(
                        interface = name,
                        "the driver cannot do zero-copy: the kernel copies each packet"
                    );
                    bind(copy_mode)?
                }
                bound => bound?,
            };
            sources.push(source);
        }
        let without = interface.without_lane(&queues);
        if !without.is_empty() {
            tracing::warn!(
                interface = name,
                queues = ?without,
                "these queues have no lane: their packets go to the kernel; lower the number of queues (ethtool -L) or take them in"
            );
        }
        let sockets = sources.iter().map(XskSource::second_descriptor).collect::<Result<_, _>>()?;
        let port = Port { interface, queues, sockets, program, xdp_mode, copy_mode };
        Ok((port, Arc::new(memory), sources))
    }

    /// Lets packets in: from now on the queues' packets go to their sockets.
    ///
    /// # Errors
    /// [`PortError::Map`]
    pub fn open(&self) -> Result<(), PortError> {
        for (queue, socket) in self.queues.iter().zip(&self.sockets) {
            self.program.insert_socket(*queue, socket)?;
        }
        Ok(())
    }

    /// Lets no packets in: until it is opened again, they pass to the kernel.
    ///
    /// # Errors
    /// [`PortError::Map`]
    pub fn shut(&self) -> Result<(), PortError> {
        for queue in &self.queues {
            self.program.remove_socket(*queue)?;
        }
        Ok(())
    }

    /// Gives the interface back to the kernel. Counters can still be read.
    pub fn close(&mut self) {
        self.program.detach();
    }

    /// How packets come in, for people.
    pub fn mode(&self) -> String {
        format!("{}, {}", self.xdp_mode, self.copy_mode)
    }

    /// Whether the interface is still there.
    pub fn exists(&self) -> bool {
        nix::net::if_::if_nametoindex(self.interface.name.as_str()) == Ok(self.interface.index)
    }

    /// What the XDP program counted: for each queue served, in order, and for all others together.
    pub fn counters(&self) -> (Vec<report::Xdp>, report::Xdp) {
        let counters = self.program.counters().unwrap_or_default();
        let served = |queue: &u32| counters.get(*queue as usize).map_or_else(report::Xdp::default, xdp);
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
    }
}
