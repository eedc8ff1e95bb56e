//! Which member a packet goes to: flow hash → bucket → member.

pub mod buckets;
#[cfg(test)]
mod families;
pub mod hash;

pub use buckets::{BUCKETS, BucketTable, NOBODY};
pub use hash::HashKey;
