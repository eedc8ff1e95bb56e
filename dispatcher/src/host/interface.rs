//! A network interface: index, type, MTU, RX queues, driver, offloads.
//!
//! All queries go through a socket, which belongs to the calling thread's network namespace. `/sys`
//! may show another namespace, so its answers count only if the interface index matches.

pub(crate) mod buffer;
mod error;
pub(crate) mod ioctl;
mod offload;

use std::fs;
use std::path::{Path, PathBuf};

use nix::net::if_::if_nameindex;
use xfan_shm::ids::QueueId;

use crate::config::Queues;
use ioctl::{channels, driver, index, kind, mtu, optional, rx_ring, socket};

pub use error::InterfaceError;
pub use offload::{NoMerging, Offload};

/// The properties of an interface that xfan needs, read once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index in its network namespace.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The number of RX queues in use, at least 1. Queues are numbered from 0.
    pub rx_queues: u32,
    /// The number of entries of each RX ring of the NIC; 0 if the driver does not report it.
    pub rx_ring: u32,
    /// The driver's name, such as `ixgbe` or `veth`; empty if the driver does not report it.
    pub driver: String,
    /// The bus address, such as the PCI address `0000:01:00.0`; empty for virtual interfaces.
    pub bus: String,
}

impl Interface {
    /// Looks an interface up in the calling thread's network namespace.
    ///
    /// # Errors
    /// No interface has this name, the interface is not an Ethernet device, or a query fails.
    pub fn find(name: &str) -> Result<Self, InterfaceError> {
        let failed = |what| move |source| InterfaceError::Query { what, name: name.to_owned(), source };
        let socket = socket().map_err(failed("the settings"))?;
        let index = index(&socket, name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => InterfaceError::Unknown { name: name.to_owned(), existing: names() },
            _ => failed("the index")(error),
        })?;
        let kind = kind(&socket, name).map_err(failed("the type"))?;
        if !matches!(kind, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK) {
            return Err(InterfaceError::NotEthernet { name: name.to_owned(), kind });
        }
        let mtu = mtu(&socket, name).map_err(failed("the MTU"))?;
        let driver = optional(driver(&socket, name)).map_err(failed("the driver"))?.unwrap_or_default();
        let rx_queues = match optional(channels(&socket, name)).map_err(failed("the RX queues"))? {
            Some(count) if count > 0 => count,
            // The driver reports no channels. `/sys` lists the queues.
            _ => sysfs(name, index).and_then(|directory| sysfs_queues(&directory)).unwrap_or(1),
        };
        // Some drivers do not report it.
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

    /// The queues that get a lane, in the configured order.
    ///
    /// # Errors
    /// [`InterfaceError::NoQueue`] if the configuration names a queue that does not exist.
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

    /// The queues that are not in `lanes`: their packets still go to the kernel.
    #[must_use]
    pub fn without_lane(&self, lanes: &[QueueId]) -> Vec<QueueId> {
        (0..self.rx_queues).map(QueueId).filter(|queue| !lanes.contains(queue)).collect()
    }

    /// The interface's directory in `/sys`, if `/sys` shows this interface.
    pub(crate) fn sysfs(&self) -> Option<PathBuf> {
        sysfs(&self.name, self.index)
    }

    /// Whether the interface receives its packets through lower interfaces, on which native XDP
    /// runs: a bond, or a Hyper-V interface with a virtual function. If so, the kernel drops the
    /// packets that native XDP redirects to a socket of this interface.
    #[must_use]
    pub fn is_fed_from_below(&self) -> bool {
        match self.driver.as_str() {
            "bonding" => true,
            "hv_netvsc" => !self.lower().is_empty(),
            _ => false,
        }
    }

    /// The names of the interfaces directly below this one; empty if `/sys` does not show them.
    #[must_use]
    pub fn lower(&self) -> Vec<String> {
        let entries =
            self.sysfs().and_then(|directory| fs::read_dir(directory).ok()).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("lower_")?.to_owned()))
            .collect();
        names.sort();
        names
    }

    /// All interfaces below this one that `/sys` shows, each before those below it.
    #[must_use]
    pub fn all_below(&self) -> Vec<Interface> {
        let mut all = Vec::new();
        self.add_below(&mut all);
        all
    }

    fn add_below(&self, all: &mut Vec<Interface>) {
        for name in self.lower() {
            // One that is not an Ethernet device, or no longer exists, has nothing of interest.
            if let Ok(lower) = Interface::find(&name)
                && !all.iter().any(|known| known.index == lower.index)
            {
                all.push(lower.clone());
                lower.add_below(all);
            }
        }
    }
}

/// The names of all interfaces of this network namespace; empty if the query fails.
fn names() -> Vec<String> {
    let Ok(all) = if_nameindex() else { return Vec::new() };
    all.iter().map(|interface| interface.name().to_string_lossy().into_owned()).collect()
}

/// The interface's directory in `/sys`, unless `/sys` shows the interface of another namespace.
fn sysfs(name: &str, index: u32) -> Option<PathBuf> {
    let directory = Path::new("/sys/class/net").join(name);
    let shown: u32 = fs::read_to_string(directory.join("ifindex")).ok()?.trim().parse().ok()?;
    (shown == index).then_some(directory)
}

fn sysfs_queues(directory: &Path) -> Option<u32> {
    let queues = fs::read_dir(directory.join("queues")).ok()?.flatten();
    let count = queues.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"rx-")).count();
    u32::try_from(count).ok().filter(|&count| count > 0)
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
    fn the_loopback_interface_is_found() {
        let lo = Interface::find("lo").unwrap();
        assert!(lo.index > 0 && lo.mtu > 0 && lo.rx_queues == 1 && lo.bus.is_empty(), "{lo:?}");
    }

    #[test]
    fn an_offload_that_cannot_change_is_an_error() {
        let lo = Interface::find("lo").unwrap();
        assert!(!lo.offload(Offload::Lro).unwrap());
        // The loopback interface has no LRO; without root, the change is refused.
        let error = lo.set_offload(Offload::Lro, true).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("cannot turn on lro of `lo`: "), "{message}");
        assert!(message.ends_with("; see `ethtool -k lo`"), "{message}");
    }

    #[test]
    fn an_unknown_interface_error_lists_the_existing() {
        let error = Interface::find("no-such-if").unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("`no-such-if` in this network namespace; existing interfaces: "),
            "{message}"
        );
        assert!(message.contains("lo"), "{message}");
        let long = Interface::find("a-name-of-more-than-15-bytes").unwrap_err();
        assert!(matches!(long, InterfaceError::Unknown { .. }), "{long}");
    }

    #[test]
    fn the_error_names_a_device_without_ethernet() {
        let refused = |kind| InterfaceError::NotEthernet { name: "x0".to_owned(), kind };
        let message = refused(libc::ARPHRD_NONE).to_string();
        assert_eq!(
            message,
            "`x0` is a layer-3 device, such as tun or WireGuard: its packets have no Ethernet header; \
             use the Ethernet interface that carries them, or a tunnel of Ethernet frames (tap, \
             gretap, VXLAN)"
        );
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
    fn selected_queues_must_exist() {
        let four = interface(4);
        assert_eq!(four.select(&Queues::All).unwrap(), [0, 1, 2, 3].map(QueueId));
        assert_eq!(four.select(&Queues::List(vec![3, 1])).unwrap(), [3, 1].map(QueueId));
        assert_eq!(four.without_lane(&[3, 1].map(QueueId)), [0, 2].map(QueueId));
        let message = four.select(&Queues::List(vec![0, 4])).unwrap_err().to_string();
        assert_eq!(message, "`eth1` has no RX queue 4: it has 4 (0 to 3); see `ethtool -l eth1`");
    }
}
