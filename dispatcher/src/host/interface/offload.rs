//! GRO and LRO: offloads that merge received packets before they reach generic XDP.

use std::io;
use std::os::fd::OwnedFd;

use nix::net::if_::if_indextoname;

use super::ioctl::{ValueCommand, socket, value};
use super::{Interface, InterfaceError};

/// An offload that merges received packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Generic receive offload: the kernel merges packets.
    Gro,
    /// Large receive offload: the NIC or its driver merges packets.
    Lro,
}

impl Offload {
    /// Its name in `ethtool -K`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gro => "gro",
            Self::Lro => "lro",
        }
    }
}

impl Interface {
    /// Whether an offload is on; `false` if the driver does not support it.
    ///
    /// # Errors
    /// The query fails.
    pub fn offload(&self, offload: Offload) -> Result<bool, InterfaceError> {
        let failed = |source| InterfaceError::Query { what: "the offloads", name: self.name.clone(), source };
        read(&socket().map_err(failed)?, &self.name, offload).map_err(failed)
    }

    /// Turns an offload on or off.
    ///
    /// # Errors
    /// The kernel refuses (EPERM without `CAP_NET_ADMIN`), or the driver does not change the
    /// setting.
    pub fn set_offload(&self, offload: Offload, on: bool) -> Result<(), InterfaceError> {
        set_offload(&self.name, offload, on)
    }
}

fn set_offload(name: &str, offload: Offload, on: bool) -> Result<(), InterfaceError> {
    let failed = |source| InterfaceError::Offload { offload, on, name: name.to_owned(), source };
    let socket = socket().map_err(failed)?;
    write(&socket, name, offload, on).map_err(failed)?;
    // A driver may report success without changing the setting.
    match read(&socket, name, offload).map_err(failed)? == on {
        true => Ok(()),
        false => Err(failed(io::Error::other("the driver did not change the setting"))),
    }
}

/// Keeps GRO and LRO off. Dropping it turns those that were on back on, even if an interface was
/// renamed.
///
/// The kernel skips GRO on an interface with a program in generic mode (`netif_elide_gro`), but not
/// on the lower interfaces through which that interface receives packets: the ports of a bond or a
/// bridge, and the interface under a VLAN or a macvlan.
#[derive(Debug)]
pub struct NoMerging {
    done: Vec<Done>,
}

/// An offload that was turned off.
#[derive(Debug)]
struct Done {
    index: u32,
    offload: Offload,
    /// The offload's name for messages, with the interface's name if that is a lower one.
    what: String,
}

impl NoMerging {
    /// Turns GRO and LRO off on an interface and on all lower interfaces.
    ///
    /// # Errors
    /// An offload is on and cannot be turned off, or a query fails. GRO of `interface` itself may
    /// stay on: the kernel skips it.
    pub fn of(interface: &Interface) -> Result<Self, InterfaceError> {
        let mut no_merging = NoMerging { done: Vec::new() };
        // The lowest interfaces come first: some interfaces keep an offload on while a lower one
        // has it on.
        for interface in interface.all_below().iter().rev() {
            for offload in [Offload::Gro, Offload::Lro] {
                no_merging.turn_off(interface, offload, interface.name.clone())?;
            }
        }
        for offload in [Offload::Gro, Offload::Lro] {
            match no_merging.turn_off(interface, offload, String::new()) {
                Err(InterfaceError::Offload { offload: Offload::Gro, .. }) => {}
                result => result?,
            }
        }
        Ok(no_merging)
    }

    fn turn_off(
        &mut self,
        interface: &Interface,
        offload: Offload,
        below: String,
    ) -> Result<(), InterfaceError> {
        if interface.offload(offload)? {
            interface.set_offload(offload, false)?;
            let of = if below.is_empty() { below } else { format!(" of {below}") };
            self.done.push(Done { index: interface.index, offload, what: format!("{}{of}", offload.name()) });
        }
        Ok(())
    }

    /// The offloads that were turned off, for messages.
    pub fn names(&self) -> Vec<&str> {
        self.done.iter().map(|done| done.what.as_str()).collect()
    }
}

impl Drop for NoMerging {
    fn drop(&mut self) {
        for Done { index, offload, .. } in self.done.iter().rev() {
            // An interface that no longer exists has nothing to restore.
            let Ok(name) = if_indextoname(*index) else { continue };
            let name = name.to_string_lossy().into_owned();
            if let Err(error) = set_offload(&name, *offload, true) {
                tracing::warn!("{error}");
            }
        }
    }
}

/// The bit of LRO in the flags, as in `linux/ethtool.h`.
const ETH_FLAG_LRO: u32 = 1 << 15;

fn read(socket: &OwnedFd, name: &str, offload: Offload) -> io::Result<bool> {
    Ok(match offload {
        Offload::Gro => value(socket, name, ValueCommand::GetGro, 0)? != 0,
        Offload::Lro => value(socket, name, ValueCommand::GetFlags, 0)? & ETH_FLAG_LRO != 0,
    })
}

fn write(socket: &OwnedFd, name: &str, offload: Offload, on: bool) -> io::Result<()> {
    match offload {
        Offload::Gro => value(socket, name, ValueCommand::SetGro, on.into())?,
        Offload::Lro => {
            let others = value(socket, name, ValueCommand::GetFlags, 0)? & !ETH_FLAG_LRO;
            value(socket, name, ValueCommand::SetFlags, others | if on { ETH_FLAG_LRO } else { 0 })?
        }
    };
    Ok(())
}
