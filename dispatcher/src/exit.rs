//! The exit codes of `xfan`, and the only map from errors to them.

use std::fmt::Write as _;
use std::io::ErrorKind::PermissionDenied;
use std::process::ExitCode;

use xfan_xdp::{AttachError, LoadError};

use crate::control::error::PrimaryError;
use crate::control::server::ControlError;
use crate::host::directory::DirectoryError;
use crate::host::interface::InterfaceError;
use crate::log::LogError;
use crate::port::PortError;
use crate::port::mode::ModeError;
use crate::port::socket::BindError;
use crate::process::output::OutputError;
use crate::start::RunError;

/// Why `xfan` ended. Scripts may rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command succeeded, or a signal stopped the primary in an orderly way.
    Ok = 0,
    /// An operation failed, or packets or frames were unaccounted for.
    Failure = 1,
    /// The command line or the configuration is invalid. clap uses the same code.
    Usage = 2,
    /// Not root, or a capability is missing.
    Permission = 3,
    /// The interface does not exist, is unusable or was removed; it has no such queue; or its
    /// packets do not fit into a frame.
    Interface = 4,
    /// Another primary, XDP program or AF_XDP socket already uses the interface or queue.
    Busy = 5,
    /// Workers do not start, use another protocol version, or have all ended for good.
    Workers = 6,
}

impl Exit {
    /// Every exit code, in numerical order.
    pub const ALL: [Self; 7] =
        [Self::Ok, Self::Failure, Self::Usage, Self::Permission, Self::Interface, Self::Busy, Self::Workers];

    /// The number that the process returns.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The meaning of the code, in one line for the help text.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "ended as asked",
            Self::Failure => "failed while running, or results could not be printed",
            Self::Usage => "wrong command line or configuration",
            Self::Permission => "no permission: not root, or a capability is missing",
            Self::Interface => "interface unknown, unusable or gone; queue out of range; or MTU too large",
            Self::Busy => "busy: another primary, XDP program or AF_XDP socket is there",
            Self::Workers => "workers: command not found, exits at once, or all are down for good",
        }
    }

    /// The table of exit codes at the end of the long help.
    #[must_use]
    pub fn help() -> String {
        let mut text = String::from("Exit codes:\n");
        for exit in Self::ALL {
            let _ = writeln!(text, "  {}  {}", exit.code(), exit.meaning());
        }
        text.truncate(text.trim_end().len());
        text
    }
}

impl From<&RunError> for Exit {
    fn from(error: &RunError) -> Self {
        match error {
            RunError::Config(_)
            | RunError::User(_)
            | RunError::Budget(_)
            | RunError::Placement(_)
            | RunError::TooManyLanes { .. }
            | RunError::Control(
                ControlError::NotASocket(_) | ControlError::Directory(DirectoryError::Shared { .. }),
            )
            | RunError::Log(LogError::File { .. }) => Self::Usage,
            RunError::Privilege(_) => Self::Permission,
            RunError::Interface(error) => error.into(),
            RunError::Mode(error) => error.into(),
            RunError::Port(error) => error.into(),
            RunError::Control(ControlError::Occupied(_)) => Self::Busy,
            RunError::Output(OutputError::Io(_)) => Self::Failure,
            RunError::Output(_) => Self::Usage,
            RunError::Primary(error) => error.into(),
            RunError::Topology(_)
            | RunError::Memory(_)
            | RunError::Control(_)
            | RunError::Filter(_)
            | RunError::Io(_)
            | RunError::Log(_)
            | RunError::Descriptors { .. }
            | RunError::Imbalance(_)
            | RunError::Unaccounted(_) => Self::Failure,
        }
    }
}

impl From<&InterfaceError> for Exit {
    fn from(error: &InterfaceError) -> Self {
        match error {
            InterfaceError::Query { source, .. } | InterfaceError::Offload { source, .. }
                if source.kind() == PermissionDenied =>
            {
                Self::Permission
            }
            InterfaceError::Query { .. } => Self::Failure,
            _ => Self::Interface,
        }
    }
}

impl From<&ModeError> for Exit {
    fn from(error: &ModeError) -> Self {
        match error {
            ModeError::MtuTooLarge { .. } | ModeError::FedFromBelow { .. } => Self::Interface,
            ModeError::GenericZeroCopy => Self::Usage,
        }
    }
}

impl From<&PortError> for Exit {
    fn from(error: &PortError) -> Self {
        match error {
            PortError::Attach(AttachError::AnotherPrimary { .. } | AttachError::AnotherProgram { .. })
            | PortError::Bind(BindError::Busy { .. }) => Self::Busy,
            PortError::Attach(AttachError::Privilege { .. })
            | PortError::Load(LoadError::Privilege { .. }) => Self::Permission,
            PortError::Attach(AttachError::NoNativeMode { .. } | AttachError::NoSuchInterface { .. })
            | PortError::Bind(BindError::NoZeroCopy { .. }) => Self::Interface,
            PortError::Interface(error) => error.into(),
            _ => Self::Failure,
        }
    }
}

impl From<&PrimaryError> for Exit {
    fn from(error: &PrimaryError) -> Self {
        match error {
            PrimaryError::Spawn(_)
            | PrimaryError::EndedEarly { .. }
            | PrimaryError::NotAttached { .. }
            | PrimaryError::Refused { .. }
            | PrimaryError::NoneLeft { .. } => Self::Workers,
            PrimaryError::Vanished(_) => Self::Interface,
            PrimaryError::Port(error) => error.into(),
            PrimaryError::LaneEnded(_) | PrimaryError::Io(_) => Self::Failure,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_lists_every_code_in_order() {
        for (number, exit) in Exit::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(exit.code()), number);
            assert!(Exit::help().contains(exit.meaning()));
        }
        assert!(Exit::help().lines().all(|line| line.len() <= 80));
    }

    #[test]
    fn an_unusable_interface_has_its_own_code() {
        let name = || "x0".to_owned();
        let kind = libc::ARPHRD_NONE;
        for error in [
            InterfaceError::Unknown { name: name(), existing: Vec::new() },
            InterfaceError::NotEthernet { name: name(), kind },
        ] {
            assert_eq!(Exit::from(&error), Exit::Interface, "{error}");
        }
        assert_eq!(Exit::from(&ModeError::GenericZeroCopy), Exit::Usage);
    }
}
