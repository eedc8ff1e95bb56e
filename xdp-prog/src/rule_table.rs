//! Pass rules in the form that the program reads: `struct pass_rules`, looked up by one load per
//! packet.

use std::mem::{offset_of, size_of};

use crate::object::skeleton::types;
use crate::rule::{PassRule, SCTP, TCP, UDP};

// The values of structs.h.
const RULE_PASS: u8 = 1;
const RULE_PORTS: u8 = 2;
/// The protocols with ports. A protocol's index here is its index into `pass_rules.ports`.
const PORT_PROTOCOLS: [u8; 3] = [TCP, UDP, SCTP];
const PORT_BITMAP_BYTES: usize = 8192;

const ACTIVE: usize = offset_of!(types::pass_rules, active);
const PROTOCOLS: usize = offset_of!(types::pass_rules, protocols);
const PORTS: usize = offset_of!(types::pass_rules, ports);
const TABLE_BYTES: usize = size_of::<types::pass_rules>();
const _: () = assert!(TABLE_BYTES == 1 + 256 + PORT_PROTOCOLS.len() * PORT_BITMAP_BYTES);
const _: () = assert!(TABLE_BYTES == size_of::<types::bss>(), "the rules must be all of .bss");

/// The value for the only entry of the program's `.bss` map that makes `rules` effective. For
/// loaders other than [`SteerProgram`](crate::SteerProgram).
pub fn rule_table(rules: &[PassRule]) -> Vec<u8> {
    let mut table = vec![0; TABLE_BYTES];
    table[ACTIVE] = u8::from(!rules.is_empty());
    for (index, &protocol) in (0_u8..).zip(&PORT_PROTOCOLS) {
        let bitmap = PORTS + usize::from(index) * PORT_BITMAP_BYTES;
        for port in rules.iter().filter(|rule| rule.protocol() == protocol).filter_map(|rule| rule.port()) {
            table[bitmap + usize::from(port >> 3)] |= 1 << (port & 7);
            table[PROTOCOLS + usize::from(protocol)] = RULE_PORTS + index;
        }
    }
    // After the ports, because a rule for a whole protocol includes the rules for its ports.
    for rule in rules.iter().filter(|rule| rule.port().is_none()) {
        table[PROTOCOLS + usize::from(rule.protocol())] = RULE_PASS;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rules: &[&str]) -> Vec<u8> {
        rule_table(&rules.iter().map(|rule| rule.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn no_rules_are_all_zeros() {
        assert_eq!(table(&[]), vec![0; TABLE_BYTES]);
    }

    #[test]
    fn a_protocol_sets_only_its_own_entry() {
        let table = table(&["icmp"]);
        assert_eq!(table[ACTIVE], 1);
        assert_eq!(table[PROTOCOLS + 1], RULE_PASS);
        assert_eq!(table.iter().filter(|&&byte| byte != 0).count(), 2);
    }

    #[test]
    fn a_port_sets_one_bit_of_its_protocols_bitmap() {
        let table = table(&["udp/53", "sctp/65535"]);
        assert_eq!(table[PROTOCOLS + usize::from(UDP)], RULE_PORTS + 1);
        assert_eq!(table[PROTOCOLS + usize::from(SCTP)], RULE_PORTS + 2);
        assert_eq!(table[PORTS + PORT_BITMAP_BYTES + 53 / 8], 1 << (53 % 8));
        assert_eq!(*table.last().unwrap(), 0x80);
        assert_eq!(table.iter().filter(|&&byte| byte != 0).count(), 5);
    }

    #[test]
    fn a_whole_protocol_wins_over_its_ports_in_any_order() {
        for rules in [["tcp", "tcp/22"], ["tcp/22", "tcp"]] {
            assert_eq!(table(&rules)[PROTOCOLS + usize::from(TCP)], RULE_PASS);
        }
    }
}
