//! Files and descriptors: owners and modes, full disks, low limits, and cleanup.

mod control;
mod descriptors;
mod records;
