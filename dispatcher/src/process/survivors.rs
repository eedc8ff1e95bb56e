//! Workers that outlive their primary (`survive = true`), and the note by which the next one knows them.
//!
//! A primary that is killed can hand nothing over. So while it runs it keeps a note of its workers beside its control socket, which an
//! ordered end takes away. The note holds their tokens, and who stands in it may be killed: it is root's alone, and what is in it is
//! believed only where the kernel says the same of the process.

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

/// A worker that a primary started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survivor {
    /// The member it was started for, such as `default/0`.
    pub member: String,
    /// Process id …
    pub pid: u32,
    /// … and when that process began, in clock ticks since boot: together they are no other process'.
    pub began: u64,
    /// What it must know to take its place.
    pub token: String,
    /// Its program and arguments.
    pub command: Vec<String>,
}

impl Survivor {
    /// The note's line about a running process; none if the kernel knows no such process.
    pub fn of(process: &Process, member: &str, token: &str, command: &WorkerCommand) -> Option<Self> {
        Some(Survivor {
            member: member.to_owned(),
            pid: process.pid(),
            began: facts(process.pid())?.began,
            token: token.to_owned(),
            command: command.command.clone(),
        })
    }

    /// A descriptor of the process, if it still runs, as the user that workers run as.
    pub fn find(&self, command: &WorkerCommand) -> Option<OwnedFd> {
        // First the descriptor: it stays with the process it was opened for, whatever becomes of the number.
        let pidfd = sys::pidfd_open(self.pid).ok()?;
        let facts = facts(self.pid)?;
        let is_ours = facts.began == self.began && facts.uid == command.user.uid.as_raw();
        is_ours.then_some(pidfd)
    }
}

/// What the kernel says of a process.
struct Facts {
    began: u64,
    uid: u32,
}

fn facts(pid: u32) -> Option<Facts> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    // Its name, which stands there too, may be of any bytes.
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // Real, effective, …
    let uid = uids.split_whitespace().nth(1)?.parse().ok()?;
    Some(Facts { began: process.stat().ok()?.starttime, uid })
}

/// The note beside a control socket.
#[derive(Clone, Debug)]
pub struct Note {
    folder: Directory,
    name: OsString,
    /// What is written before it gets that name.
    new: OsString,
}

impl Note {
    /// Of the primary whose socket has this name in its folder: `eth1.sock.workers` beside
    /// `eth1.sock`.
    pub fn beside((folder, socket): (&Directory, &OsStr)) -> Self {
        let with = |more| {
            let mut name = socket.to_owned();
            name.push(more);
            name
        };
        Note { folder: folder.clone(), name: with(".workers"), new: with(".workers.new") }
    }

    /// Writes who runs now. Whoever reads sees the note as it was or as it is.
    ///
    /// # Errors
    /// Whatever the file system says.
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

    /// Who stands in it; nobody if there is none.
    ///
    /// # Errors
    /// It cannot be read, is not this user's alone, or is no such note.
    pub fn read(&self) -> io::Result<Vec<Survivor>> {
        /// More than the note of 64 workers.
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
            return Err(io::Error::other("it is not this user's alone"));
        }
        let mut bytes = Vec::new();
        file.take(LIMIT).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Takes it away, and what a primary may have left of one.
    pub fn remove(&self) {
        self.forget(&self.name);
        self.remove_unfinished();
    }

    /// Takes away what a primary left that was killed while it wrote.
    pub fn remove_unfinished(&self) {
        self.forget(&self.new);
    }

    fn forget(&self, name: &OsStr) {
        if let Err(error) = self.folder.remove(name) {
            tracing::warn!(file = %name.display(), "cannot be removed: {error}");
        }
    }

    /// Its name in the socket's folder.
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

    /// A note, and where it lies.
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
    fn what_is_written_is_read_until_it_is_taken_away() {
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
    fn what_others_may_have_written_is_not_believed() {
        let (folder, note, path) = note();
        let folder = folder.path();
        fs::write(&path, "no JSON").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(note.read().is_err());
        note.write(&[survivor(7, 1)]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert_eq!(note.read().unwrap_err().to_string(), "it is not this user's alone");
        fs::rename(&path, folder.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(folder.join("elsewhere"), &path).unwrap();
        assert!(note.read().is_err());
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(note.read().is_err());
    }

    #[test]
    fn what_a_killed_primary_left_is_cleaned_and_links_are_not_followed() {
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
    fn only_the_very_process_is_found() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let began = facts(child.id()).unwrap().began;
        let command = |uid| {
            let mut user = crate::config::WorkerUser::find(Some("root")).unwrap();
            user.uid = uid;
            let limits =
                crate::process::cgroup::Limits { memory: None, processes: 9, cpu_weight: 100, lanes: vec![] };
            let output = Output::begin(WorkerOutput::Null, true, &[]).unwrap();
            let command = vec!["worker".into()];
            WorkerCommand { command, user, survive: true, limits, sandbox: None, output }
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
