//! Pass rules: packets of a protocol, or of a protocol's destination port, that go to the kernel.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// IP protocol number of TCP.
pub(crate) const TCP: u8 = 6;
/// IP protocol number of UDP.
pub(crate) const UDP: u8 = 17;
/// IP protocol number of SCTP.
pub(crate) const SCTP: u8 = 132;

/// The IP protocols that rules know by name. Any other is written as its number.
const NAMES: [(&str, u8); 12] = [
    ("icmp", 1),
    ("igmp", 2),
    ("tcp", TCP),
    ("udp", UDP),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("icmpv6", 58),
    ("ospf", 89),
    ("pim", 103),
    ("vrrp", 112),
    ("sctp", SCTP),
];

/// A rule for packets that go to the kernel instead of an AF_XDP socket: all packets of an IP
/// protocol, over IPv4 and IPv6, or those to one destination port of TCP, UDP or SCTP. Rules cannot
/// name source ports: a sender could choose its source port to bypass the sensor.
///
/// A rule with a port matches only packets that contain the port. Fragments other than the first do
/// not, so they are redirected.
///
/// # Examples
///
/// ```
/// use xfan_xdp::PassRule;
///
/// let ssh: PassRule = "tcp/22".parse()?;
/// assert_eq!((ssh.protocol(), ssh.port()), (6, Some(22)));
/// assert_eq!("1".parse::<PassRule>()?.to_string(), "icmp");
/// # Ok::<(), xfan_xdp::RuleError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PassRule {
    protocol: u8,
    port: Option<u16>,
}

impl PassRule {
    /// The IP protocol number.
    pub fn protocol(self) -> u8 {
        self.protocol
    }

    /// The destination port, 1 to 65535; `None` for the whole protocol.
    pub fn port(self) -> Option<u16> {
        self.port
    }
}

/// Why a text is not a pass rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RuleError {
    /// The part before the slash is not a protocol.
    #[error(
        "pass rule \"{rule}\": \"{protocol}\" is not an IP protocol; write {}, or a protocol number from 0 to 255",
        names()
    )]
    UnknownProtocol {
        /// The rule as it was written.
        rule: String,
        /// The part before the slash.
        protocol: String,
    },
    /// The part after the slash is not a port.
    #[error(
        "pass rule \"{rule}\": \"{port}\" is not a destination port; write one from 1 to 65535, as in tcp/22, \
         or omit the slash to pass the whole protocol"
    )]
    BadPort {
        /// The rule as it was written.
        rule: String,
        /// The part after the slash.
        port: String,
    },
    /// The protocol has no ports.
    #[error(
        "pass rule \"{rule}\": only tcp, udp and sctp have ports; write \"{protocol}\" to pass the whole protocol"
    )]
    NoPorts {
        /// The rule as it was written.
        rule: String,
        /// The part before the slash.
        protocol: String,
    },
}

fn names() -> String {
    NAMES.map(|(name, _)| name).join(", ")
}

impl FromStr for PassRule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (name, port) = match text.split_once('/') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        let protocol = parse_protocol(name)
            .ok_or_else(|| RuleError::UnknownProtocol { rule: text.into(), protocol: name.into() })?;
        let port = match port {
            None => None,
            Some(_) if ![TCP, UDP, SCTP].contains(&protocol) => {
                return Err(RuleError::NoPorts { rule: text.into(), protocol: name.into() });
            }
            Some(port) => Some(
                parse_number::<u16>(port)
                    .filter(|&port| port != 0)
                    .ok_or_else(|| RuleError::BadPort { rule: text.into(), port: port.into() })?,
            ),
        };
        Ok(Self { protocol, port })
    }
}

fn parse_protocol(text: &str) -> Option<u8> {
    let named = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
    named.map(|&(_, number)| number).or_else(|| parse_number(text))
}

/// Parses decimal digits. `str::parse` alone would also accept a leading plus sign.
fn parse_number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl fmt::Display for PassRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|&&(_, number)| number == self.protocol) {
            Some((name, _)) => f.write_str(name)?,
            None => write!(f, "{}", self.protocol)?,
        }
        match self.port {
            Some(port) => write!(f, "/{port}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Result<PassRule, RuleError> {
        text.parse()
    }

    #[test]
    fn every_protocol_name_is_accepted_and_displayed() {
        for (name, protocol) in NAMES {
            let parsed = rule(name).unwrap();
            assert_eq!((parsed.protocol(), parsed.port()), (protocol, None));
            assert_eq!(parsed.to_string(), name);
            assert_eq!(rule(&protocol.to_string()), Ok(parsed));
        }
    }

    #[test]
    fn numbers_ports_and_capitals_are_accepted() {
        for (text, protocol, port, written) in [
            ("tcp/22", 6, Some(22), "tcp/22"),
            ("UDP/53", 17, Some(53), "udp/53"),
            ("sctp/65535", 132, Some(65535), "sctp/65535"),
            ("6/1", 6, Some(1), "tcp/1"),
            ("0", 0, None, "0"),
            ("255", 255, None, "255"),
            ("IcmpV6", 58, None, "icmpv6"),
        ] {
            let parsed = rule(text).unwrap();
            assert_eq!((parsed.protocol(), parsed.port()), (protocol, port), "{text}");
            assert_eq!(parsed.to_string(), written);
            assert_eq!(rule(written), Ok(parsed));
        }
    }

    #[test]
    fn unknown_protocols_are_refused() {
        for text in ["", "tpc", "256", "-1", "+6", " tcp", "tcp ", "/22", "tcp:22", "icmp6"] {
            assert!(matches!(rule(text), Err(RuleError::UnknownProtocol { .. })), "{text:?}");
        }
        assert_eq!(
            rule("tpc/22").unwrap_err().to_string(),
            "pass rule \"tpc/22\": \"tpc\" is not an IP protocol; write icmp, igmp, tcp, udp, gre, esp, ah, icmpv6, \
             ospf, pim, vrrp, sctp, or a protocol number from 0 to 255"
        );
    }

    #[test]
    fn invalid_ports_are_refused() {
        for text in ["tcp/", "tcp/0", "udp/65536", "sctp/ssh", "tcp/-1", "tcp/+22", "tcp/22/23", "tcp/ 22"] {
            assert!(matches!(rule(text), Err(RuleError::BadPort { .. })), "{text:?}");
        }
        assert_eq!(
            rule("tcp/70000").unwrap_err().to_string(),
            "pass rule \"tcp/70000\": \"70000\" is not a destination port; write one from 1 to 65535, as in tcp/22, \
             or omit the slash to pass the whole protocol"
        );
    }

    #[test]
    fn ports_of_protocols_without_ports_are_refused() {
        for text in ["icmp/8", "89/1", "gre/"] {
            assert!(matches!(rule(text), Err(RuleError::NoPorts { .. })), "{text:?}");
        }
        assert_eq!(
            rule("icmp/8").unwrap_err().to_string(),
            "pass rule \"icmp/8\": only tcp, udp and sctp have ports; write \"icmp\" to pass the whole protocol"
        );
    }
}
