//! What the kernel says about one network interface.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use serde::Deserialize;

use crate::command::{CommandError, ip};

/// An interface, as it was when it was asked for.
#[derive(Clone, Debug, Deserialize)]
pub struct Link {
    /// Its name, in its namespace.
    #[serde(rename = "ifname")]
    pub name: String,
    /// Its index, in its namespace.
    #[serde(rename = "ifindex")]
    pub index: u32,
    /// Its MTU, in bytes after the Ethernet header.
    pub mtu: u32,
    /// Its type, as `ip` names it.
    link_type: String,
    /// Its MAC address.
    #[serde(rename = "address", default, deserialize_with = "mac_address")]
    pub mac: [u8; 6],
    /// Receive queues in use.
    #[serde(rename = "num_rx_queues")]
    pub rx_queues: u32,
    /// Transmit queues in use.
    #[serde(rename = "num_tx_queues")]
    pub tx_queues: u32,
}

/// Why an interface could not be asked for.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is none of this name, or `ip` is not there.
    #[error("interface {name} is not to be found in this network namespace: {source}")]
    Unknown {
        /// The interface asked for.
        name: String,
        /// What `ip` said.
        source: CommandError,
    },
    /// `ip` says something else than it used to.
    #[error("`ip -json -details link show dev {name}` printed what this program cannot read: {reason}")]
    Unreadable {
        /// The interface asked for.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Its frames are no Ethernet frames.
    #[error("interface {name} is of type `{link_type}`, not Ethernet")]
    NotEthernet {
        /// The interface asked for.
        name: String,
        /// Its type, as `ip` names it.
        link_type: String,
    },
    /// The driver does not tell its channels.
    #[error("the queues that {name} uses cannot be read: {source}")]
    Channels {
        /// The interface asked for.
        name: String,
        /// Why.
        source: io::Error,
    },
}

impl Link {
    /// The interface `name` in the namespace of the calling thread.
    ///
    /// # Errors
    /// There is no such interface, or `ip` (iproute2) is missing or unreadable.
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
        // `ip` shows the queues allocated. What is sent through one that is not in use is lost.
        let in_use = channels(name).map_err(|source| LinkError::Channels { name: name.into(), source })?;
        if let Some((rx_queues, tx_queues)) = in_use {
            (link.rx_queues, link.tx_queues) = (rx_queues, tx_queues);
        }
        Ok(link)
    }

    /// Longest Ethernet frame it carries, in bytes: MTU, Ethernet header and one VLAN tag.
    pub fn max_frame_bytes(&self) -> usize {
        self.mtu as usize + 14 + 4
    }
}

/// `struct ethtool_channels` of linux/ethtool.h.
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

/// The RX and TX queues in use; `None` where the driver knows no channels: it uses all that are allocated.
fn channels(name: &str) -> io::Result<Option<(u32, u32)>> {
    const ETHTOOL_GCHANNELS: u32 = 0x3c;
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: `ifreq` is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    // SAFETY: SIOCETHTOOL reads the name of a `struct ifreq` and follows its `ifru_data`; for ETHTOOL_GCHANNELS that is a
    // `struct ethtool_channels`, which `Channels` is. Both live through the call.
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
