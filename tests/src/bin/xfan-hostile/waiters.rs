//! Many epoll entries that wait for a descriptor: waking them takes the kernel long.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::Outcome;

/// The number of epoll instances, and of copies of the descriptor that each watches.
const INSTANCES: usize = 300;
const COPIES: usize = 1000;

/// The entries. Dropping it removes them.
pub struct Waiters {
    /// The number of entries.
    pub count: usize,
    _instances: Vec<Epoll>,
    _copies: Vec<OwnedFd>,
}

impl Waiters {
    /// Creates as many entries as the limits allow.
    pub fn of(fd: &OwnedFd) -> Outcome<Self> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        let mut copies = Vec::new();
        for _ in 0..COPIES.min(usize::try_from(most)? / 2) {
            copies.push(fd.try_clone()?);
        }
        let (mut instances, mut count) = (Vec::new(), 0);
        while instances.len() < INSTANCES
            && let Ok(instance) = Epoll::new(EpollCreateFlags::empty())
        {
            count += copies.iter().filter(|copy| watch(&instance, copy.as_fd())).count();
            instances.push(instance);
        }
        Ok(Waiters { count, _instances: instances, _copies: copies })
    }
}

fn watch(instance: &Epoll, fd: BorrowedFd<'_>) -> bool {
    let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    instance.add(fd, EpollEvent::new(events, 0)).is_ok()
}
