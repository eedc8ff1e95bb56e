//! The user that the workers run as.

use nix::unistd::{Gid, Uid, User};

/// The user id of `nobody` where the system has no such user: the kernel's overflow id.
const NOBODY: u32 = 65534;

/// The user that the workers run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerUser {
    /// Its name.
    pub name: String,
    /// Its user id.
    pub uid: Uid,
    /// Its group id.
    pub gid: Gid,
}

/// Why workers cannot run as a user.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The system has no user of this name.
    #[error("no user `{0}` on this system: set `user` (or --user) to one that `getent passwd` lists")]
    Unknown(String),
    /// The system has no user or group of this name.
    #[error("no {kind} `{name}` on this system, which [control] names: see `getent {database}`")]
    UnknownInControl {
        /// `user` or `group`.
        kind: &'static str,
        /// The name.
        name: String,
        /// The database of `getent` that lists them.
        database: &'static str,
    },
    /// xfan itself runs as this user, who could then write to packet memory.
    #[error(
        "workers cannot run as {name}, as whom xfan itself runs: they could write to the packets of all workers. Choose \
         another user with --user, or run xfan as root"
    )]
    Own {
        /// The user.
        name: String,
    },
    /// Workers are to run as root, but xfan does not.
    #[error(
        "workers can run as root only if xfan does: choose an unprivileged user with --user, or run xfan as root"
    )]
    Root,
    /// The permissions of the control socket's file keep the workers out.
    #[error(
        "socket_owner and socket_mode in [control] keep the workers' user `{0}` from the control socket: let it write to the \
         socket, as its owner, by its group, or as everybody (\"0666\": whoever connects is checked all the same)"
    )]
    LockedOut(String),
    /// The lookup failed.
    #[error("cannot look up `{name}`: {source}")]
    Lookup {
        /// The name or id.
        name: String,
        /// The system's error.
        source: nix::Error,
    },
}

impl WorkerUser {
    /// The user `asked` for, else the user who called sudo (`SUDO_UID`) unless that is root, else
    /// `nobody`.
    ///
    /// # Errors
    /// [`UserError::Unknown`], [`UserError::Lookup`].
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

    /// Whether workers have root's access to files: then nothing prevents them from writing to the
    /// segments of others.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.uid.is_root()
    }

    /// Checks that workers may run as this user beside a primary that runs as `own`: the owner of
    /// packet memory could write to it. A primary that runs as root may have workers that do.
    ///
    /// # Errors
    /// [`UserError::Own`], [`UserError::Root`].
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

    /// A user who called sudo need not have an entry in the list of users.
    fn numbered(uid: Uid) -> Result<Self, UserError> {
        let found =
            User::from_uid(uid).map_err(|source| UserError::Lookup { name: uid.to_string(), source })?;
        Ok(found.map_or_else(
            || Self { name: uid.to_string(), uid, gid: Gid::from_raw(NOBODY) },
            |User { name, uid, gid, .. }| Self { name, uid, gid },
        ))
    }
}

/// The user that `SUDO_UID` names, if it is a number and not that of root.
fn caller(sudo_uid: Option<&str>) -> Option<Uid> {
    let uid = Uid::from_raw(sudo_uid?.parse().ok()?);
    (!uid.is_root()).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_never_chosen_by_default() {
        assert_eq!(caller(Some("0")), None);
        assert_eq!(caller(Some("1000")), Some(Uid::from_raw(1000)));
        assert_eq!(caller(Some("-1")), None);
        assert_eq!(caller(None), None);
        assert!(WorkerUser::find(Some("root")).unwrap().is_root());
    }

    #[test]
    fn workers_of_an_unprivileged_primary_run_as_others() {
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
