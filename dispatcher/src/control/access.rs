//! Who may use the control socket.
//!
//! The permissions of the socket's file keep out most users. Each connection is checked again, by
//! the user and the groups of the connecting process, as the kernel tells them.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{UnixCredentials, getsockopt, sockopt};
use nix::unistd::{Gid, Group, Uid, User};

use crate::config::{ControlAccess, UserError, WorkerUser};
use crate::host::sys;

/// Whom a peer is admitted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Root, or whom the configuration names.
    Named,
    /// The workers' user: a compromised worker may run as it, and must not take more than its
    /// member.
    Worker,
}

/// Who may connect, and whose the socket's file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    worker: Uid,
    users: Vec<Uid>,
    groups: Vec<Gid>,
    /// The file's owner.
    pub owner: Uid,
    /// The file's group; none: as it is made.
    pub group: Option<Gid>,
    /// The file's permissions.
    pub mode: u32,
}

impl Access {
    /// Looks up all names of a configuration. The workers' user always has access, and root.
    ///
    /// # Errors
    /// A user or group that the system does not know.
    pub fn find(config: &ControlAccess, workers: &WorkerUser) -> Result<Self, UserError> {
        let users = config.allow_users.iter().map(|name| user(name)).collect::<Result<Vec<_>, _>>()?;
        let groups = config.allow_groups.iter().map(|name| group(name)).collect::<Result<Vec<_>, _>>()?;
        let owner = config.socket_owner.as_ref();
        let mode = if users.is_empty() && groups.is_empty() { 0o600 } else { 0o666 };
        Ok(Access {
            owner: owner.and_then(|owner| owner.user.as_deref()).map_or(Ok(workers.uid), user)?,
            group: owner.and_then(|owner| owner.group.as_deref()).map(group).transpose()?,
            mode: config.socket_mode.unwrap_or(mode),
            worker: workers.uid,
            users: users.into_iter().chain([Uid::from_raw(0)]).collect(),
            groups,
        })
    }

    /// Whether the file's permissions let this user connect.
    pub fn lets_connect(&self, user: &WorkerUser) -> bool {
        let write = if user.uid == self.owner {
            0o200
        } else if self.group == Some(user.gid) {
            0o020
        } else {
            0o002
        };
        user.is_root() || self.mode & write != 0
    }

    /// Whom this peer may connect as; `None`: it may not.
    ///
    /// # Errors
    /// If the kernel does not tell its groups.
    pub fn admits(&self, socket: impl AsFd, peer: &UnixCredentials) -> io::Result<Option<Standing>> {
        let uid = Uid::from_raw(peer.uid());
        if uid == self.worker && !uid.is_root() {
            return Ok(Some(Standing::Worker));
        }
        let named = |gid: u32| self.groups.contains(&Gid::from_raw(gid));
        if self.users.contains(&uid)
            || !self.groups.is_empty()
                && (named(peer.gid()) || sys::peer_groups(socket.as_fd())?.into_iter().any(named))
        {
            return Ok(Some(Standing::Named));
        }
        Ok(None)
    }
}

/// Who connected, as the kernel noted it then.
///
/// # Errors
/// Whatever the kernel says.
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
    fn the_workers_user_and_root_are_always_among_them() {
        let access = Access::find(&ControlAccess::default(), &workers()).unwrap();
        assert_eq!((access.owner.as_raw(), access.group, access.mode), (4711, None, 0o600));
        assert_eq!((access.users, access.worker), (vec![Uid::from_raw(0)], Uid::from_raw(4711)));
        let owner = Owner { user: Some("root".into()), group: Some("root".into()) };
        let config = ControlAccess {
            allow_groups: vec!["root".into()],
            socket_owner: Some(owner),
            ..Default::default()
        };
        let access = Access::find(&config, &workers()).unwrap();
        assert_eq!((access.owner.as_raw(), access.group, access.mode), (0, Some(Gid::from_raw(0)), 0o666));
    }

    #[test]
    fn the_files_permissions_count_as_the_kernel_counts_them() {
        let access = |mode, owner, group: Option<u32>| Access {
            worker: Uid::from_raw(4711),
            users: vec![],
            groups: vec![],
            owner: Uid::from_raw(owner),
            group: group.map(Gid::from_raw),
            mode,
        };
        assert!(access(0o600, 4711, None).lets_connect(&workers()));
        assert!(access(0o660, 0, Some(4711)).lets_connect(&workers()));
        assert!(access(0o666, 0, None).lets_connect(&workers()));
        assert!(!access(0o660, 0, Some(4)).lets_connect(&workers()));
        assert!(
            !access(0o066, 4711, Some(4711)).lets_connect(&workers()),
            "the first class that fits decides"
        );
    }

    #[test]
    fn who_is_not_there_is_named() {
        let config = ControlAccess { allow_groups: vec!["no-such-group".into()], ..Default::default() };
        let error = Access::find(&config, &workers()).unwrap_err().to_string();
        assert_eq!(
            error,
            "no group `no-such-group` on this system, which [control] names: see `getent group`"
        );
    }

    #[test]
    fn a_peer_is_who_the_kernel_says() {
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
        let admits = |access: Access| access.admits(&a, &peer).unwrap();
        assert_eq!(admits(none.clone()), None);
        let uid = Uid::from_raw(peer.uid());
        let worker = admits(Access { worker: uid, users: vec![uid], ..none.clone() });
        assert_eq!(worker, Some(if uid.is_root() { Standing::Named } else { Standing::Worker }));
        assert_eq!(admits(Access { users: vec![uid], ..none.clone() }), Some(Standing::Named));
        for gid in nix::unistd::getgroups().unwrap().into_iter().chain([Gid::from_raw(peer.gid())]) {
            assert_eq!(admits(Access { groups: vec![gid], ..none.clone() }), Some(Standing::Named), "{gid}");
        }
        assert_eq!(admits(Access { groups: vec![Gid::from_raw(54321)], ..none }), None);
    }
}
