//! Access to the control socket.
//!
//! The permissions of the socket's file exclude most users. The primary also checks each
//! connection: by the user and the groups of the process, as the kernel recorded them when it
//! connected.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{UnixCredentials, getsockopt, sockopt};
use nix::unistd::{Gid, Group, Uid, User, geteuid};

use crate::config::{ControlAccess, UserError, WorkerUser};
use crate::host::sys;

/// The role of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Root, or a user that `allow_users` or `allow_groups` names.
    Allowed,
    /// The workers' user. The peer may be a compromised worker, which must not take a second
    /// member.
    Worker,
}

/// The users that may connect, and the owner and permissions of the socket's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    worker: Uid,
    users: Vec<Uid>,
    groups: Vec<Gid>,
    /// The file's owner.
    pub owner: Uid,
    /// The file's group; `None`: the group that the kernel gives it.
    pub group: Option<Gid>,
    /// The file's permissions.
    pub mode: u32,
}

impl Access {
    /// Looks up the users and groups that a configuration names. The workers' user and root always
    /// have access.
    ///
    /// # Errors
    /// A user or group does not exist.
    pub fn find(config: &ControlAccess, workers: &WorkerUser) -> Result<Self, UserError> {
        let users = config.allow_users.iter().map(|name| user(name)).collect::<Result<Vec<_>, _>>()?;
        let groups = config.allow_groups.iter().map(|name| group(name)).collect::<Result<Vec<_>, _>>()?;
        let owner = config.socket_owner.as_ref();
        let mode = if users.is_empty() && groups.is_empty() { 0o600 } else { 0o666 };
        let mode = config.socket_mode.unwrap_or(mode);
        // The owner of a file can change its permissions. Where every user may connect, the
        // workers' user need not be the owner, and must not be able to lock the others out.
        let usual = if mode & 0o002 == 0 { workers.uid } else { geteuid() };
        Ok(Access {
            owner: owner.and_then(|owner| owner.user.as_deref()).map_or(Ok(usual), user)?,
            group: owner.and_then(|owner| owner.group.as_deref()).map(group).transpose()?,
            mode,
            worker: workers.uid,
            users: users.into_iter().chain([Uid::from_raw(0)]).collect(),
            groups,
        })
    }

    /// Whether the file's permissions allow this user to connect.
    pub fn file_permits(&self, user: &WorkerUser) -> bool {
        let write = if user.uid == self.owner {
            0o200
        } else if self.group == Some(user.gid) {
            0o020
        } else {
            0o002
        };
        user.is_root() || self.mode & write != 0
    }

    /// The role of this peer; `None`: it has no access.
    ///
    /// # Errors
    /// The errors of getsockopt(2) for its groups.
    pub fn role_of(&self, socket: impl AsFd, peer: &UnixCredentials) -> io::Result<Option<Role>> {
        let uid = Uid::from_raw(peer.uid());
        if uid == self.worker && !uid.is_root() {
            return Ok(Some(Role::Worker));
        }
        let named = |gid: u32| self.groups.contains(&Gid::from_raw(gid));
        if self.users.contains(&uid)
            || !self.groups.is_empty()
                && (named(peer.gid()) || sys::peer_groups(socket.as_fd())?.into_iter().any(named))
        {
            return Ok(Some(Role::Allowed));
        }
        Ok(None)
    }
}

/// The credentials of the process that connected, as the kernel recorded them then.
///
/// # Errors
/// The errors of getsockopt(2).
pub fn peer_of(socket: &impl AsFd) -> io::Result<UnixCredentials> {
    Ok(getsockopt(socket, sockopt::PeerCredentials)?)
}

fn user(name: &str) -> Result<Uid, UserError> {
    match User::from_name(name) {
        Ok(Some(user)) => Ok(user.uid),
        Ok(None) => {
            Err(UserError::UnknownInControl { kind: "user", name: name.to_owned(), database: "passwd" })
        }
        Err(source) => Err(UserError::Lookup { name: name.to_owned(), source }),
    }
}

fn group(name: &str) -> Result<Gid, UserError> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => {
            Err(UserError::UnknownInControl { kind: "group", name: name.to_owned(), database: "group" })
        }
        Err(source) => Err(UserError::Lookup { name: name.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Owner;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    fn workers() -> WorkerUser {
        WorkerUser { name: "w".into(), uid: Uid::from_raw(4711), gid: Gid::from_raw(4711) }
    }

    #[test]
    fn the_workers_user_and_root_always_have_access() {
        let access = Access::find(&ControlAccess::default(), &workers()).unwrap();
        assert_eq!((access.owner.as_raw(), access.group, access.mode), (4711, None, 0o600));
        assert_eq!((access.users, access.worker), (vec![Uid::from_raw(0)], Uid::from_raw(4711)));
        let owner = Owner { user: Some("root".into()), group: Some("root".into()) };
        let config = ControlAccess { allow_groups: vec!["root".into()], ..Default::default() };
        let access = Access::find(&config, &workers()).unwrap();
        assert_eq!((access.owner, access.mode), (geteuid(), 0o666), "no worker can change it");
        let config = ControlAccess {
            allow_groups: vec!["root".into()],
            socket_owner: Some(owner),
            ..Default::default()
        };
        let access = Access::find(&config, &workers()).unwrap();
        assert_eq!((access.owner.as_raw(), access.group, access.mode), (0, Some(Gid::from_raw(0)), 0o666));
    }

    #[test]
    fn permissions_are_checked_as_by_the_kernel() {
        let access = |mode, owner, group: Option<u32>| Access {
            worker: Uid::from_raw(4711),
            users: vec![],
            groups: vec![],
            owner: Uid::from_raw(owner),
            group: group.map(Gid::from_raw),
            mode,
        };
        assert!(access(0o600, 4711, None).file_permits(&workers()));
        assert!(access(0o660, 0, Some(4711)).file_permits(&workers()));
        assert!(access(0o666, 0, None).file_permits(&workers()));
        assert!(!access(0o660, 0, Some(4)).file_permits(&workers()));
        assert!(
            !access(0o066, 4711, Some(4711)).file_permits(&workers()),
            "the first class that matches decides"
        );
    }

    #[test]
    fn an_unknown_group_is_named() {
        let config = ControlAccess { allow_groups: vec!["no-such-group".into()], ..Default::default() };
        let error = Access::find(&config, &workers()).unwrap_err().to_string();
        assert_eq!(
            error,
            "no group `no-such-group` on this system, which [control] names: see `getent group`"
        );
    }

    #[test]
    fn a_role_follows_from_the_kernels_credentials() {
        let (a, _b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let peer = peer_of(&a).unwrap();
        assert_eq!(peer.uid(), nix::unistd::getuid().as_raw());
        let none = Access {
            worker: Uid::from_raw(54321),
            users: vec![],
            groups: vec![],
            owner: Uid::from_raw(0),
            group: None,
            mode: 0,
        };
        let role_of = |access: Access| access.role_of(&a, &peer).unwrap();
        assert_eq!(role_of(none.clone()), None);
        let uid = Uid::from_raw(peer.uid());
        let worker = role_of(Access { worker: uid, users: vec![uid], ..none.clone() });
        assert_eq!(worker, Some(if uid.is_root() { Role::Allowed } else { Role::Worker }));
        assert_eq!(role_of(Access { users: vec![uid], ..none.clone() }), Some(Role::Allowed));
        for gid in nix::unistd::getgroups().unwrap().into_iter().chain([Gid::from_raw(peer.gid())]) {
            assert_eq!(role_of(Access { groups: vec![gid], ..none.clone() }), Some(Role::Allowed), "{gid}");
        }
        assert_eq!(role_of(Access { groups: vec![Gid::from_raw(54321)], ..none }), None);
    }
}
