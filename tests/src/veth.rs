//! A multi-queue veth pair between two namespaces, or within one.
//!
//! What the sender puts into its TX queue q arrives on the receiver's RX queue q. Frames that an
//! XDP program redirects into the sender arrive on the RX queue whose number is the sending CPU's,
//! modulo the receiver's queues; the receiver accepts them only while it has NAPI, that is, an XDP
//! program or GRO.

use crate::command::CommandError;
use crate::link::{Link, LinkError};
use crate::netns::Netns;

/// The properties of a pair.
#[derive(Clone, Copy, Debug)]
pub struct VethConfig {
    /// The number of RX and of TX queues of each end.
    pub queues: u32,
    /// The MTU of each end, in bytes after the Ethernet header. At most 3,498 for a receiver with
    /// an XDP program.
    pub mtu: u32,
    /// Whether the sender's kernel leaves checksums unfinished, as by default. Replayed frames have
    /// checksums.
    pub checksum_offload: bool,
    /// Whether the receiver merges segments (GRO), which also gives it NAPI without an XDP program.
    pub gro: bool,
}

impl Default for VethConfig {
    fn default() -> Self {
        Self { queues: 1, mtu: 1500, checksum_offload: false, gro: false }
    }
}

impl VethConfig {
    /// A pair with `queues` queues and the defaults otherwise: MTU 1500, no offloads.
    pub fn queues(queues: u32) -> Self {
        Self { queues, ..Self::default() }
    }
}

/// A veth pair, both ends up. It exists until its namespace is removed.
#[derive(Clone, Debug)]
pub struct Veth {
    /// The sending end: `tx0`.
    pub sender: Link,
    /// The receiving end: `rx0`.
    pub receiver: Link,
}

/// Why there is no pair.
#[derive(Debug, thiserror::Error)]
pub enum VethError {
    /// A tool did not make the pair, or did not set it up.
    #[error("no veth pair: {0}")]
    Command(#[from] CommandError),
    /// The pair was made but cannot be found.
    #[error("no veth pair: {0}")]
    Link(#[from] LinkError),
}

impl Veth {
    /// Makes the pair `tx0` in `sender` and `rx0` in `receiver`, which may be the same namespace.
    ///
    /// # Errors
    /// There already is one, the MTU or the number of queues is beyond the driver's limits, or a
    /// tool is missing.
    pub fn create(config: &VethConfig, sender: &Netns, receiver: &Netns) -> Result<Self, VethError> {
        let VethConfig { queues, mtu, .. } = config;
        let end = format!("numrxqueues {queues} numtxqueues {queues} mtu {mtu}");
        let peer = format!("name rx0 {end} netns {}", receiver.name());
        sender.ip(&format!("link add name tx0 {end} type veth peer {peer}"))?;
        for (namespace, name) in [(sender, "tx0"), (receiver, "rx0")] {
            let switch = |on| if on { "on" } else { "off" };
            let (tx, gro) = (switch(config.checksum_offload), switch(config.gro));
            namespace.ethtool(&format!("-K {name} tx {tx} gro {gro}"))?;
            namespace.ip(&format!("link set dev {name} up"))?;
        }
        Ok(Self {
            sender: sender.run(|| Link::named("tx0"))?,
            receiver: receiver.run(|| Link::named("rx0"))?,
        })
    }

    /// Makes the pair within one new quiet namespace.
    ///
    /// # Errors
    /// As [`Veth::create`] and [`Netns::quiet`].
    pub fn in_namespace(config: &VethConfig) -> Result<(Netns, Self), Box<dyn std::error::Error>> {
        let namespace = Netns::quiet()?;
        let pair = Self::create(config, &namespace, &namespace)?;
        Ok((namespace, pair))
    }
}

/// A quiet namespace with a pair of `queues` queues, as most tests need it.
///
/// # Panics
/// The namespace or the pair cannot be made.
pub fn network(queues: u32) -> Netns {
    Veth::in_namespace(&VethConfig::queues(queues)).expect("a namespace with a veth pair").0
}
