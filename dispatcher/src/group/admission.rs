//! Which member a worker may become.

use xfan_shm::ids::MemberId;

use crate::group::event::{ConnectionId, ProcessId};
use crate::group::machine::Group;
use crate::group::shown::Shown;

/// A worker that wants to attach.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Its connection.
    pub connection: ConnectionId,
    /// The member that it names.
    pub named: Option<MemberId>,
    /// For which process its connection was made.
    pub inherited: Inherited,
    /// The configuration gives its user no access of its own: it may be any process of the workers'
    /// user.
    pub as_worker: bool,
}

/// For which process a connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// For none: it was accepted on the control socket.
    No,
    /// For the process of this member.
    From(MemberId),
    /// For a process that has exited, or that may not attach again.
    Stale,
}

/// What a candidate proves about the process that was started for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// It knows the token of the process.
    pub token: bool,
    /// It is the process, or a descendant of it. A token alone proves little: all processes of a
    /// user can read each other's environment.
    pub descends: bool,
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
    /// Its connection was made for another member, this one.
    ForMember(MemberId),
    /// The primary has started a process for the member, and the worker does not know its token.
    NoToken(MemberId),
    /// The primary starts the group's workers, and only users that the configuration names may
    /// attach others: a worker that was started for its member must not take a second one.
    NotNamed,
    /// The member has a worker.
    Occupied(MemberId),
    /// The worker does not descend from the member's process.
    NoDescendant(MemberId, ProcessId),
    /// No worker may attach to a member in this state.
    InState(MemberId, Shown),
}

impl Group {
    /// The member that a worker becomes. `starts_workers`: the primary starts the group's workers.
    /// `proof` tells what the worker proves about a member that has a process.
    ///
    /// # Errors
    /// [`NotAdmitted`]
    pub fn admit(
        &self,
        candidate: &Candidate,
        starts_workers: bool,
        proof: impl FnOnce(MemberId) -> Proof,
    ) -> Result<MemberId, NotAdmitted> {
        let Candidate { connection, named, inherited, as_worker } = *candidate;
        if self.member_of(connection).is_some() {
            return Err(NotAdmitted::HasAttached);
        }
        // A worker that has inherited the connection of a member needs no other proof, and becomes
        // no other member.
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
                return Err(NotAdmitted::NoToken(id));
            }
            None if !member.is_supervised() && starts_workers && as_worker => {
                return Err(NotAdmitted::NotNamed);
            }
            None => {}
        }
        if member.connection().is_some() {
            return Err(NotAdmitted::Occupied(id));
        }
        if let Some(process) = process
            && !proof.is_some_and(|proof| proof.descends)
        {
            return Err(NotAdmitted::NoDescendant(id, process));
        }
        match member.may_attach() {
            Ok(()) => Ok(id),
            Err(_) => Err(NotAdmitted::InState(id, member.shown())),
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

    const GOOD: Proof = Proof { token: true, descends: true };
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
        Candidate { connection: 7, named: None, inherited: Inherited::No, as_worker: false }
    }

    fn admit(group: &Group, candidate: Candidate, proof: Proof) -> Result<MemberId, NotAdmitted> {
        group.admit(&candidate, true, |_| proof)
    }

    #[test]
    fn an_inherited_connection_is_proof_of_its_member_alone() {
        let (group, nothing) = (group(), Proof { token: false, descends: false });
        let own = Candidate { inherited: Inherited::From(M0), as_worker: true, ..stranger() };
        assert_eq!(admit(&group, own, nothing), Ok(M0));
        assert_eq!(admit(&group, Candidate { named: Some(M0), ..own }, nothing), Ok(M0));
        let other = Candidate { named: Some(M1), ..own };
        assert_eq!(admit(&group, other, nothing), Err(NotAdmitted::ForMember(M0)));
        let stale = Candidate { inherited: Inherited::Stale, ..own };
        assert_eq!(admit(&group, stale, GOOD), Err(NotAdmitted::Stale));
    }

    #[test]
    fn a_supervised_member_takes_its_process_and_no_other() {
        let group = group();
        let named = Candidate { named: Some(M0), as_worker: true, ..stranger() };
        assert_eq!(admit(&group, named, GOOD), Ok(M0));
        let guessed = Proof { token: false, ..GOOD };
        assert_eq!(admit(&group, named, guessed), Err(NotAdmitted::NoToken(M0)));
        let read = Proof { descends: false, ..GOOD };
        assert_eq!(admit(&group, named, read), Err(NotAdmitted::NoDescendant(M0, ProcessId(100))));
    }

    #[test]
    fn a_vacant_member_is_for_named_users() {
        let mut group = group();
        assert_eq!(admit(&group, stranger(), GOOD), Ok(M1));
        let worker = Candidate { as_worker: true, ..stranger() };
        assert_eq!(admit(&group, worker, GOOD), Err(NotAdmitted::NotNamed));
        // Where all workers attach by themselves, the workers' user may, too.
        assert_eq!(group.admit(&worker, false, |_| GOOD), Ok(M1));
        group.step(Event::Attaching(M1, 7), Instant::now()).unwrap();
        assert_eq!(admit(&group, stranger(), GOOD), Err(NotAdmitted::HasAttached));
        let late = Candidate { connection: 8, ..stranger() };
        assert_eq!(admit(&group, late, GOOD), Err(NotAdmitted::NoneVacant));
        let named = Candidate { named: Some(M1), ..late };
        assert_eq!(admit(&group, named, GOOD), Err(NotAdmitted::Occupied(M1)));
    }
}
