//! Queries a driver by ethtool: channels, offloads, and its own counters.
//!
//! The kernel writes all strings and counters that exist, even beyond the end of the buffer. So a
//! [`Page`] ends at a guard page, where the kernel fails with EFAULT instead.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::host::interface::{channels, ethtool, optional, socket};

/// As in linux/ethtool.h.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSTATS: u32 = 0x1d;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETH_SS_STATS: u32 = 1;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;
/// The most strings to read: more than any driver has.
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

    /// RX queues in use; `None`: the driver does not report them.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn rx_queues(&self, name: &str) -> io::Result<Option<u32>> {
        Ok(optional(channels(&self.socket, name))?.filter(|&count| count > 0))
    }

    /// The driver's own counters, by name.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn counters(&self, name: &str) -> io::Result<BTreeMap<String, u64>> {
        let Some(names) = self.strings(name, ETH_SS_STATS)? else { return Ok(BTreeMap::new()) };
        // struct ethtool_stats: command, number of counters, and a u64 for each.
        let mut page = Page::new(8 + names.len() * 8)?;
        page.put(0, ETHTOOL_GSTATS);
        page.put(4, count(&names));
        page.ask(&self.socket, name)?;
        if page.get(4) != count(&names) {
            return Err(io::Error::other("the driver's counters have just changed"));
        }
        let (values, _) = page.bytes()[8..].as_chunks::<8>();
        Ok(names.into_iter().zip(values.iter().map(|value| u64::from_ne_bytes(*value))).collect())
    }

    /// The offloads that are on.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn offloads(&self, name: &str) -> io::Result<Offloads> {
        let Some(names) = self.strings(name, ETH_SS_FEATURES)? else { return Ok(Offloads::default()) };
        // struct ethtool_gfeatures: command, number of blocks, and 4 u32 for each block, the third
        // of which is the mask of active features.
        let blocks = names.len().div_ceil(32);
        let mut page = Page::new(8 + blocks * 16)?;
        page.put(0, ETHTOOL_GFEATURES);
        page.put(4, u32::try_from(blocks).unwrap_or(0));
        page.ask(&self.socket, name)?;
        let is_on = |wanted: &str| {
            let place = names.iter().position(|name| name == wanted);
            place.is_some_and(|bit| page.get(8 + bit / 32 * 16 + 8) >> (bit % 32) & 1 == 1)
        };
        Ok(Offloads { lro: is_on("rx-lro") || is_on("rx-gro-hw"), rxvlan: is_on("rx-vlan-hw-parse") })
    }

    /// The names in a string set; `None`: the driver has no such set.
    fn strings(&self, name: &str, set: u32) -> io::Result<Option<Vec<String>>> {
        // struct ethtool_sset_info: command, padding, a mask of sets, and the size of each set in
        // the mask.
        let mut page = Page::new(24)?;
        page.put(0, ETHTOOL_GSSET_INFO);
        page.put(8, 1 << set);
        if optional(page.ask(&self.socket, name))?.is_none() || page.get(8) == 0 {
            return Ok(None);
        }
        let count = page.get(16);
        if count == 0 || count > MAX_STRINGS {
            return Ok(None);
        }
        // struct ethtool_gstrings: command, set, number, and the strings.
        let mut page = Page::new(12 + count as usize * ETH_GSTRING_LEN)?;
        page.put(0, ETHTOOL_GSTRINGS);
        page.put(4, set);
        page.put(8, count);
        page.ask(&self.socket, name)?;
        let (strings, _) = page.bytes()[12..].as_chunks::<ETH_GSTRING_LEN>();
        let there = strings.iter().take(page.get(8) as usize);
        Ok(Some(there.map(|string| crate::host::interface::c_text(string)).collect()))
    }
}

fn count(names: &[String]) -> u32 {
    u32::try_from(names.len()).unwrap_or(u32::MAX)
}

/// A question and its answer, followed by memory that nothing can be written to.
struct Page {
    start: NonNull<c_void>,
    /// Bytes that were asked for.
    length: usize,
    mapped: usize,
}

impl Page {
    fn new(length: usize) -> io::Result<Self> {
        const PAGE: usize = 4096;
        let usable = length.next_multiple_of(PAGE);
        let mapped = NonZeroUsize::new(usable + PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so no existing mapping is replaced.
        let start = unsafe { mmap_anonymous(None, mapped, access, MapFlags::MAP_PRIVATE) }?;
        let page = Page { start, length, mapped: mapped.get() };
        // SAFETY: the last page of our own mapping, to which nothing points.
        unsafe { mprotect(start.byte_add(usable), PAGE, ProtFlags::PROT_NONE) }?;
        Ok(page)
    }

    /// All bytes that were asked for.
    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, readable and zero at first, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }

    fn put(&mut self, at: usize, value: u32) {
        // SAFETY: as in `bytes`, and borrowed exclusively.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast::<u8>(), self.length) };
        bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn get(&self, at: usize) -> u32 {
        self.bytes()[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    fn ask(&mut self, socket: &OwnedFd, name: &str) -> io::Result<()> {
        // SAFETY: it starts with the number of a command. What the kernel writes beyond our bytes
        // ends within the mapping, or at its last page, which it cannot write to.
        unsafe { ethtool(socket, name, self.start.as_ptr()) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing borrowed from it is left.
        let _ = unsafe { munmap(self.start, self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_answers_or_has_nothing_to_say() {
        let driver = Driver::open().unwrap();
        assert_eq!(driver.rx_queues("lo").unwrap(), None);
        assert_eq!(driver.counters("lo").unwrap(), BTreeMap::new());
        assert!(!driver.offloads("lo").unwrap().lro);
        assert_eq!(driver.counters("no-such-if").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn what_is_written_beyond_a_page_fails() {
        let page = Page::new(100).unwrap();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the kernel writes to the mapping up to its last page, which it cannot write to.
        let read =
            unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), page.start.as_ptr(), 3 * 4096) };
        assert!(read <= 4096, "{read}");
    }
}
