//! Carries out what the group decides. Everything here returns at once.

use std::collections::VecDeque;
use std::time::Instant;

use crate::control::error::PrimaryError;
use crate::control::lanes::Then;
use crate::control::primary::Primary;
use crate::group::{Action, Event, Failure, Refused};

impl Primary {
    /// Has the group deal with an event that cannot be refused, or may be.
    pub(super) fn apply(&mut self, event: Event) {
        if let Err(refused) = self.try_apply(event) {
            tracing::debug!(?event, "refused: {refused}");
        }
    }

    /// Has the group deal with an event, and carries out what it decides.
    pub(super) fn try_apply(&mut self, event: Event) -> Result<(), Refused> {
        let mut answers = VecDeque::new();
        let actions = self.group.step(event, Instant::now())?;
        actions.into_iter().for_each(|action| self.execute(action, &mut answers));
        while let Some(answer) = answers.pop_front() {
            let actions = self.group.step(answer, Instant::now())?;
            actions.into_iter().for_each(|action| self.execute(action, &mut answers));
            if matches!(answer, Event::Spawned(..)) {
                self.write_note();
            }
        }
        Ok(())
    }

    fn execute(&mut self, action: Action, answers: &mut VecDeque<Event>) {
        match action {
            Action::Spawn(member) => answers.push_back(match self.spawn(member) {
                Ok(process) => Event::Spawned(member, process),
                Err(error) => {
                    // At the start, and for an operator, the error is the answer.
                    if self.group.is_open() {
                        tracing::error!(member = self.members[member.index()].id, "{error}");
                    }
                    self.members[member.index()].trouble = error.to_string();
                    self.spawn_error = Some(error);
                    Event::SpawnFailed(member)
                }
            }),
            Action::Terminate(process) => self.terminate(process),
            Action::Kill(process) => self.kill(process),
            Action::Forget(process) => self.forget(process),
            Action::HangUp(member, _) => {
                if let Some(joining) = self.members[member.index()].joining.take() {
                    joining.connection.end();
                }
            }
            Action::Join(member) => {
                let session = self.members[member.index()].session.as_mut();
                let links = session.map(|session| std::mem::take(&mut session.links));
                self.lanes.join(member, links.unwrap_or_default());
            }
            Action::EndSession { member, lost } => {
                let member = &mut self.members[member.index()];
                let lost = lost || member.backlog() > 0;
                if let Some(session) = member.end_session(lost) {
                    self.ended = Some((session.pid, Box::new(session)));
                }
            }
            Action::Close(member) => {
                if let Some(session) = &self.members[member.index()].session {
                    session.close();
                }
            }
            Action::Steer(ticket, table) => {
                self.lanes.steer(&table);
                self.lanes.when_obeyed(Then::Tell(ticket));
            }
            Action::Hold(ticket, member) => {
                let pid = self.let_go();
                self.lanes.hold(member);
                self.lanes.when_obeyed(Then::Held { member, pid });
                self.lanes.when_obeyed(Then::Tell(ticket));
            }
            Action::Retire(ticket, member, table) => {
                let pid = self.let_go();
                let found = &self.members[member.index()];
                let (requeued, lost) = (found.requeued(), found.lost());
                self.lanes.retire(member, &table);
                self.lanes.when_obeyed(Then::Retired { member, pid, requeued, lost });
                self.lanes.when_obeyed(Then::Tell(ticket));
            }
            Action::Record(member, fact) => self.record(member, fact),
            Action::Fail(failure) => {
                let error = self.explain(failure);
                self.failure.get_or_insert(error);
            }
        }
        // A session outlives the links that the lanes have.
        if let Some((_, session)) = self.dropped.take() {
            self.lanes.when_obeyed(Then::Drop(session));
        }
    }

    /// Has the session that just ended dropped after the next command. Returns its worker's pid.
    fn let_go(&mut self) -> u32 {
        self.dropped = self.ended.take();
        self.dropped.as_ref().map_or(0, |(pid, _)| *pid)
    }

    /// Does what has waited for the lanes.
    pub(super) fn acknowledge(&mut self) {
        while let Some(then) = self.lanes.next_obeyed() {
            match then {
                Then::Tell(ticket) => self.apply(Event::Obeyed(ticket)),
                Then::Held { member, pid } => {
                    let member = &self.members[member.index()];
                    let timeout = self.group.policy().hold.unwrap_or_default();
                    let detail = format!("{} packets, for {timeout:?}", member.backlog());
                    self.journal.write(Some(&member.id), pid, "held", detail);
                }
                Then::Retired { member, pid, requeued, lost } => {
                    let member = &self.members[member.index()];
                    let (requeued, lost) = (member.requeued() - requeued, member.lost() - lost);
                    if requeued + lost > 0 {
                        tracing::info!(member = member.id, requeued, lost, "uncommitted packets");
                        let detail = format!("requeued {requeued}, lost {lost}");
                        self.journal.write(Some(&member.id), pid, "uncommitted", detail);
                    }
                }
                Then::Drop(_) => {}
            }
        }
        self.lanes.look_for_late();
    }

    /// The first failure, if the group cannot go on.
    pub(super) fn check_failure(&mut self) -> Result<(), PrimaryError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn explain(&mut self, failure: Failure) -> PrimaryError {
        let of = |member: xfan_shm::ids::MemberId| {
            let found = &self.members[member.index()];
            (found.id.clone(), found.program.clone())
        };
        match failure {
            Failure::Spawn(_) => {
                let unknown = || std::io::Error::from(std::io::ErrorKind::Other).into();
                self.spawn_error.take().unwrap_or_else(unknown)
            }
            Failure::EndedEarly(number) => {
                let (member, program) = of(number);
                let how = self.members[number.index()].last_exit.clone().unwrap_or_default();
                PrimaryError::EndedEarly { member, program, how }
            }
            Failure::NotAttached(number) => {
                let (member, program) = of(number);
                PrimaryError::NotAttached { member, program, timeout: self.group.policy().start_timeout }
            }
            Failure::Incompatible(number) => {
                let (member, program) = of(number);
                let reason = self.members[number.index()].trouble.clone();
                PrimaryError::Refused { member, program, reason }
            }
            Failure::NoneLeft(number) => {
                let (member, _) = of(number);
                let how = self.members[number.index()].trouble.clone();
                PrimaryError::NoneLeft { member, how }
            }
        }
    }
}
