//! ioctl(2) queries about an interface: netdevice(7) and ethtool (`linux/ethtool.h`).
//!
//! An interface that does not exist fails with ENODEV.

#![allow(unsafe_code, reason = "ioctl(2) takes pointers to structures of the kernel")]

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};

/// Opens a socket for queries about interfaces in the calling thread's network namespace.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Turns EOPNOTSUPP, by which a driver says that it does not support a query, into `None`.
pub(crate) fn optional<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `struct ethtool_channels` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}
const _: () = assert!(size_of::<Channels>() == 36);

/// `struct ethtool_ringparam` of `linux/ethtool.h`.
#[repr(C)]
#[derive(Default)]
struct RingParameters {
    cmd: u32,
    max: [u32; 4],
    rx: u32,
    others: [u32; 3],
}
const _: () = assert!(size_of::<RingParameters>() == 36);

/// `struct ethtool_value` of `linux/ethtool.h`.
#[repr(C)]
struct Value {
    cmd: u32,
    data: u32,
}
const _: () = assert!(size_of::<Value>() == 8);

/// `struct ethtool_drvinfo` of `linux/ethtool.h`.
#[repr(C)]
pub(super) struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    rom: [u8; 32],
    reserved: [u8; 12],
    counts: [u32; 5],
}
const _: () = assert!(size_of::<DriverInfo>() == 196);

impl Default for DriverInfo {
    fn default() -> Self {
        let text = [0; 32];
        Self {
            cmd: 0,
            driver: text,
            version: text,
            firmware: text,
            bus: text,
            rom: text,
            reserved: [0; 12],
            counts: [0; 5],
        }
    }
}

impl DriverInfo {
    /// The driver's name.
    pub(super) fn driver(&self) -> String {
        c_text(&self.driver)
    }

    /// The bus address. Empty if the device is on no bus, which some drivers report as `N/A`.
    pub(super) fn bus(&self) -> String {
        Some(c_text(&self.bus)).filter(|bus| bus != "N/A").unwrap_or_default()
    }
}

/// The text before the first null byte.
pub(crate) fn c_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The number of RX queues in use, as the driver reports it.
pub(crate) fn channels(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    const ETHTOOL_GCHANNELS: u32 = 0x3c;
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: ETHTOOL_GCHANNELS fills a `struct ethtool_channels`; `Channels` has its layout.
    unsafe { ethtool(socket, name, &raw mut channels)? };
    Ok(channels.rx.saturating_add(channels.combined))
}

/// The number of entries of each RX ring of the NIC.
pub(super) fn rx_ring(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    const ETHTOOL_GRINGPARAM: u32 = 0x10;
    let mut rings = RingParameters { cmd: ETHTOOL_GRINGPARAM, ..RingParameters::default() };
    // SAFETY: ETHTOOL_GRINGPARAM fills a `struct ethtool_ringparam`; `RingParameters` has its
    // layout.
    unsafe { ethtool(socket, name, &raw mut rings)? };
    Ok(rings.rx)
}

/// The driver and its bus address.
pub(super) fn driver(socket: &OwnedFd, name: &str) -> io::Result<DriverInfo> {
    const ETHTOOL_GDRVINFO: u32 = 0x03;
    let mut info = DriverInfo { cmd: ETHTOOL_GDRVINFO, ..DriverInfo::default() };
    // SAFETY: ETHTOOL_GDRVINFO fills a `struct ethtool_drvinfo`; `DriverInfo` has its layout.
    unsafe { ethtool(socket, name, &raw mut info)? };
    Ok(info)
}

/// An ethtool command whose argument and answer are one number.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub(super) enum ValueCommand {
    GetFlags = 0x25,
    SetFlags = 0x26,
    GetGro = 0x2b,
    SetGro = 0x2c,
}

/// Runs an ethtool command. `data` is the new value for a command that sets one.
pub(super) fn value(socket: &OwnedFd, name: &str, cmd: ValueCommand, data: u32) -> io::Result<u32> {
    let mut value = Value { cmd: cmd as u32, data };
    // SAFETY: the commands of `ValueCommand` read and fill a `struct ethtool_value`; `Value` has
    // its layout.
    unsafe { ethtool(socket, name, &raw mut value)? };
    Ok(value.data)
}

/// The index of the interface.
pub(super) fn index(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    let answer = netdevice(socket, name, libc::SIOCGIFINDEX)?;
    // SAFETY: SIOCGIFINDEX has filled `ifru_ifindex`.
    number(unsafe { answer.ifru_ifindex })
}

/// The device type: an `ARPHRD_*` value of `linux/if_arp.h`.
pub(super) fn kind(socket: &OwnedFd, name: &str) -> io::Result<u16> {
    let answer = netdevice(socket, name, libc::SIOCGIFHWADDR)?;
    // SAFETY: SIOCGIFHWADDR has filled `ifru_hwaddr`.
    Ok(unsafe { answer.ifru_hwaddr.sa_family })
}

/// The MTU in bytes.
pub(super) fn mtu(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    let answer = netdevice(socket, name, libc::SIOCGIFMTU)?;
    // SAFETY: SIOCGIFMTU has filled `ifru_mtu`.
    number(unsafe { answer.ifru_mtu })
}

/// The name of the interface with this index. Unlike the other queries, it does not take RTNL.
pub(crate) fn name_of(socket: &OwnedFd, index: u32) -> io::Result<String> {
    let mut request = request("")?;
    request.ifr_ifru.ifru_ifindex = libc::c_int::try_from(index).map_err(io::Error::other)?;
    // SAFETY: SIOCGIFNAME reads `ifru_ifindex` of a `struct ifreq` and fills its name; `request`
    // outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFNAME, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(c_text(&request.ifr_name.map(|byte| byte as u8)))
}

fn number(answer: libc::c_int) -> io::Result<u32> {
    u32::try_from(answer).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Makes a query of netdevice(7) whose answer the kernel writes to the request itself.
fn netdevice(socket: &OwnedFd, name: &str, query: libc::Ioctl) -> io::Result<libc::__c_anonymous_ifr_ifru> {
    let mut request = request(name)?;
    // SAFETY: the queries used here read the name of a `struct ifreq` and fill its union;
    // `request` outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), query, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request.ifr_ifru)
}

/// Makes an ethtool query. The kernel writes the answer to `query`.
///
/// # Safety
/// `query` must point to a structure that begins with the number of an ethtool command and has the
/// layout that the kernel reads and writes for that command.
pub(super) unsafe fn ethtool<T>(socket: &OwnedFd, name: &str, query: *mut T) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_data = query.cast();
    // SAFETY: SIOCETHTOOL reads the name of a `struct ifreq` and follows its `ifru_data`, which the
    // caller guarantees to be valid; both outlive the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        // No interface can have a name of this length.
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_on_no_bus_has_an_empty_address() {
        let mut info = DriverInfo::default();
        info.bus[..3].copy_from_slice(b"N/A");
        assert_eq!(info.bus(), "");
        info.bus[..4].copy_from_slice(b"0:1\0");
        assert_eq!(info.bus(), "0:1");
    }
}
