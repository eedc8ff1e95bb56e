//! What a member has: segments, connections, counters. Its [group](crate::group) decides what
//! happens to it.

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
use crate::group::{Group, Reading};
use crate::lane::MemberLink;
use crate::lane::counters::{Counter, Evidence, MemberCounters};
use crate::report;

/// What the primary keeps for a member. It outlives the workers, and so do the counters.
#[derive(Debug)]
pub struct Resources {
    /// Such as `default/0`.
    pub id: String,
    /// CPU that its worker runs on.
    pub core: Option<usize>,
    /// How long its worker spins when there is nothing to do.
    pub spin: Duration,
    /// Name of its program, once known.
    pub program: String,
    /// How its last process ended.
    pub last_exit: Option<String>,
    /// The last error or impossible index of its worker, for the log and the event history.
    pub trouble: String,
    /// A worker that was given segments, and has not said that it mapped them.
    pub joining: Option<Joining>,
    /// The worker that the lanes serve.
    pub session: Option<Session>,
    /// Some worker had it.
    taken: bool,
    /// One for each lane, in order.
    counters: Vec<Arc<MemberCounters>>,
    /// What its former sessions published.
    past: Past,
}

#[derive(Debug, Default)]
struct Past {
    busy_ticks: u64,
    published: std::collections::BTreeMap<String, u64>,
}

impl Past {
    /// Adds what a session published. Names beyond as many as a worker can publish are left out:
    /// one that comes again and again, under new names each time, must not fill the primary's
    /// memory.
    fn add(&mut self, published: impl Iterator<Item = (String, u64)>) {
        for (name, value) in published {
            if self.published.len() < COUNTERS || self.published.contains_key(&name) {
                let sum = self.published.entry(name).or_default();
                // What a worker publishes may be any number.
                *sum = sum.wrapping_add(value);
            }
        }
    }
}

/// A worker that the lanes serve, or are about to.
#[derive(Debug)]
pub struct Session {
    /// Its connection.
    pub connection: Connection,
    /// Process id, as the kernel says.
    pub pid: u32,
    /// What the lanes get of it, in order, until they have it.
    pub links: Vec<MemberLink>,
    down: Down,
    up: Up,
    doorbell: Arc<OwnedFd>,
    /// What each lane has found against the worker, in order.
    evidence: Vec<Arc<Evidence>>,
}

impl Session {
    /// The first impossible index that a lane has read, and the lane.
    pub fn impossible_index(&self) -> Option<(LaneId, IndexError)> {
        let mut found = (0..).map(LaneId).zip(&self.evidence);
        found.find_map(|(lane, evidence)| Some((lane, evidence.impossible_index()?)))
    }

    /// Whether a lane found the worker's bell slow.
    pub fn has_slow_bell(&self) -> bool {
        self.evidence.iter().any(|evidence| evidence.has_slow_bell())
    }

    /// Tells the worker that what is in its rings is the last.
    pub fn close(&self) {
        self.down.set_phase(Phase::Closing);
        bell::ring(&self.doorbell);
    }
}

/// A worker that was given segments, and has yet to map them.
#[derive(Debug)]
pub struct Joining {
    /// Its connection.
    pub connection: Connection,
    /// Process id, as the kernel says.
    pub pid: u32,
    /// Name of its program.
    pub program: String,
    geometry: Geometry,
    down: Down,
    /// Its own segment. Not mapped here before it is sealed.
    up_fd: OwnedFd,
    doorbell: Arc<OwnedFd>,
}

/// What a worker is handed, beside the packet memory.
#[derive(Debug)]
pub struct Handover {
    /// Its down segment, read-only.
    pub down: OwnedFd,
    /// Its up segment, writable.
    pub up: OwnedFd,
    /// The sleeper's end of its bell.
    pub doorbell: OwnedFd,
}

/// A session could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// No memory or descriptors.
    #[error("cannot make a worker's segments: {0}")]
    Io(#[from] io::Error),
    /// They are not as they should be.
    #[error("cannot make a worker's segments: {0}")]
    Layout(#[from] LayoutError),
    /// The worker has not sealed its segment.
    #[error(
        "the worker has not sealed its own segment: it must add F_SEAL_FUTURE_WRITE and F_SEAL_SEAL once it has mapped it \
         (fcntl(2)), as the worker library does; the kernel must be Linux 5.1 or later"
    )]
    Unsealed,
}

impl Resources {
    /// A member without a worker, in which a worker spins for `spin` when there is nothing to do.
    pub fn new(id: String, core: Option<usize>, spin: Duration, lanes: usize) -> Self {
        Resources {
            id,
            core,
            spin,
            program: String::new(),
            last_exit: None,
            trouble: String::new(),
            joining: None,
            session: None,
            taken: false,
            counters: (0..lanes).map(|_| Arc::default()).collect(),
            past: Past::default(),
        }
    }

    /// Makes the segments of a session to come. Returns what the worker is handed.
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

    /// The worker that was joining has mapped its segments, and sealed its own: it cannot take
    /// pages of it away from the lanes. Returns whether the segments could be locked in memory.
    ///
    /// Nothing here takes a lock that the worker can hold: the worker seals its segment, which is
    /// not mapped here before.
    ///
    /// # Errors
    /// [`SessionError`]; then no worker is joining any more.
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
        // Locking maps all pages: those that the worker took away before are back when this
        // returns.
        let locked = [up.lock(), down.lock()].into_iter().collect();
        self.session = Some(Session { connection, pid, links, down, up, doorbell, evidence });
        self.program = program;
        self.taken = true;
        Ok(locked)
    }

    /// The connection of its worker, joined or not.
    pub fn connection(&self) -> Option<&Connection> {
        let session = self.session.as_ref().map(|session| &session.connection);
        session.or_else(|| self.joining.as_ref().map(|joining| &joining.connection))
    }

    /// Whether no worker ever had it.
    pub fn is_untouched(&self) -> bool {
        !self.taken
    }

    /// How far its worker has come.
    pub fn read(&self) -> Option<Reading> {
        let session = self.session.as_ref()?;
        Some(Reading {
            committed: self.sum(|lane| &lane.committed),
            heartbeat: session.up.heartbeat().load(Ordering::Relaxed),
            backlog: self.backlog(),
        })
    }

    /// Ends the session; what it published is kept. `lost`: the worker may still hold packets,
    /// which are others' from now on.
    pub fn end_session(&mut self, lost: bool) -> Option<Session> {
        let session = self.session.take()?;
        // Before any of its packets goes to another worker: this one may have been stopped by a
        // signal, and go on one day.
        session.down.set_phase(if lost { Phase::Over } else { Phase::Closing });
        bell::ring(&session.doorbell);
        session.connection.end();
        let busy_ticks = session.up.busy_ticks().load(Ordering::Relaxed);
        // A worker can publish any number.
        self.past.busy_ticks = self.past.busy_ticks.wrapping_add(busy_ticks);
        self.past.add(session.up.published_counters());
        Some(session)
    }

    fn sum(&self, field: impl Fn(&MemberCounters) -> &Counter) -> u64 {
        self.counters.iter().map(|lane| field(lane).get()).sum()
    }

    /// Packets in its rings.
    pub fn backlog(&self) -> u64 {
        // Read in this order, a sum can only be too high while packets flow.
        let gone = self.sum(|lane| &lane.committed) + self.requeued() + self.lost();
        self.sum(|lane| &lane.delivered).saturating_sub(gone)
    }

    /// Packets that were in its rings when its worker left, and went to others.
    pub fn requeued(&self) -> u64 {
        self.sum(|lane| &lane.requeued)
    }

    /// Packets that were in its rings when its worker left, and that no other ring had room for.
    pub fn lost(&self) -> u64 {
        self.sum(|lane| &lane.lost)
    }

    /// What is known of it. `pid` is its process; `output_dropped` is counted elsewhere.
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
        let life = &group.members()[number.index()];
        let age = life.age(std::time::Instant::now());
        report::Member {
            id: self.id.clone(),
            program: self.program.clone(),
            pid,
            core: self.core,
            state: life.shown().name().to_owned(),
            in_state_ns: u64::try_from(age.as_nanos()).unwrap_or(u64::MAX),
            cpu_ns: usage.cpu_ns,
            resident_bytes: usage.resident_bytes,
            restarts: life.restarts(),
            hangs: life.hangs(),
            held: life.is_held(),
            supervised: life.is_supervised(),
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

/// What a process uses, as the kernel says (proc(5)).
#[derive(Default)]
struct Usage {
    cpu_ns: u64,
    resident_bytes: u64,
}

impl Usage {
    /// Nothing for a process that is not there, or in another PID namespace.
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
    fn what_a_process_uses_is_what_the_kernel_says() {
        let own = Usage::of(std::process::id());
        assert!(own.resident_bytes > 100_000, "{}", own.resident_bytes);
        assert!(own.cpu_ns < 3_600_000_000_000);
        assert_eq!(Usage::of(0).resident_bytes + Usage::of(u32::MAX).resident_bytes, 0);
    }

    #[test]
    fn new_names_at_every_session_do_not_pile_up() {
        let mut past = Past::default();
        for session in 0..100 {
            past.add((0..COUNTERS).map(|number| (format!("n{session}_{number}"), u64::MAX)));
            past.add([("n0_0".to_owned(), 1)].into_iter());
        }
        assert_eq!(past.published.len(), COUNTERS);
        assert_eq!(past.published["n0_0"], 99, "wraps around");
    }
}
