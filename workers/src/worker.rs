//! The worker: a member of a group, and the loop that waits for packets.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use xfan_shm::clock::ticks;
use xfan_shm::doorbell::Sleeper;
use xfan_shm::layout::{COUNTERS, Phase, counter_name_is_valid};
use xfan_shm::protocol::{self, ProtocolError, Request};

use crate::attach::{Builder, Membership};
use crate::batch::{Batch, Received};
use crate::counter::{Counter, CounterError};
use crate::error::{AttachError, RecvError};
use crate::idle::{self, Idle, Step, Wake};
use crate::leave::Leave;
use crate::receiver::Receiver;

/// After a request to leave: how long to wait for the dispatcher once no packet arrives any more.
/// A dispatcher answers within milliseconds. 2 s leave room for a busy one, and a worker still
/// stops within the time that service managers grant.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);

/// A member of a dispatcher's group, and the packets that its lanes send to it.
///
/// Make one with [`attach`](Self::attach), [`attach_to`](Self::attach_to) or
/// [`builder`](Self::builder), and call [`recv`](Self::recv) in a loop. Dropping the worker ends
/// its membership: packets that it has not committed go to other workers.
pub struct Worker {
    // Fixed while the worker is a member.
    builder: Builder,
    member: String,
    core: Option<usize>,
    published: Vec<String>,
    // Changes with every batch.
    receiver: Receiver,
    // Used while there are no packets.
    idle: Idle,
    sleeper: Sleeper,
    wakeups: u64,
    leave: Leave,
}

/// What [`Worker::wait`] found.
enum Turn {
    /// When the scan that found packets began, in ticks, and their number.
    Packets(u64, u32),
    Idle,
    Closed,
}

/// The last step of attaching. It stands here because it makes a [`Worker`].
impl Builder {
    /// Attaches to the dispatcher, and pins the calling thread to the core that the dispatcher
    /// assigns to this worker, if any.
    ///
    /// # Errors
    /// - [`AttachError::Batch`] if the batch size is out of range.
    /// - [`AttachError::NoSocket`] if neither [`socket`](Self::socket) nor the environment names a
    ///   control socket.
    /// - [`AttachError::NoDispatcher`], [`AttachError::Permission`] and [`AttachError::Connect`] if
    ///   the connection fails.
    /// - [`AttachError::Refused`] if the dispatcher does not accept the worker, for example because
    ///   every member has one.
    /// - The other variants of [`AttachError`] if the exchange fails, or if the memory cannot be
    ///   mapped or the thread not be pinned.
    pub fn attach(self) -> Result<Worker, AttachError> {
        self.join().map(Worker::new)
    }
}

impl Worker {
    /// Attaches to the dispatcher that started this process, as the member that it was started for.
    /// Both are read from the environment. Pins the calling thread to the core that the dispatcher
    /// assigns.
    ///
    /// # Errors
    /// See [`Builder::attach`].
    pub fn attach() -> Result<Worker, AttachError> {
        Worker::builder().attach()
    }

    /// Attaches to the dispatcher that listens on the control socket `path`, as any vacant member.
    /// Pins the calling thread to the core that the dispatcher assigns.
    ///
    /// # Errors
    /// See [`Builder::attach`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use xfan_worker::{Worker, default_socket};
    ///
    /// let worker = Worker::attach_to(default_socket("eth1"))?;
    /// println!("member {}, {} lanes", worker.member(), worker.lanes());
    /// # Ok::<(), xfan_worker::AttachError>(())
    /// ```
    pub fn attach_to(path: impl Into<PathBuf>) -> Result<Worker, AttachError> {
        Worker::builder().socket(path).attach()
    }

    /// Returns the options for attaching, at their defaults.
    pub fn builder() -> Builder {
        Builder::new()
    }

    fn new(membership: Membership) -> Self {
        let Membership { builder, attached, umem, down, up, control, doorbell, leave } = membership;
        let receiver = Receiver::new(umem, down, up, attached.geometry.lanes, attached.ports, builder.batch);
        Worker {
            builder,
            member: attached.member,
            core: attached.core,
            published: Vec::new(),
            receiver,
            idle: Idle::new(attached.spin_ns, attached.yield_ns, control, doorbell),
            sleeper: Sleeper::default(),
            wakeups: 0,
            leave,
        }
    }

    /// Attaches to the next dispatcher on the same control socket. Call it after
    /// [`RecvError::PrimaryGone`] or [`RecvError::Evicted`].
    ///
    /// The worker asks for the member that it was, and joins as any vacant member if it cannot have
    /// that one. If no dispatcher listens yet, it waits for one, at most for `patience`. Meanwhile
    /// the kernel's network stack receives the traffic.
    ///
    /// Use this in workers that attached on their own, and in workers that a dispatcher started
    /// and that [survive](Self::survival) it. Counters are not carried over: publish them again.
    ///
    /// # Errors
    /// [`AttachError::Leaving`] if a signal asked the worker to leave. Any other [`AttachError`] as
    /// in [`Builder::attach`]. The call may be repeated after an error.
    pub fn reattach(&mut self, patience: Duration) -> Result<(), AttachError> {
        let next = self.builder.clone().join_next(self.member.clone(), &self.leave, patience)?;
        *self = Worker::new(next);
        Ok(())
    }

    /// How long this worker should look for the next dispatcher when the one that started it is
    /// gone: the patience for [`reattach`](Self::reattach). `None` means that the worker should
    /// exit. It is set by `survive = true` in the dispatcher's configuration.
    pub fn survival(&self) -> Option<Duration> {
        self.builder.survival
    }

    /// The member that the worker is, such as `default/0`.
    pub fn member(&self) -> &str {
        &self.member
    }

    /// The core that the attaching thread was pinned to, if any.
    pub fn core(&self) -> Option<usize> {
        self.core
    }

    /// Number of lanes that send packets to this worker.
    pub fn lanes(&self) -> usize {
        self.receiver.lanes()
    }

    /// Names of the dispatcher's interfaces. [`Packet::port`](crate::Packet::port) is an index into
    /// them.
    pub fn ports(&self) -> &[String] {
        self.receiver.ports()
    }

    /// Publishes a counter with value 0. `xfan stats` shows it under `name`, next to the member.
    ///
    /// A name has 1 to 24 characters of `a-z`, `0-9` and `_`. A worker can publish 32 counters.
    ///
    /// # Errors
    /// - [`CounterError::Name`] if the name is not valid.
    /// - [`CounterError::Taken`] if this worker has published that name.
    /// - [`CounterError::Full`] if this worker has published 32 counters.
    pub fn counter(&mut self, name: &str) -> Result<Counter, CounterError> {
        if !counter_name_is_valid(name) {
            return Err(CounterError::Name(name.into()));
        }
        if self.published.iter().any(|taken| taken == name) {
            return Err(CounterError::Taken(name.into()));
        }
        let index = self.published.len();
        if index == COUNTERS {
            return Err(CounterError::Full(name.into()));
        }
        self.receiver.up.publish_counter(index, name);
        self.published.push(name.into());
        Ok(Counter::new(&self.receiver.up, index))
    }

    /// Receives packets: at most a batch, all from one lane. The lanes take turns.
    ///
    /// If there are no packets, the worker waits for at most `timeout`. It spins, then yields, then
    /// sleeps, for the times in the dispatcher's configuration. With a timeout of zero it returns
    /// at once. Finding packets costs no system call, lock or allocation.
    ///
    /// Returns [`Received::Idle`] if no packet arrived in time or a signal interrupted the sleep,
    /// and [`Received::Closed`] if no more packets will arrive.
    ///
    /// # Errors
    /// - [`RecvError::PrimaryGone`] if the dispatcher died, once all packets are committed.
    /// - [`RecvError::Evicted`] if the dispatcher ended this worker's membership.
    /// - [`RecvError::Corrupt`] if a descriptor points outside the packet memory.
    /// - [`RecvError::System`] if a system call fails.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use xfan_worker::{Received, Worker};
    ///
    /// let mut worker = Worker::attach()?;
    /// let mut bytes = 0;
    /// loop {
    ///     match worker.recv(Duration::from_millis(100))? {
    ///         Received::Packets(batch) => {
    ///             bytes += batch.iter().map(|packet| packet.data().len()).sum::<usize>();
    ///             batch.commit();
    ///         }
    ///         Received::Idle => {}
    ///         Received::Closed => break,
    ///     }
    /// }
    /// println!("{bytes} bytes");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn recv(&mut self, timeout: Duration) -> Result<Received<'_>, RecvError> {
        self.receiver.beat();
        if self.leave.is_due() {
            self.request_detach()?;
        }
        let start = ticks();
        let count = self.receiver.scan()?;
        // Checked after the scan: if the worker is evicted, a packet that the scan found may be
        // meant for the member's next worker.
        if self.is_evicted() {
            return Err(RecvError::Evicted);
        }
        if count > 0 {
            self.idle.end();
            return Ok(Received::Packets(Batch::new(&mut self.receiver, start, count)));
        }
        Ok(match self.wait(timeout)? {
            Turn::Packets(start, count) => Received::Packets(Batch::new(&mut self.receiver, start, count)),
            Turn::Idle => Received::Idle,
            Turn::Closed => Received::Closed,
        })
    }

    /// Asks the dispatcher to detach this worker.
    ///
    /// Packets on their way to the worker still arrive. To lose none, keep receiving until
    /// [`Received::Closed`], then drop the worker. If the dispatcher does not answer, `Closed`
    /// comes once no packet has arrived for 2 seconds. Further calls do nothing.
    ///
    /// # Errors
    /// [`RecvError::System`] if the request cannot be sent. A dispatcher that is gone is not an
    /// error here: [`recv`](Self::recv) reports it.
    pub fn request_detach(&mut self) -> Result<(), RecvError> {
        if !self.leave.begin(ticks()) {
            return Ok(());
        }
        match protocol::send(self.idle.control(), &Request::Detach, &[]) {
            Ok(()) | Err(ProtocolError::Closed) => Ok(()),
            Err(ProtocolError::Io(error)) => Err(RecvError::System("send the detach request", error)),
            Err(other) => Err(RecvError::System("send the detach request", io::Error::other(other))),
        }
    }

    /// Commits the first `packets` of those that [`Batch::leave_open`] left. If it left fewer,
    /// nothing is committed, and the error is their number.
    #[doc(hidden)]
    #[inline]
    pub fn commit_open(&mut self, packets: usize) -> Result<(), usize> {
        self.receiver.commit_open(packets)
    }

    /// Whether the dispatcher has ended this worker's membership.
    ///
    /// If so, its packets belong to other workers, and their frames may be overwritten. If not,
    /// all data read from packets before this call was data of those packets.
    #[inline(always)]
    pub fn is_evicted(&self) -> bool {
        self.receiver.is_evicted()
    }

    /// Waits for packets, at most for `timeout`.
    #[inline(never)]
    fn wait(&mut self, timeout: Duration) -> Result<Turn, RecvError> {
        let entered = ticks();
        let limit = idle::ticks(timeout);
        loop {
            // Both are read before the scan. So the scan sees every packet that was published
            // before the dispatcher closed the ring or the connection.
            let closing = self.receiver.down.phase() == Phase::Closing;
            let hung_up = self.idle.has_hung_up();
            let now = ticks();
            let count = self.receiver.scan()?;
            if self.is_evicted() {
                // To a worker that asked to leave, this is the answer.
                let asked = self.leave.since().is_some();
                return if asked { Ok(Turn::Closed) } else { Err(RecvError::Evicted) };
            }
            if count > 0 {
                self.idle.end();
                return Ok(Turn::Packets(now, count));
            }
            let idle_since = self.idle.begin(now);
            if closing || self.detach_timed_out(now, idle_since) {
                return Ok(Turn::Closed);
            }
            if hung_up {
                let asked = self.leave.since().is_some();
                return if asked { Ok(Turn::Closed) } else { Err(RecvError::PrimaryGone) };
            }
            if self
                .idle
                .look(now)
                .map_err(|error| RecvError::System("poll the connection to the dispatcher", error))?
            {
                continue;
            }
            let waited = now.saturating_sub(entered);
            if waited >= limit {
                return Ok(Turn::Idle);
            }
            match self.idle.step(now.saturating_sub(idle_since)) {
                Step::Spin => std::hint::spin_loop(),
                Step::Yield => std::thread::yield_now(),
                Step::Sleep => {
                    if self.sleep(idle::duration(limit - waited))? == Wake::Interrupted {
                        return Ok(Turn::Idle);
                    }
                }
            }
            self.receiver.beat();
            if self.leave.is_due() {
                self.request_detach()?;
            }
        }
    }

    /// Announces the sleep, checks the rings once more, and sleeps if they are still empty. The
    /// protocol is described in `xfan_shm::doorbell`.
    fn sleep(&mut self, limit: Duration) -> Result<Wake, RecvError> {
        self.sleeper.announce(self.receiver.up.epoch());
        let idle = self.receiver.is_empty() && self.receiver.down.phase() == Phase::Running;
        let wake = if idle { self.idle.sleep(limit) } else { Ok(Wake::Other) };
        self.sleeper.awake(self.receiver.up.epoch());
        let wake = wake.map_err(|error| RecvError::System("sleep until packets arrive", error))?;
        if wake == Wake::Rung {
            self.wakeups += 1;
            self.receiver.up.wakeups().store(self.wakeups, Ordering::Relaxed);
        }
        Ok(wake)
    }

    /// Whether the worker asked to leave, and since then neither an answer nor a packet arrived for
    /// [`DETACH_TIMEOUT`].
    fn detach_timed_out(&self, now: u64, idle_since: u64) -> bool {
        self.leave
            .since()
            .is_some_and(|since| now.saturating_sub(since.max(idle_since)) > idle::ticks(DETACH_TIMEOUT))
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("member", &self.member)
            .field("lanes", &self.lanes())
            .finish_non_exhaustive()
    }
}
