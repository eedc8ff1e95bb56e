//! Worker processes: how they are started and confined, and what becomes of their output.

pub mod cgroup;
pub mod inherit;
pub mod orphans;
pub mod output;
pub mod seccomp;
pub mod spawn;
pub mod survivors;
