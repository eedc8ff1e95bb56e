//! The exit codes of `xfan`: one per kind of trouble, so that a script can tell them apart.

use std::fmt::Write as _;
use std::process::ExitCode;

/// Why `xfan` ended. The number is the exit code of the process and part of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Ended as asked: by a signal after an orderly stop, or because the work was done.
    Ok = 0,
    /// Something failed while running.
    Failure = 1,
    /// The command line or the configuration is wrong. (clap uses the same code.)
    Usage = 2,
    /// Not root, or a capability is missing.
    Permission = 3,
    /// The interface is unknown, unusable or gone, has no such queue, or its packets do not fit a
    /// frame.
    Interface = 4,
    /// Somebody else is there: another primary, XDP program or socket on the queue.
    Busy = 5,
    /// The workers do not come up, speak another protocol version, or none is left.
    Workers = 6,
}

impl Exit {
    /// Every exit code, in numerical order.
    pub const ALL: [Self; 7] =
        [Self::Ok, Self::Failure, Self::Usage, Self::Permission, Self::Interface, Self::Busy, Self::Workers];

    /// The exit code of the process.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// What the code says, in one line for the help text.
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

    /// The table of exit codes that ends the long help.
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

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lists_every_code_in_order() {
        for (number, exit) in Exit::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(exit.code()), number);
            assert!(Exit::help().contains(exit.meaning()));
        }
        assert!(Exit::help().lines().all(|line| line.len() <= 80));
    }
}
