//! Numbers that must not be swapped, each a type of its own.
//!
//! Each is as large as the integer in it, and appears in JSON as that integer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Defines the types below: what they have in common.
macro_rules! numbers {
    ($($(#[$attribute:meta])* $name:ident($integer:ty);)*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        #[repr(transparent)]
        pub struct $name(pub $integer);

        impl $name {
            /// The number as an index.
            #[inline(always)]
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

numbers! {
    /// An RX queue of an interface, as ethtool(8) numbers them.
    QueueId(u32);
    /// A lane of the primary, counted from 0 over all ports. A worker has one ring per lane.
    LaneId(u32);
    /// An interface that the primary dispatches: an index into the names that a worker gets with
    /// [`Attached`](crate::protocol::Attached).
    PortId(u8);
    /// A group of workers that share one copy of the traffic.
    GroupId(u8);
    /// A member of a group: the slot that one worker at a time takes. The bucket table holds these.
    MemberId(u8);
    /// Bytes from the start of the packet memory (UMEM), which has at most 4 GiB.
    UmemOffset(u32);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_id_costs_and_looks_like_its_integer() {
        assert_eq!((size_of::<QueueId>(), size_of::<PortId>(), size_of::<UmemOffset>()), (4, 1, 4));
        assert_eq!(serde_json::to_string(&(QueueId(7), MemberId(3))).unwrap(), "[7,3]");
        assert_eq!(serde_json::from_str::<LaneId>("9").unwrap(), LaneId(9));
        assert_eq!((format!("{:>3}", QueueId(7)), LaneId(9).index()), ("  7".to_owned(), 9));
    }
}
