//! Allocates memory near the interface: a closure runs with its memory bound to one NUMA node.

use hwlocality::Topology;
use hwlocality::memory::binding::{MemoryBindingFlags, MemoryBindingPolicy};
use hwlocality::memory::nodeset::NodeSet;
use tracing::{debug, warn};

/// Calls `f` while the calling thread allocates its memory from NUMA node `node`. Restores the
/// thread's memory policy afterwards, also if `f` panics.
///
/// The policy acts when a page is first touched, so `f` must touch what it allocates. Registering a
/// UMEM does, since the kernel pins its pages. The policy is a preference: if the node is full,
/// memory comes from other nodes.
///
/// On a machine with a single node, this only calls `f`. If the binding fails, this logs a warning
/// and calls `f` without it.
pub fn with_memory_bound_to<R>(node: usize, f: impl FnOnce() -> R) -> R {
    let topology = match Topology::new() {
        Ok(topology) => topology,
        Err(error) => {
            warn!(node, %error, "packet memory is not bound to the interface's NUMA node: hwloc failed");
            return f();
        }
    };
    if topology.nodeset().weight() == Some(1) {
        debug!("packet memory needs no binding: the machine has a single NUMA node");
        return f();
    }
    if topology.node_with_os_index(node).is_none() {
        warn!(
            node,
            "packet memory is not bound to the interface's NUMA node: the node has no memory that this process may use"
        );
        return f();
    }
    match Binding::new(&topology, node) {
        Ok(_binding) => f(),
        Err(error) => {
            warn!(node, error, "packet memory is not bound to the interface's NUMA node");
            f()
        }
    }
}

/// Binds the memory of the calling thread to a node. Dropping it restores the previous policy.
struct Binding<'a> {
    topology: &'a Topology,
    before: (NodeSet, Option<MemoryBindingPolicy>),
}

impl<'a> Binding<'a> {
    fn new(topology: &'a Topology, node: usize) -> Result<Self, String> {
        let before = topology
            .memory_binding::<NodeSet>(MemoryBindingFlags::THREAD)
            .map_err(|error| format!("cannot read the thread's memory policy: {error}"))?;
        let mut nodes = NodeSet::new();
        nodes.set(node);
        topology
            .bind_memory(&nodes, MemoryBindingPolicy::Bind, MemoryBindingFlags::THREAD)
            .map_err(|error| format!("cannot set the thread's memory policy: {error}"))?;
        Ok(Self { topology, before })
    }
}

impl Drop for Binding<'_> {
    fn drop(&mut self) {
        let flags = MemoryBindingFlags::THREAD;
        let restored = match &self.before {
            (nodes, Some(policy)) if *policy != MemoryBindingPolicy::FirstTouch => {
                self.topology.bind_memory(nodes, *policy, flags)
            }
            _ => self.topology.unbind_memory(flags),
        };
        if let Err(error) = restored {
            warn!(%error, "the memory policy of the thread could not be restored");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closure_runs_on_every_machine() {
        for node in [0, 1, 4000] {
            assert_eq!(with_memory_bound_to(node, || 7), 7);
        }
    }

    #[test]
    fn a_binding_ends_with_its_scope() {
        let topology = Topology::new().unwrap();
        let policy = || topology.memory_binding::<NodeSet>(MemoryBindingFlags::THREAD).ok();
        let before = policy();
        match Binding::new(&topology, 0) {
            Ok(binding) => {
                assert_eq!(policy().and_then(|(_, policy)| policy), Some(MemoryBindingPolicy::Bind));
                drop(binding);
                assert_eq!(policy(), before);
            }
            Err(error) => eprintln!("skipped: this kernel binds no memory: {error}"),
        }
    }
}
