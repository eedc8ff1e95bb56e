//! A network interface of this network namespace: index, type, MTU, RX queues, driver, offloads.
//!
//! All queries go through a socket, which belongs to a namespace. `/sys` may show another
//! namespace.

use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::net::if_::if_nameindex;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};
use xfan_shm::ids::QueueId;

use crate::config::Queues;

mod offload;

pub use offload::{NoMerging, Offload};

/// The properties of an interface that xfan needs. Read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index in this namespace.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The RX queues in use, numbered from 0. At least 1.
    pub rx_queues: u32,
    /// Entries of the NIC's RX ring for one queue; 0 if the driver does not report it.
    pub rx_ring: u32,
    /// The driver's name, such as `ixgbe` or `veth`. Empty when it does not say.
    pub driver: String,
    /// Where the device sits, such as the PCI address `0000:01:00.0`. Empty for virtual interfaces.
    pub bus: String,
}

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// No interface has this name.
    #[error("no interface `{name}` in this network namespace; there are: {}", list(there))]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        there: Vec<String>,
    },
    /// The interface's packets do not begin with an Ethernet header.
    #[error(
        "`{name}` is {}: its packets begin with no Ethernet header; name the Ethernet interface that carries them, or \
         use a tunnel of Ethernet frames (tap, gretap, VXLAN)",
        device(*kind)
    )]
    NotEthernet {
        /// The interface.
        name: String,
        /// Its type, a number of `linux/if_arp.h`.
        kind: u16,
    },
    /// A queue beyond those the interface has.
    #[error(
        "`{name}` has no RX queue {queue}: it has {count} (0 to {}); see `ethtool -l {name}`",
        count - 1
    )]
    NoQueue {
        /// The interface.
        name: String,
        /// The queue asked for.
        queue: QueueId,
        /// RX queues the interface has.
        count: u32,
    },
    /// A query failed.
    #[error("cannot read {what} of `{name}`: {source}")]
    Query {
        /// What we asked for.
        what: &'static str,
        /// The interface.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// An offload cannot be turned on or off.
    #[error(
        "cannot turn {} {} of `{name}`: {source}; see `ethtool -k {name}`",
        if *on { "on" } else { "off" },
        offload.name()
    )]
    Offload {
        /// Which one.
        offload: Offload,
        /// Whether it should be turned on.
        on: bool,
        /// The interface.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
}

impl Interface {
    /// Looks an interface up in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// No interface has this name, it is not an Ethernet device, or a query fails.
    pub fn find(name: &str) -> Result<Self, InterfaceError> {
        let asked = |what| move |source| InterfaceError::Query { what, name: name.to_owned(), source };
        let socket = socket().map_err(asked("the settings"))?;
        let index = index(&socket, name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => InterfaceError::Unknown { name: name.to_owned(), there: names() },
            _ => asked("the index")(error),
        })?;
        let kind = kind(&socket, name).map_err(asked("the type"))?;
        if !matches!(kind, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK) {
            return Err(InterfaceError::NotEthernet { name: name.to_owned(), kind });
        }
        let mtu = mtu(&socket, name).map_err(asked("the MTU"))?;
        let driver = optional(driver(&socket, name)).map_err(asked("the driver"))?.unwrap_or_default();
        let rx_queues = match optional(channels(&socket, name)).map_err(asked("the RX queues"))? {
            Some(count) if count > 0 => count,
            // The driver has no channels. /sys lists the queues, if it shows this namespace.
            _ => sysfs(name, index).and_then(|folder| sysfs_queues(&folder)).unwrap_or(1),
        };
        // Optional: a driver may fail to report it.
        let rx_ring = rx_ring(&socket, name).unwrap_or(0);
        Ok(Self {
            name: name.to_owned(),
            index,
            mtu,
            rx_queues,
            rx_ring,
            driver: driver.driver(),
            bus: driver.bus(),
        })
    }

    /// The queues that get a lane.
    ///
    /// # Errors
    ///
    /// A queue that the interface does not have.
    pub fn select(&self, queues: &Queues) -> Result<Vec<QueueId>, InterfaceError> {
        let queues: Vec<_> = match queues {
            Queues::All => (0..self.rx_queues).map(QueueId).collect(),
            Queues::List(list) => list.iter().copied().map(QueueId).collect(),
        };
        match queues.iter().find(|queue| queue.0 >= self.rx_queues) {
            None => Ok(queues),
            Some(&queue) => {
                Err(InterfaceError::NoQueue { name: self.name.clone(), queue, count: self.rx_queues })
            }
        }
    }

    /// The queues that get no lane: their packets go to the kernel as before.
    #[must_use]
    pub fn without_lane(&self, lanes: &[QueueId]) -> Vec<QueueId> {
        (0..self.rx_queues).map(QueueId).filter(|queue| !lanes.contains(queue)).collect()
    }

    /// The interface's folder in `/sys`, if `/sys` shows this interface.
    pub(crate) fn sysfs(&self) -> Option<PathBuf> {
        sysfs(&self.name, self.index)
    }

    /// Whether it receives packets through interfaces below it, where native XDP runs: a bond, or a
    /// Hyper-V interface with a virtual function. The kernel then drops packets that native XDP
    /// redirects to a socket of this interface.
    #[must_use]
    pub fn is_fed_from_below(&self) -> bool {
        match self.driver.as_str() {
            "bonding" => true,
            "hv_netvsc" => !self.lower().is_empty(),
            _ => false,
        }
    }

    /// The names of the interfaces directly below it; empty if `/sys` does not show them.
    #[must_use]
    pub fn lower(&self) -> Vec<String> {
        let entries =
            self.sysfs().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("lower_")?.to_owned()))
            .collect();
        names.sort();
        names
    }
}

/// Types of `linux/if_arp.h` that libc has no names for.
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_NETLINK: u16 = 824;

/// A name for a device type of `linux/if_arp.h`.
fn device(kind: u16) -> String {
    match kind {
        libc::ARPHRD_NONE => "a layer-3 device, such as tun or WireGuard",
        ARPHRD_RAWIP => "a modem's IP device",
        libc::ARPHRD_PPP => "a PPP device",
        libc::ARPHRD_TUNNEL => "an IPIP tunnel",
        libc::ARPHRD_TUNNEL6 => "an IPv6 tunnel",
        libc::ARPHRD_SIT => "a SIT tunnel (IPv6 in IPv4)",
        libc::ARPHRD_IPGRE | ARPHRD_IP6GRE => "a GRE tunnel of IP packets",
        libc::ARPHRD_INFINIBAND => "an InfiniBand device",
        libc::ARPHRD_IEEE80211 | libc::ARPHRD_IEEE80211_PRISM | libc::ARPHRD_IEEE80211_RADIOTAP => {
            "a Wi-Fi device in monitor mode"
        }
        libc::ARPHRD_CAN => "a CAN bus",
        ARPHRD_NETLINK => "a monitor of netlink messages",
        other => return format!("a device of type {other} (linux/if_arp.h)"),
    }
    .to_owned()
}

fn list(names: &[impl Display]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The names of all interfaces of this namespace; none if the kernel does not tell.
fn names() -> Vec<String> {
    let Ok(all) = if_nameindex() else { return Vec::new() };
    all.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect()
}

/// A socket to ask about interfaces of the calling thread's namespace.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    Ok(socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// `None` where a driver does not support the question.
pub(crate) fn optional<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The interface's folder in `/sys`, unless `/sys` shows another namespace's interface of this name.
fn sysfs(name: &str, index: u32) -> Option<PathBuf> {
    let folder = Path::new("/sys/class/net").join(name);
    let shown: u32 = fs::read_to_string(folder.join("ifindex")).ok()?.trim().parse().ok()?;
    (shown == index).then_some(folder)
}

fn sysfs_queues(folder: &Path) -> Option<u32> {
    let queues = fs::read_dir(folder.join("queues")).ok()?.flatten();
    let count = queues.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"rx-")).count();
    u32::try_from(count).ok().filter(|&count| count > 0)
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

/// `struct ethtool_drvinfo` of `linux/ethtool.h`.
#[repr(C)]
struct DriverInfo {
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
    fn driver(&self) -> String {
        c_text(&self.driver)
    }

    /// Empty, and not `N/A` as some drivers put it, where there is no bus.
    fn bus(&self) -> String {
        Some(c_text(&self.bus)).filter(|bus| bus != "N/A").unwrap_or_default()
    }
}

pub(crate) fn c_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// RX queues in use, as the driver says.
pub(crate) fn channels(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    const ETHTOOL_GCHANNELS: u32 = 0x3c;
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: ETHTOOL_GCHANNELS fills a `struct ethtool_channels`, which `Channels` is.
    unsafe { ethtool(socket, name, &raw mut channels)? };
    Ok(channels.rx.saturating_add(channels.combined))
}

fn rx_ring(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    const ETHTOOL_GRINGPARAM: u32 = 0x10;
    let mut rings = RingParameters { cmd: ETHTOOL_GRINGPARAM, ..RingParameters::default() };
    // SAFETY: ETHTOOL_GRINGPARAM fills a `struct ethtool_ringparam`, which `RingParameters` is.
    unsafe { ethtool(socket, name, &mut rings)? };
    Ok(rings.rx)
}

fn driver(socket: &OwnedFd, name: &str) -> io::Result<DriverInfo> {
    const ETHTOOL_GDRVINFO: u32 = 0x03;
    let mut info = DriverInfo { cmd: ETHTOOL_GDRVINFO, ..DriverInfo::default() };
    // SAFETY: ETHTOOL_GDRVINFO fills a `struct ethtool_drvinfo`, which `DriverInfo` is.
    unsafe { ethtool(socket, name, &raw mut info)? };
    Ok(info)
}

fn index(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    let answer = ask(socket, name, libc::SIOCGIFINDEX)?;
    // SAFETY: SIOCGIFINDEX has filled `ifru_ifindex`.
    number(unsafe { answer.ifru_ifindex })
}

fn kind(socket: &OwnedFd, name: &str) -> io::Result<u16> {
    let answer = ask(socket, name, libc::SIOCGIFHWADDR)?;
    // SAFETY: SIOCGIFHWADDR has filled `ifru_hwaddr`.
    Ok(unsafe { answer.ifru_hwaddr.sa_family })
}

fn mtu(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    let answer = ask(socket, name, libc::SIOCGIFMTU)?;
    // SAFETY: SIOCGIFMTU has filled `ifru_mtu`.
    number(unsafe { answer.ifru_mtu })
}

fn number(answer: libc::c_int) -> io::Result<u32> {
    u32::try_from(answer).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Makes one of the queries of netdevice(7), whose answer is written to the request itself.
fn ask(socket: &OwnedFd, name: &str, question: libc::Ioctl) -> io::Result<libc::__c_anonymous_ifr_ifru> {
    let mut request = request(name)?;
    // SAFETY: these questions read the name of a `struct ifreq` and fill its union; the request is
    // ours and lives through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), question, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(request.ifr_ifru)
}

/// Makes an ethtool query. The answer is written to `question`.
///
/// # Safety
///
/// `question` must point to a struct that starts with the number of an ethtool command and has the
/// layout that the kernel reads and writes for that command.
pub(crate) unsafe fn ethtool<T>(socket: &OwnedFd, name: &str, question: *mut T) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_data = question.cast();
    // SAFETY: SIOCETHTOOL reads the name of a `struct ifreq` and follows its `ifru_data`, which points to
    // what the caller vouches for; both live through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        // No interface has so long a name.
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(rx_queues: u32) -> Interface {
        let name = "eth1".to_owned();
        Interface {
            name,
            index: 2,
            mtu: 1500,
            rx_queues,
            rx_ring: 0,
            driver: String::new(),
            bus: String::new(),
        }
    }

    #[test]
    fn every_namespace_has_a_loopback() {
        let lo = Interface::find("lo").unwrap();
        assert!(lo.index > 0 && lo.mtu > 0 && lo.rx_queues == 1 && lo.bus.is_empty(), "{lo:?}");
    }

    #[test]
    fn an_offload_that_cannot_be_changed_is_told() {
        let lo = Interface::find("lo").unwrap();
        assert!(!lo.offload(Offload::Lro).unwrap());
        // The loopback has no LRO to turn on; without root nothing may be turned on.
        let error = lo.set_offload(Offload::Lro, true).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("cannot turn on lro of `lo`: "), "{message}");
        assert!(message.ends_with("; see `ethtool -k lo`"), "{message}");
    }

    #[test]
    fn an_unknown_interface_is_told_with_those_there_are() {
        let error = Interface::find("no-such-if").unwrap_err();
        let message = error.to_string();
        assert!(message.contains("`no-such-if` in this network namespace; there are: "), "{message}");
        assert!(message.contains("lo"), "{message}");
        assert_eq!(crate::exit::Exit::from(&error), crate::exit::Exit::Interface);
        let long = Interface::find("a-name-of-more-than-15-bytes").unwrap_err();
        assert!(matches!(long, InterfaceError::Unknown { .. }), "{long}");
    }

    #[test]
    fn a_device_that_is_no_ethernet_one_is_named() {
        let refused = |kind| InterfaceError::NotEthernet { name: "x0".to_owned(), kind };
        let message = refused(libc::ARPHRD_NONE).to_string();
        assert_eq!(
            message,
            "`x0` is a layer-3 device, such as tun or WireGuard: its packets begin with no Ethernet header; name the \
             Ethernet interface that carries them, or use a tunnel of Ethernet frames (tap, gretap, VXLAN)"
        );
        assert_eq!(crate::exit::Exit::from(&refused(libc::ARPHRD_NONE)), crate::exit::Exit::Interface);
        let others = [
            (768, "`x0` is an IPIP tunnel: "),
            (512, "`x0` is a PPP device: "),
            (803, "`x0` is a Wi-Fi device in monitor mode: "),
            (32, "`x0` is an InfiniBand device: "),
            (823, "`x0` is a GRE tunnel of IP packets: "),
            (519, "`x0` is a modem's IP device: "),
            (65000, "`x0` is a device of type 65000 (linux/if_arp.h): "),
        ];
        for (kind, begin) in others {
            let message = refused(kind).to_string();
            assert!(message.starts_with(begin), "{message}");
        }
    }

    #[test]
    fn queues_must_be_there() {
        let four = interface(4);
        assert_eq!(four.select(&Queues::All).unwrap(), [0, 1, 2, 3].map(QueueId));
        assert_eq!(four.select(&Queues::List(vec![3, 1])).unwrap(), [3, 1].map(QueueId));
        assert_eq!(four.without_lane(&[3, 1].map(QueueId)), [0, 2].map(QueueId));
        let message = four.select(&Queues::List(vec![0, 4])).unwrap_err().to_string();
        assert_eq!(message, "`eth1` has no RX queue 4: it has 4 (0 to 3); see `ethtool -l eth1`");
    }

    #[test]
    fn a_driver_without_a_bus_has_an_empty_one() {
        let mut info = DriverInfo::default();
        info.bus[..3].copy_from_slice(b"N/A");
        assert_eq!(info.bus(), "");
        info.bus[..4].copy_from_slice(b"0:1\0");
        assert_eq!(info.bus(), "0:1");
    }
}
