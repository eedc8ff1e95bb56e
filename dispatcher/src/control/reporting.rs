//! The report: what is known of everything.

use crate::control::lanes::GROUP;
use crate::control::primary::Primary;
use crate::lane::BUCKETS;
use crate::port::Port;
use crate::port::watch::Watch;
use crate::report::{self, Report};

impl Primary {
    /// What is known of everything.
    pub fn report(&mut self) -> Report {
        let (served, unserved) = self.port.as_ref().map(Port::counters).unwrap_or_default();
        let mut served = served.into_iter();
        let mut lanes: Vec<_> = self
            .lanes
            .handles
            .iter_mut()
            .map(|lane| lane.report(served.next().unwrap_or_default()))
            .collect();
        for (lane, arrivals) in lanes.iter_mut().zip(&self.arrivals) {
            lane.unaccounted = arrivals.lost();
        }
        let members = self
            .group
            .numbered()
            .filter(|(number, member)| {
                let untouched = self.members[number.index()].is_untouched() && member.is_vacant();
                number.index() < self.places || !untouched
            })
            .map(|(number, _)| {
                let member = &self.members[number.index()];
                let output = self.spawner.as_ref().map(|spawner| &spawner.command.output);
                let dropped = output.map_or(0, |output| output.dropped(&member.id));
                member.report(&self.group, number, self.pid_of(number), dropped)
            })
            .collect();
        let port = report::Port {
            name: self.name.clone(),
            mode: self.mode(),
            lanes,
            unserved,
            nic: self.watch.as_ref().map(Watch::nic).unwrap_or_default(),
            notices: self.notices(),
        };
        let group = report::Group {
            name: self.group_name.clone(),
            buckets: BUCKETS,
            lanes: self.lanes.handles.iter().map(|lane| lane.report_of(GROUP, &self.name)).collect(),
            members,
        };
        Report {
            version: report::VERSION,
            pid: std::process::id(),
            uptime_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            ports: vec![port],
            groups: vec![group],
            confinement: self.spawner.as_ref().map(|spawner| spawner.confinement.clone()).unwrap_or_default(),
            control: report::Control { refused: self.refused, ..self.control.report() },
            log_lines_lost: crate::log::lost(),
        }
    }
}
