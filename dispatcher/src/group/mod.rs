//! Pure decisions about the members of a group; no I/O.

pub mod life;
pub mod restart;
