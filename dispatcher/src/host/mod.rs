//! What the machine is, and the system calls that nothing else wraps.

pub mod folder;
pub mod interface;
pub mod placement;
pub mod privileges;
pub mod sys;
pub mod topology;
