//! Where the records go: a file, or standard output, one line each.
//!
//! Records wait in memory until they are written: for the next [`flush`](Output::flush), or, when
//! the disk is full, until there is room. A regular file always ends with a whole record; what a
//! full disk has taken of one is cut off.

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

/// Bytes that are gathered before they are written.
const GATHERED: usize = 64 << 10;
/// Most bytes of records that wait while they cannot be written.
const MAX_WAITING: usize = 16 << 20;
/// More bytes than a record has.
const LONGEST_RECORD: usize = 4 << 10;
/// How every record begins.
const BEGINNING: &[u8] = b"{\"community_id\":";
/// How long a slow reader of a pipe may take at the end.
const PATIENCE: Duration = Duration::from_secs(1);

/// A file of JSON lines.
pub struct Output {
    name: String,
    /// `None`: standard output.
    path: Option<PathBuf>,
    file: File,
    /// Lines that are not written, from `written` on.
    bytes: Vec<u8>,
    written: usize,
    /// What these bytes are, in order.
    lines: VecDeque<Line>,
    /// Bytes of the first line that are in the file already.
    begun: usize,
    max_waiting: usize,
    outage: Option<Outage>,
    /// Nobody reads any more.
    broken: bool,
    reopen: bool,
    counts: Counts,
}

/// A line that waits. One of no packets is no record.
struct Line {
    bytes: usize,
    packets: u64,
}

/// Nothing can be written at the moment.
#[derive(Default)]
struct Outage {
    told: bool,
    told_of_loss: bool,
}

/// What became of the records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// In the file.
    pub written: u64,
    /// In memory.
    pub waiting: u64,
    /// Nowhere, and the packets in them.
    pub lost: u64,
    /// Packets of the records lost.
    pub packets_lost: u64,
}

/// It cannot be written to.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {name}: {error}")]
pub struct OutputError {
    what: &'static str,
    name: String,
    #[source]
    error: io::Error,
}

impl Output {
    /// Opens the file that `template` names: `{member}` stands for the member, with `-` for `/`; `-` alone is
    /// standard output. Lines are appended, so that a worker that is restarted overwrites nothing.
    ///
    /// # Errors
    /// [`OutputError`]
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

    /// Takes one record of so many packets, and writes it some time before the next
    /// [`flush`](Self::flush) has returned, if that can be. A record for which there is no room is
    /// lost, and counted.
    pub fn write(&mut self, record: &impl Serialize, packets: u64) {
        let start = self.bytes.len();
        // One too large for memory would end the process; one that is no JSON cannot be.
        let whole = serde_json::to_writer(&mut self.bytes, record).is_ok();
        self.bytes.push(b'\n');
        let room = self.bytes.len() - self.written <= self.max_waiting;
        if !whole || !room || self.broken {
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

    /// Writes what waits, as far as it can be. Says on standard error when that begins to fail, and
    /// when it works again.
    pub fn flush(&mut self) {
        match self.try_flush() {
            Ok(()) => {
                if self.outage.take_if(|outage| outage.told || outage.told_of_loss).is_some() {
                    let Counts { lost, packets_lost, .. } = self.counts;
                    say(format!(
                        "xfan-flow: {} takes flow records again; lost are {lost}, of {packets_lost} packets",
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

    /// Opens the file anew, which may have been renamed; the records that wait go to the new one.
    /// If it cannot be opened, the old one is kept, and standard error says so. Standard output
    /// stays what it is.
    pub fn reopen(&mut self) {
        let Some(path) = self.path.clone() else { return };
        // What has been begun is ended in the same file.
        if self.try_flush().is_err() && self.begun > 0 {
            self.reopen = true;
            return;
        }
        self.reopen = false;
        // Not to wait for the reader of a named pipe; of a regular file it means nothing.
        let nonblocking = OFlag::O_NONBLOCK.bits();
        match OpenOptions::new().append(true).create(true).custom_flags(nonblocking).open(path) {
            Ok(file) => {
                self.file = file;
                // The reader of a pipe is waited for, as before.
                let _ = fcntl(&self.file, FcntlArg::F_SETFL(OFlag::O_APPEND));
                if let Err(error) = self.repair() {
                    say(format!("xfan-flow: cannot read {}: {error}", self.name));
                }
            }
            Err(error) => {
                say(format!(
                    "xfan-flow: cannot open {} anew: {error}: writing to the file as before",
                    self.name
                ));
            }
        }
    }

    /// Writes what waits, a last time. What cannot be written is lost.
    ///
    /// # Errors
    /// [`OutputError`]
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

    /// Whether nobody reads any more, and nobody will.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// What became of the records.
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

    /// Notes that so many more bytes are in the file.
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
        // A long outage is over: the memory of what is written is free again.
        if self.written > GATHERED && self.written > self.bytes.len() / 2 {
            let whole = self.written - self.begun;
            self.bytes.drain(..whole);
            self.written = self.begun;
        }
    }

    /// Takes back what the file has of a record that does not fit, if that is still its end.
    /// Otherwise the rest follows once it can be written, as in a pipe.
    fn cut_begun(&mut self) {
        if self.begun == 0 || self.path.is_none() {
            return;
        }
        let cut = || -> io::Result<bool> {
            let (mut file, begun) = (&self.file, self.begun as u64);
            // The end of the last write is where the file ended then.
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

    /// Sees to it that what is appended begins a line. A process that was killed while it wrote may
    /// have left a part of a record, which is cut off; a line that is none is ended.
    fn repair(&mut self) -> io::Result<()> {
        if self.path.is_none() || !self.file.metadata()?.is_file() {
            return Ok(());
        }
        // Another worker that has the same file may be about to write.
        if_alone(&self.file.try_clone()?, || self.repair_alone())?;
        Ok(())
    }

    fn repair_alone(&mut self) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        let mut tail = Vec::new();
        // The same file, by a descriptor that may read. Where it may not, the file stays as it is.
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
                    "xfan-flow: {} ended within a record, whose writer was killed: its {} bytes are cut off",
                    self.name,
                    last.len()
                ));
            } else {
                // Before all that waits.
                self.bytes.insert(self.written, b'\n');
                self.lines.push_front(Line { bytes: 1, packets: 0 });
            }
        }
        Ok(())
    }

    fn note_outage(&mut self, error: &io::Error) {
        let loses = self.bytes.len() - self.written + LONGEST_RECORD > self.max_waiting;
        // A pipe that is full for a moment is nothing to speak of.
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
                "xfan-flow: cannot write flow records to {name}: {error}: they wait in memory, up to {most} MiB of them, and are \
                 written once they can be"
            ));
        }
        if tells_of_loss {
            say(format!(
                "xfan-flow: {most} MiB of flow records wait to be written to {name}: more are lost (records_lost)"
            ));
        }
    }
}

/// Does something to a file while no other worker has it open, nor can open it; `None`: one has.
/// Each holds a shared lock for that, which nobody ever waits for.
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
    fn the_member_is_in_the_name_and_lines_are_appended() {
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
    fn on_a_full_disk_records_wait_and_what_has_no_room_is_counted() {
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
        // There is room again.
        output.reopen();
        output.flush();
        assert_eq!(output.counts(), counts(3, 0, 2, 27));
        assert_eq!(fs::read_to_string(&path).unwrap(), line(0) + &line(1) + &line(2));
        // It is full until the end.
        output.file = File::create("/dev/full").unwrap();
        output.write(&record(9), 100);
        assert!(output.finish().is_err());
        assert_eq!(output.counts(), counts(3, 0, 3, 127));
    }

    #[test]
    fn half_a_record_left_by_a_killed_writer_is_cut_off() {
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
    fn a_line_that_is_no_record_is_ended_and_kept() {
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
    fn a_file_that_another_worker_writes_to_is_not_cut() {
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
    fn what_a_full_disk_took_of_a_record_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flows");
        let mut output = open(&path);
        for number in 0..2 {
            output.write(&record(number), 1);
        }
        // As if the disk had become full within the second.
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
    fn a_record_begun_in_a_pipe_is_ended_there() {
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
    fn a_reader_that_is_gone_ends_it_and_all_is_counted_as_lost() {
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
    fn a_renamed_file_gets_no_more_once_it_is_reopened() {
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
        // Where no new file can be, the old one stays.
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
