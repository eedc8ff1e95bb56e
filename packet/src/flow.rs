//! The flow a packet belongs to: its 5-tuple.

use std::net::IpAddr;

/// A directed 5-tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Source port; 0 where there is none.
    pub source_port: u16,
    /// Destination port; 0 where there is none.
    pub destination_port: u16,
    /// Protocol number, after IPv6 extension headers.
    pub protocol: u8,
}

impl FlowKey {
    /// The same flow seen from its other end.
    pub fn reversed(self) -> Self {
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// One key for both directions, and whether it is the reverse of this one.
    pub fn canonical(self) -> (Self, bool) {
        let backwards = (self.source, self.source_port) > (self.destination, self.destination_port);
        if backwards { (self.reversed(), true) } else { (self, false) }
    }
}
