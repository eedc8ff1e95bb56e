//! What the kernel says about one network interface.

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
    /// Its MAC address.
    #[serde(rename = "address", deserialize_with = "mac_address")]
    pub mac: [u8; 6],
    /// Receive queues.
    #[serde(rename = "num_rx_queues")]
    pub rx_queues: u32,
    /// Transmit queues.
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
        links.pop().ok_or_else(|| unreadable("an empty list".into()))
    }

    /// Longest Ethernet frame it carries, in bytes: MTU, Ethernet header and one VLAN tag.
    pub fn max_frame_bytes(&self) -> usize {
        self.mtu as usize + 14 + 4
    }
}

fn mac_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    let text = String::deserialize(deserializer)?;
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let wrong = || serde::de::Error::custom(format!("{text} is not a MAC address"));
    bytes.ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(wrong)
}
