//! `xfan run`: from a configuration to a running primary.

use std::num::NonZeroU32;
use std::time::Duration;

use xfan_shm::layout::{Geometry, MAX_LANES};
use xfan_xdp::AttachError;

use crate::access::Access;
use crate::config::{BudgetError, Config, ConfigError, FrameBudget, OnLoss, UserError, WorkerUser};
use crate::control::{ControlError, Listener};
use crate::exit::Exit;
use crate::interface::{Interface, InterfaceError};
use crate::lane::LaneConfig;
use crate::lanes::{LaneHandle, LaneParts};
use crate::members::Member;
use crate::placement::{PlacementError, place};
use crate::port::{Port, PortError};
use crate::primary::{Care, Outcome, Primary, PrimaryError, random_bytes};
use crate::privileges::{PrivilegeError, check_privileges};
use crate::steer::HashKey;
use crate::supervisor::WorkerCommand;
use crate::sys::put_off_signals;
use crate::topology::{Machine, TopologyError};
use crate::xsk::BindError;

/// Why `xfan run` ended with an error.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
#[allow(missing_docs)] // each is its source
pub enum RunError {
    Config(#[from] ConfigError),
    Privilege(#[from] PrivilegeError),
    User(#[from] UserError),
    Interface(#[from] InterfaceError),
    Topology(#[from] TopologyError),
    Placement(#[from] PlacementError),
    Budget(#[from] BudgetError),
    Port(#[from] PortError),
    Control(#[from] ControlError),
    Primary(#[from] PrimaryError),
    Io(#[from] std::io::Error),
    #[error(
        "`{interface}` would get {lanes} lanes, one for each RX queue, but the limit is {MAX_LANES}: name the queues that get \
         one with --queues, or lower their number (`ethtool -L {interface}`)"
    )]
    TooManyLanes {
        interface: String,
        lanes: u32,
    },
    #[error("packets or frames do not add up, which is a bug of xfan: {}", .0.join("; "))]
    Imbalance(Vec<String>),
}

impl RunError {
    /// The exit code of the process.
    pub fn exit(&self) -> Exit {
        match self {
            RunError::Config(error) => error.exit(),
            RunError::Privilege(_) => Exit::Permission,
            RunError::User(error) => error.exit(),
            RunError::Interface(error) => error.exit(),
            RunError::Topology(error) => error.exit(),
            RunError::Placement(error) => error.exit(),
            RunError::Budget(error) => error.exit(),
            RunError::Control(ControlError::NotASocket(_)) => Exit::Usage,
            RunError::Port(PortError::Attach(
                AttachError::AnotherPrimary { .. } | AttachError::AnotherProgram { .. },
            ))
            | RunError::Port(PortError::Bind(BindError::Busy { .. }))
            | RunError::Control(ControlError::Occupied(_)) => Exit::Busy,
            RunError::Port(PortError::Attach(AttachError::Privilege { .. }))
            | RunError::Port(PortError::Load(xfan_xdp::LoadError::Privilege { .. })) => Exit::Permission,
            RunError::Port(PortError::Attach(
                AttachError::NoNativeMode { .. } | AttachError::NoSuchInterface { .. },
            )) => Exit::Interface,
            RunError::TooManyLanes { .. } => Exit::Usage,
            RunError::Primary(error) => error.exit(),
            RunError::Port(_) | RunError::Control(_) | RunError::Io(_) | RunError::Imbalance(_) => {
                Exit::Failure
            }
        }
    }
}

/// Runs a primary until it is asked to end; returns its last report.
///
/// # Errors
/// [`RunError`]. Everything is taken down again in either case.
pub fn run(config: &Config) -> Result<Outcome, RunError> {
    let interface = Interface::find(&config.interface)?;
    let queues = interface.select(&config.queues)?;
    interface.check_mtu(config.frame_size)?;
    check_privileges()?;
    let user = WorkerUser::find(config.user.as_deref())?;
    let access = Access::find(&config.control, &user)?;
    if !config.command.is_empty() && !access.lets_connect(&user) {
        return Err(UserError::LockedOut(user.name).into());
    }
    let machine = Machine::discover(Some(&interface))?;
    let placement = place(&machine, queues.len(), config.workers, config.cores.as_deref())?;
    for note in &placement.notes {
        tracing::warn!("{note}");
    }
    let budget = FrameBudget::plan(queues.len(), config.workers, config, placement.shared)?;
    let key = HashKey::from_bytes(match config.hash_key {
        Some(key) => key,
        None => random_bytes()?,
    });
    let lanes = u32::try_from(queues.len()).unwrap_or(u32::MAX);
    if lanes > MAX_LANES {
        return Err(RunError::TooManyLanes { interface: interface.name, lanes });
    }
    let geometry = Geometry { lanes, slots: budget.ring_slots };
    let (port, memory, sources) = Port::take(interface, queues.clone(), config, &budget, machine.nic_node())?;
    // Until the primary listens to them.
    put_off_signals(true)?;
    let listener = Listener::bind(&config.socket, access)?;
    // Who shares a CPU must not spin on it.
    let spin = |shared: bool| if shared { Duration::ZERO } else { config.idle.spin };
    let mut lanes = Vec::with_capacity(queues.len());
    for ((source, slot), (queue, first)) in
        sources.into_iter().zip(&placement.lanes).zip(queues.into_iter().zip(0u32..))
    {
        let parts = LaneParts {
            queue,
            core: slot.cpu,
            config: LaneConfig {
                batch: config.batch,
                posted: budget.rx_ring,
                spin: spin(slot.shared),
                yields: config.idle.yielding,
                shared: slot.shared,
                port: 0,
            },
            memory: memory.clone(),
            region: (
                region_start(first, budget.frames_per_lane, config.frame_size),
                config.frame_size,
                NonZeroU32::new(budget.frames_per_lane).unwrap_or(NonZeroU32::MIN),
            ),
            key,
            socket: Some(source.second_descriptor()?),
        };
        lanes.push(LaneHandle::spawn(parts, source)?);
    }
    // Who joins later gets a CPU of its own, or none: then the scheduler finds one, and there is no spinning on it.
    let all = place(&machine, lanes.len(), budget.places, config.cores.as_deref())?;
    let later = all.workers.get(config.workers..).filter(|_| !all.shared).unwrap_or_default();
    let workers_share = placement.workers.iter().any(|slot| slot.shared);
    let members = (0..budget.places)
        .map(|number| {
            let slot = placement.workers.get(number).or_else(|| later.get(number - config.workers));
            let spin = spin(slot.is_none() || workers_share);
            Member::new(format!("default/{number}"), slot.map(|slot| slot.cpu), spin, lanes.len())
        })
        .collect();
    let primary = Primary::new(
        config.interface.clone(),
        Some(port),
        memory,
        geometry,
        lanes,
        members,
        config.workers,
        config.idle.yielding,
        (config.start_timeout, config.stop_timeout),
        Care {
            restart: config.restart,
            hang_timeout: config.hang_timeout,
            hold: (config.on_loss == OnLoss::Hold).then_some(config.hold_timeout),
            on_empty: config.on_empty,
        },
    );
    let workers = (!config.command.is_empty()).then(|| WorkerCommand {
        command: config.command.clone(),
        user,
        survive: config.survive,
    });
    let outcome = primary.run(&listener, workers.as_ref())?;
    Ok(outcome)
}

/// UMEM offset of the first frame of lane number `lane`. All of them are below the limit of 4 GiB, though their end may not be.
fn region_start(lane: u32, frames: u32, frame_size: u32) -> u32 {
    u32::try_from(u64::from(lane) * u64::from(frames) * u64::from(frame_size)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_may_end_where_offsets_end() {
        assert_eq!(region_start(0, 1 << 21, 2048), 0);
        assert_eq!(region_start(3, 1 << 19, 2048), 3 << 30);
    }
}
