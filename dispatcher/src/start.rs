//! `xfan run`: starts a primary from a configuration, and runs it to its end.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use xfan_shm::ids::{LaneId, PortId, QueueId};
use xfan_shm::layout::{Geometry, MAX_LANES};
use xfan_xdp::AttachError;

use crate::config::{BudgetError, Config, ConfigError, FrameBudget, OnLoss, Sizes, UserError, WorkerUser};
use crate::control::access::Access;
use crate::control::error::PrimaryError;
use crate::control::groups::GroupParts;
use crate::control::outcome::Outcome;
use crate::control::ports::PortParts;
use crate::control::primary::{Parts, Primary};
use crate::control::resources::Resources;
use crate::control::server::{ControlError, Listener};
use crate::group::policy::Policy;
use crate::host::interface::{Interface, InterfaceError};
use crate::host::placement::{Placement, PlacementError, place};
use crate::host::privileges::{PrivilegeError, check_privileges};
use crate::host::random::random_bytes;
use crate::host::sys::{self, block_signals};
use crate::host::topology::{Machine, TopologyError, with_memory_bound_to};
use crate::lane::handle::LaneHandle;
use crate::lane::{HashKey, LaneConfig, LaneParts};
use crate::log::LogError;
use crate::memory::frames::Region;
use crate::memory::umem::{PacketMemory, UmemError};
use crate::port::mode::{CopyMode, Mode, ModeError, modes};
use crate::port::socket::BindError;
use crate::port::{Port, PortError};
use crate::process::cgroup::Limits;
use crate::process::inherit;
use crate::process::orphans;
use crate::process::output::{Output, OutputError};
use crate::process::seccomp::{Filter, FilterError};
use crate::process::spawn::WorkerCommand;

/// The name of the group of all workers.
const GROUP: &str = "default";

/// Why `xfan run` failed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
#[allow(missing_docs)] // the sources and messages say it
pub enum RunError {
    Config(#[from] ConfigError),
    Privilege(#[from] PrivilegeError),
    User(#[from] UserError),
    Interface(#[from] InterfaceError),
    Mode(#[from] ModeError),
    Topology(#[from] TopologyError),
    Placement(#[from] PlacementError),
    Budget(#[from] BudgetError),
    Memory(#[from] UmemError),
    Port(#[from] PortError),
    Control(#[from] ControlError),
    Log(#[from] LogError),
    Output(#[from] OutputError),
    Primary(#[from] PrimaryError),
    Filter(#[from] FilterError),
    Io(#[from] std::io::Error),
    #[error(
        "`{interface}` needs {lanes} lanes, one for each RX queue, but the limit is {MAX_LANES}: \
         select fewer queues with --queues, or lower their number (`ethtool -L {interface}`)"
    )]
    TooManyLanes {
        interface: String,
        lanes: u32,
    },
    #[error(
        "{lanes} lanes and {workers} workers need {needed} file descriptors, but RLIMIT_NOFILE of \
         this process is {limit} (ulimit -n, LimitNOFILE=): raise it, or use fewer queues or workers"
    )]
    Descriptors {
        needed: u64,
        lanes: usize,
        workers: usize,
        limit: u64,
    },
    #[error("the counts of packets or frames do not add up, which is a bug of xfan: {}", .0.join("; "))]
    Imbalance(Vec<String>),
    #[error("packets were lost that are in no counter: {}", .0.join("; "))]
    Unaccounted(Vec<String>),
}

/// Runs a primary until a stop signal or an error, and returns its last report.
///
/// Attaching the XDP program is the first step that affects traffic. Every step that can fail
/// without it comes before: the sockets are bound, their FILL rings are full, and the workers are
/// attached.
///
/// # Errors
/// [`RunError`]. All changes to the system are undone in either case.
pub fn run(config: &Config) -> Result<Outcome, RunError> {
    let descriptors = sys::raise_descriptor_limit();
    let interface = Interface::find(&config.port.interface)?;
    let queues = interface.select(&config.port.queues)?;
    // Checked here, since libraries report a lack of descriptors as other errors.
    let needed = descriptors_needed(queues.len(), config.group.workers);
    if needed > descriptors {
        let (lanes, workers) = (queues.len(), config.group.workers);
        return Err(RunError::Descriptors { needed, lanes, workers, limit: descriptors });
    }
    let modes = modes(config, &interface)?;
    check_privileges()?;
    let user = WorkerUser::find(config.group.user.as_deref())?;
    if !config.group.command.is_empty() {
        user.check_beside(nix::unistd::geteuid())?;
    }
    let access = Access::find(&config.control, &user)?;
    if !config.group.command.is_empty() && !access.file_permits(&user) {
        return Err(UserError::LockedOut(user.name).into());
    }
    let machine = Machine::discover(Some(&interface))?;
    let placement = place(&machine, queues.len(), config.group.workers, config.primary.cores.as_deref())?;
    for note in &placement.notes {
        tracing::warn!("{note}");
    }
    let lanes = u32::try_from(queues.len()).unwrap_or(u32::MAX);
    if lanes > MAX_LANES {
        return Err(RunError::TooManyLanes { interface: interface.name, lanes });
    }
    let key = HashKey::from_bytes(match config.primary.hash_key {
        Some(key) => key,
        None => random_bytes()?,
    });
    confine()?;
    let mut workers = None;
    if !config.group.command.is_empty() {
        let members: Vec<_> = (0..config.group.workers).map(member_id).collect();
        let output = Output::begin(config.group.worker_output.clone(), config.group.survive, &members)?;
        let lanes = placement.lanes.iter().map(|slot| slot.cpu).filter(|_| !placement.shared);
        let limits = Limits {
            memory: config.group.worker_memory,
            processes: config.group.worker_processes,
            cpu_weight: config.group.worker_cpu_weight,
            lanes: lanes.collect(),
        };
        let sandbox = config.group.worker_sandbox.then(Filter::of_sandbox).transpose()?;
        workers = Some(WorkerCommand {
            command: config.group.command.clone(),
            user,
            survive: config.group.survive,
            own_session: !placement.shared,
            limits,
            sandbox,
            output,
        });
    }
    let start = Start { config, interface, queues, machine, placement, key };
    let outcome = start.run(modes, &access, workers.as_ref());
    if let Some(workers) = workers {
        workers.output.end();
    }
    outcome
}

/// The number of descriptors that a primary needs: some 30 of its own, 6 for each lane, 9 for each
/// worker (3 of them for its output), and some more while it starts a worker or answers an
/// operator.
fn descriptors_needed(lanes: usize, workers: usize) -> u64 {
    48 + 6 * lanes as u64 + 9 * workers as u64
}

/// Applies the restrictions that depend on neither the interface nor the configuration, to this
/// process and everything it starts.
fn confine() -> Result<(), RunError> {
    Filter::of_primary()?.install_for_all_threads().map_err(FilterError::from)?;
    orphans::become_subreaper()?;
    if let Err(error) = inherit::protect_from_oom() {
        tracing::info!(
            "xfan cannot protect itself from the OOM killer ({error}): grant it CAP_SYS_RESOURCE, or \
             set OOMScoreAdjust=-900 in its systemd unit"
        );
    }
    if let Err(error) = inherit::exclude_packets_from_core_dumps() {
        tracing::info!("core dumps may contain packets: cannot exclude shared memory from them: {error}");
    }
    Ok(())
}

/// Whether a mode failed because of something that the next mode does not need: zero-copy, larger
/// frames, or enough frames for the ring of the NIC.
fn next_mode_may_work(error: &RunError) -> bool {
    matches!(error, RunError::Budget(_) | RunError::Port(PortError::Bind(BindError::NoZeroCopy { .. })))
}

/// What a start needs in each mode.
struct Start<'a> {
    config: &'a Config,
    interface: Interface,
    queues: Vec<QueueId>,
    machine: Machine,
    placement: Placement,
    key: HashKey,
}

impl Start<'_> {
    /// Runs a primary in the first mode that works.
    fn run(
        &self,
        modes: Vec<Mode>,
        access: &Access,
        workers: Option<&WorkerCommand>,
    ) -> Result<Outcome, RunError> {
        let mut listener = None;
        let mut modes = modes.into_iter().peekable();
        loop {
            // `modes` is never empty, and the loop continues only if another mode is left.
            let Some(mode) = modes.next() else {
                return Err(RunError::Io(std::io::ErrorKind::InvalidInput.into()));
            };
            let last = modes.peek().is_none();
            // Signals stay blocked until the primary waits for them. The lanes inherit the mask.
            block_signals(true)?;
            let primary = match self.primary(mode, workers) {
                Err(error) if !last && next_mode_may_work(&error) => {
                    tracing::warn!(
                        "zero-copy is not available: {error}. Trying copy mode, in which the kernel \
                         copies each packet"
                    );
                    continue;
                }
                primary => primary?,
            };
            let listener = match &mut listener {
                Some(listener) => listener,
                none => none.insert(Listener::bind(&self.config.primary.socket, access.clone())?),
            };
            let outcome = Primary::run(primary, listener)?;
            match outcome.error {
                Some(PrimaryError::Port(PortError::Attach(error @ AttachError::NoNativeMode { .. })))
                    if !last && !outcome.interrupted =>
                {
                    tracing::warn!("{error}. Zero-copy needs native XDP: xfan starts again in copy mode");
                }
                error => return Ok(Outcome { error, ..outcome }),
            }
        }
    }

    /// Creates a primary in one mode. Its sockets are bound, and its lanes run and have posted
    /// frames, but no packets arrive yet.
    fn primary(&self, mode: Mode, workers: Option<&WorkerCommand>) -> Result<Parts, RunError> {
        let Start { config, interface, queues, machine, placement, key } = self;
        let nic_ring = match mode.bind {
            CopyMode::ZeroCopy => interface.rx_ring,
            CopyMode::Copy => 0,
        };
        let sizes = Sizes { frame_size: mode.frame_size, nic_ring };
        let budget = FrameBudget::plan(queues.len(), config.group.workers, config, placement.shared, sizes)?;
        let memory = Arc::new(packet_memory(&budget, queues.len(), mode, machine.nic_node())?);
        // The first port: its name is the first that a worker gets.
        let (port, sources) = Port::bind(
            PortId(0),
            interface.clone(),
            queues.clone(),
            &config.port.pass,
            mode,
            &budget,
            &memory,
        )?;
        // A thread that shares a CPU must not spin on it.
        let spin = |shared: bool| if shared { Duration::ZERO } else { config.idle.spin };
        let mut lanes = Vec::with_capacity(queues.len());
        for ((source, slot), (queue, id)) in
            sources.into_iter().zip(&placement.lanes).zip(queues.iter().zip((0..).map(LaneId)))
        {
            let parts = LaneParts {
                port: port.id,
                queue: *queue,
                core: slot.cpu,
                config: LaneConfig {
                    batch: config.primary.batch,
                    posted: budget.rx_ring,
                    spin: spin(slot.shared),
                    yields: config.idle.r#yield,
                    shared: slot.shared,
                },
                memory: memory.clone(),
                region: Region::of_lane(id, mode.frame_size, frames_per_lane(&budget)),
                key: *key,
                groups: 1,
                socket: Some(source.second_descriptor()?),
            };
            lanes.push(LaneHandle::spawn(parts, source)?);
        }
        // A worker that joins later gets a CPU of its own if one is left. Otherwise it is neither
        // pinned nor does it spin.
        let all = place(machine, lanes.len(), budget.max_workers, config.primary.cores.as_deref())?;
        let later = all.workers.get(config.group.workers..).filter(|_| !all.shared).unwrap_or_default();
        let workers_share = placement.workers.iter().any(|slot| slot.shared);
        let members = (0..budget.max_workers)
            .map(|number| {
                let slot = placement.workers.get(number).or_else(|| later.get(number - config.group.workers));
                let spin = spin(slot.is_none() || workers_share);
                Resources::new(member_id(number), slot.map(|slot| slot.cpu), spin, lanes.len())
            })
            .collect();
        let geometry =
            Geometry { lanes: u32::try_from(queues.len()).unwrap_or(u32::MAX), slots: budget.ring_slots };
        let policy = Policy {
            restart: config.group.restart_policy(),
            hang_timeout: config.group.hang_timeout,
            hold: (config.group.on_loss == OnLoss::Hold).then_some(config.group.hold_timeout),
            on_empty: config.group.on_empty,
            start_timeout: config.group.start_timeout,
            stop_timeout: config.group.stop_timeout,
        };
        let group = GroupParts {
            name: GROUP.to_owned(),
            members,
            initial: config.group.workers,
            policy,
            command: workers.cloned(),
        };
        let port = PortParts { name: config.port.interface.clone(), port: Some(port) };
        let (ports, groups) = (vec![port], vec![group]);
        Ok(Parts { ports, groups, memory, geometry, lanes, yields: config.idle.r#yield })
    }
}

/// The id of a member.
fn member_id(number: usize) -> String {
    format!("{GROUP}/{number}")
}

/// Makes the packet memory of all ports, on the NUMA node of the NIC if it has one.
fn packet_memory(
    budget: &FrameBudget,
    lanes: usize,
    mode: Mode,
    node: Option<usize>,
) -> Result<PacketMemory, UmemError> {
    let lanes = u32::try_from(lanes).unwrap_or(u32::MAX);
    let frames = frames_per_lane(budget).saturating_mul(NonZeroU32::new(lanes).unwrap_or(NonZeroU32::MIN));
    let make = || PacketMemory::of_sockets(mode.frame_size, frames, budget.fill_ring);
    match node {
        Some(node) => with_memory_bound_to(node, make),
        None => make(),
    }
}

fn frames_per_lane(budget: &FrameBudget) -> NonZeroU32 {
    NonZeroU32::new(budget.frames_per_lane).unwrap_or(NonZeroU32::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_mode_follows_if_frames_do_not_suffice() {
        let config = Config::from_toml_str("interface = 'eth1'\nframes = 12000", "f").unwrap();
        let plan = |frame_size, nic_ring, lanes| {
            let sizes = Sizes { frame_size, nic_ring };
            FrameBudget::plan(lanes, 2, &config, false, sizes).map_err(RunError::from)
        };
        // Zero-copy needs most of the frames for the NIC's ring, or frames twice as large; copy
        // mode needs neither.
        let of_ring = plan(4096, 16_384, 1).unwrap_err();
        let of_size = plan(4096, 4096, 100).unwrap_err();
        assert!(next_mode_may_work(&of_ring) && next_mode_may_work(&of_size), "{of_ring} {of_size}");
        assert!(plan(2048, 0, 1).is_ok() && plan(2048, 0, 100).is_ok());
        let bind = |error| RunError::Port(PortError::Bind(error));
        let (interface, queue) = ("eth1".to_owned(), QueueId(0));
        let source = std::io::Error::from_raw_os_error(libc::EINVAL);
        assert!(next_mode_may_work(&bind(BindError::NoZeroCopy {
            interface: interface.clone(),
            queue,
            source
        })));
        assert!(!next_mode_may_work(&bind(BindError::Busy { interface, queue })));
    }
}
