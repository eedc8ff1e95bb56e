//! Asking a dispatcher how it is, without becoming a worker.

use std::path::Path;

use xfan_shm::protocol::{RefusalCode, Reply, Request};

use crate::attach::{AttachError, ask, dial};

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// There is nobody to ask, or no answer.
    #[error(transparent)]
    NoAnswer(#[from] AttachError),
    /// The dispatcher said no, and why.
    #[error("the dispatcher refused to report: {message}")]
    Refused {
        /// The kind of refusal.
        code: RefusalCode,
        /// A sentence.
        message: String,
    },
}

/// Asks the dispatcher behind the control socket `path` for its counters, lanes and members. The value is what
/// `xfan stats --json` prints.
///
/// ```no_run
/// let report = xfan_worker::report("/run/xfan/eth1.sock")?;
/// println!("member 0 is {}", report["groups"][0]["members"][0]["state"]);
/// # Ok::<(), xfan_worker::ReportError>(())
/// ```
///
/// # Errors
/// [`ReportError`]
pub fn report(path: impl AsRef<Path>) -> Result<serde_json::Value, ReportError> {
    let path = path.as_ref();
    let (reply, _) = ask(dial(path)?, &Request::Stats, path)?;
    match reply {
        Reply::Stats(report) => Ok(report),
        Reply::Refused(refusal) => Err(ReportError::Refused { code: refusal.code, message: refusal.message }),
        _ => Err(AttachError::Unexpected(path.into()).into()),
    }
}
