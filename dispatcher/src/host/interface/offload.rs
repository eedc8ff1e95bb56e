//! GRO and LRO, which merge packets into larger ones before they reach generic XDP.

use std::io;
use std::os::fd::OwnedFd;

use nix::net::if_::if_indextoname;

use super::{Interface, InterfaceError, ethtool, socket};

/// An offload that merges received packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Generic receive offload: the kernel merges.
    Gro,
    /// Large receive offload: the NIC or its driver merges.
    Lro,
}

impl Offload {
    /// The name that `ethtool -K` uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gro => "gro",
            Self::Lro => "lro",
        }
    }
}

impl Interface {
    /// Whether an offload is on. `false` if the driver does not have it.
    ///
    /// # Errors
    ///
    /// The query fails.
    pub fn offload(&self, offload: Offload) -> Result<bool, InterfaceError> {
        let failed = |source| InterfaceError::Query { what: "the offloads", name: self.name.clone(), source };
        read(&socket().map_err(failed)?, &self.name, offload).map_err(failed)
    }

    /// Turns an offload on or off.
    ///
    /// # Errors
    ///
    /// The kernel refuses (EPERM without `CAP_NET_ADMIN`), or the driver does not change it.
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
        false => Err(failed(io::Error::other("the driver does not change it"))),
    }
}

/// Keeps GRO and LRO off. Dropping it turns on again those that were on, even if an interface has
/// been renamed.
///
/// The kernel skips GRO on an interface with a program in generic mode (`netif_elide_gro`). But it
/// does not skip GRO on the interfaces below, through which that interface receives packets: the
/// ports of a bond or a bridge, and the interface under a VLAN or a macvlan.
#[derive(Debug)]
pub struct NoMerging {
    done: Vec<Done>,
}

/// An offload that was turned off.
#[derive(Debug)]
struct Done {
    index: u32,
    offload: Offload,
    /// Its name, for messages; with the interface's, if that is one below.
    what: String,
}

impl NoMerging {
    /// Turns off those of GRO and LRO that are on.
    ///
    /// # Errors
    ///
    /// One of them is on and cannot be turned off, or a query fails.
    pub fn of(interface: &Interface) -> Result<Self, InterfaceError> {
        let mut no_merging = NoMerging { done: Vec::new() };
        // The interfaces below come first: some interfaces keep an offload on while one below has
        // it.
        let mut all = Vec::new();
        below(interface, &mut all);
        for interface in all.iter().rev() {
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

    /// The offloads that were turned off.
    pub fn names(&self) -> Vec<&str> {
        self.done.iter().map(|done| done.what.as_str()).collect()
    }
}

/// Collects all interfaces below one that `/sys` shows; each comes before those below it.
fn below(interface: &Interface, all: &mut Vec<Interface>) {
    for name in interface.lower() {
        // An interface that is not an Ethernet device, or is gone by now, merges nothing.
        if let Ok(lower) = Interface::find(&name)
            && !all.iter().any(|known| known.index == lower.index)
        {
            all.push(lower.clone());
            below(&lower, all);
        }
    }
}

impl Drop for NoMerging {
    fn drop(&mut self) {
        for Done { index, offload, .. } in self.done.iter().rev() {
            // An interface that is gone has no settings.
            let Ok(name) = if_indextoname(*index) else { continue };
            let name = name.to_string_lossy().into_owned();
            if let Err(error) = set_offload(&name, *offload, true) {
                tracing::warn!("{error}");
            }
        }
    }
}

/// `struct ethtool_value` of `linux/ethtool.h`.
#[repr(C)]
struct Value {
    cmd: u32,
    data: u32,
}
const _: () = assert!(size_of::<Value>() == 8);

const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_SGRO: u32 = 0x2c;
/// The bit of LRO in the flags.
const ETH_FLAG_LRO: u32 = 1 << 15;

fn read(socket: &OwnedFd, name: &str, offload: Offload) -> io::Result<bool> {
    Ok(match offload {
        Offload::Gro => value(socket, name, ETHTOOL_GGRO, 0)? != 0,
        Offload::Lro => value(socket, name, ETHTOOL_GFLAGS, 0)? & ETH_FLAG_LRO != 0,
    })
}

fn write(socket: &OwnedFd, name: &str, offload: Offload, on: bool) -> io::Result<()> {
    match offload {
        Offload::Gro => value(socket, name, ETHTOOL_SGRO, on.into())?,
        Offload::Lro => {
            let others = value(socket, name, ETHTOOL_GFLAGS, 0)? & !ETH_FLAG_LRO;
            value(socket, name, ETHTOOL_SFLAGS, others | if on { ETH_FLAG_LRO } else { 0 })?
        }
    };
    Ok(())
}

/// Runs one of the ethtool commands above. `data` is the new value for a command that sets one.
fn value(socket: &OwnedFd, name: &str, cmd: u32, data: u32) -> io::Result<u32> {
    let mut value = Value { cmd, data };
    // SAFETY: these commands read and fill a `struct ethtool_value`, which `Value` is.
    unsafe { ethtool(socket, name, &mut value)? };
    Ok(value.data)
}
