//! Assigns a CPU to each lane and worker: lanes get the cores nearest to the interface, workers the
//! next ones.

use crate::config::format_list;
use crate::host::topology::{Core, Machine};

/// The CPUs of all lanes and workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// One slot for each lane, in the order of the lanes.
    pub lanes: Vec<Slot>,
    /// One slot for each worker.
    pub workers: Vec<Slot>,
    /// Whether any CPU runs more than one lane or worker. Threads that share a CPU must yield, not
    /// spin.
    pub shared: bool,
    /// Sentences for the operator, such as what limits performance.
    pub notes: Vec<String>,
}

/// The CPU of one lane or worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The number of the CPU (hardware thread) to which it is pinned.
    pub cpu: usize,
    /// Whether another lane or worker is pinned to the same CPU.
    pub shared: bool,
    /// Why this CPU was chosen.
    pub reason: String,
}

/// Why lanes and workers cannot be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The setting `cores` names a CPU that does not exist or that this process may not use.
    #[error(
        "`cores` names CPU {cpu}, which does not exist or which this process may not use; it may use {}",
        format_list(allowed)
    )]
    NotAllowed {
        /// The requested CPU.
        cpu: usize,
        /// The CPUs that this process may use.
        allowed: Vec<usize>,
    },
    /// The process may use no CPU.
    #[error("found no CPU that this process may use; check `taskset -p $$` and the cpuset of its cgroup")]
    NoCpu,
}

/// A CPU, and why it comes next.
#[derive(Clone)]
struct Candidate {
    cpu: usize,
    reason: String,
}

/// Assigns a CPU to every lane and every worker.
///
/// Physical cores come first: those of the interface's NUMA node, then those of its package, then
/// all others. SMT siblings follow once every core is used. `asked`, from the setting `cores`,
/// replaces this order.
///
/// Lanes get the first CPUs, workers the next. If there are too few, workers share the CPUs that
/// the lanes left; workers share CPUs with lanes only if the lanes left none.
///
/// # Errors
/// [`PlacementError`]
pub fn place(
    machine: &Machine,
    lanes: usize,
    workers: usize,
    asked: Option<&[usize]>,
) -> Result<Placement, PlacementError> {
    let order = match asked {
        Some(cpus) => as_asked(machine, cpus)?,
        None => nearest_first(machine),
    };
    if order.is_empty() {
        return Err(PlacementError::NoCpu);
    }
    let left = order.len().saturating_sub(lanes);
    let of_worker = |worker: usize| if left > 0 { lanes + worker % left } else { lanes + worker };
    let threads: Vec<Candidate> = (0..lanes)
        .chain((0..workers).map(of_worker))
        .map(|position| order[position % order.len()].clone())
        .collect();

    let names: Vec<String> = (0..lanes)
        .map(|lane| format!("lane {lane}"))
        .chain((0..workers).map(|worker| format!("worker {worker}")))
        .collect();
    let slot = |position: usize| {
        let Candidate { cpu, reason } = threads[position].clone();
        let others: Vec<&str> = (0..threads.len())
            .filter(|&other| other != position && threads[other].cpu == cpu)
            .map(|other| names[other].as_str())
            .collect();
        let reason = match others.as_slice() {
            [] => reason,
            [other] => format!("{reason}; shared with {other}"),
            _ => format!("{reason}; shared with {} others", others.len()),
        };
        Slot { cpu, shared: !others.is_empty(), reason }
    };
    let slots: Vec<Slot> = (0..threads.len()).map(slot).collect();
    let shared = slots.iter().any(|slot| slot.shared);
    let (lanes, workers) = slots.split_at(lanes);
    let notes = notes(machine, lanes, workers, asked.is_some());
    Ok(Placement { lanes: lanes.to_vec(), workers: workers.to_vec(), shared, notes })
}

fn as_asked(machine: &Machine, cpus: &[usize]) -> Result<Vec<Candidate>, PlacementError> {
    let allowed = machine.cpus();
    let candidate = |&cpu: &usize| {
        if allowed.contains(&cpu) {
            Ok(Candidate { cpu, reason: "requested by `cores`".to_owned() })
        } else {
            Err(PlacementError::NotAllowed { cpu, allowed: allowed.clone() })
        }
    };
    cpus.iter().map(candidate).collect()
}

fn nearest_first(machine: &Machine) -> Vec<Candidate> {
    let home = machine.nic_node();
    let home_package = machine.cores.iter().find(|core| Some(core.node) == home).map(|core| core.package);
    let mut cores: Vec<&Core> = machine.cores.iter().filter(|core| !core.cpus.is_empty()).collect();
    cores.sort_by_key(|core| {
        let away = match home {
            Some(home) if core.node == home => 0,
            Some(_) if Some(core.package) == home_package => 1,
            _ => 2,
        };
        (away, core.package, core.node, core.l3, core.cpus[0])
    });
    let reason = |core: &Core, depth: usize| match (depth, home) {
        (1.., _) => format!("SMT sibling of CPU {}: no core is left", core.cpus[0]),
        (_, Some(home)) if core.node == home => format!("core on the interface's node {home}"),
        (_, Some(home)) => format!("next core: the interface's node {home} is full"),
        (_, None) => "next core".to_owned(),
    };
    let deepest = cores.iter().map(|core| core.cpus.len()).max().unwrap_or(0);
    let level = |depth: usize| {
        let reason = &reason;
        cores.iter().filter_map(move |core| {
            let &cpu = core.cpus.get(depth)?;
            Some(Candidate { cpu, reason: reason(core, depth) })
        })
    };
    (0..deepest).flat_map(level).collect()
}

fn notes(machine: &Machine, lanes: &[Slot], workers: &[Slot], asked: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let mut used: Vec<usize> = lanes.iter().chain(workers).map(|slot| slot.cpu).collect();
    let threads = used.len();
    used.sort_unstable();
    used.dedup();
    if used.len() < threads {
        let remedy = if asked { "list more CPUs in `cores`" } else { "use fewer workers or queues" };
        notes.push(format!(
            "{} and {} share {}: threads that share a CPU yield instead of spinning, and are slower; \
             to avoid this, {remedy}",
            plural(lanes.len(), "lane"),
            plural(workers.len(), "worker"),
            plural(used.len(), "CPU"),
        ));
    }
    if let Some(nic) = &machine.nic
        && nic.node.is_none()
        && machine.cores.iter().any(|core| core.node != machine.cores[0].node)
    {
        notes.push(format!("the NUMA node of {} is unknown: {}", nic.name, nic.source));
    }
    if let Some(nic) = &machine.nic
        && let Some(home) = nic.node
    {
        let away = lanes
            .iter()
            .filter(|slot| machine.core_of(slot.cpu).is_some_and(|core| core.node != home))
            .count();
        if away > 0 {
            notes.push(format!(
                "lanes that are not on NUMA node {home}, where {} is: {away} of {}; their packets cross the interconnect",
                nic.name,
                lanes.len()
            ));
        }
    }
    notes
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 { format!("{count} {noun}") } else { format!("{count} {noun}s") }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::host::topology::{LocalitySource, NicLocality};
    use proptest::prelude::*;

    /// A machine of `nodes` nodes with `cores` cores of `smt` CPUs each. SMT siblings are numbered
    /// as on x86: `c` and `c + all cores`.
    pub(crate) fn machine(nodes: usize, cores: usize, smt: usize, nic: Option<usize>) -> Machine {
        let all = nodes * cores;
        let core = |index: usize| Core {
            cpus: (0..smt).map(|thread| index + thread * all).collect(),
            node: index / cores,
            package: index / cores,
            l3: Some(index / cores),
        };
        let (node, source) = match nic {
            Some(node) => (Some(node), LocalitySource::Pci("0000:01:00.0".to_owned())),
            None => (None, LocalitySource::Virtual),
        };
        let nic = Some(NicLocality { name: "eth1".to_owned(), node, source });
        Machine { cores: (0..all).map(core).collect(), nic }
    }

    fn cpus(slots: &[Slot]) -> Vec<usize> {
        slots.iter().map(|slot| slot.cpu).collect()
    }

    fn auto(machine: &Machine, lanes: usize, workers: usize) -> Placement {
        place(machine, lanes, workers, None).unwrap()
    }

    #[test]
    fn a_single_core_is_shared_with_a_note() {
        let placement = auto(&machine(1, 1, 1, None), 1, 2);
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![0], vec![0, 0]));
        assert!(placement.shared && placement.workers[0].shared);
        assert!(placement.notes[0].starts_with("1 lane and 2 workers share 1 CPU:"), "{:?}", placement.notes);
        assert!(placement.lanes[0].reason.ends_with("shared with 2 others"), "{:?}", placement.lanes);
    }

    #[test]
    fn workers_share_with_workers_before_lanes() {
        let placement = auto(&machine(1, 2, 1, None), 1, 1);
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![0], vec![1]));
        assert!(!placement.shared && placement.notes.is_empty());
        let placement = auto(&machine(1, 2, 1, None), 1, 3);
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![0], vec![1, 1, 1]));
        assert!(placement.shared && !placement.lanes[0].shared);
        let placement = auto(&machine(1, 2, 1, None), 4, 2);
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![0, 1, 0, 1], vec![0, 1]));
    }

    #[test]
    fn the_node_of_the_interface_comes_first() {
        let placement = auto(&machine(2, 4, 1, Some(1)), 2, 4);
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![4, 5], vec![6, 7, 0, 1]));
        assert_eq!(placement.lanes[0].reason, "core on the interface's node 1");
        assert_eq!(placement.workers[2].reason, "next core: the interface's node 1 is full");
        assert!(placement.notes.is_empty(), "{:?}", placement.notes);
    }

    #[test]
    fn lanes_on_another_node_cause_a_note() {
        let placement = auto(&machine(2, 2, 1, Some(1)), 3, 1);
        assert!(placement.notes[0].contains("NUMA node 1, where eth1 is: 1 of 3;"), "{:?}", placement.notes);
        let placement = auto(&machine(2, 2, 1, None), 1, 1);
        assert!(placement.notes[0].contains("it is virtual"), "{:?}", placement.notes);
    }

    #[test]
    fn siblings_come_after_the_cores_of_all_nodes() {
        let placement = auto(&machine(2, 2, 2, Some(0)), 2, 4);
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![0, 1], vec![2, 3, 4, 5]));
        assert_eq!(placement.workers[2].reason, "SMT sibling of CPU 0: no core is left");
        assert!(!placement.shared);
    }

    #[test]
    fn configured_cores_replace_the_order() {
        let machine = machine(2, 4, 1, Some(1));
        let placement = place(&machine, 2, 2, Some(&[3, 1, 2, 2])).unwrap();
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![3, 1], vec![2, 2]));
        assert!(placement.shared && !placement.lanes[0].shared);
        let placement = place(&machine, 1, 3, Some(&[3, 1])).unwrap();
        assert_eq!((cpus(&placement.lanes), cpus(&placement.workers)), (vec![3], vec![1, 1, 1]));
    }

    #[test]
    fn a_missing_cpu_error_lists_the_usable() {
        let error = place(&machine(1, 4, 1, None), 1, 1, Some(&[0, 9])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`cores` names CPU 9, which does not exist or which this process may not use; it may use 0-3"
        );
        let nothing = Machine { cores: Vec::new(), nic: None };
        assert_eq!(place(&nothing, 1, 1, None), Err(PlacementError::NoCpu));
    }

    proptest! {
        #[test]
        fn only_allowed_cpus_are_used(
            nodes in 1usize..4, cores in 1usize..6, smt in 1usize..3, nic in prop::option::of(0usize..4),
            gone in prop::collection::vec(0usize..30, 0..12), lanes in 0usize..20, workers in 0usize..20,
        ) {
            let mut machine = machine(nodes, cores, smt, nic);
            for core in &mut machine.cores {
                core.cpus.retain(|cpu| !gone.contains(cpu));
            }
            machine.cores.retain(|core| !core.cpus.is_empty());
            let allowed = machine.cpus();
            let Ok(placement) = place(&machine, lanes, workers, None) else {
                prop_assert!(allowed.is_empty());
                return Ok(());
            };
            prop_assert_eq!((placement.lanes.len(), placement.workers.len()), (lanes, workers));
            let mut used = cpus(&placement.lanes);
            used.extend(cpus(&placement.workers));
            prop_assert!(used.iter().all(|cpu| allowed.contains(cpu)));
            used.sort_unstable();
            let doubles = used.windows(2).any(|pair| pair[0] == pair[1]);
            prop_assert_eq!(doubles, lanes + workers > allowed.len());
            prop_assert_eq!(doubles, placement.shared);
        }
    }
}
