//! Queries a driver by ethtool: channels, offloads, and the driver's own counters.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use crate::host::interface::buffer::GuardedBuffer;
use crate::host::interface::ioctl::{c_text, channels, optional, socket};

// As in linux/ethtool.h.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSTATS: u32 = 0x1d;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_STATS: u32 = 1;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;
/// The most strings to read: more than any driver has, and 8 MiB of answer.
const MAX_STRINGS: u32 = 1 << 18;

/// A socket for ethtool queries.
#[derive(Debug)]
pub struct Driver {
    socket: OwnedFd,
}

/// Offloads that change packets before the XDP program sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// The NIC or its driver merges packets (LRO, hardware GRO).
    pub lro: bool,
    /// The NIC strips VLAN tags.
    pub rxvlan: bool,
}

impl Driver {
    /// Opens a socket for queries, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of socket(2).
    pub fn open() -> io::Result<Self> {
        Ok(Driver { socket: socket()? })
    }

    /// The number of RX queues in use; `None` if the driver does not report it.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn rx_queues(&self, name: &str) -> io::Result<Option<u32>> {
        Ok(optional(channels(&self.socket, name))?.filter(|&count| count > 0))
    }

    /// The driver's own counters, by name.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn counters(&self, name: &str) -> io::Result<BTreeMap<String, u64>> {
        let Some(names) = self.strings(name, ETH_SS_STATS)? else { return Ok(BTreeMap::new()) };
        // struct ethtool_stats: command, number of counters, and one u64 for each counter.
        let mut buffer = GuardedBuffer::new(8 + names.len() * 8)?;
        buffer.put(0, ETHTOOL_GSTATS);
        buffer.put(4, count(&names));
        buffer.query(&self.socket, name)?;
        if buffer.get(4) != count(&names) {
            return Err(io::Error::other("the number of the driver's counters changed between two queries"));
        }
        let (values, _) = buffer.bytes()[8..].as_chunks::<8>();
        Ok(names.into_iter().zip(values.iter().map(|value| u64::from_ne_bytes(*value))).collect())
    }

    /// The offloads that are on.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn offloads(&self, name: &str) -> io::Result<Offloads> {
        let Some(names) = self.strings(name, ETH_SS_FEATURES)? else { return Ok(Offloads::default()) };
        // struct ethtool_gfeatures: command, number of blocks, and 4 u32 for each block. The third
        // of these is the mask of active features.
        let blocks = names.len().div_ceil(32);
        let mut buffer = GuardedBuffer::new(8 + blocks * 16)?;
        buffer.put(0, ETHTOOL_GFEATURES);
        buffer.put(4, u32::try_from(blocks).unwrap_or(0));
        buffer.query(&self.socket, name)?;
        let is_on = |wanted: &str| {
            let position = names.iter().position(|name| name == wanted);
            position.is_some_and(|bit| buffer.get(8 + bit / 32 * 16 + 8) >> (bit % 32) & 1 == 1)
        };
        Ok(Offloads { lro: is_on("rx-lro") || is_on("rx-gro-hw"), rxvlan: is_on("rx-vlan-hw-parse") })
    }

    /// The names in a string set; `None` if the driver has no such set.
    fn strings(&self, name: &str, set: u32) -> io::Result<Option<Vec<String>>> {
        // struct ethtool_sset_info: command, padding, mask of sets, size of each set in the mask.
        let mut buffer = GuardedBuffer::new(24)?;
        buffer.put(0, ETHTOOL_GSSET_INFO);
        buffer.put(8, 1 << set);
        if optional(buffer.query(&self.socket, name))?.is_none() || buffer.get(8) == 0 {
            return Ok(None);
        }
        let count = buffer.get(16);
        if count == 0 || count > MAX_STRINGS {
            return Ok(None);
        }
        // struct ethtool_gstrings: command, set, number of strings, strings.
        let mut buffer = GuardedBuffer::new(12 + count as usize * ETH_GSTRING_LEN)?;
        buffer.put(0, ETHTOOL_GSTRINGS);
        buffer.put(4, set);
        buffer.put(8, count);
        buffer.query(&self.socket, name)?;
        let (strings, _) = buffer.bytes()[12..].as_chunks::<ETH_GSTRING_LEN>();
        let there = strings.iter().take(buffer.get(8) as usize);
        Ok(Some(there.map(|string| c_text(string)).collect()))
    }
}

fn count(names: &[String]) -> u32 {
    u32::try_from(names.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_driver_has_no_counters() {
        let driver = Driver::open().unwrap();
        assert_eq!(driver.rx_queues("lo").unwrap(), None);
        assert_eq!(driver.counters("lo").unwrap(), BTreeMap::new());
        assert!(!driver.offloads("lo").unwrap().lro);
        assert_eq!(driver.counters("no-such-if").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
}
