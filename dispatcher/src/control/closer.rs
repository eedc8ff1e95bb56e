//! Closes the primary's copies of descriptors that it has sent to a peer.
//!
//! A peer can make this close block: it closes its own copy first, and holds a mutex that the last
//! close takes. (An epoll instance that watches the descriptor has such a mutex. epoll_wait(2)
//! holds it while it copies events to a page of a file system that never answers.) So each batch of
//! descriptors is closed by a thread of its own, which may stay in the kernel. With one thread for
//! all batches, the connections of other peers would stay open behind one that blocks.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::host::privileges::drop_all_capabilities;

/// The most threads, and the most batches that wait for a thread. A worker has only a few
/// connections, and each blocks at most one thread.
const LIMIT: usize = 256;

/// The stack of a thread, in bytes. The threads only close descriptors.
const STACK: usize = 64 << 10;

/// Closes descriptors on other threads.
#[derive(Debug, Default)]
pub(super) struct Closer {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    threads: usize,
    waiting: Vec<Vec<OwnedFd>>,
}

impl Closer {
    /// Closes descriptors on another thread. Does not block.
    pub(super) fn close(self: &Arc<Self>, fds: Vec<OwnedFd>) {
        if fds.is_empty() {
            return;
        }
        let mut state = self.state();
        if state.waiting.len() >= LIMIT {
            // The caller must not block, so the descriptors stay open.
            tracing::error!("descriptors cannot be closed: peers block {LIMIT} threads");
            std::mem::forget(fds);
            return;
        }
        state.waiting.push(fds);
        if state.threads >= LIMIT {
            return;
        }
        let closer = self.clone();
        let thread = std::thread::Builder::new().name("closer".into()).stack_size(STACK);
        // If the thread cannot be started, the next one closes these descriptors, too.
        if thread.spawn(move || closer.run()).is_ok() {
            state.threads += 1;
        }
    }

    fn run(&self) {
        drop_all_capabilities();
        loop {
            let mut state = self.state();
            let Some(fds) = state.waiting.pop() else {
                state.threads -= 1;
                return;
            };
            drop(state);
            drop(fds);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    #[test]
    fn a_close_that_blocks_does_not_delay_others() {
        // The peer does not read, and the close lingers until it does.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let linger = libc::linger { l_onoff: 1, l_linger: 3600 };
        setsockopt(&stream.as_fd(), sockopt::Linger, &linger).unwrap();
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[0; 1 << 16]).is_ok() {}
        stream.set_nonblocking(false).unwrap();

        let closer = Arc::new(Closer::default());
        closer.close(vec![stream.into()]);
        for _ in 0..3 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            closer.close(vec![ours.into()]);
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "it is closed");
        }
        assert!(closer.state().threads >= 1, "one still lingers");
        drop(peer);
    }
}
