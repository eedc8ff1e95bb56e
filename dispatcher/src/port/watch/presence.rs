//! Whether an interface is still there, and what it is called now.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use crate::host::interface::socket;

/// An interface, followed by its index. It keeps one descriptor open, so that a query needs no new
/// one.
#[derive(Debug)]
pub struct Presence {
    socket: OwnedFd,
    index: libc::c_int,
}

impl Presence {
    /// Follows the interface with this index in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of socket(2).
    pub fn of(index: u32) -> io::Result<Self> {
        let socket = socket()?;
        Ok(Presence { socket, index: libc::c_int::try_from(index).map_err(io::Error::other)? })
    }

    /// The interface's name; `None`: the interface no longer exists. Does not take RTNL.
    ///
    /// # Errors
    /// Any error but ENODEV. It does not mean that the interface is gone.
    pub fn name(&self) -> io::Result<Option<String>> {
        // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_ifindex = self.index;
        // SAFETY: SIOCGIFNAME reads `ifru_ifindex` of a `struct ifreq` and fills its name; it is
        // ours and lives through the call.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCGIFNAME, &raw mut request) } == 0 {
            let name: Vec<u8> =
                request.ifr_name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
            return Ok(Some(String::from_utf8_lossy(&name).into_owned()));
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            error => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_has_a_name_or_is_gone() {
        let loopback = nix::net::if_::if_nametoindex("lo").unwrap();
        assert_eq!(Presence::of(loopback).unwrap().name().unwrap().as_deref(), Some("lo"));
        assert_eq!(Presence::of(0x7fff_fff0).unwrap().name().unwrap(), None);
    }

    #[test]
    fn an_error_is_not_an_interface_that_is_gone() {
        let not_a_socket = std::fs::File::open("/dev/null").unwrap().into();
        let presence = Presence { socket: not_a_socket, index: 1 };
        assert_eq!(presence.name().unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
