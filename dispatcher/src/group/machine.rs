//! The state machine of a group: `step(event, now)` changes the members and returns actions.
//!
//! The flows belong to the running members and to those whose packets are held. Each change of that
//! set deals the table anew, and the lanes get the new table with the change itself.

use std::collections::BTreeMap;
use std::mem::{replace, take};
use std::time::{Duration, Instant};

use xfan_shm::ids::MemberId;

use crate::config::OnEmpty;
use crate::group::event::{
    Action, Cause, ConnectionId, Event, Fact, Failure, ProcessId, Reading, Refused, Ticket,
};
use crate::group::member::{Closing, Down, Joining, Member, Occasion, Overdue, Process, Rest, State};
use crate::group::phase::Phase;
use crate::group::policy::Policy;
use crate::group::restart::Starts;
use crate::group::shown::Shown;
use crate::lane::BucketTable;

/// The shortest time between two attempts to end a process.
const AGAIN: Duration = Duration::from_millis(100);

impl Default for State {
    fn default() -> Self {
        Self::VACANT
    }
}

/// The numbers of members. There are at most [`MAX_MEMBERS`](crate::config::MAX_MEMBERS).
fn ids() -> impl Iterator<Item = MemberId> {
    (0..u8::MAX).map(MemberId)
}

/// A group of members, and how their flows are dealt out.
#[derive(Debug)]
pub struct Group {
    pub(super) policy: Policy,
    pub(super) members: Vec<Member>,
    pub(super) table: BucketTable,
    pub(super) phase: Phase,
    pub(super) hurried: bool,
    pub(super) tickets: u64,
    /// Processes of an earlier primary that have got SIGTERM.
    pub(super) unwanted: Vec<(ProcessId, Overdue)>,
    /// For each user but root: how often its workers have attached.
    guests: BTreeMap<u32, Starts>,
    pub(super) out: Vec<Action>,
}

impl Group {
    /// A group of vacant members.
    pub fn new(policy: Policy, members: usize, now: Instant) -> Self {
        Group {
            policy,
            members: vec![Member::new(now); members],
            table: BucketTable::empty(),
            phase: Phase::Starting,
            hurried: false,
            tickets: 0,
            unwanted: Vec::new(),
            guests: BTreeMap::new(),
            out: Vec::new(),
        }
    }

    /// Its settings.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Its members, by number.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Its members with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (MemberId, &Member)> {
        ids().zip(&self.members)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = MemberId> + use<> {
        ids().take(self.members.len())
    }

    /// The member of this number.
    ///
    /// # Errors
    /// [`Refused::Unknown`]
    pub fn member(&self, member: MemberId) -> Result<&Member, Refused> {
        self.get(member)
    }

    /// The table that the lanes use, or are about to.
    pub fn table(&self) -> &BucketTable {
        &self.table
    }

    /// Whether every process that was started has attached: packets may come.
    pub fn has_started(&self) -> bool {
        let starting = |member: &Member| {
            matches!(member.state, State::Spawning { .. }) || member.shown() == Shown::Starting
        };
        self.phase == Phase::Starting && !self.members.iter().any(starting)
    }

    /// Whether the start is over, and the stop has not begun.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether a member takes packets.
    pub(super) fn has_flows(&self) -> bool {
        self.members.iter().any(Member::has_flows)
    }

    /// Whether packets are to come: a member takes them, or they are to be dropped.
    pub fn wants_packets(&self) -> bool {
        self.is_open() && (self.policy.on_empty == OnEmpty::Drop || self.has_flows())
    }

    /// The member whose process this is.
    pub fn member_of_process(&self, process: ProcessId) -> Option<MemberId> {
        self.numbered().find(|(_, member)| member.process() == Some(process)).map(|(id, _)| id)
    }

    /// The member whose worker, joined or not, speaks through this connection.
    pub fn member_of(&self, connection: ConnectionId) -> Option<MemberId> {
        self.numbered().find(|(_, member)| member.connection() == Some(connection)).map(|(id, _)| id)
    }

    /// The members that are vacant.
    pub fn vacancies(&self) -> impl Iterator<Item = MemberId> {
        self.numbered().filter(|(_, member)| member.is_vacant()).map(|(id, _)| id)
    }

    /// The vacant member for a worker that names none; one whose packets are held comes first.
    pub(super) fn vacant(&self) -> Option<MemberId> {
        let held = |id: &MemberId| self.members[id.index()].is_held();
        self.vacancies().find(held).or_else(|| self.vacancies().next())
    }

    /// Counts a worker that the primary did not start: each costs the lanes some time when it
    /// joins and when it leaves. Root may attach as often as it likes.
    ///
    /// # Errors
    /// The limit, if it has been reached.
    pub fn count_guest(&mut self, uid: u32, now: Instant) -> Result<(), u32> {
        if uid == 0 {
            return Ok(());
        }
        let mut limit = self.policy.restart;
        let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        limit.limit_burst = limit.limit_burst.saturating_mul(members);
        let guests = self.guests.entry(uid).or_default();
        if guests.too_many(&limit, now) {
            return Err(limit.limit_burst);
        }
        guests.count(now);
        Ok(())
    }

    /// Deals with one event.
    ///
    /// # Errors
    /// [`Refused`]: the event cannot happen now. Nothing has changed.
    pub fn step(&mut self, event: Event, now: Instant) -> Result<Vec<Action>, Refused> {
        let result = self.handle(event, now);
        for member in &mut self.members {
            let shown = member.state.shown();
            if shown != member.shown {
                (member.shown, member.since) = (shown, now);
            }
        }
        let actions = take(&mut self.out);
        result.map(|()| actions)
    }

    fn handle(&mut self, event: Event, now: Instant) -> Result<(), Refused> {
        match event {
            Event::Start(member) => self.start(member, now),
            Event::Spawned(member, process) => self.spawned(member, process, now),
            Event::SpawnFailed(member) => self.spawn_failed(member, now),
            Event::Adopted(member, process) => self.adopted(member, process, now),
            Event::Unwanted(process) => {
                let late = self.is_stopping();
                self.out.push(if late { Action::Kill(process) } else { Action::Terminate(process) });
                let overdue = Overdue { at: now + self.policy.stop_timeout, terminated: true };
                self.unwanted.push((process, overdue));
                Ok(())
            }
            Event::Attaching(member, connection) => self.attaching(member, connection, now),
            Event::Incompatible(member) => {
                let ours =
                    matches!(self.get(member)?.state, State::Starting { process, .. } if !process.adopted);
                if ours && self.phase == Phase::Starting {
                    self.out.push(Action::Fail(Failure::Incompatible(member)));
                }
                Ok(())
            }
            Event::Joined(connection) => self.joined(connection),
            Event::Detach(connection) => {
                self.detach(connection);
                Ok(())
            }
            Event::HungUp(connection) => {
                self.hung_up(connection, now);
                Ok(())
            }
            Event::Exited(process, success) => {
                self.exited(process, success, now);
                self.proceed(now);
                Ok(())
            }
            Event::Lied(member) => self.condemn(member, Cause::Lied, now),
            Event::SlowedBell(member) => self.condemn(member, Cause::SlowBell, now),
            Event::Observed(member, reading) => self.observed(member, reading, now),
            Event::Obeyed(ticket) => {
                self.obeyed(ticket);
                Ok(())
            }
            Event::Opened => self.opened(),
            Event::Order(member, purpose) => self.order(member, purpose, now),
            Event::Add(member) => self.add(member, now),
            Event::Stop => {
                self.stop();
                Ok(())
            }
            Event::Finish => {
                self.finish(now);
                Ok(())
            }
            Event::Hurry => {
                self.hurried = true;
                self.proceed(now);
                Ok(())
            }
            Event::Tick => {
                self.tick(now);
                Ok(())
            }
        }
    }

    pub(super) fn get(&self, member: MemberId) -> Result<&Member, Refused> {
        self.members.get(member.index()).ok_or(Refused::Unknown)
    }

    pub(super) fn is_stopping(&self) -> bool {
        matches!(self.phase, Phase::Stopping(_))
    }

    pub(super) fn record(&mut self, member: MemberId, fact: Fact) {
        self.out.push(Action::Record(member, fact));
    }

    pub(super) fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn deal(&mut self) {
        let of = |wanted: fn(&Member) -> bool| -> Vec<MemberId> {
            self.numbered().filter(|(_, member)| wanted(member)).map(|(id, _)| id).collect()
        };
        self.table = self.table.with_members_and_fixed(&of(Member::has_flows), &of(Member::is_held));
    }

    /// Deals the flows out anew, and has the lanes use the table.
    pub(super) fn steer(&mut self) -> Ticket {
        self.deal();
        let ticket = self.ticket();
        self.out.push(Action::Steer(ticket, Box::new(self.table.clone())));
        ticket
    }

    pub(super) fn retire(&mut self, member: MemberId) {
        self.deal();
        let ticket = self.ticket();
        self.out.push(Action::Retire(ticket, member, Box::new(self.table.clone())));
    }

    /// Ends what is held for a member: its flows and packets go to the others. Whether there was
    /// something.
    pub(super) fn release(&mut self, member: MemberId) -> bool {
        let held = self.members[member.index()].state.held().and_then(Option::take).is_some();
        if held {
            self.retire(member);
        }
        held
    }

    pub(super) fn patience(&self) -> Duration {
        self.policy.stop_timeout.max(AGAIN)
    }

    pub(super) fn hang_up(&mut self, member: MemberId, joining: Option<Joining>) {
        if let Some(joining) = joining {
            self.out.push(Action::HangUp(member, joining.connection));
        }
    }

    fn start(&mut self, member: MemberId, now: Instant) -> Result<(), Refused> {
        let held = self.vacant_at_start(member)?;
        self.spawn(member, Occasion::Start, Down { rest: Rest::Stopped, restart: None, held }, now);
        Ok(())
    }

    /// Until when packets are held for a member that may get a process as the primary starts.
    fn vacant_at_start(&self, member: MemberId) -> Result<Option<Instant>, Refused> {
        let found = self.get(member)?;
        match found.state {
            State::Vacant { joining: None, held, .. } if self.phase == Phase::Starting => Ok(held),
            _ => Err(Refused::Illegal(found.shown())),
        }
    }

    pub(super) fn spawn(&mut self, member: MemberId, occasion: Occasion, down: Down, now: Instant) {
        self.members[member.index()].starts.count(now);
        self.members[member.index()].state = State::Spawning { occasion, down };
        self.out.push(Action::Spawn(member));
    }

    fn spawned(&mut self, member: MemberId, id: ProcessId, now: Instant) -> Result<(), Refused> {
        let State::Spawning { down, .. } = self.get(member)?.state else {
            return Err(Refused::Illegal(self.members[member.index()].shown()));
        };
        let process = Process { id, adopted: false, attached: 0 };
        self.expect(member, process, down.held, now);
        if self.is_stopping() {
            self.release(member);
            self.end_late(id);
        }
        Ok(())
    }

    fn adopted(&mut self, member: MemberId, id: ProcessId, now: Instant) -> Result<(), Refused> {
        let held = self.vacant_at_start(member)?;
        self.members[member.index()].starts.count(now);
        self.expect(member, Process { id, adopted: true, attached: 0 }, held, now);
        Ok(())
    }

    /// Waits for a process to attach.
    fn expect(&mut self, member: MemberId, process: Process, held: Option<Instant>, now: Instant) {
        let until = now + self.policy.start_timeout;
        self.members[member.index()].state =
            State::Starting { process, until, joining: None, overdue: None, held };
        self.record(member, Fact::Started { adopted: process.adopted });
    }

    fn spawn_failed(&mut self, member: MemberId, now: Instant) -> Result<(), Refused> {
        let State::Spawning { occasion, down } = self.get(member)?.state else {
            return Err(Refused::Illegal(self.members[member.index()].shown()));
        };
        self.members[member.index()].state = State::Down(down);
        if self.is_stopping() {
            return Ok(());
        }
        match occasion {
            Occasion::Start => self.out.push(Action::Fail(Failure::Spawn(member))),
            Occasion::Replace if self.phase == Phase::Starting => {
                self.out.push(Action::Fail(Failure::Spawn(member)));
            }
            Occasion::Restart | Occasion::Replace => self.judge(member, down, false, now),
            // As it was before.
            Occasion::Order => {}
            Occasion::Add => {
                let crashed = down.rest == Rest::Crashed;
                self.members[member.index()].state =
                    State::Vacant { crashed, joining: None, held: down.held };
            }
            Occasion::Again => {
                self.members[member.index()].state = State::Down(Down { rest: Rest::Failed, ..down });
                self.record(member, Fact::GivenUp { too_often: false });
                self.release(member);
            }
        }
        Ok(())
    }

    fn observed(&mut self, member: MemberId, reading: Reading, now: Instant) -> Result<(), Refused> {
        self.get(member)?;
        let timeout = self.policy.hang_timeout;
        if self.is_stopping() {
            if let State::Draining { closing: closing @ Closing::Told, .. } =
                &mut self.members[member.index()].state
                && reading.backlog == 0
            {
                *closing = Closing::Finished;
                self.proceed(now);
            }
            return Ok(());
        }
        let (State::Running { worker, .. } | State::Draining { worker, .. }) =
            &mut self.members[member.index()].state
        else {
            return Ok(());
        };
        let still = match worker.pulse {
            Some((last, since))
                if reading.backlog > 0
                    && (last.committed, last.heartbeat) == (reading.committed, reading.heartbeat) =>
            {
                now.saturating_duration_since(since)
            }
            _ => {
                worker.pulse = Some((reading, now));
                Duration::ZERO
            }
        };
        if timeout.is_zero() {
            return Ok(());
        }
        let slow = still >= timeout / 2;
        if let State::Running { stalled, .. } = &mut self.members[member.index()].state
            && replace(stalled, slow) != slow
        {
            self.record(member, if slow { Fact::Stalled(still) } else { Fact::Recovered });
        }
        if still >= timeout {
            self.members[member.index()].hangs += 1;
            self.record(member, Fact::Hung(still));
            self.condemn(member, Cause::Hung, now)?;
        }
        Ok(())
    }

    /// Evicts a worker that did what no honest worker does.
    fn condemn(&mut self, member: MemberId, cause: Cause, now: Instant) -> Result<(), Refused> {
        if self.get(member)?.has_session() {
            self.record(member, Fact::Died(cause));
            self.evict(member, Shown::Crashed, now);
        }
        Ok(())
    }

    fn obeyed(&mut self, ticket: Ticket) {
        if matches!(self.phase, Phase::Opening(opening) if opening <= ticket) {
            self.phase = Phase::Open;
        }
        for (member, id) in self.members.iter_mut().zip(ids()) {
            if let State::Draining { closing, .. } = &mut member.state
                && matches!(closing, Closing::When(when) if *when <= ticket)
            {
                *closing = Closing::Told;
                self.out.push(Action::Close(id));
            }
        }
    }

    /// Deals the flows out anew: at every start the same members get the same flows, though workers
    /// attach in any order.
    fn opened(&mut self) -> Result<(), Refused> {
        if !self.has_started() {
            return Err(Refused::Starting);
        }
        self.table = BucketTable::empty();
        self.phase = Phase::Opening(self.steer());
        Ok(())
    }
}
