//! Limits the number of open connections, in all and for each user.

use std::collections::HashMap;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::control::access::Role;

/// The most connections of all users except root and the workers' user. They leave most of the
/// usual 1,024 descriptors for other things.
const ALL: usize = 256;
/// The most connections of one user: 64 workers, the most of a group, and some tools.
const USER: usize = 80;
/// The most connections of root.
const ROOT: usize = 64;
/// The most connections of the workers' user if its workers inherit theirs, which do not count:
/// only tools and workers that attach again need others.
const WORKERS: usize = 16;

/// The most connections of each kind of peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionLimits {
    all: usize,
    user: usize,
    root: usize,
    workers: usize,
    /// `RLIMIT_NOFILE`, if it reduces the limits above.
    descriptors: Option<usize>,
}

impl ConnectionLimits {
    /// The limits for this process. `inherited`: all workers inherit their connections.
    pub fn new(inherited: bool) -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Self::of(usize::try_from(descriptors).unwrap_or(usize::MAX), inherited)
    }

    /// The limits for a process that may have this number of descriptors. Connections get less than
    /// half of them.
    fn of(descriptors: usize, inherited: bool) -> Self {
        let part = |most: usize, divisor: usize| most.min(descriptors / divisor).max(1);
        ConnectionLimits {
            all: part(ALL, 4),
            user: part(USER, 8),
            root: part(ROOT, 16),
            workers: part(if inherited { WORKERS } else { USER }, 12),
            descriptors: (descriptors < 4 * ALL).then_some(descriptors),
        }
    }
}

/// Counts the connections of each user.
#[derive(Debug)]
pub(super) struct Admission {
    limits: ConnectionLimits,
    root: Arc<Semaphore>,
    workers: Arc<Semaphore>,
    others: Arc<Semaphore>,
    /// Contains only users with access, so the number of users of the system bounds it.
    users: HashMap<u32, Arc<Semaphore>>,
}

impl Admission {
    pub fn new(limits: ConnectionLimits) -> Self {
        Admission {
            root: Arc::new(Semaphore::new(limits.root)),
            workers: Arc::new(Semaphore::new(limits.workers)),
            others: Arc::new(Semaphore::new(limits.all)),
            users: HashMap::new(),
            limits,
        }
    }

    /// Admits a connection. It counts until the permits are dropped.
    ///
    /// # Errors
    /// A sentence about the limit that is reached.
    pub fn admit(&mut self, uid: u32, role: Role) -> Result<Vec<OwnedSemaphorePermit>, String> {
        let ConnectionLimits { all, user, root, workers, descriptors } = self.limits;
        let wanted: &[_] = match (uid, role) {
            (0, _) => &[(&self.root, root, "of root")],
            (_, Role::Worker) => &[(&self.workers, workers, "of the workers' user")],
            (_, Role::Allowed) => {
                let own = self.users.entry(uid).or_insert_with(|| Arc::new(Semaphore::new(user)));
                &[(&*own, user, "of this user"), (&self.others, all, "of all users")]
            }
        };
        let acquire = |&(left, limit, whose): &(&Arc<Semaphore>, usize, &str)| {
            let message = || {
                let more = descriptors.map_or_else(String::new, |descriptors| {
                    format!(
                        ", or raise the limit of open files, of which it is a part: RLIMIT_NOFILE is \
                         {descriptors} (ulimit -n, LimitNOFILE=)"
                    )
                });
                format!("there are {limit} connections {whose}, which is the limit: close some{more}")
            };
            left.clone().try_acquire_owned().map_err(|_| message())
        };
        wanted.iter().map(acquire).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens connections until one is refused. Returns them and the error.
    fn fill(admission: &mut Admission, uid: u32, role: Role) -> (Vec<Vec<OwnedSemaphorePermit>>, String) {
        let mut open = Vec::new();
        loop {
            match admission.admit(uid, role) {
                Ok(connection) => open.push(connection),
                Err(message) => return (open, message),
            }
        }
    }

    #[test]
    fn nobody_uses_up_the_connections_of_another() {
        use Role::{Allowed, Worker};
        let mut admission = Admission::new(ConnectionLimits::of(1 << 20, true));
        let mut all = Vec::new();
        for (uid, role, limit, whose) in [
            (65534, Worker, 16, "16 connections of the workers' user"),
            (1000, Allowed, 80, "80 connections of this user"),
            (1001, Allowed, 80, "80 connections of this user"),
            (1002, Allowed, 80, "80 connections of this user"),
            (1003, Allowed, 16, "256 connections of all users"),
            (0, Allowed, 64, "64 connections of root"),
        ] {
            let (open, message) = fill(&mut admission, uid, role);
            assert_eq!(open.len(), limit, "{uid}");
            assert!(message.contains(whose), "{message}");
            all.push(open);
        }
        all.remove(1);
        assert_eq!(fill(&mut admission, 1004, Allowed).0.len(), 80);
    }

    #[test]
    fn few_descriptors_are_not_all_for_connections() {
        for descriptors in [64, 256, 1024, 4096] {
            for inherited in [false, true] {
                let ConnectionLimits { all, user, root, workers, .. } =
                    ConnectionLimits::of(descriptors, inherited);
                assert!(2 * (all + root + workers) <= descriptors && user <= all);
            }
        }
        let usual = ConnectionLimits::of(1024, false);
        assert_eq!(usual, ConnectionLimits { all: 256, user: 80, root: 64, workers: 80, descriptors: None });
    }
}
