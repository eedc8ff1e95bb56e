//! The key of a flow: its 5-tuple.

use std::net::IpAddr;

/// A 5-tuple, in the direction of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Source port; 0 if the packet has none.
    pub source_port: u16,
    /// Destination port; 0 if the packet has none.
    pub destination_port: u16,
    /// IP protocol number. For IPv6, that of the header after the extension headers.
    pub protocol: u8,
}

impl FlowKey {
    /// The same flow in the reverse direction.
    pub fn reversed(self) -> Self {
        FlowKey {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// The key that stands for both directions of the flow, and whether it is the reverse of this
    /// one.
    pub fn canonical(self) -> (Self, bool) {
        let backwards = (self.source, self.source_port) > (self.destination, self.destination_port);
        if backwards { (self.reversed(), true) } else { (self, false) }
    }
}
