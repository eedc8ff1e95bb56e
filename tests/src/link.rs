//! What the kernel reports about a network interface.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::Deserialize;

use crate::command::{CommandError, ip};

/// An interface at the time of the query.
#[derive(Clone, Debug, Deserialize)]
pub struct Link {
    /// The name in its namespace.
    #[serde(rename = "ifname")]
    pub name: String,
    /// The index in its namespace.
    #[serde(rename = "ifindex")]
    pub index: u32,
    /// The MTU, in bytes after the Ethernet header.
    pub mtu: u32,
    /// The type, as `ip` names it.
    link_type: String,
    /// The MAC address.
    #[serde(rename = "address", default, deserialize_with = "mac_address")]
    pub mac: [u8; 6],
    /// The number of receive queues in use.
    #[serde(rename = "num_rx_queues")]
    pub rx_queues: u32,
    /// The number of transmit queues in use.
    #[serde(rename = "num_tx_queues")]
    pub tx_queues: u32,
}

/// Why an interface could not be queried.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no interface of this name, or `ip` is missing.
    #[error("cannot find interface {name} in this network namespace: {source}")]
    Unknown {
        /// The interface of the query.
        name: String,
        /// The error of `ip`.
        source: CommandError,
    },
    /// The output of `ip` has an unexpected form.
    #[error("`ip -json -details link show dev {name}` printed what this program cannot read: {reason}")]
    Unreadable {
        /// The interface of the query.
        name: String,
        /// What is wrong with the output.
        reason: String,
    },
    /// The interface is not of type Ethernet.
    #[error("interface {name} is of type `{link_type}`, not Ethernet")]
    NotEthernet {
        /// The interface of the query.
        name: String,
        /// The type, as `ip` names it.
        link_type: String,
    },
    /// The driver does not report its channels.
    #[error("the queues that {name} uses cannot be read: {source}")]
    Channels {
        /// The interface of the query.
        name: String,
        /// Why.
        source: io::Error,
    },
}

impl Link {
    /// Queries the interface `name` in the namespace of the calling thread.
    ///
    /// # Errors
    /// There is no such interface, or `ip` (iproute2) is missing or its output unreadable.
    pub fn named(name: &str) -> Result<Self, LinkError> {
        let text = ip(&format!("-json -details link show dev {name}"))
            .map_err(|source| LinkError::Unknown { name: name.into(), source })?;
        let unreadable = |reason: String| LinkError::Unreadable { name: name.into(), reason };
        let mut links: Vec<Link> =
            serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        let mut link = links.pop().ok_or_else(|| unreadable("an empty list".into()))?;
        if !["ether", "loopback"].contains(&&*link.link_type) {
            return Err(LinkError::NotEthernet { name: name.into(), link_type: link.link_type });
        }
        // `ip` shows the allocated queues. Frames sent through a queue that is not in use are lost.
        let in_use = channels(name).map_err(|source| LinkError::Channels { name: name.into(), source })?;
        if let Some((rx_queues, tx_queues)) = in_use {
            (link.rx_queues, link.tx_queues) = (rx_queues, tx_queues);
        }
        Ok(link)
    }

    /// The longest Ethernet frame the interface carries, in bytes: MTU, Ethernet header and one
    /// VLAN tag.
    pub fn max_frame_bytes(&self) -> usize {
        self.mtu as usize + 14 + 4
    }
}

/// The layout of `struct ethtool_channels` in linux/ethtool.h.
#[repr(C)]
#[derive(Default)]
struct Channels {
    cmd: u32,
    max: [u32; 4],
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

const _: () = assert!(size_of::<Channels>() == 36);

/// The RX and TX queues in use; `None` if the driver has no channels and uses all allocated queues.
fn channels(name: &str) -> io::Result<Option<(u32, u32)>> {
    const ETHTOOL_GCHANNELS: u32 = 0x3c;
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    // SAFETY: SIOCETHTOOL reads the name in a `struct ifreq` and follows its `ifru_data`. For
    // ETHTOOL_GCHANNELS that is a `struct ethtool_channels`, whose layout `Channels` has. Both
    // outlive the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) } < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(None) } else { Err(error) };
    }
    Ok(Some((channels.rx + channels.combined, channels.tx + channels.combined)))
}

fn mac_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    let text = String::deserialize(deserializer)?;
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let wrong = || serde::de::Error::custom(format!("{text} is not a MAC address"));
    bytes.ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_without_channels_uses_all_queues() {
        assert_eq!(channels("lo").unwrap(), None);
        let lo = Link::named("lo").unwrap();
        assert_eq!((lo.rx_queues, lo.tx_queues), (1, 1));
        assert!(channels("none-of-such-a-name").is_err());
    }
}
