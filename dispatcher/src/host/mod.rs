//! The machine: interfaces, CPUs, capabilities, directories, system calls.

pub mod autogroup;
pub mod directory;
pub mod interface;
pub mod placement;
pub mod privileges;
pub mod random;
pub mod show;
pub mod sys;
pub mod topology;
