//! How a primary ended.

use crate::control::error::PrimaryError;
use crate::report::Report;

/// How a primary ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why, unless it was asked to.
    pub error: Option<PrimaryError>,
    /// The last report.
    pub report: Report,
    /// What did not add up; nothing, unless there is a bug.
    pub imbalances: Vec<String>,
    /// A signal arrived while the primary stopped: it must not be started again.
    pub interrupted: bool,
    /// One sentence for each lane with redirected packets that did not arrive and are in no
    /// counter.
    pub unaccounted: Vec<String>,
}
