//! Who the workers run as.

use nix::unistd::{Gid, Uid, User};

/// What `nobody` is where the system has no such user: the kernel's overflow id.
const NOBODY: u32 = 65534;

/// The user the workers run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerUser {
    /// Its name, for people.
    pub name: String,
    /// Its user id.
    pub uid: Uid,
    /// Its group id.
    pub gid: Gid,
}

/// Why there is no such user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The system knows no user of this name.
    #[error("no user `{0}` on this system: set `user` (or --user) to one that `getent passwd` lists")]
    Unknown(String),
    /// The system knows no user or group of this name.
    #[error("no {kind} `{name}` on this system, which [control] names: see `getent {database}`")]
    UnknownInControl {
        /// `user` or `group`.
        kind: &'static str,
        /// As given.
        name: String,
        /// Where `getent` lists them.
        database: &'static str,
    },
    /// It owns the packet memory.
    #[error(
        "workers cannot run as {name}, as whom xfan itself runs: they could write to the packets of all workers. Choose \
         another user with --user, or run xfan as root"
    )]
    Own {
        /// The user.
        name: String,
    },
    /// Only a primary of root's can start them.
    #[error(
        "workers can run as root only if xfan does: choose an unprivileged user with --user, or run xfan as root"
    )]
    Root,
    /// The control socket's file keeps the workers out.
    #[error(
        "socket_owner and socket_mode in [control] keep the workers' user `{0}` from the control socket: let it write to the \
         socket, as its owner, by its group, or as everybody (\"0666\": whoever connects is checked all the same)"
    )]
    LockedOut(String),
    /// The system cannot be asked.
    #[error("cannot look up `{name}`: {source}")]
    Lookup {
        /// Whom we looked for.
        name: String,
        /// What the system says.
        source: nix::Error,
    },
}

impl WorkerUser {
    /// The user `asked` for; else the one who called sudo (`SUDO_UID`), unless that is root; else `nobody`.
    ///
    /// # Errors
    ///
    /// The user asked for does not exist, or the system's list of users cannot be read.
    pub fn find(asked: Option<&str>) -> Result<Self, UserError> {
        match asked {
            Some(name) => Self::named(name)?.ok_or_else(|| UserError::Unknown(name.to_owned())),
            None => match caller(std::env::var("SUDO_UID").ok().as_deref()) {
                Some(uid) => Self::numbered(uid),
                None => Ok(Self::named("nobody")?.unwrap_or_else(|| Self {
                    name: "nobody".to_owned(),
                    uid: Uid::from_raw(NOBODY),
                    gid: Gid::from_raw(NOBODY),
                })),
            },
        }
    }

    /// Whether workers run with root's rights over files: then nothing keeps them from writing to
    /// segments that are not theirs.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.uid.is_root()
    }

    /// Checks that workers may run as this user, where the primary runs as `own`: who owns packet memory can write to it.
    ///
    /// # Errors
    /// [`UserError::Own`], [`UserError::Root`]. A primary of root's may have workers of root's.
    pub fn check_beside(&self, own: Uid) -> Result<(), UserError> {
        match (own.is_root(), self.is_root()) {
            (true, _) => Ok(()),
            (false, true) => Err(UserError::Root),
            (false, false) if self.uid == own => Err(UserError::Own { name: self.name.clone() }),
            (false, false) => Ok(()),
        }
    }

    fn named(name: &str) -> Result<Option<Self>, UserError> {
        let found =
            User::from_name(name).map_err(|source| UserError::Lookup { name: name.to_owned(), source })?;
        Ok(found.map(|User { name, uid, gid, .. }| Self { name, uid, gid }))
    }

    /// A user may have called sudo and have no entry in the list of users.
    fn numbered(uid: Uid) -> Result<Self, UserError> {
        let found =
            User::from_uid(uid).map_err(|source| UserError::Lookup { name: uid.to_string(), source })?;
        Ok(found.map_or_else(
            || Self { name: uid.to_string(), uid, gid: Gid::from_raw(NOBODY) },
            |User { name, uid, gid, .. }| Self { name, uid, gid },
        ))
    }
}

/// The user `SUDO_UID` names, if it is a number and not root's.
fn caller(sudo_uid: Option<&str>) -> Option<Uid> {
    let uid = Uid::from_raw(sudo_uid?.parse().ok()?);
    (!uid.is_root()).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_had_by_asking_only() {
        assert_eq!(caller(Some("0")), None);
        assert_eq!(caller(Some("1000")), Some(Uid::from_raw(1000)));
        assert_eq!(caller(Some("-1")), None);
        assert_eq!(caller(None), None);
        assert!(WorkerUser::find(Some("root")).unwrap().is_root());
    }

    #[test]
    fn workers_do_not_run_as_an_unprivileged_primary_or_as_root_beside_it() {
        let user = |uid| WorkerUser { name: "x".into(), uid: Uid::from_raw(uid), gid: Gid::from_raw(uid) };
        let check =
            |own, workers| user(workers).check_beside(Uid::from_raw(own)).map_err(|error| error.to_string());
        for fine in [(0, 0), (0, 7), (7, 8)] {
            assert_eq!(check(fine.0, fine.1), Ok(()));
        }
        assert!(check(7, 7).unwrap_err().contains("workers cannot run as x, as whom xfan itself runs"));
        assert!(check(7, 0).unwrap_err().contains("only if xfan does"));
    }

    #[test]
    fn an_unknown_user_is_named() {
        let error = WorkerUser::find(Some("no-such-user-x")).unwrap_err().to_string();
        assert!(error.contains("`no-such-user-x`"), "{error}");
    }
}
