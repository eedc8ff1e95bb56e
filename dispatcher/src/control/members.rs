//! Members: workers' places in a group. A place outlives the process in it, and so do its counters.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xfan_shm::bell;
use xfan_shm::clock::ticks_to_ns;
use xfan_shm::ids::LaneId;
use xfan_shm::layout::{COUNTERS, Down, Geometry, LayoutError, Phase, SharedRing, Up};
use xfan_shm::ring::Producer;
use xfan_shm::segment;

use crate::control::connection::Channel;
use crate::control::peer::Connection;
use crate::control::primary::{Overdue, Purpose};
use crate::group::life::{Change, Life, State};
use crate::group::restart::Starts;
use crate::lane::MemberLink;
use crate::lane::counters::{Counter, MemberCounters};
use crate::process::spawn::Process;
use crate::report;

/// A worker's place.
#[derive(Debug)]
pub struct Member {
    /// Such as `default/0`.
    pub id: String,
    /// CPU its worker is to run on.
    pub core: Option<usize>,
    /// Where it is in its life.
    pub life: Life,
    /// What a process must know to take the place; `None`: it is open to all who may connect.
    pub token: Option<String>,
    /// The process started for it.
    pub process: Option<Process>,
    /// The connection that this process inherited.
    pub channel: Option<Channel>,
    /// A worker that was given segments and has not said that it is ready: no lane knows it.
    pub joining: Option<Joining>,
    /// The worker attached to it.
    pub session: Option<Session>,
    /// Name of its program, once known.
    pub program: String,
    /// Starts of its processes.
    pub starts: Starts,
    /// Times that the process which was started for it has attached.
    pub attached: u32,
    /// Its process is to be started again.
    pub restarting: bool,
    /// How its last process ended.
    pub last_exit: Option<String>,
    /// Times it hung.
    pub hangs: u64,
    /// What it leaves for, as an operator ordered.
    pub leaving: Option<Purpose>,
    /// When something has to be done about a worker that ought to have ended.
    pub overdue: Option<Overdue>,
    /// Its worker is gone; until then its flows and its packets are kept for the next.
    pub held_until: Option<Instant>,
    /// How long its worker spins when there is nothing to do.
    pub spin: Duration,
    /// Somebody had it, or has.
    taken: bool,
    pulse: Option<Pulse>,
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
    /// Adds what a session published. Names beyond as many as a worker can publish are left out: one that comes again and
    /// again, under new names each time, must not fill the primary's memory.
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

/// What a worker that is alive changes, and when it last did.
#[derive(Debug)]
struct Pulse {
    committed: u64,
    heartbeat: u64,
    since: Instant,
}

/// A worker that has taken a place.
#[derive(Debug)]
pub struct Session {
    /// Its connection.
    pub connection: Connection,
    /// Process id, as the kernel says.
    pub pid: u32,
    down: Down,
    up: Up,
    doorbell: Arc<OwnedFd>,
}

/// A worker that has been given segments, and has yet to map them.
#[derive(Debug)]
pub struct Joining {
    connection: Connection,
    pid: u32,
    geometry: Geometry,
    down: Down,
    /// Its own segment. Not mapped here before it is sealed.
    up_fd: OwnedFd,
    doorbell: Arc<OwnedFd>,
    /// Name of its program.
    pub program: String,
    /// When it is hung up on.
    pub deadline: Instant,
}

impl Joining {
    /// Its connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Process id of its worker, as the kernel says.
    pub fn pid(&self) -> u32 {
        self.pid
    }
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

impl Member {
    /// A vacant place, in which a worker spins for `spin` when there is nothing to do.
    pub fn new(id: String, core: Option<usize>, spin: Duration, lanes: usize) -> Self {
        Member {
            id,
            core,
            life: Life::new(Instant::now()),
            token: None,
            process: None,
            channel: None,
            joining: None,
            session: None,
            program: String::new(),
            starts: Starts::default(),
            attached: 0,
            restarting: false,
            last_exit: None,
            hangs: 0,
            leaving: None,
            overdue: None,
            held_until: None,
            spin,
            taken: false,
            pulse: None,
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
        deadline: Instant,
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
        self.joining = Some(Joining { connection, pid, geometry, down, up_fd, doorbell, program, deadline });
        Ok(handover)
    }

    /// The worker that was joining has mapped its segments, and sealed its own: it cannot take
    /// pages of it away from the lanes. Returns the lanes' links, in order, and whether the segments
    /// could be locked.
    ///
    /// Nothing here takes a lock that the worker can hold: it is the worker that seals, and the
    /// segment is not mapped here before.
    ///
    /// # Errors
    /// [`SessionError`]; then nobody is joining any more.
    pub fn begin_session(
        &mut self,
        joining: Joining,
    ) -> Result<(Vec<MemberLink>, io::Result<()>), SessionError> {
        let Joining { connection, pid, geometry, down, up_fd, doorbell, program, .. } = joining;
        if !segment::is_sealed_against_further_writers(&up_fd)? {
            return Err(SessionError::Unsealed);
        }
        let up = Up::watch(&up_fd, geometry)?;
        let links = (0..geometry.lanes)
            .zip(&self.counters)
            .map(|(lane, counters)| MemberLink {
                ring: Producer::new(SharedRing::new(&down, &up, LaneId(lane))),
                up: up.clone(),
                doorbell: doorbell.clone(),
                counters: counters.clone(),
            })
            .collect();
        // What it took away before is back when this returns, also if it cannot be locked.
        let locked = [up.lock(), down.lock()].into_iter().collect();
        self.session = Some(Session { connection, pid, down, up, doorbell });
        self.program = program;
        self.taken = true;
        Ok((links, locked))
    }

    /// Whether a worker may take the place: it is neither leaving nor down for good.
    pub fn may_attach(&self) -> bool {
        self.state().after(Change::Attach).is_some()
            && self.leaving.is_none()
            && (self.token.is_none() || self.process.is_some())
    }

    /// Hangs up on a worker that has not said that it is ready. Whether there was one.
    pub fn end_joining(&mut self) -> bool {
        let joining = self.joining.take();
        if let Some(joining) = &joining {
            joining.connection().end();
        }
        joining.is_some()
    }

    /// The connection of its worker, joined or not.
    pub fn connection(&self) -> Option<&Connection> {
        let session = self.session.as_ref().map(|session| &session.connection);
        session.or_else(|| self.joining.as_ref().map(Joining::connection))
    }

    /// The state it is in.
    pub fn state(&self) -> State {
        self.life.state()
    }

    /// Whether it has its share of the flows: its worker takes them, or they are held.
    pub fn has_flows(&self) -> bool {
        self.state().takes_packets() || self.held_until.is_some()
    }

    /// Process id of its worker, as the kernel says; else of the process started for it; 0: none.
    pub fn pid(&self) -> u32 {
        let process = self.process.as_ref().map(Process::pid);
        self.session.as_ref().map(|session| session.pid).or(process).unwrap_or(0)
    }

    /// Whether nobody has the place, and xfan starts nobody for it.
    pub fn is_vacant(&self) -> bool {
        self.token.is_none() && self.connection().is_none() && self.process.is_none()
    }

    /// Whether nobody ever had the place.
    pub fn is_untouched(&self) -> bool {
        self.is_vacant() && !self.taken
    }

    /// How long its worker has had packets, and has neither committed one nor asked for more.
    pub fn stands_still(&mut self, now: Instant) -> Option<Duration> {
        let Some(session) = &self.session else {
            self.pulse = None;
            return None;
        };
        let heartbeat = session.up.heartbeat().load(std::sync::atomic::Ordering::Relaxed);
        let committed = self.sum(|lane| &lane.committed);
        let idle = self.backlog() == 0;
        match &self.pulse {
            Some(pulse) if !idle && pulse.committed == committed && pulse.heartbeat == heartbeat => {
                Some(now.duration_since(pulse.since))
            }
            _ => {
                self.pulse = Some(Pulse { committed, heartbeat, since: now });
                None
            }
        }
    }

    /// Tells the worker that what is in its rings is the last.
    pub fn close(&self) {
        if let Some(session) = &self.session {
            session.down.set_phase(Phase::Closing);
            bell::ring(&session.doorbell);
        }
    }

    /// Forgets the session; what it published is kept. With `packets` the worker may still have some, which are others' from now on.
    pub fn end_session(&mut self, packets: bool) -> Option<Session> {
        let session = self.session.take()?;
        // Before any of its packets goes to another: it may be a worker that was stopped, and goes on one day.
        session.down.set_phase(if packets { Phase::Over } else { Phase::Closing });
        bell::ring(&session.doorbell);
        let busy_ticks = session.up.busy_ticks().load(std::sync::atomic::Ordering::Relaxed);
        // What a worker publishes may be any number.
        self.past.busy_ticks = self.past.busy_ticks.wrapping_add(busy_ticks);
        self.past.add(session.up.published_counters());
        Some(session)
    }

    /// Whether a lane caught its worker lying, since the last call.
    pub fn take_corrupt(&self) -> bool {
        let caught =
            |lane: &&Arc<MemberCounters>| lane.corrupt.swap(false, std::sync::atomic::Ordering::AcqRel);
        self.counters.iter().filter(caught).count() > 0
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

    /// Packets that were in its rings when it was gone, and went to others.
    pub fn requeued(&self) -> u64 {
        self.sum(|lane| &lane.requeued)
    }

    /// Packets that were in its rings when it was gone, and that nobody had room for.
    pub fn lost(&self) -> u64 {
        self.sum(|lane| &lane.lost)
    }

    /// What is known of it; `output_dropped` is what others count.
    pub fn report(&self, buckets: usize, output_dropped: u64) -> report::Member {
        let mut counters = self.past.published.clone();
        let mut busy = self.past.busy_ticks;
        if let Some(session) = &self.session {
            busy = busy.wrapping_add(session.up.busy_ticks().load(std::sync::atomic::Ordering::Relaxed));
            for (name, value) in session.up.published_counters() {
                let sum: &mut u64 = counters.entry(name).or_default();
                *sum = sum.wrapping_add(value);
            }
        }
        let usage = Usage::of(self.pid());
        report::Member {
            id: self.id.clone(),
            program: self.program.clone(),
            pid: self.pid(),
            core: self.core,
            state: self.state().name().to_owned(),
            in_state_ns: u64::try_from(self.life.age(Instant::now()).as_nanos()).unwrap_or(u64::MAX),
            cpu_ns: usage.cpu_ns,
            resident_bytes: usage.resident_bytes,
            restarts: self.starts.restarts,
            hangs: self.hangs,
            held: self.held_until.is_some(),
            supervised: self.token.is_some(),
            last_exit: self.last_exit.clone(),
            buckets,
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
