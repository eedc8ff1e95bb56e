//! Asking a dispatcher for its report, without becoming a worker.

use std::path::Path;

use xfan_shm::protocol::{RefusalCode, Reply, Request};

use crate::connection::{ask, dial};
use crate::error::AttachError;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The dispatcher cannot be reached, or did not answer.
    #[error(transparent)]
    NoAnswer(#[from] AttachError),
    /// The dispatcher refused to report.
    #[error("the dispatcher refused to report: {message}")]
    Refused {
        /// The kind of refusal, for programs.
        code: RefusalCode,
        /// The dispatcher's reason: a sentence for people.
        message: String,
    },
}

/// Asks the dispatcher that listens on the control socket `path` for the counters and states of its
/// lanes and members. The value is the JSON object that `xfan stats --json` prints.
///
/// # Errors
/// [`ReportError::NoAnswer`] if the dispatcher cannot be reached or does not answer within 10
/// seconds. [`ReportError::Refused`] if the user may not ask it.
///
/// # Examples
///
/// ```no_run
/// let report = xfan_worker::report("/run/xfan/eth1.sock")?;
/// println!("member 0 is {}", report["groups"][0]["members"][0]["state"]);
/// # Ok::<(), xfan_worker::ReportError>(())
/// ```
pub fn report(path: impl AsRef<Path>) -> Result<serde_json::Value, ReportError> {
    let path = path.as_ref();
    let (reply, _) = ask(dial(path)?, &Request::Stats, path)?;
    match reply {
        Reply::Stats(report) => Ok(report),
        Reply::Refused(refusal) => Err(ReportError::Refused { code: refusal.code, message: refusal.message }),
        _ => Err(AttachError::Unexpected(path.into()).into()),
    }
}
