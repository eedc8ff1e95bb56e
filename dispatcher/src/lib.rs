//! Placeholder.
pub mod frames;
pub mod steer;
pub mod counters;
pub mod lane;
pub mod source;
pub mod umem;
pub mod cli;
pub mod config;
pub mod exit;
pub mod interface;
pub mod placement;
pub mod topology;
pub mod xsk;
