//! Conditions of the interface that affect packets.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How much something matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The condition may be intended.
    Info,
    /// Packets may be missed.
    Warn,
    /// Packets are missed.
    Error,
}

impl Level {
    /// The word that begins a line of this level.
    #[must_use]
    pub const fn mark(self) -> &'static str {
        match self {
            Self::Info => "note:",
            Self::Warn => "warning:",
            Self::Error => "error:",
        }
    }
}

/// A condition, and its effect on packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// What it is about: `link`, `carrier`, `queues`, `queues_gone`, `mtu`, `promiscuous`, `xdp`,
    /// `unseen`, `lro`, `rxvlan`, or `unaccounted`.
    pub topic: String,
    /// How much it matters.
    pub level: Level,
    /// The condition.
    pub what: String,
    /// The effect on packets, and what to do.
    pub meaning: String,
}

impl Notice {
    /// A condition that `topic` names.
    pub fn new(topic: &str, level: Level, what: impl Into<String>, meaning: impl Into<String>) -> Self {
        Notice { topic: topic.to_owned(), level, what: what.into(), meaning: meaning.into() }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.meaning)
    }
}
