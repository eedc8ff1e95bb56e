//! What a worker can do to the pages of its own segment.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::signal::Signal;

use crate::Outcome;
use crate::membership::{Membership, pending_signals};
use crate::probe::{checked, said};

/// From linux/mempolicy.h: binds pages to the nodes of the policy.
const MPOL_BIND: libc::c_int = 2;
const MPOL_MF_MOVE: libc::c_int = 2;

impl Membership {
    /// Asks the kernel to remove the first page, through the worker's own mapping.
    pub fn remove_page(&self) -> io::Result<libc::c_int> {
        self.advise(libc::MADV_REMOVE)
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: the range is the worker's own mapping; nothing has a reference into it.
        checked(unsafe {
            libc::madvise(self.segment.address().as_ptr().cast(), self.segment.length(), advice)
        })
    }

    fn punch(&self) -> io::Result<libc::c_int> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let length = i64::try_from(self.segment.length()).unwrap_or(0);
        // SAFETY: the call takes no pointers.
        checked(unsafe { libc::fallocate(self.up.as_raw_fd(), punch, 0, length) })
    }

    fn bind_to_node_0(&self) -> io::Result<libc::c_int> {
        let nodes: libc::c_ulong = 1;
        // SAFETY: the range is the worker's own mapping; the mask has the given number of bits.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.segment.address().as_ptr(),
                self.segment.length(),
                MPOL_BIND,
                &raw const nodes,
                64,
                MPOL_MF_MOVE,
            )
        };
        checked(libc::c_int::try_from(result).unwrap_or(-1))
    }

    fn move_first_page(&self) -> io::Result<libc::c_int> {
        let page = self.segment.address().as_ptr();
        let (node, mut status): (libc::c_int, libc::c_int) = (0, 0);
        // SAFETY: the arrays hold one page, one node and one status.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                1,
                &raw const page,
                &raw const node,
                &raw mut status,
                MPOL_MF_MOVE,
            )
        };
        checked(libc::c_int::try_from(result).unwrap_or(-1))
    }

    /// Repeats everything that may remove pages from others' mappings until SIGTERM. Prints the
    /// results of the first round, and a line after a thousand more.
    pub fn take_pages(&self) -> Outcome<()> {
        for round in 0..u64::MAX {
            let outcomes = BTreeMap::from([
                ("punch", said(self.punch())),
                ("remove", said(self.advise(libc::MADV_REMOVE))),
                ("page out", said(self.advise(libc::MADV_PAGEOUT))),
                ("cold", said(self.advise(libc::MADV_COLD))),
                ("not needed", said(self.advise(libc::MADV_DONTNEED))),
                ("not needed, locked", said(self.advise(24))),
                ("free", said(self.advise(libc::MADV_FREE))),
                ("collapse", said(self.advise(25))),
                ("merge", said(self.advise(libc::MADV_MERGEABLE))),
                ("bind", said(self.bind_to_node_0())),
                ("move", said(self.move_first_page())),
            ]);
            match round {
                0 => println!("pages {}", serde_json::to_string(&outcomes)?),
                1000 => println!("a thousand rounds"),
                _ => {}
            }
            if pending_signals()?.contains(Signal::SIGTERM) {
                break;
            }
        }
        Ok(())
    }
}
