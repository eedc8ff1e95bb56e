//! Replays frames into the queues of an interface, each exactly once, and reports how many went
//! where.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::capture::{CaptureError, CaptureReader};
use crate::link::{Link, LinkError};
use crate::netns::Netns;
use crate::oracle::{self, Flow};
use crate::traffic;
use crate::tx::{TxError, TxSocket};

/// Which queue a frame is sent through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// This many frames to one queue, then as many to the next.
    Runs(u64),
    /// All frames of a flow, in both directions, to the same queue. New flows take the queues in
    /// turn. Frames without a flow go to the first queue.
    Flow,
}

impl Spread {
    /// Each frame to the next queue.
    pub const PACKET: Self = Self::Runs(1);
}

impl FromStr for Spread {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("packet", _) => Ok(Self::PACKET),
            ("flow", _) => Ok(Self::Flow),
            (_, Ok(run)) if run > 0 => Ok(Self::Runs(run)),
            _ => Err(format!("`{text}` is neither `packet`, `flow` nor a number of packets from 1")),
        }
    }
}

/// How to replay.
#[derive(Clone, Debug)]
pub struct Replay {
    /// The sending interface, in the namespace of the calling thread.
    pub interface: String,
    /// Its TX queues to use; empty means all.
    pub queues: Vec<u32>,
    /// Which frame goes to which queue.
    pub spread: Spread,
    /// How many times to send all frames; each time they are spread alike.
    pub loops: u64,
    /// The most frames per second; none means no limit.
    pub frames_per_second: Option<u64>,
}

impl Replay {
    /// Once, as fast as possible, packet by packet over all queues of `interface`.
    pub fn onto(interface: &str) -> Self {
        Self {
            interface: interface.into(),
            queues: Vec::new(),
            spread: Spread::PACKET,
            loops: 1,
            frames_per_second: None,
        }
    }
}

/// A [`Replay`] with its queues open.
pub struct OpenReplay {
    replay: Replay,
    sockets: Vec<TxSocket>,
}

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Frames sent.
    pub packets: u64,
    /// The sum of their lengths, in bytes.
    pub bytes: u64,
    /// Frames sent by queue.
    pub queues: BTreeMap<u32, u64>,
    /// How many times a full receiver refused a frame, which was then sent again.
    pub refused: u64,
}

/// Why not everything was sent.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The interface does not exist.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A queue cannot be opened, or did not complete.
    #[error("{0}; {1} packets were sent")]
    Queue(TxError, u64),
    /// A frame cannot be sent.
    #[error("packet {number}: {source}; {sent} packets were sent")]
    Packet {
        /// The number of the frame in the capture, from 1.
        number: u64,
        /// Why.
        source: TxError,
        /// Packets sent before.
        sent: u64,
    },
    /// The capture cannot be read.
    #[error("{0}; {1} packets were sent")]
    Capture(CaptureError, u64),
    /// A pipe cannot be read twice.
    #[error("{} is no regular file: it can be read and sent only once, not {loops} times", path.display())]
    ReadOnce {
        /// The pipe.
        path: PathBuf,
        /// The requested number of times.
        loops: u64,
    },
}

impl Replay {
    /// Sends `frames` in order and waits until all have arrived at the receiver's XDP program. It
    /// checks all frames first, so that nothing is sent if one has an impossible length.
    ///
    /// # Errors
    /// A queue does not exist or is busy, a frame is too long, or the receiver refuses frames for
    /// too long.
    pub fn run<F: AsRef<[u8]>>(&self, frames: &[F]) -> Result<Report, ReplayError> {
        self.open()?.run(frames)
    }

    /// As [`run`](Self::run), with the frames of a capture file, which may be larger than memory. A
    /// regular file is read once to check all frames and once for every loop. Anything else, such
    /// as a pipe, is read only once, and each frame is checked before it is sent.
    ///
    /// With [`Spread::Flow`] memory grows with the number of flows.
    ///
    /// # Errors
    /// As [`run`](Self::run); or the file cannot be read, or not `loops` times.
    pub fn run_file(&self, path: &Path) -> Result<Report, ReplayError> {
        self.open()?.run_file(path)
    }

    /// Opens the queues for more than one run: a closed queue becomes free only later.
    ///
    /// # Errors
    /// A queue does not exist or is busy.
    pub fn open(&self) -> Result<OpenReplay, ReplayError> {
        let queues = match &self.queues[..] {
            [] => (0..Link::named(&self.interface)?.tx_queues).collect(),
            some => some.to_vec(),
        };
        let open = |queue: &u32| TxSocket::open(&self.interface, *queue);
        let opened: Result<Vec<_>, _> = queues.iter().map(open).collect();
        let sockets = opened.map_err(|error| ReplayError::Queue(error, 0))?;
        Ok(OpenReplay { replay: self.clone(), sockets })
    }

    fn keep_pace(&self, begin: Instant, sent: u64) {
        let Some(rate) = self.frames_per_second else { return };
        let due = begin + Duration::from_secs_f64(sent as f64 / rate.max(1) as f64);
        let now = Instant::now();
        if due > now {
            std::thread::sleep(due - now);
        }
    }
}

impl OpenReplay {
    /// As [`Replay::run`], beginning with the first queue each time.
    ///
    /// # Errors
    /// A frame is too long, or the receiver refuses frames for too long.
    pub fn run<F: AsRef<[u8]>>(&mut self, frames: &[F]) -> Result<Report, ReplayError> {
        self.check(frames.iter().map(Ok))?;
        self.send(|| Ok(frames.iter().map(Ok)))
    }

    /// As [`Replay::run_file`], beginning with the first queue each time.
    ///
    /// # Errors
    /// As [`Replay::run_file`].
    pub fn run_file(&mut self, path: &Path) -> Result<Report, ReplayError> {
        let capture = |error| ReplayError::Capture(error, 0);
        let metadata = std::fs::metadata(path)
            .map_err(|source| capture(CaptureError::Io { path: path.into(), source }))?;
        let loops = self.replay.loops;
        if metadata.is_file() {
            self.check(CaptureReader::open(path).map_err(capture)?)?;
        } else if loops > 1 {
            return Err(ReplayError::ReadOnce { path: path.into(), loops });
        }
        self.send(|| CaptureReader::open(path))
    }

    /// Checks that all frames can be read and sent.
    fn check<F: AsRef<[u8]>>(&self, frames: impl Frames<F>) -> Result<(), ReplayError> {
        for (number, frame) in (1..).zip(frames) {
            let frame = frame.map_err(|error| ReplayError::Capture(error, 0))?;
            let fits = self.sockets[0].check_length(frame.as_ref().len());
            fits.map_err(|source| ReplayError::Packet { number, source, sent: 0 })?;
        }
        Ok(())
    }

    /// Sends the frames that `open` returns, anew for every loop.
    fn send<F: AsRef<[u8]>, I: Frames<F>>(
        &mut self,
        open: impl Fn() -> Result<I, CaptureError>,
    ) -> Result<Report, ReplayError> {
        let Self { replay, sockets } = self;
        let mut report = Report::default();
        let before: Vec<_> = sockets.iter().map(|socket| (socket.sent(), socket.refused())).collect();
        let begin = Instant::now();
        for _ in 0..replay.loops {
            let mut route = Route::new(replay.spread, sockets.len());
            let capture = |error| ReplayError::Capture(error, report.packets);
            for (number, frame) in (1..).zip(open().map_err(capture)?) {
                let frame = frame.map_err(|error| ReplayError::Capture(error, report.packets))?;
                let frame = frame.as_ref();
                replay.keep_pace(begin, report.packets);
                sockets[route.queue_of(frame)].send(frame).map_err(|source| ReplayError::Packet {
                    number,
                    source,
                    sent: report.packets,
                })?;
                report.packets += 1;
                report.bytes += frame.len() as u64;
            }
        }
        for (socket, (sent, refused)) in sockets.iter_mut().zip(before) {
            socket.finish().map_err(|error| ReplayError::Queue(error, report.packets))?;
            report.queues.insert(socket.queue(), socket.sent() - sent);
            report.refused += socket.refused() - refused;
        }
        Ok(report)
    }
}

/// Frames from memory, or from a file that may turn out to be damaged.
trait Frames<F>: Iterator<Item = Result<F, CaptureError>> {}
impl<F, I: Iterator<Item = Result<F, CaptureError>>> Frames<F> for I {}

/// Finds the index of the queue for each frame in turn.
struct Route {
    spread: Spread,
    queues: usize,
    /// The number of frames so far.
    frames: u64,
    /// The queue of every flow so far.
    flows: HashMap<Flow, usize>,
}

impl Route {
    fn new(spread: Spread, queues: usize) -> Self {
        Self { spread, queues, frames: 0, flows: HashMap::new() }
    }

    fn queue_of(&mut self, frame: &[u8]) -> usize {
        let number = self.frames;
        self.frames += 1;
        match self.spread {
            Spread::Runs(run) => {
                usize::try_from(number / run % self.queues as u64).expect("less than `queues`")
            }
            Spread::Flow => oracle::read(frame, &[]).flow.map_or(0, |flow| {
                let next = self.flows.len();
                *self.flows.entry(flow).or_insert(next) % self.queues
            }),
        }
    }
}

/// Sends 600 synthetic packets of 60 flows from `tx0` of a namespace; the same packets for the same
/// seed.
///
/// # Panics
/// The packets cannot be sent.
pub fn send_synthetic(namespace: &Netns, seed: u64) {
    let frames = traffic::synthetic(60, 600, seed).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic;

    fn route(spread: Spread, frames: &[Vec<u8>], queues: usize) -> Vec<usize> {
        let mut route = Route::new(spread, queues);
        frames.iter().map(|frame| route.queue_of(frame)).collect()
    }

    #[test]
    fn spreads_by_packet_and_by_run() {
        let frames = vec![vec![0; 60]; 7];
        assert_eq!(route(Spread::PACKET, &frames, 3), [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(route(Spread::Runs(2), &frames, 3), [0, 0, 1, 1, 2, 2, 0]);
        assert_eq!(route(Spread::Runs(2), &frames, 1), [0; 7]);
    }

    #[test]
    fn spreads_by_flow_keep_directions_together() {
        let frames = traffic::synthetic(20, 200, 1).frames;
        let queues = route(Spread::Flow, &frames, 4);
        let mut queue_of = HashMap::new();
        for (frame, queue) in frames.iter().zip(&queues) {
            let flow = oracle::read(frame, &[]).flow.unwrap();
            assert_eq!(queue_of.entry(flow).or_insert(queue), &queue);
        }
        assert_eq!((0..4).filter(|queue| queues.contains(queue)).count(), 4);
    }

    #[test]
    fn reads_a_spread() {
        assert_eq!("packet".parse(), Ok(Spread::Runs(1)));
        assert_eq!("flow".parse(), Ok(Spread::Flow));
        assert_eq!("16".parse(), Ok(Spread::Runs(16)));
        assert!("0".parse::<Spread>().unwrap_err().contains("`0` is neither"));
    }
}
