//! Makes the report.

use crate::control::groups::{GroupState, MemberKey};
use crate::control::primary::Primary;
use crate::lane::BUCKETS;
use crate::lane::handle::LaneHandle;
use crate::report::{self, Report};

impl Primary {
    /// Makes the report of the primary.
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

    /// Makes the report of a group.
    fn report_of(&self, group: &GroupState) -> report::Group {
        let is_shown = |key: &MemberKey| {
            let untouched = self.resources(*key).is_unused() && self.member(*key).is_vacant();
            key.member.index() < group.initial || !untouched
        };
        let report_of = |key: MemberKey| {
            let resources = self.resources(key);
            let output = group.workers.as_ref().map(|workers| &workers.command.output);
            let dropped = output.map_or(0, |output| output.dropped(&resources.id));
            resources.report(&group.machine, key.member, self.pid_of(key), dropped)
        };
        let port_of = |lane: &LaneHandle| self.ports[lane.port.index()].name.as_str();
        report::Group {
            name: group.name.clone(),
            buckets: BUCKETS,
            lanes: self.lanes.handles.iter().map(|lane| lane.report_of(group.id, port_of(lane))).collect(),
            members: group.keys().filter(is_shown).map(report_of).collect(),
            confinement: group
                .workers
                .as_ref()
                .map(|workers| workers.confinement.clone())
                .unwrap_or_default(),
        }
    }
}
