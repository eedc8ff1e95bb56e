//! Workers that survive their primary (`survive = true`), and the note by which the next primary
//! recognises them.
//!
//! A primary that is killed cannot hand anything over. While it runs, it therefore keeps a note
//! about its workers beside its control socket; an orderly stop removes the note. The note contains
//! the workers' tokens, and the next primary may kill the processes in it. Only root can read and
//! write it, and an entry counts only if the kernel reports the same about the process.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::OFlag;

use serde::{Deserialize, Serialize};

use crate::host::directory::Directory;
use crate::host::sys;
use crate::process::spawn::{Process, WorkerCommand};

/// A worker that a primary started, as the note describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survivor {
    /// The member it was started for, such as `default/0`.
    pub member: String,
    /// The process id.
    pub pid: u32,
    /// The start time of the process, in clock ticks since boot. Pid and start time together
    /// identify a process.
    pub began: u64,
    /// The token that the worker must present to attach again.
    pub token: String,
    /// The program and its arguments.
    pub command: Vec<String>,
}

impl Survivor {
    /// Describes a running process; `None` if the process no longer exists.
    pub fn of(process: &Process, member: &str, token: &str, command: &WorkerCommand) -> Option<Self> {
        Some(Survivor {
            member: member.to_owned(),
            pid: process.pid(),
            began: identity(process.pid())?.began,
            token: token.to_owned(),
            command: command.command.clone(),
        })
    }

    /// Opens a pidfd of the process, if it still exists and runs as the workers' user.
    pub fn find(&self, command: &WorkerCommand) -> Option<OwnedFd> {
        // The pidfd comes first: it keeps referring to the same process, even if the pid is reused.
        let pidfd = sys::pidfd_open(self.pid).ok()?;
        let identity = identity(self.pid)?;
        let is_ours = identity.began == self.began && identity.uid == command.user.uid.as_raw();
        is_ours.then_some(pidfd)
    }
}

/// The identity of a process, according to the kernel.
struct Identity {
    began: u64,
    uid: u32,
}

fn identity(pid: u32) -> Option<Identity> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    // The file also contains the name of the process, which may not be UTF-8.
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // Real, effective, …
    let uid = uids.split_whitespace().nth(1)?.parse().ok()?;
    Some(Identity { began: process.stat().ok()?.starttime, uid })
}

/// The note beside a control socket.
#[derive(Clone, Debug)]
pub struct Note {
    folder: Directory,
    name: OsString,
    /// The temporary name under which it is written.
    new: OsString,
}

impl Note {
    /// The note for the socket with this name in its directory: `eth1.sock.workers` beside
    /// `eth1.sock`.
    pub fn beside((folder, socket): (&Directory, &OsStr)) -> Self {
        let with = |more| {
            let mut name = socket.to_owned();
            name.push(more);
            name
        };
        Note { folder: folder.clone(), name: with(".workers"), new: with(".workers.new") }
    }

    /// Replaces the note atomically by one about these workers.
    ///
    /// # Errors
    /// The errors of the file system.
    pub fn write(&self, survivors: &[Survivor]) -> io::Result<()> {
        self.remove_unfinished();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let mut file = File::from(self.folder.open_file(&self.new, flags, 0o600)?);
        let written = file.write_all(&serde_json::to_vec(survivors)?);
        let written = written.and_then(|()| self.folder.rename(&self.new, &self.name));
        if written.is_err() {
            self.remove_unfinished();
        }
        written
    }

    /// The workers in the note; empty if there is no note.
    ///
    /// # Errors
    /// The note cannot be read or parsed, or other users have access to it.
    pub fn read(&self) -> io::Result<Vec<Survivor>> {
        /// Larger than any note: 64 workers, the most of a group, with long commands.
        const LIMIT: u64 = 4 << 20;
        let file = match self.folder.open_file(&self.name, OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => File::from(file?),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file()
            || metadata.uid() != nix::unistd::geteuid().as_raw()
            || metadata.mode() & 0o077 != 0
        {
            return Err(io::Error::other("other users have access to it"));
        }
        let mut bytes = Vec::new();
        file.take(LIMIT).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Removes the note, and an unfinished one.
    pub fn remove(&self) {
        self.remove_file(&self.name);
        self.remove_unfinished();
    }

    /// Removes the unfinished note of a primary that was killed while it wrote.
    pub fn remove_unfinished(&self) {
        self.remove_file(&self.new);
    }

    fn remove_file(&self, name: &OsStr) {
        if let Err(error) = self.folder.remove(name) {
            tracing::warn!(file = %name.display(), "the note about workers cannot be removed: {error}");
        }
    }

    /// Its name in the directory of the socket.
    pub fn name(&self) -> &OsStr {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::WorkerOutput;
    use crate::process::output::Output;

    /// A note, and its path.
    fn note() -> (tempfile::TempDir, Note, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let note = Note::beside((&Directory::open(folder.path()).unwrap(), OsStr::new("eth1.sock")));
        let path = folder.path().join("eth1.sock.workers");
        (folder, note, path)
    }

    fn survivor(pid: u32, began: u64) -> Survivor {
        let (member, token) = ("default/0".into(), "secret".into());
        Survivor { member, pid, began, token, command: vec!["worker".into()] }
    }

    #[test]
    fn a_note_is_read_until_it_is_removed() {
        let (_folder, note, path) = note();
        assert_eq!(note.read().unwrap(), []);
        for began in [1, 2] {
            note.write(&[survivor(7, began)]).unwrap();
            assert_eq!(note.read().unwrap(), [survivor(7, began)]);
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        note.remove();
        note.remove();
        assert_eq!(note.read().unwrap(), []);
    }

    #[test]
    fn a_note_that_others_can_access_is_refused() {
        let (folder, note, path) = note();
        let folder = folder.path();
        fs::write(&path, "no JSON").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(note.read().is_err());
        note.write(&[survivor(7, 1)]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(note.read().unwrap_err().to_string(), "other users have access to it");
        fs::rename(&path, folder.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(folder.join("elsewhere"), &path).unwrap();
        assert!(note.read().is_err());
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(note.read().is_err());
    }

    #[test]
    fn unfinished_notes_are_removed_without_following_links() {
        let (folder, note, path) = note();
        let (target, new) = (folder.path().join("target"), folder.path().join("eth1.sock.workers.new"));
        fs::write(&target, "as it was").unwrap();
        for _ in 0..2 {
            std::os::unix::fs::symlink(&target, &new).unwrap();
            note.write(&[survivor(7, 1)]).unwrap();
            assert!(!new.exists() && fs::symlink_metadata(&path).unwrap().is_file());
        }
        fs::write(&new, "half").unwrap();
        note.remove();
        assert!(!new.exists() && !path.exists());
        assert_eq!(fs::read_to_string(&target).unwrap(), "as it was");
    }

    #[test]
    fn only_the_same_process_is_found() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let began = identity(child.id()).unwrap().began;
        let command = |uid| {
            let mut user = crate::config::WorkerUser::find(Some("root")).unwrap();
            user.uid = uid;
            let limits =
                crate::process::cgroup::Limits { memory: None, processes: 9, cpu_weight: 100, lanes: vec![] };
            let output = Output::begin(WorkerOutput::Null, true, &[]).unwrap();
            let command = vec!["worker".into()];
            let (survive, own_session, sandbox) = (true, false, None);
            WorkerCommand { command, user, survive, own_session, limits, sandbox, output }
        };
        let own = command(nix::unistd::geteuid());
        assert!(survivor(child.id(), began + 1).find(&own).is_none(), "another that got its number");
        let other = command(nix::unistd::Uid::from_raw(4242));
        assert!(survivor(child.id(), began).find(&other).is_none(), "of another user");
        let mut process = Process::adopt(child.id(), survivor(child.id(), began).find(&own).unwrap(), None);
        assert_eq!((process.pid(), process.ended()), (child.id(), None));
        process.kill();
        child.wait().unwrap();
        assert_eq!(process.ended(), Some(crate::process::spawn::Ending::Unknown));
        assert!(survivor(child.id(), began).find(&own).is_none());
    }
}
