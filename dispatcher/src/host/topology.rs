//! The machine as hwloc sees it, reduced to what placement needs.

mod memory;
mod show;

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
pub use show::show;

/// The CPUs this process may run on, and where the interface sits among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The physical cores with at least one CPU that we may use, in the order of their CPUs.
    pub cores: Vec<Core>,
    /// The interface's place. `None` when no interface was asked about.
    pub nic: Option<NicLocality>,
}

/// A physical core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    /// The numbers of its CPUs (hardware threads) that we may use, ascending. Never empty.
    pub cpus: Vec<usize>,
    /// The NUMA node whose memory is nearest.
    pub node: usize,
    /// The package (socket) it lies in.
    pub package: usize,
    /// The L3 cache it uses, if the machine tells.
    pub l3: Option<usize>,
}

/// Where an interface sits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicLocality {
    /// The interface.
    pub name: String,
    /// Its NUMA node, if it has one and the machine tells.
    pub node: Option<usize>,
    /// How we know.
    pub source: LocalitySource,
}

/// How we know where an interface sits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalitySource {
    /// hwloc knows the PCI device of this address.
    Pci(String),
    /// hwloc knows a network device of this name.
    Device,
    /// `/sys` gives the device's node.
    Sysfs,
    /// We do not: the interface is virtual and sits nowhere.
    Virtual,
    /// We do not: the machine does not tell.
    Untold,
}

impl fmt::Display for LocalitySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pci(address) => write!(f, "hwloc, PCI device {address}"),
            Self::Device => f.write_str("hwloc, network device"),
            Self::Sysfs => f.write_str("/sys"),
            Self::Virtual => f.write_str("it is virtual"),
            Self::Untold => f.write_str("the machine does not tell"),
        }
    }
}

/// Why the machine cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// hwloc fails.
    #[error("hwloc cannot read the machine's topology: {0}")]
    Hwloc(String),
}

impl Machine {
    /// Looks at this machine. Only the CPUs that the calling thread may run on count, so call it before
    /// any thread is pinned.
    ///
    /// # Errors
    ///
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

    /// Every CPU we may run on, ascending.
    #[must_use]
    pub fn cpus(&self) -> Vec<usize> {
        let mut cpus: Vec<_> = self.cores.iter().flat_map(|core| core.cpus.iter().copied()).collect();
        cpus.sort_unstable();
        cpus
    }

    /// The NUMA node of the interface, if it is known.
    #[must_use]
    pub fn nic_node(&self) -> Option<usize> {
        self.nic.as_ref()?.node
    }

    /// The core that has this CPU.
    #[must_use]
    pub fn core_of(&self, cpu: usize) -> Option<&Core> {
        self.cores.iter().find(|core| core.cpus.contains(&cpu))
    }
}

/// hwloc's topology of this machine, devices included.
fn load() -> Result<Topology, TopologyError> {
    let topology = Topology::builder()
        .with_io_type_filter(TypeFilter::KeepImportant)
        .map_err(|error| TopologyError::Hwloc(error.to_string()))?;
    topology.build().map_err(|error| TopologyError::Hwloc(error.to_string()))
}

/// The cores of `topology` with a CPU in `allowed`.
fn cores(topology: &Topology, allowed: &CpuSet) -> Vec<Core> {
    let mut cores: Vec<(_, Core)> = Vec::new();
    for unit in topology.objects_with_type(ObjectType::PU) {
        let Some(cpu) = unit.os_index().filter(|&cpu| allowed.is_set(cpu)) else { continue };
        let place = |kind| unit.first_ancestor_with_type(kind);
        // Where hwloc sees no cores every CPU is one.
        let identity = place(ObjectType::Core).unwrap_or(unit).global_persistent_index();
        if let Some((_, core)) = cores.iter_mut().find(|(known, _)| *known == identity) {
            core.cpus.push(cpu);
            continue;
        }
        let core = Core {
            cpus: vec![cpu],
            node: first_node(unit).unwrap_or(0),
            package: place(ObjectType::Package).map_or(0, TopologyObject::logical_index),
            l3: place(ObjectType::L3Cache).map(TopologyObject::logical_index),
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

/// The node of a device: that of its nearest ancestor with CPUs, if that lies in a single node.
fn only_node(device: &TopologyObject) -> Option<usize> {
    let nodes = device.first_non_io_ancestor()?.nodeset()?;
    (nodes.weight() == Some(1)).then(|| nodes.first_set().map(usize::from)).flatten()
}

/// The PCI address comes from the driver and is the same in every network namespace, so it is asked first.
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
    // Where there is no node the file says -1.
    let told = |device: &PathBuf| fs::read_to_string(device.join("numa_node")).ok()?.trim().parse().ok();
    match of_bus.iter().chain(&device).find_map(told) {
        Some(node) => at(Some(node), LocalitySource::Sysfs),
        None if bus.is_empty() && device.is_none() => at(None, LocalitySource::Virtual),
        None => at(None, LocalitySource::Untold),
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
    fn nodes_packages_and_caches_are_told_apart() {
        let cores = synthetic("pack:2 [numa] l3:2 core:2 pu:1", &[0, 1, 2, 3, 4, 5, 6, 7]);
        let places: Vec<_> = cores.iter().map(|core| (core.package, core.node, core.l3)).collect();
        assert_eq!(places[0], (0, 0, Some(0)));
        assert_eq!(places[2], (0, 0, Some(1)));
        assert_eq!(places[4], (1, 1, Some(2)));
        assert_eq!(places[7], (1, 1, Some(3)));
    }

    #[test]
    fn cpus_that_are_not_allowed_are_not_there() {
        let cores = synthetic("numa:1 core:2 pu:2", &[1, 2, 3]);
        assert_eq!(cores.iter().map(|core| core.cpus.clone()).collect::<Vec<_>>(), [vec![1], vec![2, 3]]);
    }

    #[test]
    fn this_machine_has_a_cpu_and_a_loopback_that_is_near_to_none() {
        let lo = Interface::find("lo").unwrap();
        let machine = Machine::discover(Some(&lo)).unwrap();
        assert!(!machine.cpus().is_empty());
        assert_eq!(machine.nic.unwrap().source, LocalitySource::Virtual);
    }
}
