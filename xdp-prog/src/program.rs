//! The loaded program: its sockets, rules and counters, and its attachment to an interface.

use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{ErrorKind, MapCore as _, MapFlags, MapHandle};
use thiserror::Error;

use crate::attach::{self, AttachError, Attachment, XdpMode};
use crate::counters::QueueCounters;
use crate::libbpf_log;
use crate::object::skeleton::XfanSkelBuilder;
use crate::privilege::Lacking;
use crate::rule::PassRule;
use crate::rule_table::rule_table;

/// Largest number of RX queues that the program can be loaded for: the kernel numbers queues with
/// 16 bits.
pub const MAX_QUEUES: u32 = 65_535;

/// The oldest Linux release that xfan supports and is tested on.
pub const MINIMUM_KERNEL: &str = "5.10";

/// Why the program could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The number of queues is out of range.
    #[error("cannot load the XDP program for {0} RX queues: an interface has 1 to {MAX_QUEUES}")]
    Queues(u32),
    /// The process has no permission.
    #[error("the kernel does not let this process load an XDP program ({source:#}); {advice}")]
    Privilege {
        /// The missing capabilities, and what to do.
        advice: String,
        /// The kernel's error.
        source: libbpf_rs::Error,
    },
    /// The kernel cannot allocate the maps.
    #[error(
        "the kernel has no memory for the maps of an XDP program with {queues} RX queues ({source:#}); \
         raise the memory limit of this process's control group, or RLIMIT_MEMLOCK on a kernel before 5.11"
    )]
    Memory {
        /// Number of queues asked for.
        queues: u32,
        /// The kernel's error.
        source: libbpf_rs::Error,
    },
    /// The kernel refuses the program or a map, most likely because it is too old.
    #[error(
        "the kernel refuses the XDP program ({source:#}); xfan needs Linux {MINIMUM_KERNEL} or newer{}",
        Log(log)
    )]
    Refused {
        /// The kernel's error.
        source: libbpf_rs::Error,
        /// The messages of libbpf and of the verifier.
        log: String,
    },
}

/// Displays the end of a log, which may be long.
struct Log<'a>(&'a str);

impl fmt::Display for Log<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Enough for the verifier's reason and libbpf's summary, which end the log.
        const SHOWN_LINES: usize = 20;
        let lines: Vec<&str> = self.0.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

/// Why a map of the loaded program could not be read or written.
#[derive(Debug, Error)]
pub enum MapError {
    /// The program was loaded for fewer queues.
    #[error("there is no RX queue {queue}: the XDP program was loaded for queues 0 to {}", queues - 1)]
    NoSuchQueue {
        /// The queue that the caller named.
        queue: u32,
        /// The number of queues the program was loaded for.
        queues: u32,
    },
    /// The kernel refuses the socket.
    #[error("the kernel refuses file descriptor {fd} as the AF_XDP socket of RX queue {queue}: {source:#}")]
    Socket {
        /// The queue.
        queue: u32,
        /// The file descriptor of the socket.
        fd: i32,
        /// The kernel's error.
        source: libbpf_rs::Error,
    },
    /// The kernel refuses access to a map.
    #[error("the kernel refuses access to the XDP program's map \"{map}\": {source:#}")]
    Access {
        /// The map.
        map: &'static str,
        /// The kernel's error.
        source: libbpf_rs::Error,
    },
}

/// The loaded XDP program, which may be attached to an interface. Dropping it detaches and unloads
/// it. The crate's documentation has an example.
#[derive(Debug)]
pub struct SteerProgram {
    // The first field is dropped first: the program is detached before its maps are closed.
    attachment: Option<Attachment>,
    program: OwnedFd,
    sockets: MapHandle,
    counters: MapHandle,
    rules: MapHandle,
    queues: u32,
}

impl SteerProgram {
    /// Loads the program for an interface with `queues` RX queues, and for sockets whose frames
    /// hold packets of up to `max_length` bytes. No queue has a socket yet, and no packet is
    /// redirected before [`attach`](Self::attach).
    ///
    /// # Errors
    ///
    /// - [`LoadError::Queues`] if `queues` is not 1 to [`MAX_QUEUES`].
    /// - [`LoadError::Privilege`] if the process lacks a capability. It needs CAP_BPF and
    ///   CAP_PERFMON (or CAP_SYS_ADMIN), and CAP_NET_ADMIN.
    /// - [`LoadError::Memory`] if the kernel cannot allocate the maps.
    /// - [`LoadError::Refused`] if the kernel refuses the program for another reason.
    pub fn load(queues: u32, rules: &[PassRule], max_length: u32) -> Result<Self, LoadError> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(LoadError::Queues(queues));
        }
        let (loaded, log) = libbpf_log::collect(|| load(queues, rules, max_length));
        loaded.map_err(|source| {
            let lacking = Lacking::of_this_thread();
            // The verifier also returns EPERM or EACCES for its own reasons. Then libbpf prints a
            // log.
            let denied = source.kind() == ErrorKind::PermissionDenied;
            if denied && (!lacking.is_empty() || !log.contains("PROG LOAD LOG")) {
                return LoadError::Privilege { advice: lacking.to_string(), source };
            }
            match source.kind() {
                ErrorKind::OutOfMemory => LoadError::Memory { queues, source },
                _ => LoadError::Refused { source, log },
            }
        })
    }

    /// Attaches the program to an interface. From then on it handles the interface's packets.
    ///
    /// The interface is identified by `ifindex`, in the network namespace of the calling thread.
    /// `interface` is its name, for error messages.
    ///
    /// # Errors
    ///
    /// - [`AttachError::Twice`] if this program is already attached.
    /// - [`AttachError::AnotherPrimary`] or [`AttachError::AnotherProgram`] if another program is
    ///   attached to the interface.
    /// - [`AttachError::NoNativeMode`] if the driver refuses native mode. Generic mode may work.
    /// - [`AttachError::NoSuchInterface`], [`AttachError::Privilege`] or [`AttachError::Refused`]
    ///   for other reasons.
    ///
    /// After an error, the program remains loaded and can be attached again.
    pub fn attach(&mut self, ifindex: u32, interface: &str, mode: XdpMode) -> Result<(), AttachError> {
        if self.attachment.is_some() {
            return Err(AttachError::Twice { interface: interface.into() });
        }
        self.attachment = Some(Attachment::new(self.program.as_fd(), ifindex, interface, mode)?);
        Ok(())
    }

    /// Checks that no other program is attached to the interface. Call it while this program is not
    /// attached.
    ///
    /// # Errors
    ///
    /// [`AttachError::AnotherPrimary`] or [`AttachError::AnotherProgram`].
    pub fn check_unoccupied(&self, ifindex: u32, interface: &str) -> Result<(), AttachError> {
        attach::occupant(self.program.as_fd(), ifindex, interface).map_or(Ok(()), Err)
    }

    /// Detaches the program, so that the interface's packets go to the kernel again. Its counters
    /// can still be read, and it can be attached again. Does nothing if the program is not
    /// attached.
    pub fn detach(&mut self) {
        self.attachment = None;
    }

    /// The mode in which the program is attached; `None` if it is not attached.
    pub fn mode(&self) -> Option<XdpMode> {
        self.attachment.as_ref().map(Attachment::mode)
    }

    /// Redirects the packets of `queue` to an AF_XDP socket that is bound to that queue. Replaces
    /// the queue's previous socket, if any. The kernel removes a socket when it is closed.
    ///
    /// # Errors
    ///
    /// [`MapError::NoSuchQueue`] if the queue does not exist, [`MapError::Socket`] if the file
    /// descriptor is not an AF_XDP socket.
    pub fn insert_socket(&self, queue: u32, socket: &impl AsRawFd) -> Result<(), MapError> {
        self.check_queue(queue)?;
        let fd = socket.as_raw_fd();
        self.sockets
            .update(&queue.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY)
            .map_err(|source| MapError::Socket { queue, fd, source })
    }

    /// Removes the socket of `queue`, if it has one. The queue's packets then go to the kernel.
    ///
    /// # Errors
    ///
    /// [`MapError::NoSuchQueue`] if the queue does not exist, [`MapError::Access`] if the kernel
    /// refuses access to the map.
    pub fn remove_socket(&self, queue: u32) -> Result<(), MapError> {
        self.check_queue(queue)?;
        match self.sockets.delete(&queue.to_ne_bytes()) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(MapError::Access { map: "xsks", source })
            }
            _ => Ok(()),
        }
    }

    /// Replaces all pass rules. The kernel does not copy them atomically: meanwhile a packet may be
    /// checked against a mixture of old and new rules.
    ///
    /// # Errors
    ///
    /// [`MapError::Access`] if the kernel refuses access to the map.
    pub fn set_rules(&self, rules: &[PassRule]) -> Result<(), MapError> {
        write_rules(&self.rules, rules).map_err(|source| MapError::Access { map: ".bss", source })
    }

    /// The counters of each queue, by queue number, summed over all CPUs.
    ///
    /// # Errors
    ///
    /// [`MapError::Access`] if the kernel refuses access to the map.
    pub fn counters(&self) -> Result<Vec<QueueCounters>, MapError> {
        (1..=self.queues).map(|entry| self.counters_of_entry(entry)).collect()
    }

    /// The sum of the counters of all queues beyond those that the program was loaded for. They are
    /// zero unless the number of the interface's RX queues was raised since. The packets of such a
    /// queue go to the kernel.
    ///
    /// # Errors
    ///
    /// [`MapError::Access`] if the kernel refuses access to the map.
    pub fn counters_of_new_queues(&self) -> Result<QueueCounters, MapError> {
        self.counters_of_entry(0)
    }

    fn counters_of_entry(&self, entry: u32) -> Result<QueueCounters, MapError> {
        let cpus = self
            .counters
            .lookup_percpu(&entry.to_ne_bytes(), MapFlags::ANY)
            .map_err(|source| MapError::Access { map: "counters", source })?;
        let mut sum = QueueCounters::default();
        for cpu in cpus.unwrap_or_default() {
            sum += QueueCounters::from_bytes(&cpu);
        }
        Ok(sum)
    }

    fn check_queue(&self, queue: u32) -> Result<(), MapError> {
        if queue < self.queues { Ok(()) } else { Err(MapError::NoSuchQueue { queue, queues: self.queues }) }
    }
}

/// Loads the program through the skeleton. Keeps only duplicated file descriptors of it, because
/// the skeleton borrows its storage.
fn load(queues: u32, rules: &[PassRule], max_length: u32) -> Result<SteerProgram, libbpf_rs::Error> {
    let mut storage = MaybeUninit::uninit();
    let mut open = XfanSkelBuilder::default().open(&mut storage)?;
    open.maps.xsks.set_max_entries(queues)?;
    open.maps.counters.set_max_entries(queues + 1)?;
    if let Some(constants) = open.maps.rodata_data.as_deref_mut() {
        constants.max_length = max_length;
    }
    let loaded = open.load()?;

    let program = SteerProgram {
        attachment: None,
        program: loaded.progs.xfan_steer.as_fd().try_clone_to_owned()?,
        sockets: handle(&loaded.maps.xsks)?,
        counters: handle(&loaded.maps.counters)?,
        rules: handle(&loaded.maps.bss)?,
        queues,
    };
    write_rules(&program.rules, rules)?;
    Ok(program)
}

fn handle(map: &libbpf_rs::MapMut<'_>) -> Result<MapHandle, libbpf_rs::Error> {
    MapHandle::try_from(map)
}

fn write_rules(map: &MapHandle, rules: &[PassRule]) -> Result<(), libbpf_rs::Error> {
    map.update(&0_u32.to_ne_bytes(), &rule_table(rules), MapFlags::ANY)
}

const fn assert_send<T: Send>() {}
const _: () = assert_send::<SteerProgram>();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_numbers_out_of_range_are_refused() {
        for queues in [0, MAX_QUEUES + 1, u32::MAX] {
            let error = SteerProgram::load(queues, &[], 1792).unwrap_err();
            assert!(matches!(error, LoadError::Queues(n) if n == queues));
        }
    }

    #[test]
    fn the_error_shows_the_end_of_the_log() {
        let log: String = (0..30).map(|line| format!("line {line}\n")).collect();
        let source = libbpf_rs::Error::from(std::io::Error::from_raw_os_error(22));
        let text = LoadError::Refused { source, log }.to_string();
        assert!(
            text.contains("\n  line 29") && text.contains("line 10") && !text.contains("line 9\n"),
            "{text}"
        );
    }
}
