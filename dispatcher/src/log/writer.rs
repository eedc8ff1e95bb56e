//! A thread that writes lines, so that whoever has some need not wait for a disk, a pipe or a
//! terminal.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::sink::Sink;
use crate::host::privileges::drop_all_capabilities;

/// Bytes that may wait to be written.
pub const ROOM: usize = 1 << 20;

/// What a line in the queue takes beside its bytes.
const OVERHEAD: usize = 64;

/// How long after a failure the next try is made, if there is no line before.
const RETRY: Duration = Duration::from_millis(500);

/// The way to a thread that writes lines. Offering some never blocks.
#[derive(Debug)]
pub struct Writer {
    queue: Sender<Lines>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes in the queue, or being written.
    waiting: AtomicUsize,
    /// Lines that were not written.
    lost: AtomicU64,
    reopen: AtomicBool,
}

#[derive(Debug)]
struct Lines {
    bytes: Vec<u8>,
    count: u64,
    /// Counts them if they are lost, beside the writer.
    owner: Option<Arc<AtomicU64>>,
}

/// The line that tells how many were lost.
pub type Notice = fn(u64) -> Vec<u8>;

impl Writer {
    /// Starts the thread. `name` is for the log. Once lines can be written again, `notice` tells
    /// there how many were lost; without one the log does.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: String, sink: Sink, notice: Option<Notice>) -> io::Result<Self> {
        let (queue, lines) = channel();
        let shared = Arc::<Shared>::default();
        let carrier = Carrier { name, sink, notice, told: 0, failed: 0, shared: shared.clone() };
        std::thread::Builder::new().name("writer".into()).spawn(move || {
            drop_all_capabilities();
            carrier.run(&lines);
        })?;
        Ok(Writer { queue, shared })
    }

    /// Has whole lines written, unless more than `room` bytes would wait then. Whether they will be
    /// tried.
    pub fn offer(&self, bytes: Vec<u8>, count: u64, owner: Option<Arc<AtomicU64>>, room: usize) -> bool {
        let size = bytes.len() + OVERHEAD;
        let taken = self.shared.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |waiting| {
            Some(waiting + size).filter(|all| *all <= room)
        });
        taken.is_ok() && self.queue.send(Lines { bytes, count, owner }).is_ok()
    }

    /// Counts lines as lost that could not be offered.
    pub fn lose(&self, count: u64) {
        self.shared.lost.fetch_add(count, Ordering::Relaxed);
    }

    /// Lines that were not written.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Has the file opened anew, before the next line.
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Release);
        // Wakes the thread.
        let _ = self.queue.send(Lines { bytes: Vec::new(), count: 0, owner: None });
    }

    /// Waits until all that was offered is written or lost, but not longer than to the deadline.
    pub fn flush(&self, deadline: Instant) {
        while self.shared.waiting.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The thread's own.
struct Carrier {
    name: String,
    sink: Sink,
    notice: Option<Notice>,
    /// Lost lines that the notice has told of.
    told: u64,
    /// Lines that failed since the last that did not.
    failed: u64,
    shared: Arc<Shared>,
}

impl Carrier {
    fn run(mut self, queue: &Receiver<Lines>) {
        loop {
            let untold = self.notice.is_some() && self.shared.lost.load(Ordering::Relaxed) > self.told;
            let next = queue.recv_timeout(if untold { RETRY } else { Duration::MAX });
            if self.shared.reopen.swap(false, Ordering::Acquire)
                && let Err(error) = self.sink.reopen()
            {
                tracing::error!(file = self.name, "cannot be opened anew, the old one stays in use: {error}");
            }
            match next {
                Ok(lines) if lines.count > 0 => {
                    self.write(&lines);
                    self.shared.waiting.fetch_sub(lines.bytes.len() + OVERHEAD, Ordering::Release);
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.tell();
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn write(&mut self, lines: &Lines) {
        match self.tell().and_then(|()| self.sink.write(&lines.bytes)) {
            Ok(()) => {
                let failed = std::mem::take(&mut self.failed);
                if failed > 0 && self.notice.is_none() {
                    tracing::warn!(file = self.name, lost = failed, "can be written to again");
                }
            }
            Err(error) => {
                if self.failed == 0 && self.notice.is_none() {
                    tracing::error!(file = self.name, "cannot be written to, its lines are lost: {error}");
                }
                self.failed += lines.count;
                self.shared.lost.fetch_add(lines.count, Ordering::Relaxed);
                if let Some(owner) = &lines.owner {
                    owner.fetch_add(lines.count, Ordering::Relaxed);
                }
            }
        }
    }

    /// Writes the notice, if there is something to tell.
    fn tell(&mut self) -> io::Result<()> {
        let lost = self.shared.lost.load(Ordering::Relaxed);
        if let Some(notice) = self.notice.filter(|_| lost > self.told) {
            self.sink.write(&notice(lost - self.told))?;
            self.told = lost;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn notice(lost: u64) -> Vec<u8> {
        format!("lost {lost}\n").into_bytes()
    }

    /// A writer to a pipe.
    fn start() -> (Writer, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (Writer::start("pipe".into(), Sink::of(writer.into()), Some(notice)).unwrap(), reader)
    }

    #[test]
    fn lines_that_find_no_room_are_counted_and_told() {
        let (writer, mut reader) = start();
        let line = |number: usize| format!("{number:0>1023}\n").into_bytes();
        let mut written = 0;
        // Fills the pipe, and then the queue.
        while writer.offer(line(written), 1, None, ROOM) {
            written += 1;
        }
        writer.lose(7);
        assert_eq!(writer.lost(), 7);
        let mut text = vec![0; 1024 * written + "lost 7\n".len()];
        reader.read_exact(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let numbers: Vec<usize> = text.lines().filter_map(|line| line.parse().ok()).collect();
        assert_eq!(numbers, (0..written).collect::<Vec<_>>());
        assert_eq!(text.lines().filter(|line| *line == "lost 7").count(), 1);
        assert!(writer.offer(line(1), 1, None, ROOM));
    }

    #[test]
    fn lines_that_fail_are_counted_for_their_owner() {
        let full = Sink::file(std::path::Path::new("/dev/full")).unwrap();
        let writer = Writer::start("full".into(), full, None).unwrap();
        let owner = Arc::<AtomicU64>::default();
        assert!(writer.offer(b"a\nb\n".to_vec(), 2, Some(owner.clone()), ROOM));
        writer.flush(Instant::now() + Duration::from_secs(600));
        assert_eq!((writer.lost(), owner.load(Ordering::Relaxed)), (2, 2));
    }

    #[test]
    fn waiting_for_a_sink_that_takes_nothing_ends() {
        let (writer, _reader) = start();
        while writer.offer(vec![b'x'; 1024], 1, None, ROOM) {}
        writer.flush(Instant::now() + Duration::from_millis(10));
        assert!(writer.shared.waiting.load(Ordering::Relaxed) > ROOM / 2);
    }
}
