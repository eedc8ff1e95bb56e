//! The CPUs of the machine as hwloc reports them, reduced to what placement needs.

mod memory;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use hwlocality::Topology;
use hwlocality::cpu::binding::CpuBindingFlags;
use hwlocality::cpu::cpuset::CpuSet;
use hwlocality::object::TopologyObject;
use hwlocality::object::types::ObjectType;
use hwlocality::topology::builder::TypeFilter;

use crate::host::interface::Interface;

pub use memory::with_memory_bound_to;

/// The CPUs that this process may use, and the location of the interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The physical cores with at least one usable CPU, in the order of their first CPUs.
    pub cores: Vec<Core>,
    /// The location of the interface; `None` if no interface was given.
    pub nic: Option<NicLocality>,
}

/// A physical core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    /// The numbers of its usable CPUs (hardware threads), ascending. Never empty.
    pub cpus: Vec<usize>,
    /// The NUMA node with the nearest memory.
    pub node: usize,
    /// The package (socket) to which it belongs.
    pub package: usize,
    /// The L3 cache that it uses, if known.
    pub l3: Option<usize>,
}

/// The location of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicLocality {
    /// The name of the interface.
    pub name: String,
    /// Its NUMA node, if it has one and it is known.
    pub node: Option<usize>,
    /// How the node is known, or why it is not.
    pub source: LocalitySource,
}

/// How the NUMA node of an interface is known, or why it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalitySource {
    /// hwloc reports it for the PCI device with this address.
    Pci(String),
    /// hwloc reports it for the network device with this name.
    Device,
    /// `/sys` reports it.
    Sysfs,
    /// Unknown: the interface is virtual.
    Virtual,
    /// Unknown: the machine does not report it.
    Unreported,
}

impl fmt::Display for LocalitySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => write!(f, "hwloc, PCI device {address}"),
            Self::Device => f.write_str("hwloc, network device"),
            Self::Sysfs => f.write_str("/sys"),
            Self::Virtual => f.write_str("it is virtual"),
            Self::Unreported => f.write_str("the machine does not report it"),
        }
    }
}

/// Why the topology cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// hwloc fails.
    #[error("hwloc cannot read the machine's topology: {0}")]
    Hwloc(String),
}

impl Machine {
    /// Reads the topology of this machine. Only the CPUs that the calling thread may use count, so
    /// call this before any thread is pinned.
    ///
    /// # Errors
    /// hwloc cannot read the topology.
    pub fn discover(interface: Option<&Interface>) -> Result<Self, TopologyError> {
        let topology = load()?;
        let allowed = topology
            .cpu_binding(CpuBindingFlags::THREAD)
            .unwrap_or_else(|_| topology.cpuset().clone_target());
        Ok(Self {
            cores: cores(&topology, &allowed),
            nic: interface.map(|interface| locality(&topology, interface)),
        })
    }

    /// All usable CPUs, ascending.
    #[must_use]
    pub fn cpus(&self) -> Vec<usize> {
        let mut cpus: Vec<_> = self.cores.iter().flat_map(|core| core.cpus.iter().copied()).collect();
        cpus.sort_unstable();
        cpus
    }

    /// The NUMA node of the interface, if known.
    #[must_use]
    pub fn nic_node(&self) -> Option<usize> {
        self.nic.as_ref()?.node
    }

    /// The core to which a CPU belongs.
    #[must_use]
    pub fn core_of(&self, cpu: usize) -> Option<&Core> {
        self.cores.iter().find(|core| core.cpus.contains(&cpu))
    }
}

/// Loads hwloc's topology of this machine, with devices.
fn load() -> Result<Topology, TopologyError> {
    let topology = Topology::builder()
        .with_io_type_filter(TypeFilter::KeepImportant)
        .map_err(|error| TopologyError::Hwloc(error.to_string()))?;
    topology.build().map_err(|error| TopologyError::Hwloc(error.to_string()))
}

/// The cores with at least one CPU in `allowed`.
fn cores(topology: &Topology, allowed: &CpuSet) -> Vec<Core> {
    let mut cores: Vec<(_, Core)> = Vec::new();
    for unit in topology.objects_with_type(ObjectType::PU) {
        let Some(cpu) = unit.os_index().filter(|&cpu| allowed.is_set(cpu)) else { continue };
        let ancestor = |kind| unit.first_ancestor_with_type(kind);
        // If hwloc reports no cores, each CPU counts as one.
        let identity = ancestor(ObjectType::Core).unwrap_or(unit).global_persistent_index();
        if let Some((_, core)) = cores.iter_mut().find(|(known, _)| *known == identity) {
            core.cpus.push(cpu);
            continue;
        }
        let core = Core {
            cpus: vec![cpu],
            node: first_node(unit).unwrap_or(0),
            package: ancestor(ObjectType::Package).map_or(0, TopologyObject::logical_index),
            l3: ancestor(ObjectType::L3Cache).map(TopologyObject::logical_index),
        };
        cores.push((identity, core));
    }
    let mut cores: Vec<_> = cores.into_iter().map(|(_, core)| core).collect();
    for core in &mut cores {
        core.cpus.sort_unstable();
    }
    cores.sort_unstable_by_key(|core| core.cpus[0]);
    cores
}

fn first_node(object: &TopologyObject) -> Option<usize> {
    object.nodeset()?.first_set().map(usize::from)
}

/// The NUMA node of a device: the node of its nearest ancestor with CPUs, if that is a single node.
fn only_node(device: &TopologyObject) -> Option<usize> {
    let nodes = device.first_non_io_ancestor()?.nodeset()?;
    (nodes.weight() == Some(1)).then(|| nodes.first_set().map(usize::from)).flatten()
}

/// Finds the NUMA node of an interface. The PCI address comes first: the driver reports it, and it
/// is the same in every network namespace.
fn locality(topology: &Topology, interface: &Interface) -> NicLocality {
    let Interface { name, bus, .. } = interface;
    let at = |node, source| NicLocality { name: name.clone(), node, source };
    if let Ok(Some(device)) = topology.pci_device_by_bus_id_string(bus)
        && let Some(node) = only_node(device)
    {
        return at(Some(node), LocalitySource::Pci(bus.clone()));
    }
    let folder = interface.sysfs();
    let by_name = |device: &&TopologyObject| device.name().is_some_and(|n| n.to_bytes() == name.as_bytes());
    if folder.is_some()
        && let Some(node) = topology.os_devices().find(by_name).and_then(only_node)
    {
        return at(Some(node), LocalitySource::Device);
    }
    let device = folder.map(|folder| folder.join("device")).filter(|device| device.exists());
    let of_bus = (!bus.is_empty()).then(|| Path::new("/sys/bus/pci/devices").join(bus));
    // The file contains -1 if there is no node, which does not parse.
    let reported = |device: &PathBuf| fs::read_to_string(device.join("numa_node")).ok()?.trim().parse().ok();
    match of_bus.iter().chain(&device).find_map(reported) {
        Some(node) => at(Some(node), LocalitySource::Sysfs),
        None if bus.is_empty() && device.is_none() => at(None, LocalitySource::Virtual),
        None => at(None, LocalitySource::Unreported),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn synthetic(description: &str, allowed: &[usize]) -> Vec<Core> {
        let topology = Topology::builder().from_synthetic(description).unwrap().build().unwrap();
        let mut set = CpuSet::new();
        for &cpu in allowed {
            set.set(cpu);
        }
        cores(&topology, &set)
    }

    #[test]
    fn siblings_are_one_core() {
        let cores = synthetic("pack:1 [numa] l3:1 core:2 pu:2", &[0, 1, 2, 3]);
        let core = |cpus: &[usize]| Core { cpus: cpus.to_vec(), node: 0, package: 0, l3: Some(0) };
        assert_eq!(cores, [core(&[0, 1]), core(&[2, 3])]);
    }

    #[test]
    fn nodes_packages_and_caches_are_distinguished() {
        let cores = synthetic("pack:2 [numa] l3:2 core:2 pu:1", &[0, 1, 2, 3, 4, 5, 6, 7]);
        let places: Vec<_> = cores.iter().map(|core| (core.package, core.node, core.l3)).collect();
        assert_eq!(places[0], (0, 0, Some(0)));
        assert_eq!(places[2], (0, 0, Some(1)));
        assert_eq!(places[4], (1, 1, Some(2)));
        assert_eq!(places[7], (1, 1, Some(3)));
    }

    #[test]
    fn disallowed_cpus_are_left_out() {
        let cores = synthetic("numa:1 core:2 pu:2", &[1, 2, 3]);
        assert_eq!(cores.iter().map(|core| core.cpus.clone()).collect::<Vec<_>>(), [vec![1], vec![2, 3]]);
    }

    #[test]
    fn the_loopback_interface_is_on_no_node() {
        let lo = Interface::find("lo").unwrap();
        let machine = Machine::discover(Some(&lo)).unwrap();
        assert!(!machine.cpus().is_empty());
        assert_eq!(machine.nic.unwrap().source, LocalitySource::Virtual);
    }
}
