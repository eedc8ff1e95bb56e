//! The thread that relays the lines of one worker.
//!
//! A worker can make each operation on its sockets slow: the kernel wakes everybody who waits for
//! them, and the worker can have a million epoll entries wait. Its relay is therefore a thread of
//! its own, and pauses in proportion to the time that it used.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, recv};
use xfan_shm::clock::thread_cpu_time;

use super::lines::{Bucket, Line, Lines};
use crate::host::sys;
use crate::log::{self, CAPACITY, Writer};
use crate::text::escaped;

/// The most bytes read from a socket in one turn.
const TURN: usize = 64 << 10;

/// The most bytes read from a socket after its worker has ended: more than the kernel queues for an
/// unprivileged process by default (twice `/proc/sys/net/core/wmem_max`).
const LAST: usize = 1 << 20;

/// The longest line in the log, in bytes; longer lines are cut.
const LONGEST_LOGGED: usize = 4 << 10;
/// The longest line in a file, in bytes; longer lines are dropped. Files may hold records that a
/// program reads, so it is larger.
const LONGEST_FILED: usize = 64 << 10;

/// All relays together use at most one part in so many of a CPU. Workers that write continuously
/// wait for their relay.
const SHARE: u32 = 5;
/// The shortest pause after a turn.
const PAUSE: Duration = Duration::from_millis(1);

/// The CPU time from which a read is slow: it takes some microseconds, unless the worker has
/// thousands of epoll entries wait for its end.
const SLOW: Duration = Duration::from_millis(10);
/// The pause after a slow read, as a multiple of its CPU time.
const SLOW_PAUSES: u32 = 100;

/// The shortest time between two reports of a worker's dropped lines.
const PERIOD: Duration = Duration::from_secs(10);

/// The names of a worker's streams, in the order of its sockets.
const STREAMS: [&str; 2] = ["stdout", "stderr"];

/// The sockets of a worker, and the destination of their lines.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) member: String,
    pub(super) target: Target,
    /// Counts the dropped lines of the member.
    pub(super) dropped: Arc<AtomicU64>,
    pub(super) sockets: [OwnedFd; 2],
    /// Readable: the worker has ended, or the primary is ending.
    pub(super) end: Arc<EventFd>,
    /// The number of relays that are taking a turn or pausing after one.
    pub(super) active: Arc<AtomicU32>,
}

/// The destination of lines.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// The log.
    Log,
    /// A file.
    File {
        /// Writes the file.
        file: Arc<Writer>,
        /// Several members share the file: each line begins with the names of member and stream.
        tagged: bool,
    },
}

/// The state of the thread.
pub(super) struct Relay {
    member: String,
    target: Target,
    dropped: Arc<AtomicU64>,
    /// The dropped lines that were reported, and when.
    reported: (u64, Instant),
    bucket: Bucket,
    streams: Vec<Stream>,
    end: Arc<EventFd>,
    active: Arc<AtomicU32>,
    /// A read was slow.
    slow: bool,
    buffer: Vec<u8>,
}

struct Stream {
    name: &'static str,
    socket: OwnedFd,
    lines: Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Bytes(usize),
    Nothing,
    End,
}

impl Relay {
    pub(super) fn new(source: Source) -> Self {
        let now = Instant::now();
        let longest = match source.target {
            Target::Log => LONGEST_LOGGED,
            Target::File { .. } => LONGEST_FILED,
        };
        let stream = |(socket, name)| Stream { name, socket, lines: Lines::new(longest) };
        Relay {
            reported: (source.dropped.load(Ordering::Relaxed), now),
            member: source.member,
            target: source.target,
            dropped: source.dropped,
            bucket: Bucket::new(now),
            streams: source.sockets.into_iter().zip(STREAMS).map(stream).collect(),
            end: source.end,
            active: source.active,
            slow: false,
            buffer: vec![0; TURN],
        }
    }

    /// Relays until `end` is readable, then what is left in the sockets.
    pub(super) fn run(mut self) {
        loop {
            let unreported = self.unreported() > 0;
            let ready = self.wait(unreported.then_some(PERIOD));
            if sys::is_readable(self.end.as_fd()) {
                return self.end();
            }
            let begun = Instant::now();
            if ready.is_empty() {
                self.report_dropped(begun, PERIOD);
                continue;
            }
            let active = self.active.fetch_add(1, Ordering::Relaxed) + 1;
            let kernel = self.take_turn(&ready, begun);
            let mut pause = PAUSE.max(begun.elapsed() * (SHARE * active - 1));
            if kernel >= SLOW {
                pause = pause.max(kernel * SLOW_PAUSES);
            }
            let ended = sys::is_readable_within(self.end.as_fd(), pause);
            self.active.fetch_sub(1, Ordering::Relaxed);
            if ended {
                return self.end();
            }
        }
    }

    /// Waits for output or the end. Returns the numbers of the readable streams.
    fn wait(&self, timeout: Option<Duration>) -> Vec<usize> {
        let mut polled = vec![PollFd::new(self.end.as_fd(), PollFlags::POLLIN)];
        polled
            .extend(self.streams.iter().map(|stream| PollFd::new(stream.socket.as_fd(), PollFlags::POLLIN)));
        if poll(&mut polled, timeout.map_or(PollTimeout::NONE, sys::poll_timeout)).is_err() {
            // A signal, or no memory. The next turn finds the output.
            std::thread::sleep(PAUSE);
            return Vec::new();
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        (0..self.streams.len()).filter(|number| is_ready(&polled[number + 1])).collect()
    }

    /// Reads once from each readable stream. Returns the CPU time of the reads.
    fn take_turn(&mut self, ready: &[usize], now: Instant) -> Duration {
        let mut kernel = Duration::ZERO;
        let mut ended = Vec::new();
        for &number in ready {
            let (found, took) = self.read(number, now);
            kernel += took;
            if found == Found::End {
                ended.push(number);
            }
        }
        // In reverse order: removing a stream shifts the numbers of later ones.
        for &number in ended.iter().rev() {
            self.finish(number, now);
        }
        self.report_dropped(now, PERIOD);
        kernel
    }

    /// Reads once from a stream, and passes on the lines that ended. Returns the CPU time of the
    /// read, too.
    fn read(&mut self, number: usize, now: Instant) -> (Found, Duration) {
        let stream = &mut self.streams[number];
        let before = thread_cpu_time();
        let received = recv(stream.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT);
        let took = thread_cpu_time().saturating_sub(before);
        if took >= SLOW && !std::mem::replace(&mut self.slow, true) {
            tracing::warn!(
                member = self.member,
                ?took,
                "the worker makes reading its output slow: it is read rarely from now on"
            );
        }
        let count = match received {
            Ok(0) => return (Found::End, took),
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return (Found::Nothing, took),
            Err(_) => return (Found::End, took),
        };
        let mut passing =
            Passing::to(&self.target, &self.member, stream.name, &mut self.bucket, &self.dropped);
        stream.lines.feed(&self.buffer[..count], |line| passing.pass(line, now));
        passing.done();
        (Found::Bytes(count), took)
    }

    /// Passes on the last line of a stream, and closes its socket.
    fn finish(&mut self, number: usize, now: Instant) {
        let mut stream = self.streams.remove(number);
        let mut passing =
            Passing::to(&self.target, &self.member, stream.name, &mut self.bucket, &self.dropped);
        stream.lines.finish(|line| passing.pass(line, now));
        passing.done();
    }

    /// The worker has ended. Relays what is left in its sockets, unless reading is slow, and closes
    /// them: its descendants may still have them open and go on writing.
    fn end(mut self) {
        let now = Instant::now();
        while !self.streams.is_empty() {
            let mut taken = 0;
            while taken < LAST
                && !self.slow
                && let (Found::Bytes(count), _) = self.read(0, now)
            {
                taken += count;
            }
            self.finish(0, now);
        }
        self.report_dropped(now, Duration::ZERO);
    }

    fn unreported(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed) - self.reported.0
    }

    /// Reports dropped lines, if the last report is at least `period` ago.
    fn report_dropped(&mut self, now: Instant, period: Duration) {
        let dropped = self.unreported();
        if dropped > 0 && now - self.reported.1 >= period {
            let (member, rate) = (&self.member, Bucket::RATE);
            match self.target {
                Target::Log => tracing::warn!(
                    member,
                    dropped,
                    "lines of the worker's output were dropped: the log takes at most {rate} a second"
                ),
                Target::File { .. } => tracing::warn!(
                    member,
                    dropped,
                    "lines of the worker's output were dropped: they were too long, or the file could not be written"
                ),
            }
            self.reported = (self.reported.0 + dropped, now);
        }
    }
}

/// Passes the lines of one read on to their destination.
struct Passing<'a> {
    target: &'a Target,
    member: &'a str,
    stream: &'static str,
    bucket: &'a mut Bucket,
    dropped: &'a Arc<AtomicU64>,
    /// Lines for the file, and their number.
    bytes: Vec<u8>,
    count: u64,
}

impl<'a> Passing<'a> {
    fn to(
        target: &'a Target,
        member: &'a str,
        stream: &'static str,
        bucket: &'a mut Bucket,
        dropped: &'a Arc<AtomicU64>,
    ) -> Self {
        Passing { target, member, stream, bucket, dropped, bytes: Vec::new(), count: 0 }
    }

    fn pass(&mut self, line: Line<'_>, now: Instant) {
        let passed = match (self.target, line) {
            (Target::Log, _) if !self.bucket.take(now) => false,
            (Target::Log, Line::Whole(text)) => log::relay(self.member, self.stream, &escaped(text)),
            (Target::Log, Line::Cut(text)) => {
                log::relay(self.member, self.stream, &(escaped(text) + " … (cut)"))
            }
            (Target::File { .. }, Line::Cut(_)) => false,
            (Target::File { tagged, .. }, Line::Whole(text)) => {
                if *tagged {
                    self.bytes.extend(format!("{} {}: ", self.member, self.stream).bytes());
                }
                self.bytes.extend(text);
                self.bytes.push(b'\n');
                self.count += 1;
                true
            }
        };
        if !passed {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn done(self) {
        if let Target::File { file, .. } = self.target
            && self.count > 0
            && !file.offer(self.bytes, self.count, Some(self.dropped.clone()), CAPACITY)
        {
            self.dropped.fetch_add(self.count, Ordering::Relaxed);
        }
    }
}
