//! How a primary ended.

use crate::control::error::PrimaryError;
use crate::report::Report;

/// How a primary ended.
#[derive(Debug)]
pub struct Outcome {
    /// The error that ended it; `None`: a stop signal did.
    pub error: Option<PrimaryError>,
    /// The last report.
    pub report: Report,
    /// One sentence for each equation of counters that does not hold: a bug of xfan.
    pub imbalances: Vec<String>,
    /// A stop signal arrived while the primary stopped, so it must not start again in another mode.
    pub interrupted: bool,
    /// One sentence for each lane that lost redirected packets which no counter contains.
    pub unaccounted: Vec<String>,
}
