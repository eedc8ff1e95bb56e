//! Why an interface cannot be used.

use std::fmt::Display;
use std::io;

use xfan_shm::ids::QueueId;

use super::Offload;

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// No interface has this name.
    #[error("no interface `{name}` in this network namespace; existing interfaces: {}", list(existing))]
    Unknown {
        /// The requested name.
        name: String,
        /// The names of the existing interfaces.
        existing: Vec<String>,
    },
    /// The interface's packets do not begin with an Ethernet header.
    #[error(
        "`{name}` is {}: its packets have no Ethernet header; use the Ethernet interface that \
         carries them, or a tunnel of Ethernet frames (tap, gretap, VXLAN)",
        device(*kind)
    )]
    NotEthernet {
        /// The interface.
        name: String,
        /// Its device type: an `ARPHRD_*` value of `linux/if_arp.h`.
        kind: u16,
    },
    /// The interface has no such RX queue.
    #[error(
        "`{name}` has no RX queue {queue}: it has {count} (0 to {}); see `ethtool -l {name}`",
        count - 1
    )]
    NoQueue {
        /// The interface.
        name: String,
        /// The requested queue.
        queue: QueueId,
        /// The number of RX queues of the interface.
        count: u32,
    },
    /// A query failed.
    #[error("cannot read {what} of `{name}`: {source}")]
    Query {
        /// What was queried.
        what: &'static str,
        /// The interface.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// An offload cannot be turned on or off.
    #[error(
        "cannot turn {} {} of `{name}`: {source}; see `ethtool -k {name}`",
        if *on { "on" } else { "off" },
        offload.name()
    )]
    Offload {
        /// The offload.
        offload: Offload,
        /// `true`: it was to be turned on.
        on: bool,
        /// The interface.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
}

// Values of `linux/if_arp.h` for which libc has no constants.
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_NETLINK: u16 = 824;

/// Describes a device type of `linux/if_arp.h`.
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
