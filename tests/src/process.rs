//! A program under test: started, its output read, and killed when dropped.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};

/// A running program in its own process group. Dropping it kills the whole group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    status: Option<ExitStatus>,
    stdout: Lines,
    stderr: Lines,
}

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Exit {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// The lines it wrote to standard output.
    pub stdout: Vec<String>,
    /// The lines it wrote to standard error.
    pub stderr: Vec<String>,
}

/// Why a program is missing or did not do what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program is not built.
    #[error("there is no {name} in {}; run `cargo build --workspace --bins --examples` first", folder.display())]
    NotBuilt {
        /// The program.
        name: String,
        /// Where the program should be.
        folder: PathBuf,
    },
    /// The program could not be started.
    #[error("{name} did not start: {source}")]
    Start {
        /// The program.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The program ended, or closed its output, before the expected line.
    #[error("{name} ended before it wrote `{pattern}`; it wrote:\n{output}")]
    NeverWritten {
        /// The program.
        name: String,
        /// The expected text.
        pattern: String,
        /// All its output.
        output: String,
    },
}

/// The path of one of the workspace's programs, such as `xfan` or `examples/manager`, built in the
/// same profile as the test.
///
/// # Errors
/// The program is not built.
pub fn binary(name: &str) -> Result<PathBuf, ProcessError> {
    let test = std::env::current_exe().map_err(|source| ProcessError::Start { name: name.into(), source })?;
    // Tests are in target/PROFILE/deps, programs one folder above.
    let found = test.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    let folder = || test.parent().unwrap_or(&test).to_path_buf();
    found.ok_or_else(|| ProcessError::NotBuilt { name: name.into(), folder: folder() })
}

/// Writes a shell script that everyone can execute.
///
/// # Panics
/// The file cannot be written.
pub fn write_script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("the script can be written");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(path, mode).expect("the script can be made executable");
}

/// Makes a command run as a user, with a group and supplementary groups.
pub fn run_as(command: &mut Command, uid: u32, gid: u32, groups: &[u32]) {
    let groups: Vec<_> = groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // SAFETY: the closure makes async-signal-safe system calls only.
    unsafe {
        command.pre_exec(move || {
            setgroups(&groups)?;
            setresgid(gid, gid, gid)?;
            Ok(setresuid(uid, uid, uid)?)
        });
    }
}

impl Exit {
    /// The sum of the packets that all `xfan-count` workers printed.
    pub fn packets(&self) -> u64 {
        self.json().iter().filter_map(|totals| totals["packets"].as_u64()).sum()
    }

    /// The packets and bytes that the `xfan-count` of a member printed.
    ///
    /// # Panics
    /// It did not print exactly one line of totals.
    pub fn totals_of(&self, member: &str) -> (u64, u64) {
        let printed = self.json().into_iter();
        let of_member: Vec<_> = printed.filter(|totals| totals["member"] == member).collect();
        assert_eq!(of_member.len(), 1, "{member} in {self:#?}");
        let number = |key: &str| of_member[0][key].as_u64().expect("a number");
        (number("packets"), number("bytes"))
    }

    /// The JSON values among the lines of standard output: its own and, for a primary, its
    /// workers', which the log relays.
    #[must_use]
    pub fn json(&self) -> Vec<serde_json::Value> {
        let relayed = self.stderr.iter().filter_map(|line| Some(line.split_once(" stdout: ")?.1));
        let lines = self.stdout.iter().map(String::as_str).chain(relayed);
        lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

impl Process {
    /// Starts `command` without standard input and reads its output line by line. The kernel kills
    /// it when the calling thread ends, for whatever reason: spawn it from the test's thread, not
    /// within [`crate::netns::Netns::run`].
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(mut command: Command) -> Result<Self, ProcessError> {
        let name = PathBuf::from(command.get_program());
        let name = name.file_name().unwrap_or(name.as_os_str()).to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        // SAFETY: between fork and exec each closure makes one plain system call on constants.
        unsafe {
            command.pre_exec(die_with_parent);
            // libxdp does not set close-on-exec on its sockets: another test's socket would hold
            // its queue in this child.
            command.pre_exec(|| xfan::host::sys::close_on_exec_from(3));
        }
        let mut child =
            command.spawn().map_err(|source| ProcessError::Start { name: name.clone(), source })?;
        let stdout = Lines::read(child.stdout.take().expect("stdout is piped"));
        let stderr = Lines::read(child.stderr.take().expect("stderr is piped"));
        Ok(Self { name, child, status: None, stdout, stderr })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("process ids are positive i32"))
    }

    /// Sends it a signal; does nothing if it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            // It may end just before the signal; its id is not reused until it is reaped.
            let _ = kill(self.pid(), signal);
        }
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status.is_none()
    }

    /// Waits without limit until a line of its standard output or standard error contains
    /// `pattern`, and returns the line.
    ///
    /// # Errors
    /// Both have ended without such a line.
    pub fn wait_for_line(&self, pattern: &str) -> Result<String, ProcessError> {
        loop {
            let ended = self.stdout.ended() && self.stderr.ended();
            let find = |lines: &Lines| lines.get().into_iter().find(|line| line.contains(pattern));
            if let Some(line) = find(&self.stdout).or_else(|| find(&self.stderr)) {
                return Ok(line);
            }
            if ended {
                let output = [self.stdout.get(), self.stderr.get()].concat().join("\n");
                let (name, pattern) = (self.name.clone(), pattern.into());
                return Err(ProcessError::NeverWritten { name, pattern, output });
            }
            // Either stream may have the line: wait a little for one, then check both.
            let waited = if self.stdout.ended() { &self.stderr } else { &self.stdout };
            waited.wait_a_little();
        }
    }

    /// The lines of its standard output so far.
    pub fn stdout(&self) -> Vec<String> {
        self.stdout.get()
    }

    /// The lines of its standard error so far.
    pub fn stderr(&self) -> Vec<String> {
        self.stderr.get()
    }

    /// Waits without limit until it has ended and all its output is read.
    ///
    /// # Panics
    /// The kernel does not know the child, which cannot happen.
    pub fn wait(mut self) -> Exit {
        let status = match self.status {
            Some(status) => status,
            None => self.child.wait().expect("the child has not been reaped"),
        };
        self.status = Some(status);
        let (stdout, stderr) = (self.stdout.all(), self.stderr.all());
        Exit { code: status.code(), signal: status.signal(), stdout, stderr }
    }

    /// Kills it alone and waits for its end, but not for the end of its output, which its children
    /// may hold open.
    pub fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.status = self.child.wait().ok();
    }

    /// Sends it a signal and waits for its end.
    pub fn end(mut self, signal: Signal) -> Exit {
        self.signal(signal);
        self.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.is_running() {
            return;
        }
        // The group was made for this child, which is not reaped yet, so its id is not reused.
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: this option takes a signal number and no pointer.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The lines that are read from a pipe.
#[derive(Debug)]
struct Lines {
    shared: Arc<(Mutex<State>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    fn read(pipe: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let writer = Arc::clone(&shared);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                lock(&writer.0).lines.push(String::from_utf8_lossy(&line).into_owned());
                writer.1.notify_all();
            }
            lock(&writer.0).ended = true;
            writer.1.notify_all();
        });
        Self { shared, reader: Some(reader) }
    }

    fn get(&self) -> Vec<String> {
        lock(&self.shared.0).lines.clone()
    }

    fn ended(&self) -> bool {
        lock(&self.shared.0).ended
    }

    fn wait_a_little(&self) {
        let state = lock(&self.shared.0);
        if !state.ended {
            let _ = self.shared.1.wait_timeout(state, std::time::Duration::from_millis(20));
        }
    }

    /// All lines, once the other end of the pipe is closed.
    fn all(&mut self) -> Vec<String> {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader does not panic");
        }
        self.get()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::spawn(command).unwrap()
    }

    #[test]
    fn lines_and_exit_code() {
        let process = shell("echo one; echo two >&2; exit 3");
        assert_eq!(process.wait_for_line("tw").unwrap(), "two");
        let exit = process.wait();
        assert_eq!((exit.code, exit.signal), (Some(3), None));
        assert_eq!((exit.stdout, exit.stderr), (vec!["one".to_string()], vec!["two".to_string()]));
    }

    #[test]
    fn a_line_that_never_comes() {
        let error = shell("echo one").wait_for_line("three").unwrap_err().to_string();
        assert!(error.contains("sh ended before it wrote `three`") && error.contains("one"), "{error}");
    }

    #[test]
    fn signals_and_drop() {
        let exit = shell("exec sleep 1000").end(Signal::SIGTERM);
        assert_eq!(exit.signal, Some(15));

        let process = shell("sleep 1000 & echo $!; wait");
        let grandchild = process.wait_for_line("").unwrap().parse().unwrap();
        let (child, grandchild) = (process.pid(), Pid::from_raw(grandchild));
        drop(process);
        assert!(kill(child, None).is_err());
        // Its new parent reaps it eventually.
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{grandchild}/stat"));
            stat.map_or(true, |stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
        };
        while !gone() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_program_that_is_not_built() {
        let error = binary("xfan-nowhere").unwrap_err().to_string();
        assert!(error.contains("cargo build --workspace"), "{error}");
    }
}
