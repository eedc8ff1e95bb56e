//! Worker processes: started, restarted, watched for hanging.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::io::Interest;
use xfan_shm::limits::explained;

use super::{Primary, PrimaryError, random_token};
use crate::config::OnEmpty;
use crate::config::Restart;
use crate::control::connection::{Channel, Connections, pair};
use crate::control::inbox::{Event, Outbox};
use crate::control::members::Member;
use crate::group::life::{Change, State};
use crate::group::restart::Verdict;
use crate::host::sys;
use crate::process::cgroup::Cgroups;
use crate::process::inherit::Fresh;
use crate::process::spawn::{Process, WorkerCommand};
use crate::process::survivors::{Note, Survivor};
use crate::report::Confinement;

/// What it takes to start a worker.
#[derive(Debug)]
pub(super) struct Spawner {
    pub(super) command: WorkerCommand,
    pub(super) socket: PathBuf,
    /// Where the workers are written down.
    pub(super) note: Note,
    pub(super) outbox: Outbox,
    pub(super) connections: Connections,
    /// None: the system gives none.
    pub(super) cgroups: Option<Cgroups>,
    /// What worker processes get instead of what the primary has.
    pub(super) fresh: Fresh,
    /// For the report.
    pub(super) confinement: Confinement,
}

/// When workers are restarted, after how long they count as hanging, and what becomes of their packets.
#[derive(Clone, Copy, Debug)]
pub struct Care {
    /// When those that ended are started again.
    pub restart: Restart,
    /// How long a worker that has packets may stand still; zero: for ever.
    pub hang_timeout: Duration,
    /// How long the flows and packets of a worker that is gone wait for the next in its place; none: they go to the others at
    /// once.
    pub hold: Option<Duration>,
    /// Where packets go while no worker takes any.
    pub on_empty: OnEmpty,
}

impl Spawner {
    /// Sends an event to the primary, later.
    fn later(&self, delay: Duration, event: Event) {
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            outbox.event(event);
        });
    }

    /// Starts a process for a member, which inherits a connection.
    fn spawn(&self, member: &str, token: &str) -> Result<(Process, Channel), PrimaryError> {
        let (ours, theirs) = pair()?;
        let cgroup = self.cgroups.as_ref().map(|cgroups| cgroups.make(member)).transpose()?;
        let process =
            Process::spawn(&self.command, &self.socket, member, token, &theirs, cgroup, self.fresh)?;
        let user = &self.command.user;
        // The kernel would name the primary, which made both ends.
        let peer =
            libc::ucred { pid: process.pid().cast_signed(), uid: user.uid.as_raw(), gid: user.gid.as_raw() };
        let channel = self.connections.hand_over(ours, peer.into());
        Ok((process, channel))
    }
}

impl Primary {
    /// Starts a process for each place but those that are for workers who join later, unless one has survived the primary before.
    pub(super) fn start_workers(&mut self) -> Result<(), PrimaryError> {
        if self.spawner.as_ref().is_some_and(|spawner| spawner.command.user.is_root()) {
            tracing::warn!(
                "workers run as root, as asked: nothing keeps them from writing to packets and segments that are not theirs"
            );
        }
        self.adopt_survivors()?;
        for place in 0..self.places {
            if self.members[place].process.is_none() {
                self.spawn_worker(place)?;
            }
        }
        self.write_note();
        Ok(())
    }

    /// Takes workers in that an earlier primary started, as far as they are what this one would start; others have to end.
    fn adopt_survivors(&mut self) -> Result<(), PrimaryError> {
        let Some(spawner) = &self.spawner else { return Ok(()) };
        let (command, note) = (spawner.command.clone(), spawner.note.clone());
        let survivors = note.read().unwrap_or_else(|error| {
            tracing::warn!(
                path = format!("{}.workers", spawner.socket.display()),
                "workers of an earlier primary cannot be found: {}",
                explained(error)
            );
            Vec::new()
        });
        note.remove();
        for survivor in survivors {
            let Some(pidfd) = survivor.find(&command) else { continue };
            let cgroup = self.cgroups().and_then(|cgroups| cgroups.of(survivor.pid));
            let process = Process::adopt(survivor.pid, pidfd, cgroup);
            let (id, pid) = (&survivor.member, survivor.pid);
            let mut places = self.members[..self.places].iter();
            match places.position(|member| member.id == *id && member.process.is_none()) {
                Some(place) if command.survive && command.command == survivor.command => {
                    tracing::info!(member = id, pid, "survived the primary before");
                    self.members[place].starts.count(Instant::now());
                    self.take_in(place, process, survivor.token, "it survived the primary before")?;
                }
                _ => {
                    tracing::info!(member = id, pid, "is to end: it is of the primary before");
                    process.signal(Signal::SIGTERM);
                    self.unwanted.0.push(process);
                }
            }
        }
        self.unwanted.1 = Instant::now() + self.stop_timeout;
        if let Some(cgroups) = self.cgroups() {
            let processes = self.members.iter().filter_map(|member| member.process.as_ref());
            let kept: Vec<_> = processes.chain(&self.unwanted.0).filter_map(Process::cgroup).collect();
            cgroups.clear(&kept);
        }
        Ok(())
    }

    /// Starts a process for this place.
    pub(super) fn start_worker(&mut self, place: usize) -> Result<(), PrimaryError> {
        self.spawn_worker(place)?;
        self.write_note();
        Ok(())
    }

    fn spawn_worker(&mut self, place: usize) -> Result<(), PrimaryError> {
        let (Some(spawner), member) = (&self.spawner, &mut self.members[place]) else { return Ok(()) };
        let token = random_token()?;
        member.starts.count(Instant::now());
        let (process, channel) = spawner.spawn(&member.id, &token)?;
        member.channel = Some(channel);
        self.take_in(place, process, token, "")
    }

    /// Expects a process to attach in this place, and watches for its end.
    fn take_in(
        &mut self,
        place: usize,
        process: Process,
        token: String,
        detail: &str,
    ) -> Result<(), PrimaryError> {
        let (Some(spawner), member) = (&self.spawner, &mut self.members[place]) else { return Ok(()) };
        member.program = spawner.command.command.first().cloned().unwrap_or_default();
        member.token = Some(token);
        member.attached = 0;
        let ended = sys::watched(process.watch()?, Interest::READABLE)?;
        let pid = process.pid();
        member.process = Some(process);
        let outbox = spawner.outbox.clone();
        tokio::spawn(async move {
            let _ = ended.readable().await;
            outbox.event(Event::Exited(place));
        });
        spawner.later(self.start_timeout, Event::StartTimeout(place, pid));
        let detail = if detail.is_empty() { member.program.clone() } else { detail.to_owned() };
        self.change(place, Change::Start, detail);
        Ok(())
    }

    /// Writes down who is to be found by the next primary.
    fn write_note(&self) {
        let Some(spawner) = self.spawner.as_ref().filter(|spawner| spawner.command.survive) else { return };
        let survivor = |member: &Member| {
            let (process, token) = (member.process.as_ref()?, member.token.as_ref()?);
            let survivor = Survivor::of(process, &member.id, token, &spawner.command);
            if survivor.is_none() {
                tracing::warn!(
                    member = member.id,
                    "the kernel does not tell when it began: the next primary will not find it"
                );
            }
            survivor
        };
        let survivors: Vec<_> = self.members.iter().filter_map(survivor).collect();
        if let Err(error) = spawner.note.write(&survivors) {
            tracing::warn!(
                path = format!("{}.workers", spawner.socket.display()),
                "cannot be written: the next primary will not find the workers: {}",
                explained(error)
            );
        }
    }

    /// As SIGHUP asks for: has all files opened anew, those of the workers that catch the signal by
    /// themselves included.
    pub(super) fn reopen(&mut self) {
        crate::log::reopen();
        if let Some(spawner) = &self.spawner {
            spawner.command.output.reopen();
        }
        let mut told = 0;
        for process in self.members.iter().filter_map(|member| member.process.as_ref()) {
            if process.catches(Signal::SIGHUP) {
                process.signal(Signal::SIGHUP);
                told += 1;
            }
        }
        tracing::info!(workers_told = told, "SIGHUP: files are opened anew");
    }

    /// The process in this place has ended. Without any left, so does the primary.
    pub(super) fn process_ended(&mut self, place: usize) -> Result<(), PrimaryError> {
        let member = &mut self.members[place];
        let Some(status) = member.process.as_mut().and_then(Process::ended) else { return Ok(()) };
        let adopted = member.process.take().is_some_and(|process| process.is_adopted());
        // What it left behind does not speak for the next one.
        member.channel = None;
        member.end_joining();
        self.look_for_orphans();
        let member = &mut self.members[place];
        let how = status.to_string();
        let attached = member.state() != State::Starting;
        if adopted && !attached {
            tracing::warn!(member = member.id, "it survived the primary before, and has not found this one");
            self.change(place, Change::Die, "it has not found this primary");
            return self.start_afresh(place);
        }
        if !attached && !self.open {
            return Err(PrimaryError::EndedEarly {
                member: member.id.clone(),
                program: member.program.clone(),
                how,
            });
        }
        // One that ends before it attaches has failed, whatever it says.
        let success = status.success() && attached;
        member.last_exit = Some(how.clone());
        if member.leaving.is_some() {
            self.leave(place, None, &how);
            return Ok(());
        }
        tracing::warn!(member = member.id, how, "its process ended");
        self.leave(place, Some(if success { Change::Leave } else { Change::Die }), &how);
        self.restart_or_not(place, success);
        self.check_any_left(place, how)
    }

    /// Decides what becomes of a member whose process is no more.
    fn restart_or_not(&mut self, place: usize, success: bool) {
        let member = &mut self.members[place];
        let limit = self.care.restart;
        match member.starts.judge(&limit, Instant::now(), success) {
            Verdict::Stay => {
                self.release(place);
            }
            Verdict::After(delay) => {
                member.restarting = true;
                if let Some(spawner) = &self.spawner {
                    spawner.later(delay, Event::Restart(place));
                }
            }
            Verdict::GiveUp => {
                let why = format!(
                    "started {} times within {:?} (start_limit_burst, start_limit_interval)",
                    limit.limit_burst, limit.limit_interval
                );
                tracing::error!(member = member.id, "stays down: {why}");
                self.change(place, Change::GiveUp, why);
                self.release(place);
            }
        }
    }

    fn check_any_left(&self, place: usize, how: String) -> Result<(), PrimaryError> {
        let over =
            |member: &Member| member.process.is_none() && member.session.is_none() && !member.restarting;
        if self.members.iter().all(over) {
            return Err(PrimaryError::NoneLeft { member: self.members[place].id.clone(), how });
        }
        Ok(())
    }

    /// It is time to start the worker of this place again.
    pub(super) fn restart(&mut self, place: usize) -> Result<(), PrimaryError> {
        let member = &mut self.members[place];
        if !std::mem::take(&mut member.restarting) || member.process.is_some() {
            return Ok(());
        }
        tracing::info!(member = member.id, "restarting");
        match self.start_worker(place) {
            Err(error @ (PrimaryError::Spawn(_) | PrimaryError::Io(_))) => {
                // The program may come back: an upgrade replaces it. So may descriptors.
                tracing::error!(member = self.members[place].id, "{error}");
                self.restart_or_not(place, false);
                self.check_any_left(place, error.to_string())
            }
            other => other,
        }
    }

    /// A process was to attach by now. At the beginning, one that has not ends it all, unless an earlier primary started it.
    pub(super) fn start_timed_out(&mut self, place: usize, pid: u32) -> Result<(), PrimaryError> {
        let member = &mut self.members[place];
        let waiting = member.state() == State::Starting;
        let Some(process) = member.process.as_mut().filter(|process| waiting && process.pid() == pid) else {
            return Ok(());
        };
        if !self.open && !process.is_adopted() {
            return Err(PrimaryError::NotAttached {
                member: member.id.clone(),
                program: member.program.clone(),
                timeout: self.start_timeout,
            });
        }
        let why = format!("has not attached within {:?}", self.start_timeout);
        tracing::warn!(member = member.id, "{why}: killed");
        process.kill();
        self.journal.write(Some(&member.id), pid, "killed", why);
        Ok(())
    }

    /// Looks for workers that have packets, and take none.
    pub(super) fn look_for_hanging(&mut self, now: Instant) {
        if self.care.hang_timeout.is_zero() {
            return;
        }
        for place in 0..self.members.len() {
            let member = &mut self.members[place];
            let still = member.stands_still(now);
            if still.is_none_or(|still| still < self.care.hang_timeout / 2) {
                self.change(place, Change::Recover, "takes packets again");
                continue;
            }
            let still = still.unwrap_or_default();
            self.change(place, Change::Stall, format!("has packets and has taken none for {still:?}"));
            if still < self.care.hang_timeout {
                continue;
            }
            let member = &mut self.members[place];
            tracing::error!(
                member = member.id,
                backlog = member.backlog(),
                "hangs: it has packets and has taken none for {still:?} (hang_timeout)"
            );
            member.hangs += 1;
            let why = format!("has taken no packet for {still:?} (hang_timeout)");
            self.journal.write(Some(&member.id), member.pid(), "hung", why);
            self.leave(place, Some(Change::Die), "evicted: it hung");
            // Its end is an event.
            if let Some(process) = &mut self.members[place].process {
                process.kill();
            }
        }
    }
}
