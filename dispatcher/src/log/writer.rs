//! A thread that writes lines, so that no other thread waits for a disk, a pipe or a terminal.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::sink::Sink;
use crate::host::privileges::drop_all_capabilities;

/// The most bytes in a queue: some 10,000 lines, which is enough for a burst and little compared
/// with packet memory.
pub const CAPACITY: usize = 1 << 20;

/// Bytes by which an entry of the queue is larger than its text: the entry itself and the
/// allocation.
const OVERHEAD: usize = 64;

/// The time after a failed write until the next attempt to report lost lines, unless a line comes
/// earlier.
const RETRY: Duration = Duration::from_millis(500);

/// A handle to a thread that writes lines. Offering lines never blocks.
#[derive(Debug)]
pub struct Writer {
    queue: Sender<Lines>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes in the queue or being written.
    queued: AtomicUsize,
    /// Lines that were not written.
    lost: AtomicU64,
    /// The sink is to be reopened before the next write.
    reopen: AtomicBool,
}

#[derive(Debug)]
struct Lines {
    bytes: Vec<u8>,
    count: u64,
    /// A second counter of lost lines, beside that of the writer.
    owner: Option<Arc<AtomicU64>>,
}

/// Makes the line that reports how many lines were lost.
pub type Notice = fn(u64) -> Vec<u8>;

impl Writer {
    /// Starts the thread. `name` names the sink in log lines. Once the sink accepts lines again,
    /// the line made by `notice` reports to it how many were lost; without `notice`, the log
    /// reports it.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(name: String, sink: Sink, notice: Option<Notice>) -> io::Result<Self> {
        let (queue, lines) = channel();
        let shared = Arc::<Shared>::default();
        let thread = WriterThread { name, sink, notice, reported: 0, failed: 0, shared: shared.clone() };
        std::thread::Builder::new().name("writer".into()).spawn(move || {
            drop_all_capabilities();
            thread.run(&lines);
        })?;
        Ok(Writer { queue, shared })
    }

    /// Queues whole lines, unless the queue would then hold more than `limit` bytes. Returns
    /// whether the lines were queued. Lines that cannot be written later are counted as lost, by
    /// the writer and by `owner`.
    pub fn offer(&self, bytes: Vec<u8>, count: u64, owner: Option<Arc<AtomicU64>>, limit: usize) -> bool {
        let size = bytes.len() + OVERHEAD;
        let reserved = self.shared.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |queued| {
            Some(queued + size).filter(|all| *all <= limit)
        });
        reserved.is_ok() && self.queue.send(Lines { bytes, count, owner }).is_ok()
    }

    /// Counts lines as lost that [`offer`](Self::offer) did not take.
    pub fn lose(&self, count: u64) {
        self.shared.lost.fetch_add(count, Ordering::Relaxed);
    }

    /// The number of lines that were lost.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Makes the thread reopen its file before it writes the next line.
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Ordering::Release);
        // Wakes the thread.
        let _ = self.queue.send(Lines { bytes: Vec::new(), count: 0, owner: None });
    }

    /// Waits until every queued line is written or lost, but not beyond the deadline.
    pub fn flush(&self, deadline: Instant) {
        while self.shared.queued.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The state of the thread.
struct WriterThread {
    name: String,
    sink: Sink,
    notice: Option<Notice>,
    /// Lost lines that a notice has already reported.
    reported: u64,
    /// Lines that could not be written since the last successful write.
    failed: u64,
    shared: Arc<Shared>,
}

impl WriterThread {
    fn run(mut self, queue: &Receiver<Lines>) {
        loop {
            let unreported =
                self.notice.is_some() && self.shared.lost.load(Ordering::Relaxed) > self.reported;
            let next = queue.recv_timeout(if unreported { RETRY } else { Duration::MAX });
            if self.shared.reopen.swap(false, Ordering::Acquire)
                && let Err(error) = self.sink.reopen()
            {
                tracing::error!(
                    file = self.name,
                    "the file cannot be reopened, and the old one stays in use: {error}"
                );
            }
            match next {
                Ok(lines) if lines.count > 0 => {
                    self.write(&lines);
                    self.shared.queued.fetch_sub(lines.bytes.len() + OVERHEAD, Ordering::Release);
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.report_lost();
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn write(&mut self, lines: &Lines) {
        match self.report_lost().and_then(|()| self.sink.write(&lines.bytes)) {
            Ok(()) => {
                let failed = std::mem::take(&mut self.failed);
                if failed > 0 && self.notice.is_none() {
                    tracing::warn!(file = self.name, lost = failed, "the file can be written again");
                }
            }
            Err(error) => {
                if self.failed == 0 && self.notice.is_none() {
                    tracing::error!(
                        file = self.name,
                        "the file cannot be written, and its lines are lost: {error}"
                    );
                }
                self.failed += lines.count;
                self.shared.lost.fetch_add(lines.count, Ordering::Relaxed);
                if let Some(owner) = &lines.owner {
                    owner.fetch_add(lines.count, Ordering::Relaxed);
                }
            }
        }
    }

    /// Writes the notice if lines were lost since the last one.
    fn report_lost(&mut self) -> io::Result<()> {
        let lost = self.shared.lost.load(Ordering::Relaxed);
        if let Some(notice) = self.notice.filter(|_| lost > self.reported) {
            self.sink.write(&notice(lost - self.reported))?;
            self.reported = lost;
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

    /// A writer whose sink is a pipe.
    fn start() -> (Writer, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        (Writer::start("pipe".into(), Sink::of(writer.into()), Some(notice)).unwrap(), reader)
    }

    #[test]
    fn lines_beyond_the_capacity_are_reported_lost() {
        let (writer, mut reader) = start();
        let line = |number: usize| format!("{number:0>1023}\n").into_bytes();
        let mut written = 0;
        // This fills the pipe, and then the queue.
        while writer.offer(line(written), 1, None, CAPACITY) {
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
        assert!(writer.offer(line(1), 1, None, CAPACITY));
    }

    #[test]
    fn lines_that_fail_are_counted_for_their_owner() {
        let full = Sink::file(std::path::Path::new("/dev/full")).unwrap();
        let writer = Writer::start("full".into(), full, None).unwrap();
        let owner = Arc::<AtomicU64>::default();
        assert!(writer.offer(b"a\nb\n".to_vec(), 2, Some(owner.clone()), CAPACITY));
        writer.flush(Instant::now() + Duration::from_secs(600));
        assert_eq!((writer.lost(), owner.load(Ordering::Relaxed)), (2, 2));
    }

    #[test]
    fn flush_ends_at_its_deadline() {
        let (writer, _reader) = start();
        while writer.offer(vec![b'x'; 1024], 1, None, CAPACITY) {}
        writer.flush(Instant::now() + Duration::from_millis(10));
        assert!(writer.shared.queued.load(Ordering::Relaxed) > CAPACITY / 2);
    }
}
