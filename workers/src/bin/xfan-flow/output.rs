//! The output: records go to a file or to standard output, one line each.
//!
//! Records are kept in memory until the next [`flush`](Output::flush), or, when the disk is full,
//! until it has free space. A regular file always ends with a complete record: if a full disk takes
//! a part of a record, that part is cut off.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::say;

/// Bytes to gather before a write. A write of 64 KiB carries about 250 records and fills a pipe of
/// the default size.
const GATHERED: usize = 64 << 10;
/// Largest number of bytes to keep while they cannot be written: some 70,000 records.
const MAX_WAITING: usize = 16 << 20;
/// Upper bound of the length of a record in bytes. A record has some 250.
const LONGEST_RECORD: usize = 4 << 10;
/// The bytes that every record begins with.
const BEGINNING: &[u8] = b"{\"community_id\":";
/// How long the worker waits for a slow reader of a pipe when it exits. The dispatcher gives a
/// stopping worker more time than this.
const PATIENCE: Duration = Duration::from_secs(1);

/// A file of JSON lines.
pub struct Output {
    name: String,
    /// `None`: standard output.
    path: Option<PathBuf>,
    file: File,
    /// Lines. Those from `written` on are not in the file yet.
    bytes: Vec<u8>,
    written: usize,
    /// The lines that are not completely in the file, in order.
    lines: VecDeque<Line>,
    /// Bytes of the first line that are already in the file.
    begun: usize,
    max_waiting: usize,
    /// Set while writing fails.
    outage: Option<Outage>,
    /// Whether the reader of the pipe has closed it.
    broken: bool,
    /// Whether to reopen the file once the record that was begun in it is complete.
    reopen: bool,
    counts: Counts,
}

/// A line that is not completely in the file. A line of 0 packets is not a record.
struct Line {
    bytes: usize,
    packets: u64,
}

/// A period during which writing fails, and which messages have been written about it.
#[derive(Default)]
struct Outage {
    told: bool,
    told_of_loss: bool,
}

/// Counts of records by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records in the file.
    pub written: u64,
    /// Records in memory, to be written.
    pub waiting: u64,
    /// Records that could not be written.
    pub lost: u64,
    /// Packets of the lost records.
    pub packets_lost: u64,
}

/// The output cannot be opened or written to.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {name}: {error}")]
pub struct OutputError {
    what: &'static str,
    name: String,
    #[source]
    error: io::Error,
}

impl Output {
    /// Opens the file that `template` names. `{member}` stands for the member, with `-` in place of
    /// `/`. A template of `-` is standard output. Lines are appended, so a restarted worker
    /// overwrites nothing.
    ///
    /// # Errors
    /// [`OutputError`] if the file cannot be opened or repaired.
    pub fn open(template: &str, member: &str) -> Result<Self, OutputError> {
        let (name, path) = if template == "-" {
            ("standard output".to_owned(), None)
        } else {
            let name = template.replace("{member}", &member.replace('/', "-"));
            (name.clone(), Some(PathBuf::from(name)))
        };
        let file = match &path {
            Some(path) => OpenOptions::new().append(true).create(true).open(path),
            None => io::stdout().as_fd().try_clone_to_owned().map(File::from),
        };
        let fail = |error| OutputError { what: "open", name: name.clone(), error };
        let file = file.map_err(fail)?;
        let mut output = Output {
            file,
            path,
            bytes: Vec::new(),
            written: 0,
            lines: VecDeque::new(),
            begun: 0,
            max_waiting: MAX_WAITING,
            outage: None,
            broken: false,
            reopen: false,
            counts: Counts::default(),
            name: name.clone(),
        };
        output.repair().map_err(fail)?;
        Ok(output)
    }

    /// Queues a record of `packets` packets. It is written by the end of the next
    /// [`flush`](Self::flush), if the file accepts it. If the memory limit is reached, the record
    /// is lost and counted.
    pub fn write(&mut self, record: &impl Serialize, packets: u64) {
        let start = self.bytes.len();
        // Writing to a vector does not fail, and every record can be expressed in JSON.
        let whole = serde_json::to_writer(&mut self.bytes, record).is_ok();
        self.bytes.push(b'\n');
        let fits = self.bytes.len() - self.written <= self.max_waiting;
        if !whole || !fits || self.broken {
            self.bytes.truncate(start);
            self.counts.lost += 1;
            self.counts.packets_lost += packets;
            return;
        }
        self.lines.push_back(Line { bytes: self.bytes.len() - start, packets });
        self.counts.waiting += 1;
        if self.outage.is_none() && self.bytes.len() - self.written >= GATHERED {
            self.flush();
        }
    }

    /// Writes the queued records, as far as the file accepts them. Reports on standard error when
    /// writing begins to fail and when it works again.
    pub fn flush(&mut self) {
        match self.try_flush() {
            Ok(()) => {
                if self.outage.take_if(|outage| outage.told || outage.told_of_loss).is_some() {
                    let Counts { lost, packets_lost, .. } = self.counts;
                    say(format!(
                        "xfan-flow: {} accepts flow records again; {lost} records of {packets_lost} packets were lost",
                        self.name
                    ));
                }
                self.outage = None;
            }
            Err(error) => self.note_outage(&error),
        }
        if self.reopen {
            self.reopen();
        }
    }

    /// Reopens the file by its name, because it may have been renamed. Queued records go to the new
    /// file. If it cannot be opened, this reports so on standard error and keeps the old file.
    /// Standard output is not reopened.
    pub fn reopen(&mut self) {
        let Some(path) = self.path.clone() else { return };
        // A record that was begun must be completed in the same file.
        if self.try_flush().is_err() && self.begun > 0 {
            self.reopen = true;
            return;
        }
        self.reopen = false;
        // Opening a named pipe must not wait for its reader. Regular files ignore the flag.
        let nonblocking = OFlag::O_NONBLOCK.bits();
        match OpenOptions::new().append(true).create(true).custom_flags(nonblocking).open(path) {
            Ok(file) => {
                self.file = file;
                // Writing to a pipe waits for its reader, as before.
                let _ = fcntl(&self.file, FcntlArg::F_SETFL(OFlag::O_APPEND));
                if let Err(error) = self.repair() {
                    say(format!("xfan-flow: cannot read {}: {error}", self.name));
                }
            }
            Err(error) => {
                say(format!(
                    "xfan-flow: cannot reopen {}: {error}; still writing to the old file",
                    self.name
                ));
            }
        }
    }

    /// Writes the queued records a last time. Those that cannot be written are counted as lost.
    ///
    /// # Errors
    /// [`OutputError`] if a record could not be written.
    pub fn finish(&mut self) -> Result<(), OutputError> {
        let deadline = Instant::now() + PATIENCE;
        let result = loop {
            match self.try_flush() {
                Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    let mut full = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut full, PollTimeout::from(100u8));
                }
                result => break result,
            }
        };
        for line in self.lines.drain(..).filter(|line| line.packets > 0) {
            self.counts.lost += 1;
            self.counts.packets_lost += line.packets;
        }
        self.counts.waiting = 0;
        (self.bytes, self.written, self.begun) = (Vec::new(), 0, 0);
        result.map_err(|error| OutputError { what: "write flow records to", name: self.name.clone(), error })
    }

    /// Whether the reader of the pipe has closed it, so that every further record is lost.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The counts of records so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn try_flush(&mut self) -> io::Result<()> {
        while self.written < self.bytes.len() {
            match self.file.write(&self.bytes[self.written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.advance(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.broken |= error.kind() == ErrorKind::BrokenPipe;
                    self.cut_begun();
                    return Err(error);
                }
            }
        }
        self.bytes.clear();
        self.bytes.shrink_to(2 * GATHERED);
        self.written = 0;
        Ok(())
    }

    /// Notes that `count` more bytes are in the file.
    fn advance(&mut self, count: usize) {
        self.written += count;
        self.begun += count;
        while let Some(line) = self.lines.front().filter(|line| line.bytes <= self.begun) {
            self.begun -= line.bytes;
            if line.packets > 0 {
                self.counts.written += 1;
                self.counts.waiting -= 1;
            }
            self.lines.pop_front();
        }
        // After a long outage, free the memory of the records that are now written.
        if self.written > GATHERED && self.written > self.bytes.len() / 2 {
            let whole = self.written - self.begun;
            self.bytes.drain(..whole);
            self.written = self.begun;
        }
    }

    /// Cuts the begun record off the file, if it is still at its end. Otherwise, as in a pipe, the
    /// rest of the record follows once it can be written.
    fn cut_begun(&mut self) {
        if self.begun == 0 || self.path.is_none() {
            return;
        }
        let cut = || -> io::Result<bool> {
            let (mut file, begun) = (&self.file, self.begun as u64);
            // After a write in append mode, the position is the end of what was written.
            let end = file.stream_position()?;
            let ours = file.metadata()?.is_file() && file.metadata()?.len() == end && end >= begun;
            if ours {
                file.set_len(end - begun)?;
            }
            Ok(ours)
        };
        if if_alone(&self.file, cut).ok().flatten().unwrap_or(false) {
            self.written -= self.begun;
            self.begun = 0;
        }
    }

    /// Ensures that the next record begins a line. If the file ends with a part of a record, left
    /// by a process that was killed while it wrote, cuts that part off. If it ends with another
    /// incomplete line, completes that line.
    fn repair(&mut self) -> io::Result<()> {
        if self.path.is_none() || !self.file.metadata()?.is_file() {
            return Ok(());
        }
        // Another worker may have the same file open and be about to write.
        if_alone(&self.file.try_clone()?, || self.repair_alone())?;
        Ok(())
    }

    fn repair_alone(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        let mut tail = Vec::new();
        // Open the same file for reading. If that is not permitted, the file stays as it is.
        if let Ok(mut reader) = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd())) {
            reader.seek(SeekFrom::Start(length.saturating_sub(LONGEST_RECORD as u64)))?;
            reader.take(LONGEST_RECORD as u64).read_to_end(&mut tail)?;
        }
        let last = tail.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
        let begins = last.starts_with(BEGINNING) || BEGINNING.starts_with(last);
        let is_whole = serde_json::from_slice::<serde::de::IgnoredAny>(last).is_ok();
        if !last.is_empty() {
            if begins && !is_whole {
                self.file.set_len(length - last.len() as u64)?;
                say(format!(
                    "xfan-flow: {} ended with an incomplete record, left by a killed writer; cut off its {} bytes",
                    self.name,
                    last.len()
                ));
            } else {
                // The line feed goes before all queued records.
                self.bytes.insert(self.written, b'\n');
                self.lines.push_front(Line { bytes: 1, packets: 0 });
            }
        }
        Ok(())
    }

    /// Reports a failed write, once for each outage, and the first loss of records in it.
    fn note_outage(&mut self, error: &io::Error) {
        let loses = self.bytes.len() - self.written + LONGEST_RECORD > self.max_waiting;
        // A pipe that is full for a moment is normal.
        let full_pipe = error.kind() == ErrorKind::WouldBlock;
        if full_pipe && !loses {
            return;
        }
        let outage = self.outage.get_or_insert_default();
        let tells = !outage.told && !full_pipe;
        let tells_of_loss = !outage.told_of_loss && loses;
        outage.told |= tells;
        outage.told_of_loss |= tells_of_loss;
        let (name, most) = (&self.name, self.max_waiting >> 20);
        if tells {
            say(format!(
                "xfan-flow: cannot write flow records to {name}: {error}; keeping up to {most} MiB of them in memory \
                 until they can be written"
            ));
        }
        if tells_of_loss {
            say(format!(
                "xfan-flow: {most} MiB of flow records wait to be written to {name}, which is the limit; further records \
                 are lost and counted (records_lost)"
            ));
        }
    }
}

/// Runs `work` while no other worker has the file open. Returns `None` if one has. Every worker
/// holds a shared lock on its file, and `work` runs under an exclusive one. No worker ever waits
/// for a lock.
fn if_alone<T>(file: &File, work: impl FnOnce() -> io::Result<T>) -> io::Result<Option<T>> {
    let result = if file.try_lock().is_ok() { work().map(Some) } else { Ok(None) };
    let _ = file.try_lock_shared();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::net::UnixStream;
    use std::path::Path;

    #[derive(Serialize)]
    struct Record {
        community_id: u32,
    }

    fn record(community_id: u32) -> Record {
        Record { community_id }
    }

    fn open(path: &Path) -> Output {
        Output::open(path.to_str().unwrap(), "a/0").unwrap()
    }

    fn line(number: u32) -> String {
        format!("{{\"community_id\":{number}}}\n")
    }

    fn counts(written: u64, waiting: u64, lost: u64, packets_lost: u64) -> Counts {
        Counts { written, waiting, lost, packets_lost }
    }

    #[test]
    fn the_name_holds_the_member_and_lines_are_appended() {
        let folder = tempfile::tempdir().unwrap();
        let template = folder.path().join("flows-{member}.json");
        for n in 0..2 {
            let mut output = Output::open(template.to_str().unwrap(), "default/3").unwrap();
            output.write(&record(n), 1);
            output.flush();
        }
        let text = fs::read_to_string(folder.path().join("flows-default-3.json")).unwrap();
        assert_eq!(text, line(0) + &line(1));
    }

    #[test]
    fn errors_name_the_file() {
        let error = Output::open("/nonexistent/{member}", "a/0").err().unwrap().to_string();
        assert_eq!(error, "cannot open /nonexistent/a-0: No such file or directory (os error 2)");
        let mut full = Output::open("/dev/full", "a/0").unwrap();
        full.write(&record(1), 1);
        let error = full.finish().unwrap_err().to_string();
        assert!(error.starts_with("cannot write flow records to /dev/full: No space"), "{error}");
    }

    #[test]
    fn on_a_full_disk_records_wait_up_to_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let mut output = open(&path);
        output.file = File::create("/dev/full").unwrap();
        output.max_waiting = 3 * line(1).len() + 1;
        for number in 0..5 {
            output.write(&record(number), 10 + u64::from(number));
            output.flush();
        }
        assert_eq!(output.counts(), counts(0, 3, 2, 13 + 14));
        // The disk has free space again.
        output.reopen();
        output.flush();
        assert_eq!(output.counts(), counts(3, 0, 2, 27));
        assert_eq!(fs::read_to_string(&path).unwrap(), line(0) + &line(1) + &line(2));
        // The disk stays full until the worker exits.
        output.file = File::create("/dev/full").unwrap();
        output.write(&record(9), 100);
        assert!(output.finish().is_err());
        assert_eq!(output.counts(), counts(3, 0, 3, 127));
    }

    #[test]
    fn an_incomplete_record_of_a_killed_writer_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        for length in 1..=line(2).len() {
            fs::write(&path, line(1) + &line(2)[..length]).unwrap();
            let mut output = open(&path);
            output.write(&record(3), 1);
            output.flush();
            let whole = if length < line(2).len() - 1 { String::new() } else { line(2) };
            assert_eq!(fs::read_to_string(&path).unwrap(), line(1) + &whole + &line(3), "{length}");
            assert_eq!(output.counts(), counts(1, 0, 0, 0));
        }
    }

    #[test]
    fn an_incomplete_line_of_another_kind_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        for found in ["a note of the operator's".to_owned(), "x".repeat(10_000)] {
            fs::write(&path, &found).unwrap();
            let mut output = open(&path);
            output.write(&record(3), 1);
            output.flush();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{found}\n{}", line(3)));
        }
    }

    #[test]
    fn a_file_that_another_worker_has_open_is_not_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let first = open(&path);
        fs::write(&path, "{\"commu").unwrap();
        let second = open(&path);
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"commu");
        drop((first, second));
        drop(open(&path));
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_record_cut_short_by_a_full_disk_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let mut output = open(&path);
        for number in 0..2 {
            output.write(&record(number), 1);
        }
        // As if the disk had become full within the second record.
        let taken = line(0).len() + 5;
        output.file.write_all(&output.bytes[..taken]).unwrap();
        output.advance(taken);
        assert_eq!((output.begun, output.counts()), (5, counts(1, 1, 0, 0)));
        output.cut_begun();
        assert_eq!(fs::read_to_string(&path).unwrap(), line(0));
        output.flush();
        assert_eq!(fs::read_to_string(&path).unwrap(), line(0) + &line(1));
        assert_eq!(output.counts(), counts(2, 0, 0, 0));
    }

    #[test]
    fn a_record_begun_in_a_pipe_is_completed_there() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let mut output = open(Path::new("/dev/null"));
        output.file = File::from(std::os::fd::OwnedFd::from(writer));
        let mut sent = 0;
        while output.counts().waiting == 0 {
            output.write(&record(sent), 1);
            output.flush();
            sent += 1;
        }
        output.write(&record(sent), 1);
        assert!(output.counts().waiting >= 1 && output.counts().lost == 0);
        let thread = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        output.finish().unwrap();
        assert_eq!(output.counts(), counts(u64::from(sent) + 1, 0, 0, 0));
        drop(output);
        assert_eq!(thread.join().unwrap(), (0..=sent).map(line).collect::<String>());
    }

    #[test]
    fn records_for_a_closed_pipe_are_counted_as_lost() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut output = open(Path::new("/dev/null"));
        output.file = File::from(std::os::fd::OwnedFd::from(writer));
        output.write(&record(1), 2);
        assert!(!output.is_broken());
        output.flush();
        assert!(output.is_broken());
        output.write(&record(2), 3);
        assert!(output.finish().is_err());
        assert_eq!(output.counts(), counts(0, 0, 2, 5));
    }

    #[test]
    fn after_reopening_a_renamed_file_gets_no_records() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("flows"), folder.path().join("flows.1"));
        let mut output = open(&path);
        output.write(&record(1), 1);
        fs::rename(&path, &old).unwrap();
        output.reopen();
        output.write(&record(2), 1);
        output.flush();
        assert_eq!(fs::read_to_string(&old).unwrap(), line(1));
        assert_eq!(fs::read_to_string(&path).unwrap(), line(2));
        // If the new file cannot be opened, the old one is kept.
        fs::rename(&path, folder.path().join("flows.2")).unwrap();
        fs::create_dir(&path).unwrap();
        output.write(&record(3), 1);
        output.reopen();
        output.write(&record(4), 1);
        output.finish().unwrap();
        let text = fs::read_to_string(folder.path().join("flows.2")).unwrap();
        assert_eq!(text, line(2) + &line(3) + &line(4));
    }
}
