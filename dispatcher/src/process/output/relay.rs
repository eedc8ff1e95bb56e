//! The thread that carries workers' lines.

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
use crate::log::{self, ROOM, Writer};
use crate::text::escaped;

/// Bytes taken from a pipe in a turn: as many as it holds by default.
const TURN: usize = 64 << 10;

/// Most bytes taken from a pipe once its worker has ended: as many as one holds at most, unless
/// root enlarges it.
const LAST: usize = 1 << 20;

/// The longest lines: in the log, and in files.
const LONGEST_LOGGED: usize = 4 << 10;
const LONGEST_FILED: usize = 64 << 10;

/// The pause after a turn is so many times the turn, and this at least: workers that write without
/// pause wait for it.
const PAUSES: u32 = 4;
const PAUSE: Duration = Duration::from_millis(1);

/// How often dropped lines are told.
const PERIOD: Duration = Duration::from_secs(10);

/// The names of a worker's streams, in the order of their pipes.
const STREAMS: [&str; 2] = ["stdout", "stderr"];

/// What the relay is to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Relay what a worker writes.
    Add(Source),
    /// Its worker has ended: relay what is left.
    End(u64),
    /// End all, and say when it is done.
    Finish(Sender<()>),
}

/// A worker's pipes, and where their lines go.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) id: u64,
    pub(super) member: String,
    pub(super) target: Target,
    /// Counts the member's lines that were not relayed.
    pub(super) dropped: Arc<AtomicU64>,
    pub(super) pipes: [File; 2],
}

/// Where lines go.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// To the log.
    Log,
    /// To a file, with the names of member and stream before each if others write to it, too.
    File {
        /// Writes it.
        file: Arc<Writer>,
        /// Whether others do.
        tagged: bool,
    },
}

/// The thread's own.
pub(super) struct Relay {
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    taps: Vec<Tapped>,
    buffer: Vec<u8>,
}

/// A worker whose output is relayed.
struct Tapped {
    id: u64,
    member: String,
    target: Target,
    dropped: Arc<AtomicU64>,
    /// Dropped lines that were told of, and when.
    told: (u64, Instant),
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

    /// Relays until nobody can tell it anything any more.
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

    /// Waits until something is there: the numbers of the workers and their streams.
    fn wait(&self) -> Vec<(usize, usize)> {
        let untold = self.taps.iter().any(|tapped| tapped.untold() > 0);
        let timeout = if untold {
            PollTimeout::try_from(PERIOD).unwrap_or(PollTimeout::MAX)
        } else {
            PollTimeout::NONE
        };
        let streams = || {
            self.taps.iter().enumerate().flat_map(|(place, tapped)| {
                tapped.streams.iter().enumerate().map(move |(number, stream)| ((place, number), stream))
            })
        };
        let mut polled = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        polled.extend(streams().map(|(_, stream)| PollFd::new(stream.pipe.as_fd(), PollFlags::POLLIN)));
        if poll(&mut polled, timeout).is_err() {
            // A signal, or no memory: what is there is seen in the next turn.
            std::thread::sleep(PAUSE);
            return Vec::new();
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        streams().zip(&polled[1..]).filter(|(_, fd)| is_ready(fd)).map(|((numbers, _), _)| numbers).collect()
    }

    /// Reads once from each pipe that has something. Whether there was anything.
    fn take_turn(&mut self, ready: &[(usize, usize)], now: Instant) -> bool {
        let mut ended = Vec::new();
        for &(place, number) in ready {
            if self.taps[place].read(number, &mut self.buffer, now) == Found::End {
                ended.push((place, number));
            }
        }
        // From the last to the first, so that the numbers stay right.
        for &(place, number) in ended.iter().rev() {
            self.taps[place].finish(number, now);
        }
        for tapped in &mut self.taps {
            tapped.tell(now, PERIOD);
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
        let told = (source.dropped.load(Ordering::Relaxed), now);
        Tapped {
            id: source.id,
            member: source.member,
            target: source.target,
            dropped: source.dropped,
            told,
            bucket: Bucket::new(now),
            streams: source.pipes.into_iter().zip(STREAMS).map(stream).collect(),
        }
    }

    /// Reads once from a pipe, and passes on the lines that are complete.
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

    /// A pipe has ended, or is to: passes on the line that was begun, and closes it.
    fn finish(&mut self, number: usize, now: Instant) {
        let mut stream = self.streams.remove(number);
        let mut passing =
            Passing::to(&self.target, &self.member, stream.name, &mut self.bucket, &self.dropped);
        stream.lines.finish(|line| passing.pass(line, now));
        passing.done();
    }

    /// The worker has ended. What it has started may have its pipes still, and write on: they are
    /// closed.
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
        self.tell(now, Duration::ZERO);
    }

    fn untold(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed) - self.told.0
    }

    /// Tells of dropped lines, if some were not told of for so long.
    fn tell(&mut self, now: Instant, period: Duration) {
        let dropped = self.untold();
        if dropped > 0 && now - self.told.1 >= period {
            let (member, rate) = (&self.member, Bucket::RATE);
            match self.target {
                Target::Log => tracing::warn!(
                    member,
                    dropped,
                    "lines of its output were dropped: at most {rate} a second are logged"
                ),
                Target::File { .. } => tracing::warn!(
                    member,
                    dropped,
                    "lines of its output were dropped: too long, or its file took no more"
                ),
            }
            self.told = (self.told.0 + dropped, now);
        }
    }
}

/// Passes on the lines of one read.
struct Passing<'a> {
    target: &'a Target,
    member: &'a str,
    stream: &'static str,
    bucket: &'a mut Bucket,
    dropped: &'a Arc<AtomicU64>,
    /// For the file.
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
            && !file.offer(self.bytes, self.count, Some(self.dropped.clone()), ROOM)
        {
            self.dropped.fetch_add(self.count, Ordering::Relaxed);
        }
    }
}
