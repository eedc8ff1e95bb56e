//! Carries out the actions of the groups. Nothing here waits.

use std::collections::VecDeque;
use std::time::Instant;

use xfan_shm::ids::{GroupId, MemberId};

use crate::control::error::PrimaryError;
use crate::control::groups::MemberKey;
use crate::control::lanes::AfterAck;
use crate::control::primary::Primary;
use crate::control::resources::{Resources, Session};
use crate::group::{Action, Event, Failure, Refused};

/// State that the actions of one step share.
#[derive(Debug, Default)]
struct Step {
    /// The results of actions, as events for the group.
    results: VecDeque<Event>,
    /// The session that an action has ended. The next action removes its links from the lanes.
    ended: Option<Box<Session>>,
}

impl Primary {
    /// Passes an event to all groups.
    pub(super) fn apply_to_all(&mut self, event: Event) {
        self.group_ids().for_each(|group| self.apply(group, event));
    }

    /// Passes an event to a group. A refusal is only logged.
    pub(super) fn apply(&mut self, group: GroupId, event: Event) {
        if let Err(refused) = self.try_apply(group, event) {
            tracing::debug!(?event, "refused: {refused}");
        }
    }

    /// Passes an event to a group, and carries out its actions.
    pub(super) fn try_apply(&mut self, group: GroupId, event: Event) -> Result<(), Refused> {
        let (mut step, mut next) = (Step::default(), Some(event));
        while let Some(event) = next {
            let actions = self.group_mut(group).machine.step(event, Instant::now())?;
            actions.into_iter().for_each(|action| self.execute(group, action, &mut step));
            if matches!(event, Event::Spawned(..)) {
                self.write_note();
            }
            next = step.results.pop_front();
        }
        Ok(())
    }

    fn execute(&mut self, group: GroupId, action: Action, step: &mut Step) {
        let key = |member| MemberKey { group, member };
        match action {
            Action::Spawn(member) => step.results.push_back(match self.spawn(key(member)) {
                Ok(process) => Event::Spawned(member, process),
                Err(error) => self.spawn_failed(key(member), error),
            }),
            Action::Terminate(process) => self.terminate(process),
            Action::Kill(process) => self.kill(process),
            Action::Forget(process) => self.forget(process),
            Action::Disconnect(member, _) => {
                if let Some(joining) = self.resources_mut(key(member)).joining.take() {
                    joining.connection.close();
                }
            }
            Action::Join(member) => {
                let session = self.resources_mut(key(member)).session.as_mut();
                let links = session.map(|session| std::mem::take(&mut session.links));
                self.lanes.join(key(member), links.unwrap_or_default());
            }
            Action::EndSession { member, revoke } => {
                let resources = self.resources_mut(key(member));
                let revoke = revoke || resources.backlog() > 0;
                step.ended = resources.end_session(revoke).map(Box::new);
            }
            Action::Close(member) => {
                if let Some(session) = &self.resources(key(member)).session {
                    session.close();
                }
            }
            Action::Steer(ticket, table) => {
                self.lanes.steer(group, &table);
                self.lanes.after_ack(AfterAck::Notify(group, ticket));
            }
            Action::Hold(ticket, member) => {
                let (member, ended) = (key(member), step.ended.take());
                self.lanes.hold(member);
                self.lanes.after_ack(AfterAck::LogHeld { member, pid: pid_of(ended.as_deref()) });
                self.lanes.after_ack(AfterAck::Notify(group, ticket));
                self.drop_later(ended);
            }
            Action::Retire(ticket, member, table) => {
                let (member, ended) = (key(member), step.ended.take());
                let resources = self.resources(member);
                let (requeued, lost) = (resources.requeued(), resources.lost());
                self.lanes.retire(member, &table);
                let pid = pid_of(ended.as_deref());
                self.lanes.after_ack(AfterAck::LogRetired { member, pid, requeued, lost });
                self.lanes.after_ack(AfterAck::Notify(group, ticket));
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
        // While the primary starts, the error ends it, and is printed then.
        if self.group(key.group).machine.is_open() {
            tracing::error!(member = self.resources(key).id, "{error}");
        }
        self.resources_mut(key).last_error = error.to_string();
        self.spawn_error = Some(error);
        Event::SpawnFailed(key.member)
    }

    /// Drops a session once the lanes have dropped its links.
    fn drop_later(&mut self, ended: Option<Box<Session>>) {
        if let Some(session) = ended {
            self.lanes.after_ack(AfterAck::Drop(session));
        }
    }

    /// Does what had to wait until the lanes acknowledged their commands.
    pub(super) fn run_acknowledged(&mut self) {
        while let Some(action) = self.lanes.next_acknowledged() {
            match action {
                AfterAck::Notify(group, ticket) => self.apply(group, Event::Acknowledged(ticket)),
                AfterAck::LogHeld { member, pid } => {
                    let timeout = self.group(member.group).machine.policy().hold.unwrap_or_default();
                    let resources = self.resources(member);
                    let detail = format!("{} packets, for {timeout:?}", resources.backlog());
                    self.write_member_event(member, pid, "held", detail);
                }
                AfterAck::LogRetired { member, pid, requeued, lost } => {
                    let resources = self.resources(member);
                    let (requeued, lost) = (resources.requeued() - requeued, resources.lost() - lost);
                    if requeued + lost > 0 {
                        tracing::info!(member = resources.id, requeued, lost, "uncommitted packets");
                        let detail = format!("requeued {requeued}, lost {lost}");
                        self.write_member_event(member, pid, "uncommitted", detail);
                    }
                }
                AfterAck::Drop(_) => {}
            }
        }
        self.lanes.warn_if_late();
    }

    /// Returns the first failure of a group as an error.
    pub(super) fn check_failure(&mut self) -> Result<(), PrimaryError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn explain(&mut self, group: GroupId, failure: Failure) -> PrimaryError {
        let of = |member: MemberId| {
            let resources = self.resources(MemberKey { group, member });
            let Resources { id, program, last_error, .. } = resources;
            (id.clone(), program.clone(), resources.last_exit.clone().unwrap_or_default(), last_error.clone())
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
                let timeout = self.group(group).machine.policy().start_timeout;
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

/// The process id of a session's worker; 0: there is no session.
fn pid_of(session: Option<&Session>) -> u32 {
    session.map_or(0, |session| session.pid)
}
