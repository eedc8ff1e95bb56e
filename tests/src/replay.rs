//! Replays frames into the queues of an interface, each exactly once, and says how many went where.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::link::{Link, LinkError};
use crate::oracle::{self, Flow};
use crate::tx::{TxError, TxSocket};

/// Which queue a frame is sent through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// So many frames to one queue, then as many to the next.
    Runs(u64),
    /// All frames of a flow, both directions, to the same queue; flows take the queues in turn, in the order in which
    /// they appear. Frames without a flow go to the first queue.
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
    /// Its TX queues to use; none means all.
    pub queues: Vec<u32>,
    /// Which frame goes through which of them.
    pub spread: Spread,
    /// How often to send all frames; every time they are spread alike.
    pub loops: u64,
    /// Frames per second at most.
    pub frames_per_second: Option<u64>,
}

impl Replay {
    /// Once, as fast as it goes, packet by packet over all queues of `interface`.
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

/// A [`Replay`] that holds its queues.
pub struct OpenReplay {
    replay: Replay,
    sockets: Vec<TxSocket>,
}

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Frames sent.
    pub packets: u64,
    /// Their lengths, in bytes.
    pub bytes: u64,
    /// Frames sent by queue.
    pub queues: BTreeMap<u32, u64>,
    /// Times a full receiver refused a frame, which was then sent again.
    pub refused: u64,
}

/// Why not all was sent.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The interface is not there.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A queue cannot be opened, or did not complete.
    #[error("{0}; {1} packets were sent")]
    Queue(TxError, u64),
    /// A frame cannot be sent.
    #[error("packet {number}: {source}; {sent} packets were sent")]
    Packet {
        /// Its number in the capture, from 1.
        number: usize,
        /// Why.
        source: TxError,
        /// Packets sent before.
        sent: u64,
    },
}

impl Replay {
    /// Sends `frames` in their order and waits until all have arrived at the receiver's XDP program. Before the first is
    /// sent, all are checked, so that a frame of an impossible length sends nothing.
    ///
    /// # Errors
    /// A queue is not there or busy, a frame too long, or the receiver refuses frames for long.
    pub fn run<F: AsRef<[u8]>>(&self, frames: &[F]) -> Result<Report, ReplayError> {
        self.open()?.run(frames)
    }

    /// Opens the queues, for more than one run: a closed queue is free again only later.
    ///
    /// # Errors
    /// A queue is not there or busy.
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

    /// For each frame the index of its queue.
    fn route<F: AsRef<[u8]>>(&self, frames: &[F], queues: usize) -> Vec<usize> {
        match self.spread {
            Spread::Runs(run) => (0..queues)
                .cycle()
                .flat_map(|queue| (0..run).map(move |_| queue))
                .take(frames.len())
                .collect(),
            Spread::Flow => {
                let mut seen: HashMap<Flow, usize> = HashMap::new();
                let mut queue_of = |frame: &F| {
                    let flow = oracle::read(frame.as_ref(), &[]).flow?;
                    let next = seen.len();
                    Some(*seen.entry(flow).or_insert(next) % queues)
                };
                frames.iter().map(|frame| queue_of(frame).unwrap_or(0)).collect()
            }
        }
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
    /// A frame is too long, or the receiver refuses frames for long.
    pub fn run<F: AsRef<[u8]>>(&mut self, frames: &[F]) -> Result<Report, ReplayError> {
        let Self { replay, sockets } = self;
        for (index, frame) in frames.iter().enumerate() {
            sockets[0].check_length(frame.as_ref().len()).map_err(|source| ReplayError::Packet {
                number: index + 1,
                source,
                sent: 0,
            })?;
        }
        let mut report = Report::default();
        let before: Vec<_> = sockets.iter().map(|socket| (socket.sent(), socket.refused())).collect();
        let route = replay.route(frames, sockets.len());
        let begin = Instant::now();
        for _ in 0..replay.loops {
            for (index, (frame, &at)) in frames.iter().zip(&route).enumerate() {
                replay.keep_pace(begin, report.packets);
                let frame = frame.as_ref();
                sockets[at].send(frame).map_err(|source| ReplayError::Packet {
                    number: index + 1,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic;

    fn route(spread: Spread, frames: &[Vec<u8>], queues: usize) -> Vec<usize> {
        Replay { spread, ..Replay::onto("none") }.route(frames, queues)
    }

    #[test]
    fn spreads_by_packet_and_by_run() {
        let frames = vec![vec![0; 60]; 7];
        assert_eq!(route(Spread::PACKET, &frames, 3), [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(route(Spread::Runs(2), &frames, 3), [0, 0, 1, 1, 2, 2, 0]);
        assert_eq!(route(Spread::Runs(2), &frames, 1), [0; 7]);
    }

    #[test]
    fn spreads_by_flow_with_both_directions_together() {
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
