//! The output of `xfan topology`: which thread would run on which CPU, and why. Fits 80 columns.

use std::fmt::Write as _;

use xfan_shm::ids::QueueId;

use crate::config::format_list;
use crate::host::interface::Interface;
use crate::host::placement::{Placement, Slot};
use crate::host::topology::{Core, Machine};

/// Width of the output in columns.
const COLUMNS: usize = 80;

/// Describes the interface, the machine and the placement. `queues` are the queues that have a
/// lane.
#[must_use]
pub fn show(machine: &Machine, interface: &Interface, queues: &[QueueId], placement: &Placement) -> String {
    let mut lines = Vec::new();
    let driver = if interface.driver.is_empty() { "unknown" } else { &interface.driver };
    head(
        &mut lines,
        "interface",
        &format!(
            "{}, driver {driver}, RX queues {}, MTU {}",
            interface.name, interface.rx_queues, interface.mtu
        ),
    );
    if let Some(nic) = &machine.nic {
        head(
            &mut lines,
            "near to",
            &match nic.node {
                Some(node) => format!("NUMA node {node} ({})", nic.source),
                None => format!("no CPU in particular: {}", nic.source),
            },
        );
    }
    let distinct = |what: fn(&Core) -> usize| {
        let mut all: Vec<_> = machine.cores.iter().map(what).collect();
        all.sort_unstable();
        all.dedup();
        all.len()
    };
    let cpus = machine.cpus();
    head(
        &mut lines,
        "machine",
        &format!(
            "packages {}, NUMA nodes {}, cores {}, CPUs {} ({})",
            distinct(|core| core.package),
            distinct(|core| core.node),
            machine.cores.len(),
            cpus.len(),
            format_list(&cpus)
        ),
    );
    let left = interface.without_lane(queues);
    if !left.is_empty() {
        let left: Vec<usize> = left.iter().map(|queue| queue.index()).collect();
        head(
            &mut lines,
            "no lane",
            &format!("queues {}: their packets go to the kernel", format_list(&left)),
        );
    }

    lines.push(String::new());
    lines.push(format!("{:<12}{:>5}{:>6}{:>5}{:>5}  why", "thread", "queue", "CPU", "node", "L3"));
    for (lane, (slot, queue)) in placement.lanes.iter().zip(queues).enumerate() {
        row(&mut lines, machine, &format!("lane {lane}"), &queue.to_string(), slot);
    }
    for (worker, slot) in placement.workers.iter().enumerate() {
        row(&mut lines, machine, &format!("worker {worker}"), "", slot);
    }

    if !placement.notes.is_empty() {
        lines.push(String::new());
    }
    for note in &placement.notes {
        wrap(&mut lines, "note: ", note);
    }
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{}", line.trim_end());
        text
    })
}

fn head(lines: &mut Vec<String>, name: &str, value: &str) {
    wrap(lines, &format!("{name:<12}"), value);
}

fn row(lines: &mut Vec<String>, machine: &Machine, thread: &str, queue: &str, slot: &Slot) {
    let core = machine.core_of(slot.cpu);
    let node = core.map_or_else(|| "-".to_owned(), |core| core.node.to_string());
    let l3 = core.and_then(|core| core.l3).map_or_else(|| "-".to_owned(), |l3| l3.to_string());
    wrap(lines, &format!("{thread:<12}{queue:>5}{:>6}{node:>5}{l3:>5}  ", slot.cpu), &slot.reason);
}

/// Wraps `text` at spaces. Lines after the first are indented by the width of `prefix`.
fn wrap(lines: &mut Vec<String>, prefix: &str, text: &str) {
    let indent = prefix.chars().count();
    let mut line = prefix.to_owned();
    for word in text.split(' ') {
        let begun = line.chars().count() > indent;
        if begun && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines.push(std::mem::replace(&mut line, " ".repeat(indent)));
            line.push_str(word);
        } else {
            line.push_str(if begun { " " } else { "" });
            line.push_str(word);
        }
    }
    lines.push(line);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::placement::{place, tests::machine};

    fn interface() -> Interface {
        Interface {
            name: "eth1".to_owned(),
            index: 2,
            mtu: 1500,
            rx_queues: 4,
            rx_ring: 4096,
            driver: "ixgbe".to_owned(),
            bus: "0000:01:00.0".to_owned(),
        }
    }

    #[test]
    fn the_table_shows_cpus_and_reasons() {
        let machine = machine(2, 4, 1, Some(1));
        let placement = place(&machine, 2, 3, None).unwrap();
        assert_eq!(
            show(&machine, &interface(), &[0, 1].map(QueueId), &placement),
            "\
interface   eth1, driver ixgbe, RX queues 4, MTU 1500
near to     NUMA node 1 (hwloc, PCI device 0000:01:00.0)
machine     packages 2, NUMA nodes 2, cores 8, CPUs 8 (0-7)
no lane     queues 2,3: their packets go to the kernel

thread      queue   CPU node   L3  why
lane 0          0     4    1    1  core on the interface's node 1
lane 1          1     5    1    1  core on the interface's node 1
worker 0              6    1    1  core on the interface's node 1
worker 1              7    1    1  core on the interface's node 1
worker 2              0    0    0  next core: the interface's node 1 is full
"
        );
    }

    #[test]
    fn nothing_is_wider_than_80_columns() {
        for (nodes, cores, smt, nic) in
            [(1, 1, 1, None), (2, 2, 2, Some(0)), (2, 1, 1, Some(1)), (2, 64, 2, None)]
        {
            let machine = machine(nodes, cores, smt, nic);
            let text = show(
                &machine,
                &interface(),
                &[0, 1, 2, 3].map(QueueId),
                &place(&machine, 4, 12, None).unwrap(),
            );
            assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        }
    }
}
