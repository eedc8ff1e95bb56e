//! Packet memory: the [`umem`] that all lanes share, and the ledger of each lane's [`frames`].

pub mod frames;
pub mod umem;
