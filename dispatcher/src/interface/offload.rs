//! GRO and LRO, which merge packets into larger ones before they reach generic XDP.

use std::io;
use std::os::fd::OwnedFd;

use nix::net::if_::if_indextoname;

use super::{Interface, InterfaceError, ethtool, socket};

/// A setting that has packets merged on their way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Generic receive offload: the kernel merges.
    Gro,
    /// Large receive offload: the NIC or its driver merges.
    Lro,
}

impl Offload {
    /// As `ethtool -K` calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gro => "gro",
            Self::Lro => "lro",
        }
    }
}

impl Interface {
    /// Whether an offload is on. Off where the driver does not know it.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell.
    pub fn offload(&self, offload: Offload) -> Result<bool, InterfaceError> {
        let failed = |source| InterfaceError::Query { what: "the offloads", name: self.name.clone(), source };
        read(&socket().map_err(failed)?, &self.name, offload).map_err(failed)
    }

    /// Turns an offload on or off.
    ///
    /// # Errors
    ///
    /// The kernel refuses (EPERM without `CAP_NET_ADMIN`), or the driver keeps it as it was.
    pub fn set_offload(&self, offload: Offload, on: bool) -> Result<(), InterfaceError> {
        let failed = |source| InterfaceError::Offload { offload, on, name: self.name.clone(), source };
        let socket = socket().map_err(failed)?;
        write(&socket, &self.name, offload, on).map_err(failed)?;
        // A driver may say yes and keep its setting.
        match read(&socket, &self.name, offload).map_err(failed)? == on {
            true => Ok(()),
            false => Err(failed(io::Error::other("the driver does not change it"))),
        }
    }
}

/// GRO and LRO turned off, as far as they were on. Dropping it turns them on again, whatever the interface is called then.
#[derive(Debug)]
pub struct NoMerging {
    interface: Interface,
    offloads: Vec<Offload>,
}

impl NoMerging {
    /// Turns off what is on.
    ///
    /// # Errors
    ///
    /// One of them is on and cannot be turned off.
    pub fn of(interface: &Interface) -> Result<Self, InterfaceError> {
        let mut done = NoMerging { interface: interface.clone(), offloads: Vec::new() };
        for offload in [Offload::Gro, Offload::Lro] {
            if interface.offload(offload)? {
                interface.set_offload(offload, false)?;
                done.offloads.push(offload);
            }
        }
        Ok(done)
    }

    /// What was turned off.
    pub fn names(&self) -> Vec<&'static str> {
        self.offloads.iter().map(|offload| offload.name()).collect()
    }
}

impl Drop for NoMerging {
    fn drop(&mut self) {
        // An interface that is gone has no settings.
        let Ok(name) = if_indextoname(self.interface.index) else { return };
        self.interface.name = name.to_string_lossy().into_owned();
        for &offload in &self.offloads {
            if let Err(error) = self.interface.set_offload(offload, true) {
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

/// Puts one of the questions above, or one of the orders with its data.
fn value(socket: &OwnedFd, name: &str, cmd: u32, data: u32) -> io::Result<u32> {
    let mut value = Value { cmd, data };
    // SAFETY: these commands read and fill a `struct ethtool_value`, which `Value` is.
    unsafe { ethtool(socket, name, &mut value)? };
    Ok(value.data)
}
