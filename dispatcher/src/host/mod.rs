//! The machine: interfaces, CPUs, capabilities, directories, system calls.

pub mod folder;
pub mod interface;
pub mod placement;
pub mod privileges;
pub mod sys;
pub mod topology;
