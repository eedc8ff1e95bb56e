//! The thread that relays the lines of workers.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::lines::{Bucket, Line, Lines};
use crate::log::{self, CAPACITY, Writer};
use crate::text::escaped;

/// The most bytes read from a pipe in one turn: the default capacity of a pipe.
const TURN: usize = 64 << 10;

/// The most bytes read from a pipe after its worker has ended: the largest capacity that a pipe of
/// an unprivileged process can have by default (`/proc/sys/fs/pipe-max-size`).
const LAST: usize = 1 << 20;

/// The longest line in the log, in bytes; longer lines are cut.
const LONGEST_LOGGED: usize = 4 << 10;
/// The longest line in a file, in bytes; longer lines are dropped. Files may hold records that a
/// program reads, so it is larger.
const LONGEST_FILED: usize = 64 << 10;

/// The pause after a turn, as a multiple of the turn's time: the relay uses at most a fifth of a
/// CPU. Workers that write continuously wait for it.
const PAUSES: u32 = 4;
/// The shortest pause after a turn.
const PAUSE: Duration = Duration::from_millis(1);

/// The shortest time between two reports of a worker's dropped lines.
const PERIOD: Duration = Duration::from_secs(10);

/// The names of a worker's streams, in the order of its pipes.
const STREAMS: [&str; 2] = ["stdout", "stderr"];

/// A command to the relay.
#[derive(Debug)]
pub(super) enum Command {
    /// Relay the output of a worker.
    Add(Source),
    /// The worker with this tap id has ended: relay what is left in its pipes.
    End(u64),
    /// Relay what is left in all pipes, and send a message when done.
    Finish(Sender<()>),
}

/// The pipes of a worker, and the destination of their lines.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) id: u64,
    pub(super) member: String,
    pub(super) target: Target,
    /// Counts the dropped lines of the member.
    pub(super) dropped: Arc<AtomicU64>,
    pub(super) pipes: [File; 2],
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
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    taps: Vec<Tapped>,
    buffer: Vec<u8>,
}

/// A worker whose output is relayed, and what remains to report about it.
struct Tapped {
    id: u64,
    member: String,
    target: Target,
    dropped: Arc<AtomicU64>,
    /// The dropped lines that were reported, and when.
    reported: (u64, Instant),
    bucket: Bucket,
    streams: Vec<Stream>,
}

struct Stream {
    name: &'static str,
    pipe: File,
    lines: Lines,
}

impl Relay {
    pub(super) fn new(commands: Receiver<Command>, wake: Arc<EventFd>) -> Self {
        Relay { commands, wake, taps: Vec::new(), buffer: vec![0; TURN] }
    }

    /// Relays until every sender of commands is gone.
    pub(super) fn run(mut self) {
        loop {
            let ready = self.wait();
            let begun = Instant::now();
            let _ = self.wake.read();
            let read = self.take_turn(&ready, begun);
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if read {
                std::thread::sleep(PAUSE.max(begun.elapsed() * PAUSES));
            }
        }
    }

    /// Waits for output or a command. Returns the positions of the readable pipes: worker and
    /// stream.
    fn wait(&self) -> Vec<(usize, usize)> {
        let unreported = self.taps.iter().any(|tapped| tapped.unreported() > 0);
        let timeout = if unreported {
            PollTimeout::try_from(PERIOD).unwrap_or(PollTimeout::MAX)
        } else {
            PollTimeout::NONE
        };
        let streams = || {
            self.taps.iter().enumerate().flat_map(|(worker, tapped)| {
                tapped.streams.iter().enumerate().map(move |(number, stream)| ((worker, number), stream))
            })
        };
        let mut polled = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        polled.extend(streams().map(|(_, stream)| PollFd::new(stream.pipe.as_fd(), PollFlags::POLLIN)));
        if poll(&mut polled, timeout).is_err() {
            // A signal, or no memory. The next turn finds the output.
            std::thread::sleep(PAUSE);
            return Vec::new();
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        streams().zip(&polled[1..]).filter(|(_, fd)| is_ready(fd)).map(|((numbers, _), _)| numbers).collect()
    }

    /// Reads once from each readable pipe. Returns whether there was one.
    fn take_turn(&mut self, ready: &[(usize, usize)], now: Instant) -> bool {
        let mut ended = Vec::new();
        for &(worker, number) in ready {
            if self.taps[worker].read(number, &mut self.buffer, now) == Found::End {
                ended.push((worker, number));
            }
        }
        // In reverse order: removing a stream shifts the numbers of later ones.
        for &(worker, number) in ended.iter().rev() {
            self.taps[worker].finish(number, now);
        }
        for tapped in &mut self.taps {
            tapped.report_dropped(now, PERIOD);
        }
        !ready.is_empty()
    }

    fn obey(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Add(source) => self.taps.push(Tapped::new(source, now)),
            Command::End(id) => {
                if let Some(place) = self.taps.iter().position(|tapped| tapped.id == id) {
                    self.taps.swap_remove(place).end(&mut self.buffer, now);
                }
            }
            Command::Finish(done) => {
                for tapped in std::mem::take(&mut self.taps) {
                    tapped.end(&mut self.buffer, now);
                }
                let _ = done.send(());
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Bytes(usize),
    Nothing,
    End,
}

impl Tapped {
    fn new(source: Source, now: Instant) -> Self {
        let longest = match source.target {
            Target::Log => LONGEST_LOGGED,
            Target::File { .. } => LONGEST_FILED,
        };
        let stream = |(pipe, name)| Stream { name, pipe, lines: Lines::new(longest) };
        let reported = (source.dropped.load(Ordering::Relaxed), now);
        Tapped {
            id: source.id,
            member: source.member,
            target: source.target,
            dropped: source.dropped,
            reported,
            bucket: Bucket::new(now),
            streams: source.pipes.into_iter().zip(STREAMS).map(stream).collect(),
        }
    }

    /// Reads once from a pipe, and passes on the lines that ended.
    fn read(&mut self, number: usize, buffer: &mut [u8], now: Instant) -> Found {
        let stream = &mut self.streams[number];
        let count = match stream.pipe.read(buffer) {
            Ok(0) => return Found::End,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Found::Nothing;
            }
            Err(_) => return Found::End,
        };
        let mut passing =
            Passing::to(&self.target, &self.member, stream.name, &mut self.bucket, &self.dropped);
        stream.lines.feed(&buffer[..count], |line| passing.pass(line, now));
        passing.done();
        Found::Bytes(count)
    }

    /// Passes on the last line of a pipe, and closes the pipe.
    fn finish(&mut self, number: usize, now: Instant) {
        let mut stream = self.streams.remove(number);
        let mut passing =
            Passing::to(&self.target, &self.member, stream.name, &mut self.bucket, &self.dropped);
        stream.lines.finish(|line| passing.pass(line, now));
        passing.done();
    }

    /// The worker has ended. Relays what is left in its pipes, and closes them: its descendants may
    /// still have them open and go on writing.
    fn end(mut self, buffer: &mut [u8], now: Instant) {
        while !self.streams.is_empty() {
            let mut taken = 0;
            while taken < LAST
                && let Found::Bytes(count) = self.read(0, buffer, now)
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
