//! Decides which member a worker may take.

use xfan_shm::ids::MemberId;

use crate::group::display_state::DisplayState;
use crate::group::event::{ConnectionId, ProcessId};
use crate::group::machine::Group;

/// A worker that wants to attach.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// The number of its connection.
    pub connection: ConnectionId,
    /// The member that it asks for; `None`: any.
    pub named: Option<MemberId>,
    /// The process that inherited its connection.
    pub inherited: Inherited,
    /// Its user is the workers' user, so it may be any process of a worker.
    pub is_workers_user: bool,
}

/// The process that inherited a connection, or the one through which it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// None: the connection was accepted on the control socket.
    No,
    /// The process of this member.
    From(MemberId),
    /// A process that has exited, or that may not attach again.
    Stale,
}

/// The evidence that a candidate belongs to a member's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// It has the token of the process.
    pub token: bool,
    /// The process made its connection. A token alone is weak evidence, since processes of one user
    /// can read each other's environment.
    pub is_process: bool,
}

/// Why a worker may not attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAdmitted {
    /// Its connection has a worker already.
    HasAttached,
    /// Its connection is [`Inherited::Stale`].
    Stale,
    /// No member is vacant.
    NoneVacant,
    /// Its connection belongs to another member, this one.
    ForMember(MemberId),
    /// The member is supervised, and the worker does not have the token of its process.
    WrongToken(MemberId),
    /// The primary starts the group's workers, and the workers' user may not attach others: a
    /// worker must not take a second member.
    NotAllowed,
    /// The member has a worker.
    Occupied(MemberId),
    /// Another process than the member's made the connection.
    NotProcess(MemberId, ProcessId),
    /// No worker may attach to a member in this state.
    InState(MemberId, DisplayState),
}

impl Group {
    /// Chooses the member that a worker takes. `starts_workers`: the primary starts the group's
    /// workers. `proof` returns the evidence for a member that has a process.
    ///
    /// # Errors
    /// [`NotAdmitted`]
    pub fn admit(
        &self,
        candidate: &Candidate,
        starts_workers: bool,
        proof: impl FnOnce(MemberId) -> Proof,
    ) -> Result<MemberId, NotAdmitted> {
        let Candidate { connection, named, inherited, is_workers_user } = *candidate;
        if self.member_of(connection).is_some() {
            return Err(NotAdmitted::HasAttached);
        }
        // A worker with a member's inherited connection needs no other proof, and cannot take
        // another member.
        let own = match inherited {
            Inherited::No => None,
            Inherited::From(member) => Some(member),
            Inherited::Stale => return Err(NotAdmitted::Stale),
        };
        let id = named.or(own).or_else(|| self.vacant()).ok_or(NotAdmitted::NoneVacant)?;
        let member = &self.members[id.index()];
        let process = member.process().filter(|_| own.is_none());
        let proof = process.map(|_| proof(id));
        match own {
            Some(own) if own != id => return Err(NotAdmitted::ForMember(own)),
            Some(_) => {}
            None if member.is_supervised() && !proof.is_some_and(|proof| proof.token) => {
                return Err(NotAdmitted::WrongToken(id));
            }
            None if !member.is_supervised() && starts_workers && is_workers_user => {
                return Err(NotAdmitted::NotAllowed);
            }
            None => {}
        }
        if member.connection().is_some() {
            return Err(NotAdmitted::Occupied(id));
        }
        if let Some(process) = process
            && !proof.is_some_and(|proof| proof.is_process)
        {
            return Err(NotAdmitted::NotProcess(id, process));
        }
        match member.may_attach() {
            Ok(()) => Ok(id),
            Err(_) => Err(NotAdmitted::InState(id, member.display_state())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::config::{self, OnEmpty, Restart};
    use crate::group::Event;
    use crate::group::policy::Policy;

    const GOOD: Proof = Proof { token: true, is_process: true };
    const M0: MemberId = MemberId(0);
    const M1: MemberId = MemberId(1);

    /// Member 0 has a process that has not attached; member 1 is vacant.
    fn group() -> Group {
        let second = Duration::from_secs(1);
        let restart =
            Restart { policy: config::Policy::No, delay: second, limit_burst: 1, limit_interval: second };
        let policy = Policy {
            restart,
            hang_timeout: second,
            hold: None,
            on_empty: OnEmpty::Drop,
            start_timeout: second,
            stop_timeout: second,
        };
        let now = Instant::now();
        let mut group = Group::new(policy, 2, now);
        group.step(Event::Start(M0), now).unwrap();
        group.step(Event::Spawned(M0, ProcessId(100)), now).unwrap();
        group
    }

    fn stranger() -> Candidate {
        Candidate { connection: 7, named: None, inherited: Inherited::No, is_workers_user: false }
    }

    fn admit(group: &Group, candidate: Candidate, proof: Proof) -> Result<MemberId, NotAdmitted> {
        group.admit(&candidate, true, |_| proof)
    }

    #[test]
    fn an_inherited_connection_is_for_one_member() {
        let (group, nothing) = (group(), Proof { token: false, is_process: false });
        let own = Candidate { inherited: Inherited::From(M0), is_workers_user: true, ..stranger() };
        assert_eq!(admit(&group, own, nothing), Ok(M0));
        assert_eq!(admit(&group, Candidate { named: Some(M0), ..own }, nothing), Ok(M0));
        let other = Candidate { named: Some(M1), ..own };
        assert_eq!(admit(&group, other, nothing), Err(NotAdmitted::ForMember(M0)));
        let stale = Candidate { inherited: Inherited::Stale, ..own };
        assert_eq!(admit(&group, stale, GOOD), Err(NotAdmitted::Stale));
    }

    #[test]
    fn a_supervised_member_accepts_only_its_process() {
        let group = group();
        let named = Candidate { named: Some(M0), is_workers_user: true, ..stranger() };
        let guessed = Proof { token: false, ..GOOD };
        assert_eq!(admit(&group, named, GOOD), Ok(M0));
        assert_eq!(admit(&group, named, guessed), Err(NotAdmitted::WrongToken(M0)));
        let read = Proof { is_process: false, ..GOOD };
        assert_eq!(admit(&group, named, read), Err(NotAdmitted::NotProcess(M0, ProcessId(100))));
    }

    #[test]
    fn a_vacant_member_is_for_allowed_users() {
        let mut group = group();
        assert_eq!(admit(&group, stranger(), GOOD), Ok(M1));
        let worker = Candidate { is_workers_user: true, ..stranger() };
        assert_eq!(admit(&group, worker, GOOD), Err(NotAdmitted::NotAllowed));
        // If the primary starts no workers, the workers' user may attach them.
        assert_eq!(group.admit(&worker, false, |_| GOOD), Ok(M1));
        group.step(Event::Attaching(M1, 7), Instant::now()).unwrap();
        assert_eq!(admit(&group, stranger(), GOOD), Err(NotAdmitted::HasAttached));
        let late = Candidate { connection: 8, ..stranger() };
        assert_eq!(admit(&group, late, GOOD), Err(NotAdmitted::NoneVacant));
        let named = Candidate { named: Some(M1), ..late };
        assert_eq!(admit(&group, named, GOOD), Err(NotAdmitted::Occupied(M1)));
    }
}
