//! The resources of a member: segments, connections and counters. Its [group](crate::group) decides
//! what happens to it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use xfan_shm::bell;
use xfan_shm::clock::ticks_to_ns;
use xfan_shm::ids::LaneId;
use xfan_shm::layout::{COUNTERS, Down, Geometry, LayoutError, Phase, SharedRing, Up};
use xfan_shm::ring::{IndexError, Producer};
use xfan_shm::segment;

use crate::control::peer::Connection;
use crate::group::{Group, Progress};
use crate::lane::MemberLink;
use crate::lane::counters::{Counter, Evidence, MemberCounters};
use crate::report;

/// The resources of a member. They outlive its workers, as do its counters.
#[derive(Debug)]
pub struct Resources {
    /// The id, such as `default/0`.
    pub id: String,
    /// The CPU that its worker is pinned to; `None`: none.
    pub core: Option<usize>,
    /// How long its worker spins when its rings are empty, before it yields.
    pub spin: Duration,
    /// The name of its worker's program; empty before the first worker.
    pub program: String,
    /// The exit status of its last process.
    pub last_exit: Option<String>,
    /// The last error of its worker, for the log and the event history.
    pub last_error: String,
    /// A worker that has its segments, and has not reported yet that it mapped them.
    pub joining: Option<Joining>,
    /// The worker that the lanes serve.
    pub session: Option<Session>,
    /// A worker has joined as this member.
    used: bool,
    /// The lanes' counters of the member, by lane.
    counters: Vec<Arc<MemberCounters>>,
    /// The counters of its ended sessions.
    past: PastSessions,
}

/// Sums of the counters that ended sessions published.
#[derive(Debug, Default)]
struct PastSessions {
    busy_ticks: u64,
    published: std::collections::BTreeMap<String, u64>,
}

impl PastSessions {
    /// Adds the counters that a session published. Keeps at most as many names as one worker can
    /// publish: a worker that attaches repeatedly, with new names each time, must not fill the
    /// primary's memory.
    fn add(&mut self, published: impl Iterator<Item = (String, u64)>) {
        for (name, value) in published {
            if self.published.len() < COUNTERS || self.published.contains_key(&name) {
                let sum = self.published.entry(name).or_default();
                // A worker may publish any number.
                *sum = sum.wrapping_add(value);
            }
        }
    }
}

/// A worker that the lanes serve, or will serve soon.
#[derive(Debug)]
pub struct Session {
    /// The worker's connection.
    pub connection: Connection,
    /// Its process id, according to the kernel.
    pub pid: u32,
    /// The lanes' ends of its rings, by lane, until the lanes get them.
    pub links: Vec<MemberLink>,
    down: Down,
    up: Up,
    doorbell: Arc<OwnedFd>,
    /// The violations that each lane has found, by lane.
    evidence: Vec<Arc<Evidence>>,
    /// Keep the segments in their pages.
    _pins: Vec<OwnedFd>,
}

impl Session {
    /// An impossible index that a lane has read, and the lane.
    pub fn impossible_index(&self) -> Option<(LaneId, IndexError)> {
        let mut found = (0..).map(LaneId).zip(&self.evidence);
        found.find_map(|(lane, evidence)| Some((lane, evidence.impossible_index()?)))
    }

    /// Whether waking the worker took a lane too long.
    pub fn has_slow_bell(&self) -> bool {
        self.evidence.iter().any(|evidence| evidence.has_slow_bell())
    }

    /// Tells the worker that its rings hold its last packets.
    pub fn close(&self) {
        self.down.set_phase(Phase::Closing);
        bell::ring(&self.doorbell);
    }
}

/// A worker that has its segments, and has not reported yet that it mapped them.
#[derive(Debug)]
pub struct Joining {
    /// The worker's connection.
    pub connection: Connection,
    /// Its process id, according to the kernel.
    pub pid: u32,
    /// The name of its program.
    pub program: String,
    geometry: Geometry,
    down: Down,
    /// Its up segment. The primary maps it only after the worker has sealed it.
    up_fd: OwnedFd,
    doorbell: Arc<OwnedFd>,
}

/// The descriptors that a worker gets, beside the packet memory.
#[derive(Debug)]
pub struct Handover {
    /// Its down segment, read-only.
    pub down: OwnedFd,
    /// Its up segment, writable.
    pub up: OwnedFd,
    /// The sleeper's end of its bell.
    pub doorbell: OwnedFd,
}

/// Why a session cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No memory or descriptor is left.
    #[error("cannot make a worker's segments: {0}")]
    Io(#[from] io::Error),
    /// A segment is malformed.
    #[error("cannot make a worker's segments: {0}")]
    Layout(#[from] LayoutError),
    /// The worker has not sealed its up segment.
    #[error(
        "the worker has not sealed its own segment: it must add F_SEAL_FUTURE_WRITE and F_SEAL_SEAL once it has mapped it \
         (fcntl(2)), as the worker library does; the kernel must be Linux 5.1 or later"
    )]
    Unsealed,
}

impl Resources {
    /// The resources of a member without a worker.
    pub fn new(id: String, core: Option<usize>, spin: Duration, lanes: usize) -> Self {
        Resources {
            id,
            core,
            spin,
            program: String::new(),
            last_exit: None,
            last_error: String::new(),
            joining: None,
            session: None,
            used: false,
            counters: (0..lanes).map(|_| Arc::default()).collect(),
            past: PastSessions::default(),
        }
    }

    /// Makes the segments for a worker. Returns the descriptors that it gets.
    ///
    /// # Errors
    /// [`SessionError`]
    pub fn begin_joining(
        &mut self,
        connection: Connection,
        pid: u32,
        program: String,
        geometry: Geometry,
    ) -> Result<Handover, SessionError> {
        let down_fd = segment::create("xfan-down", geometry.down_bytes())?;
        let up_fd = segment::create("xfan-up", geometry.up_bytes())?;
        let down = Down::create(&down_fd, geometry)?;
        Up::prepare(&up_fd, geometry)?;
        segment::seal_against_further_writers(&down_fd)?;
        let (doorbell, sleeper) = bell::create()?;
        let doorbell = Arc::new(doorbell);
        let handover = Handover {
            down: segment::reopen_read_only(&down_fd)?,
            up: up_fd.try_clone()?,
            doorbell: sleeper,
        };
        self.joining = Some(Joining { connection, pid, program, geometry, down, up_fd, doorbell });
        Ok(handover)
    }

    /// Begins the session of a worker that has mapped its segments and sealed its up segment, so
    /// that it cannot take pages away from the lanes. Returns whether the segments could be locked
    /// in memory, in pages that stay theirs.
    ///
    /// The worker seals the segment before the primary maps it. So nothing here takes a lock that
    /// the worker can hold.
    ///
    /// # Errors
    /// [`SessionError`]. The worker must attach again.
    pub fn begin_session(&mut self, joining: Joining) -> Result<io::Result<()>, SessionError> {
        let Joining { connection, pid, geometry, down, up_fd, doorbell, program } = joining;
        if !segment::is_sealed_against_further_writers(&up_fd)? {
            return Err(SessionError::Unsealed);
        }
        let up = Up::watch(&up_fd, geometry)?;
        let evidence: Vec<Arc<Evidence>> = (0..geometry.lanes).map(|_| Arc::default()).collect();
        let links = (0..geometry.lanes)
            .zip(&self.counters)
            .zip(&evidence)
            .map(|((lane, counters), evidence)| MemberLink {
                ring: Producer::new(SharedRing::new(&down, &up, LaneId(lane))),
                up: up.clone(),
                doorbell: doorbell.clone(),
                counters: counters.clone(),
                evidence: evidence.clone(),
            })
            .collect();
        // Locking maps all pages, including those that the worker removed before it sealed the
        // segment.
        let mut held: io::Result<()> = [up.lock(), down.lock()].into_iter().collect();
        let mut pins = Vec::new();
        for pin in [up.pin(), down.pin()] {
            match pin {
                Ok(pin) => pins.push(pin),
                Err(error) => {
                    let error = format!("no pipe can refer to their pages ({error}; see fs.pipe-max-size)");
                    held = held.and(Err(io::Error::other(error)));
                }
            }
        }
        self.session = Some(Session { connection, pid, links, down, up, doorbell, evidence, _pins: pins });
        self.program = program;
        self.used = true;
        Ok(held)
    }

    /// The connection of the member's worker, joined or not.
    pub fn connection(&self) -> Option<&Connection> {
        let session = self.session.as_ref().map(|session| &session.connection);
        session.or_else(|| self.joining.as_ref().map(|joining| &joining.connection))
    }

    /// Whether no worker ever joined as this member.
    pub fn is_unused(&self) -> bool {
        !self.used
    }

    /// The progress of the worker; `None`: there is no session.
    pub fn progress(&self) -> Option<Progress> {
        let session = self.session.as_ref()?;
        Some(Progress {
            committed: self.sum(|lane| &lane.committed),
            heartbeat: session.up.heartbeat().load(Ordering::Relaxed),
            backlog: self.backlog(),
        })
    }

    /// Ends the session, and keeps the counters that it published. `revoke`: other workers get its
    /// uncommitted packets, so it must not access them any more.
    pub fn end_session(&mut self, revoke: bool) -> Option<Session> {
        let session = self.session.take()?;
        // This comes before any of its packets goes to another worker: a worker that SIGSTOP has
        // stopped checks the phase when it continues.
        session.down.set_phase(if revoke { Phase::Over } else { Phase::Closing });
        bell::ring(&session.doorbell);
        session.connection.close();
        let busy_ticks = session.up.busy_ticks().load(Ordering::Relaxed);
        // A worker can publish any number.
        self.past.busy_ticks = self.past.busy_ticks.wrapping_add(busy_ticks);
        self.past.add(session.up.published_counters());
        Some(session)
    }

    fn sum(&self, field: impl Fn(&MemberCounters) -> &Counter) -> u64 {
        self.counters.iter().map(|lane| field(lane).get()).sum()
    }

    /// The number of packets in its rings. While packets flow, it may be too high.
    pub fn backlog(&self) -> u64 {
        // `delivered` must be read last: the difference cannot be too low then.
        let gone = self.sum(|lane| &lane.committed) + self.requeued() + self.lost();
        self.sum(|lane| &lane.delivered).saturating_sub(gone)
    }

    /// The number of packets that were in its rings when its worker left, and that others got.
    pub fn requeued(&self) -> u64 {
        self.sum(|lane| &lane.requeued)
    }

    /// The number of packets that were in its rings when its worker left, and that no other ring
    /// had room for.
    pub fn lost(&self) -> u64 {
        self.sum(|lane| &lane.lost)
    }

    /// The report of the member. `pid`: its worker's process; 0: none. `output_dropped`: the number
    /// of lines of its output that were dropped.
    pub fn report(
        &self,
        group: &Group,
        number: xfan_shm::ids::MemberId,
        pid: u32,
        output_dropped: u64,
    ) -> report::Member {
        let mut counters = self.past.published.clone();
        let mut busy = self.past.busy_ticks;
        if let Some(session) = &self.session {
            busy = busy.wrapping_add(session.up.busy_ticks().load(Ordering::Relaxed));
            for (name, value) in session.up.published_counters() {
                let sum: &mut u64 = counters.entry(name).or_default();
                *sum = sum.wrapping_add(value);
            }
        }
        let usage = Usage::of(pid);
        let member = &group.members()[number.index()];
        let age = member.age(std::time::Instant::now());
        report::Member {
            id: self.id.clone(),
            program: self.program.clone(),
            pid,
            core: self.core,
            state: member.display_state().name().to_owned(),
            in_state_ns: u64::try_from(age.as_nanos()).unwrap_or(u64::MAX),
            cpu_ns: usage.cpu_ns,
            resident_bytes: usage.resident_bytes,
            restarts: member.restarts(),
            hangs: member.hangs(),
            held: member.is_held(),
            supervised: member.is_supervised(),
            last_exit: self.last_exit.clone(),
            buckets: group.table().share(number),
            backlog: self.backlog(),
            delivered: self.sum(|lane| &lane.delivered),
            committed: self.sum(|lane| &lane.committed),
            dropped: self.sum(|lane| &lane.dropped),
            requeued: self.requeued(),
            lost: self.lost(),
            wakeups: self.sum(|lane| &lane.wakeups),
            output_dropped,
            busy_ns: ticks_to_ns(busy),
            counters,
        }
    }
}

/// The resource usage of a process, according to proc(5).
#[derive(Default)]
struct Usage {
    cpu_ns: u64,
    resident_bytes: u64,
}

impl Usage {
    /// Zero for a process that does not exist, or is in another PID namespace.
    fn of(pid: u32) -> Self {
        let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 0) else { return Usage::default() };
        let Ok(stat) = procfs::process::Process::new(pid).and_then(|process| process.stat()) else {
            return Usage::default();
        };
        let ticks = u128::from(stat.utime) + u128::from(stat.stime);
        let cpu_ns = ticks * 1_000_000_000 / u128::from(procfs::ticks_per_second().max(1));
        Usage {
            cpu_ns: u64::try_from(cpu_ns).unwrap_or(u64::MAX),
            resident_bytes: stat.rss.saturating_mul(procfs::page_size()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_comes_from_the_kernel() {
        let own = Usage::of(std::process::id());
        assert!(own.resident_bytes > 100_000, "{}", own.resident_bytes);
        assert!(own.cpu_ns < 3_600_000_000_000);
        assert_eq!(Usage::of(0).resident_bytes + Usage::of(u32::MAX).resident_bytes, 0);
    }

    #[test]
    fn new_names_in_every_session_do_not_accumulate() {
        let mut past = PastSessions::default();
        for session in 0..100 {
            past.add((0..COUNTERS).map(|number| (format!("n{session}_{number}"), u64::MAX)));
            past.add([("n0_0".to_owned(), 1)].into_iter());
        }
        assert_eq!(past.published.len(), COUNTERS);
        assert_eq!(past.published["n0_0"], 99, "wraps around");
    }
}
