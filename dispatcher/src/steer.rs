//! Which member a packet goes to: flow hash → bucket → member.

pub mod buckets;
pub mod hash;

pub use buckets::{BUCKETS, BucketTable, NOBODY};
pub use hash::HashKey;
