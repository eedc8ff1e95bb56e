//! Worker processes: starting, confining and adopting them, and relaying their output.

pub mod cgroup;
pub mod fork;
pub mod inherit;
pub mod orphans;
pub mod output;
pub mod seccomp;
pub mod spawn;
pub mod survivors;
