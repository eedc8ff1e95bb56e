//! What a worker can do to the pages of its own segment.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::signal::Signal;

use crate::Outcome;
use crate::place::{Place, pending_signals};
use crate::probe::{checked, said};

/// Of linux/mempolicy.h: pages go where the policy says.
const MPOL_BIND: libc::c_int = 2;
const MPOL_MF_MOVE: libc::c_int = 2;

impl Place {
    /// Asks the kernel to take the first page away, through its own mapping.
    pub fn take_away(&self) -> io::Result<libc::c_int> {
        self.advise(libc::MADV_REMOVE)
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: the range is that of our own mapping; nobody has a reference into it.
        checked(unsafe {
            libc::madvise(self.segment.address().as_ptr().cast(), self.segment.length(), advice)
        })
    }

    fn punch(&self) -> io::Result<libc::c_int> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let length = i64::try_from(self.segment.length()).unwrap_or(0);
        // SAFETY: no pointers.
        checked(unsafe { libc::fallocate(self.up.as_raw_fd(), punch, 0, length) })
    }

    fn bind_to_node_0(&self) -> io::Result<libc::c_int> {
        let nodes: libc::c_ulong = 1;
        // SAFETY: the range is that of our own mapping; the mask has as many bits as said.
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
        // SAFETY: one page, one node and one status, each where said.
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

    /// Tries everything that may take pages away from others' mappings, again and again, until
    /// SIGTERM. Prints what came of each in the first round, and a word after a thousand more.
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
