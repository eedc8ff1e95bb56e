//! The state machine of a group: `step(event, now)` changes the members and returns actions.
//!
//! The flows are distributed among the running members and those whose packets are held. Whenever
//! this set changes, the group rebuilds the bucket table, and the command that tells the lanes of
//! the change contains the new table.

use std::collections::BTreeMap;
use std::mem::{replace, take};
use std::time::{Duration, Instant};

use xfan_shm::ids::MemberId;

use crate::config::OnEmpty;
use crate::group::display_state::DisplayState;
use crate::group::event::{
    Action, Cause, ConnectionId, Event, Fact, Failure, ProcessId, Progress, Refused, Ticket,
};
use crate::group::member::{
    Closing, Down, DownReason, Joining, Member, Process, SpawnReason, State, StopDeadline,
};
use crate::group::phase::Phase;
use crate::group::policy::Policy;
use crate::group::starts::Starts;
use crate::lane::BucketTable;

/// The shortest time from one SIGTERM or SIGKILL to the next, should `stop_timeout` be shorter: the
/// kernel needs some time to end a process.
const MIN_KILL_INTERVAL: Duration = Duration::from_millis(100);

impl Default for State {
    fn default() -> Self {
        Self::VACANT
    }
}

/// The numbers of members, from 0. A group has at most [`MAX_MEMBERS`](crate::config::MAX_MEMBERS).
fn ids() -> impl Iterator<Item = MemberId> {
    (0..u8::MAX).map(MemberId)
}

/// A group of members, and the table that distributes the flows among them.
#[derive(Debug)]
pub struct Group {
    pub(super) policy: Policy,
    pub(super) members: Vec<Member>,
    pub(super) table: BucketTable,
    pub(super) phase: Phase,
    /// The primary got a second stop signal.
    pub(super) forced: bool,
    pub(super) last_ticket: u64,
    /// Processes of an earlier primary that were not adopted and have not exited yet.
    pub(super) unwanted: Vec<(ProcessId, StopDeadline)>,
    /// For each user except root: when its unsupervised workers attached.
    unsupervised_attaches: BTreeMap<u32, Starts>,
    /// The actions of the current step.
    pub(super) actions: Vec<Action>,
}

impl Group {
    /// A group of vacant members.
    pub fn new(policy: Policy, members: usize, now: Instant) -> Self {
        Group {
            policy,
            members: vec![Member::new(now); members],
            table: BucketTable::empty(),
            phase: Phase::Starting,
            forced: false,
            last_ticket: 0,
            unwanted: Vec::new(),
            unsupervised_attaches: BTreeMap::new(),
            actions: Vec::new(),
        }
    }

    /// The settings of the group.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The members, by number.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The members with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (MemberId, &Member)> {
        ids().zip(&self.members)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = MemberId> + use<> {
        ids().take(self.members.len())
    }

    /// The member with this number.
    ///
    /// # Errors
    /// [`Refused::Unknown`]
    pub fn member(&self, member: MemberId) -> Result<&Member, Refused> {
        self.members.get(member.index()).ok_or(Refused::Unknown)
    }

    /// The newest table. The lanes may still use an older one.
    pub fn table(&self) -> &BucketTable {
        &self.table
    }

    /// Whether the group is starting, and every process that was started has attached. Then the XDP
    /// program may be attached.
    pub fn has_started(&self) -> bool {
        let starting = |member: &Member| {
            matches!(member.state, State::Spawning { .. }) || member.display_state() == DisplayState::Starting
        };
        self.phase == Phase::Starting && !self.members.iter().any(starting)
    }

    /// Whether the start is complete, and no stop has begun.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether some member has a share of the flows.
    pub(super) fn has_flows(&self) -> bool {
        self.members.iter().any(Member::has_flows)
    }

    /// Whether the group wants packets: a member gets them, or `on_empty` says to drop them.
    pub fn wants_packets(&self) -> bool {
        self.is_open() && (self.policy.on_empty == OnEmpty::Drop || self.has_flows())
    }

    /// The member that this process belongs to.
    pub fn member_of_process(&self, process: ProcessId) -> Option<MemberId> {
        self.numbered().find(|(_, member)| member.process() == Some(process)).map(|(id, _)| id)
    }

    /// The member whose worker, joined or not, uses this connection.
    pub fn member_of(&self, connection: ConnectionId) -> Option<MemberId> {
        self.numbered().find(|(_, member)| member.connection() == Some(connection)).map(|(id, _)| id)
    }

    /// The vacant members.
    pub fn vacancies(&self) -> impl Iterator<Item = MemberId> {
        self.numbered().filter(|(_, member)| member.is_vacant()).map(|(id, _)| id)
    }

    /// The vacant member for a worker that names none: preferably one whose packets are held.
    pub(super) fn vacant(&self) -> Option<MemberId> {
        let held = |id: &MemberId| self.members[id.index()].is_held();
        self.vacancies().find(held).or_else(|| self.vacancies().next())
    }

    /// Counts an attach of an unsupervised worker. The number is limited for each user, since the
    /// lanes spend time on each worker that joins or leaves. It is not limited for root.
    ///
    /// # Errors
    /// The limit, if it is reached.
    pub fn count_unsupervised(&mut self, uid: u32, now: Instant) -> Result<(), u32> {
        if uid == 0 {
            return Ok(());
        }
        let mut limit = self.policy.restart;
        let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        limit.limit_burst = limit.limit_burst.saturating_mul(members);
        let attaches = self.unsupervised_attaches.entry(uid).or_default();
        if attaches.limit_reached(&limit, now) {
            return Err(limit.limit_burst);
        }
        attaches.count(now);
        Ok(())
    }

    /// Handles one event. Returns the actions to carry out, in order.
    ///
    /// # Errors
    /// [`Refused`]: the event is not possible now. The state is unchanged.
    pub fn step(&mut self, event: Event, now: Instant) -> Result<Vec<Action>, Refused> {
        let result = self.handle(event, now);
        for member in &mut self.members {
            let displayed = member.state.display_state();
            if displayed != member.displayed {
                (member.displayed, member.since) = (displayed, now);
            }
        }
        let actions = take(&mut self.actions);
        result.map(|()| actions)
    }

    fn handle(&mut self, event: Event, now: Instant) -> Result<(), Refused> {
        match event {
            Event::Start(member) => self.start(member, now),
            Event::Spawned(member, process) => self.spawned(member, process, now),
            Event::SpawnFailed(member) => self.spawn_failed(member, now),
            Event::Adopted(member, process) => self.adopted(member, process, now),
            Event::Unwanted(process) => {
                let stopping = self.is_stopping();
                self.actions.push(if stopping { Action::Kill(process) } else { Action::Terminate(process) });
                let stop_deadline = StopDeadline { at: now + self.policy.stop_timeout, terminated: true };
                self.unwanted.push((process, stop_deadline));
                Ok(())
            }
            Event::Attaching(member, connection) => self.attaching(member, connection, now),
            Event::Incompatible(member) => {
                let started_here =
                    matches!(self.member(member)?.state, State::Starting { process, .. } if !process.adopted);
                if started_here && self.phase == Phase::Starting {
                    self.actions.push(Action::Fail(Failure::Incompatible(member)));
                }
                Ok(())
            }
            Event::Joined(connection) => self.joined(connection),
            Event::Detach(connection) => {
                self.detach(connection);
                Ok(())
            }
            Event::Disconnected(connection) => {
                self.disconnected(connection, now);
                Ok(())
            }
            Event::Exited(process, success) => {
                self.exited(process, success, now);
                self.advance_stop(now);
                Ok(())
            }
            Event::ImpossibleIndex(member) => self.evict_misbehaving(member, Cause::ImpossibleIndex, now),
            Event::SlowBell(member) => self.evict_misbehaving(member, Cause::SlowBell, now),
            Event::Observed(member, progress) => self.observed(member, progress, now),
            Event::Acknowledged(ticket) => {
                self.acknowledged(ticket);
                Ok(())
            }
            Event::Opened => self.opened(),
            Event::Order(member, order) => self.order(member, order, now),
            Event::Add(member) => self.add(member, now),
            Event::Stop => {
                self.stop();
                Ok(())
            }
            Event::Finish => {
                self.finish(now);
                Ok(())
            }
            Event::ForceStop => {
                self.forced = true;
                self.advance_stop(now);
                Ok(())
            }
            Event::Tick => {
                self.tick(now);
                Ok(())
            }
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping(_))
    }

    pub(super) fn record(&mut self, member: MemberId, fact: Fact) {
        self.actions.push(Action::Record(member, fact));
    }

    /// The ticket of the next change.
    pub(super) fn ticket(&mut self) -> Ticket {
        self.last_ticket += 1;
        Ticket(self.last_ticket)
    }

    fn rebuild_table(&mut self) {
        let of = |wanted: fn(&Member) -> bool| -> Vec<MemberId> {
            self.numbered().filter(|(_, member)| wanted(member)).map(|(id, _)| id).collect()
        };
        self.table = self.table.with_members_and_fixed(&of(Member::has_flows), &of(Member::is_held));
    }

    /// Rebuilds the table, and makes the lanes use it.
    pub(super) fn steer(&mut self) -> Ticket {
        self.rebuild_table();
        let ticket = self.ticket();
        self.actions.push(Action::Steer(ticket, Box::new(self.table.clone())));
        ticket
    }

    /// Rebuilds the table, and makes the lanes use it and requeue the member's uncommitted packets.
    pub(super) fn retire(&mut self, member: MemberId) {
        self.rebuild_table();
        let ticket = self.ticket();
        self.actions.push(Action::Retire(ticket, member, Box::new(self.table.clone())));
    }

    /// Stops holding the flows and packets of a member: the other members get them. Returns whether
    /// they were held.
    pub(super) fn release(&mut self, member: MemberId) -> bool {
        let held = self.members[member.index()].state.held().and_then(Option::take).is_some();
        if held {
            self.retire(member);
        }
        held
    }

    /// The time from one SIGTERM or SIGKILL to the next.
    pub(super) fn kill_interval(&self) -> Duration {
        self.policy.stop_timeout.max(MIN_KILL_INTERVAL)
    }

    /// Closes the connection of a worker that was joining.
    pub(super) fn disconnect(&mut self, member: MemberId, joining: Option<Joining>) {
        if let Some(joining) = joining {
            self.actions.push(Action::Disconnect(member, joining.connection));
        }
    }

    fn start(&mut self, member: MemberId, now: Instant) -> Result<(), Refused> {
        let held = self.vacant_at_start(member)?;
        let down = Down { reason: DownReason::Stopped, restart: None, held };
        self.spawn(member, SpawnReason::PrimaryStart, down, now);
        Ok(())
    }

    /// Checks that a member can get a process while the primary starts. Returns until when its
    /// packets are held.
    fn vacant_at_start(&self, member: MemberId) -> Result<Option<Instant>, Refused> {
        let found = self.member(member)?;
        match found.state {
            State::Vacant { joining: None, held, .. } if self.phase == Phase::Starting => Ok(held),
            _ => Err(Refused::Illegal(found.display_state())),
        }
    }

    pub(super) fn spawn(&mut self, member: MemberId, reason: SpawnReason, down: Down, now: Instant) {
        self.members[member.index()].starts.count(now);
        self.members[member.index()].state = State::Spawning { reason, down };
        self.actions.push(Action::Spawn(member));
    }

    fn spawned(&mut self, member: MemberId, id: ProcessId, now: Instant) -> Result<(), Refused> {
        let State::Spawning { down, .. } = self.member(member)?.state else {
            return Err(Refused::Illegal(self.members[member.index()].display_state()));
        };
        let process = Process { id, adopted: false, attached: 0 };
        self.await_attach(member, process, down.held, now);
        if self.is_stopping() {
            self.release(member);
            self.end_late(id);
        }
        Ok(())
    }

    fn adopted(&mut self, member: MemberId, id: ProcessId, now: Instant) -> Result<(), Refused> {
        let held = self.vacant_at_start(member)?;
        self.members[member.index()].starts.count(now);
        self.await_attach(member, Process { id, adopted: true, attached: 0 }, held, now);
        Ok(())
    }

    /// Gives a process to a member, and waits for it to attach.
    fn await_attach(&mut self, member: MemberId, process: Process, held: Option<Instant>, now: Instant) {
        let until = now + self.policy.start_timeout;
        self.members[member.index()].state =
            State::Starting { process, until, joining: None, stop_deadline: None, held };
        self.record(member, Fact::Started { adopted: process.adopted });
    }

    fn spawn_failed(&mut self, member: MemberId, now: Instant) -> Result<(), Refused> {
        let State::Spawning { reason, down } = self.member(member)?.state else {
            return Err(Refused::Illegal(self.members[member.index()].display_state()));
        };
        self.members[member.index()].state = State::Down(down);
        if self.is_stopping() {
            return Ok(());
        }
        match reason {
            SpawnReason::PrimaryStart => self.actions.push(Action::Fail(Failure::Spawn(member))),
            SpawnReason::ReplaceAdopted if self.phase == Phase::Starting => {
                self.actions.push(Action::Fail(Failure::Spawn(member)));
            }
            SpawnReason::AutoRestart | SpawnReason::ReplaceAdopted => {
                self.decide_restart(member, down, false, now);
            }
            // The member is as it was before.
            SpawnReason::OrderedStart => {}
            SpawnReason::Add => {
                let crashed = down.reason == DownReason::Crashed;
                self.members[member.index()].state =
                    State::Vacant { crashed, joining: None, held: down.held };
            }
            SpawnReason::OrderedRestart => {
                self.members[member.index()].state = State::Down(Down { reason: DownReason::Failed, ..down });
                self.record(member, Fact::GivenUp { too_often: false });
                self.release(member);
            }
        }
        Ok(())
    }

    /// Detects a worker that stalls or hangs, and during a stop a worker that has finished.
    fn observed(&mut self, member: MemberId, progress: Progress, now: Instant) -> Result<(), Refused> {
        self.member(member)?;
        let timeout = self.policy.hang_timeout;
        if self.is_stopping() {
            if let State::Draining { closing: closing @ Closing::Announced, .. } =
                &mut self.members[member.index()].state
                && progress.backlog == 0
            {
                *closing = Closing::Finished;
                self.advance_stop(now);
            }
            return Ok(());
        }
        let (State::Running { worker, .. } | State::Draining { worker, .. }) =
            &mut self.members[member.index()].state
        else {
            return Ok(());
        };
        let stalled_for = match worker.last_progress {
            Some((last, since))
                if progress.backlog > 0
                    && (last.committed, last.heartbeat) == (progress.committed, progress.heartbeat) =>
            {
                now.saturating_duration_since(since)
            }
            _ => {
                worker.last_progress = Some((progress, now));
                Duration::ZERO
            }
        };
        if timeout.is_zero() {
            return Ok(());
        }
        let slow = stalled_for >= timeout / 2;
        if let State::Running { stalled, .. } = &mut self.members[member.index()].state
            && replace(stalled, slow) != slow
        {
            self.record(member, if slow { Fact::Stalled(stalled_for) } else { Fact::Recovered });
        }
        if stalled_for >= timeout {
            self.members[member.index()].hangs += 1;
            self.record(member, Fact::Hung(stalled_for));
            self.evict_misbehaving(member, Cause::Hung, now)?;
        }
        Ok(())
    }

    /// Evicts a worker that misbehaves.
    fn evict_misbehaving(&mut self, member: MemberId, cause: Cause, now: Instant) -> Result<(), Refused> {
        if self.member(member)?.has_session() {
            self.record(member, Fact::Died(cause));
            self.evict(member, DisplayState::Crashed, now);
        }
        Ok(())
    }

    fn acknowledged(&mut self, ticket: Ticket) {
        if matches!(self.phase, Phase::Opening(opening) if opening <= ticket) {
            self.phase = Phase::Open;
        }
        for (member, id) in self.members.iter_mut().zip(ids()) {
            if let State::Draining { closing, .. } = &mut member.state
                && matches!(closing, Closing::AfterAck(change) if *change <= ticket)
            {
                *closing = Closing::Announced;
                self.actions.push(Action::Close(id));
            }
        }
    }

    /// Builds the table from scratch, so that at every start the same members get the same flows:
    /// before, the table depended on the order in which the workers attached.
    fn opened(&mut self) -> Result<(), Refused> {
        if !self.has_started() {
            return Err(Refused::Starting);
        }
        self.table = BucketTable::empty();
        self.phase = Phase::Opening(self.steer());
        Ok(())
    }
}
