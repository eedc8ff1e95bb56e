//! The report: what is known of everything.

use crate::control::primary::Primary;
use crate::report::{self, Report};

impl Primary {
    /// What is known of everything.
    pub fn report(&mut self) -> Report {
        Report {
            version: report::VERSION,
            pid: std::process::id(),
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            ports: self.ports.iter().map(|port| port.report(&mut self.lanes)).collect(),
            groups: self.groups.iter().map(|group| self.report_of(group)).collect(),
            control: report::Control { refused: self.refused, ..self.control.report() },
            log_lines_lost: crate::log::lost(),
        }
    }
}
