//! Whether an interface still exists, and its current name.

use std::io;
use std::os::fd::OwnedFd;

use crate::host::interface::ioctl::{name_of, socket};

/// An interface, identified by its index. One descriptor stays open, so that a query needs no new
/// one.
#[derive(Debug)]
pub struct Presence {
    socket: OwnedFd,
    index: u32,
}

impl Presence {
    /// Follows the interface with this index in the calling thread's network namespace.
    ///
    /// # Errors
    /// The errors of socket(2).
    pub fn of(index: u32) -> io::Result<Self> {
        Ok(Presence { socket: socket()?, index })
    }

    /// The interface's name; `None` if the interface no longer exists. Does not take RTNL.
    ///
    /// # Errors
    /// Any error but ENODEV. An error does not mean that the interface no longer exists.
    pub fn name(&self) -> io::Result<Option<String>> {
        match name_of(&self.socket, self.index) {
            Ok(name) => Ok(Some(name)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_has_a_name_or_none() {
        let loopback = nix::net::if_::if_nametoindex("lo").unwrap();
        assert_eq!(Presence::of(loopback).unwrap().name().unwrap().as_deref(), Some("lo"));
        assert_eq!(Presence::of(0x7fff_fff0).unwrap().name().unwrap(), None);
    }

    #[test]
    fn an_error_does_not_mean_that_it_is_gone() {
        let not_a_socket = std::fs::File::open("/dev/null").unwrap().into();
        let presence = Presence { socket: not_a_socket, index: 1 };
        assert_eq!(presence.name().unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
