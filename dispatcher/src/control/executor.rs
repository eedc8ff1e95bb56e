//! Carries out what the groups decide. Everything here returns at once.

use std::collections::VecDeque;
use std::time::Instant;

use xfan_shm::ids::{GroupId, MemberId};

use crate::control::error::PrimaryError;
use crate::control::groups::MemberKey;
use crate::control::lanes::Then;
use crate::control::primary::Primary;
use crate::control::resources::{Resources, Session};
use crate::group::{Action, Event, Failure, Refused};

/// What the actions of one step leave to each other.
#[derive(Debug, Default)]
struct Step {
    /// Events that answer actions.
    answers: VecDeque<Event>,
    /// The session that has ended. The command that takes its links from the lanes follows.
    ended: Option<Box<Session>>,
}

impl Primary {
    /// Has all groups handle an event.
    pub(super) fn apply_to_all(&mut self, event: Event) {
        self.group_ids().for_each(|group| self.apply(group, event));
    }

    /// Has a group handle an event that it may refuse.
    pub(super) fn apply(&mut self, group: GroupId, event: Event) {
        if let Err(refused) = self.try_apply(group, event) {
            tracing::debug!(?event, "refused: {refused}");
        }
    }

    /// Has a group handle an event, and carries out what it decides.
    pub(super) fn try_apply(&mut self, group: GroupId, event: Event) -> Result<(), Refused> {
        let (mut step, mut next) = (Step::default(), Some(event));
        while let Some(event) = next {
            let actions = self.group_mut(group).life.step(event, Instant::now())?;
            actions.into_iter().for_each(|action| self.execute(group, action, &mut step));
            if matches!(event, Event::Spawned(..)) {
                self.write_note();
            }
            next = step.answers.pop_front();
        }
        Ok(())
    }

    fn execute(&mut self, group: GroupId, action: Action, step: &mut Step) {
        let key = |member| MemberKey { group, member };
        match action {
            Action::Spawn(member) => step.answers.push_back(match self.spawn(key(member)) {
                Ok(process) => Event::Spawned(member, process),
                Err(error) => self.spawn_failed(key(member), error),
            }),
            Action::Terminate(process) => self.terminate(process),
            Action::Kill(process) => self.kill(process),
            Action::Forget(process) => self.forget(process),
            Action::HangUp(member, _) => {
                if let Some(joining) = self.resources_mut(key(member)).joining.take() {
                    joining.connection.end();
                }
            }
            Action::Join(member) => {
                let session = self.resources_mut(key(member)).session.as_mut();
                let links = session.map(|session| std::mem::take(&mut session.links));
                self.lanes.join(key(member), links.unwrap_or_default());
            }
            Action::EndSession { member, lost } => {
                let resources = self.resources_mut(key(member));
                let lost = lost || resources.backlog() > 0;
                step.ended = resources.end_session(lost).map(Box::new);
            }
            Action::Close(member) => {
                if let Some(session) = &self.resources(key(member)).session {
                    session.close();
                }
            }
            Action::Steer(ticket, table) => {
                self.lanes.steer(group, &table);
                self.lanes.when_obeyed(Then::Tell(group, ticket));
            }
            Action::Hold(ticket, member) => {
                let (member, ended) = (key(member), step.ended.take());
                self.lanes.hold(member);
                self.lanes.when_obeyed(Then::Held { member, pid: pid_of(ended.as_deref()) });
                self.lanes.when_obeyed(Then::Tell(group, ticket));
                self.drop_later(ended);
            }
            Action::Retire(ticket, member, table) => {
                let (member, ended) = (key(member), step.ended.take());
                let resources = self.resources(member);
                let (requeued, lost) = (resources.requeued(), resources.lost());
                self.lanes.retire(member, &table);
                let pid = pid_of(ended.as_deref());
                self.lanes.when_obeyed(Then::Retired { member, pid, requeued, lost });
                self.lanes.when_obeyed(Then::Tell(group, ticket));
                self.drop_later(ended);
            }
            Action::Record(member, fact) => self.record(key(member), fact),
            Action::Fail(failure) => {
                let error = self.explain(group, failure);
                self.failure.get_or_insert(error);
            }
        }
    }

    fn spawn_failed(&mut self, key: MemberKey, error: PrimaryError) -> Event {
        // At the start, and for an operator, the error is the answer.
        if self.group(key.group).life.is_open() {
            tracing::error!(member = self.resources(key).id, "{error}");
        }
        self.resources_mut(key).trouble = error.to_string();
        self.spawn_error = Some(error);
        Event::SpawnFailed(key.member)
    }

    /// Drops a session once the lanes have let go of its links.
    fn drop_later(&mut self, ended: Option<Box<Session>>) {
        if let Some(session) = ended {
            self.lanes.when_obeyed(Then::Drop(session));
        }
    }

    /// Does what has waited for the lanes.
    pub(super) fn acknowledge(&mut self) {
        while let Some(then) = self.lanes.next_obeyed() {
            match then {
                Then::Tell(group, ticket) => self.apply(group, Event::Obeyed(ticket)),
                Then::Held { member, pid } => {
                    let timeout = self.group(member.group).life.policy().hold.unwrap_or_default();
                    let resources = self.resources(member);
                    let detail = format!("{} packets, for {timeout:?}", resources.backlog());
                    self.write_about(member, pid, "held", detail);
                }
                Then::Retired { member, pid, requeued, lost } => {
                    let resources = self.resources(member);
                    let (requeued, lost) = (resources.requeued() - requeued, resources.lost() - lost);
                    if requeued + lost > 0 {
                        tracing::info!(member = resources.id, requeued, lost, "uncommitted packets");
                        let detail = format!("requeued {requeued}, lost {lost}");
                        self.write_about(member, pid, "uncommitted", detail);
                    }
                }
                Then::Drop(_) => {}
            }
        }
        self.lanes.look_for_late();
    }

    /// The first failure, if a group cannot go on.
    pub(super) fn check_failure(&mut self) -> Result<(), PrimaryError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn explain(&mut self, group: GroupId, failure: Failure) -> PrimaryError {
        let of = |member: MemberId| {
            let resources = self.resources(MemberKey { group, member });
            let Resources { id, program, trouble, .. } = resources;
            (id.clone(), program.clone(), resources.last_exit.clone().unwrap_or_default(), trouble.clone())
        };
        match failure {
            Failure::Spawn(_) => {
                let unknown = || std::io::Error::from(std::io::ErrorKind::Other).into();
                self.spawn_error.take().unwrap_or_else(unknown)
            }
            Failure::EndedEarly(member) => {
                let (member, program, how, _) = of(member);
                PrimaryError::EndedEarly { member, program, how }
            }
            Failure::NotAttached(member) => {
                let (member, program, ..) = of(member);
                let timeout = self.group(group).life.policy().start_timeout;
                PrimaryError::NotAttached { member, program, timeout }
            }
            Failure::Incompatible(member) => {
                let (member, program, _, reason) = of(member);
                PrimaryError::Refused { member, program, reason }
            }
            Failure::NoneLeft(member) => {
                let (member, .., how) = of(member);
                PrimaryError::NoneLeft { member, how }
            }
        }
    }
}

/// Process id of the session's worker; 0: no session.
fn pid_of(session: Option<&Session>) -> u32 {
    session.map_or(0, |session| session.pid)
}
