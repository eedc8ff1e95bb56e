//! What is watched while a primary runs: its interface.

mod presence;

pub use presence::Presence;
