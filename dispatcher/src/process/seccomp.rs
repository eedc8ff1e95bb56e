//! Filters that refuse system calls: one for the primary and all workers, and a stricter one for
//! workers with `worker_sandbox = true`.
//!
//! Workers inherit the primary's filter and run arbitrary programs. Both filters therefore list
//! what they refuse, with EPERM; all other calls work. A filter is permanent and survives exec(2).

#![allow(unsafe_code, reason = "seccomp(2) takes a pointer to a program")]

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Refused for the primary and its workers. Several also need a capability that workers, and most
/// threads of the primary, do not have.
const REFUSED: &[c_long] = &[
    // Mounts and namespaces. A rule below refuses clone(2) with a namespace flag.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    // The machine: kernel modules, another kernel, swap, clock, name.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_nfsservctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_vhangup,
    libc::SYS_syslog,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    // Memory and descriptors of other processes, files by handle.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_userfaultfd,
    // Keyrings. A rule below allows one operation of keyctl(2), which xfan needs.
    libc::SYS_add_key,
    libc::SYS_request_key,
    KEXEC_FILE_LOAD,
];

/// As in asm/unistd.h; libc lacks the constant on some machines.
const KEXEC_FILE_LOAD: c_long = if cfg!(target_arch = "x86_64") { 320 } else { 294 };

/// Refused for sandboxed workers as well.
const NOT_SANDBOXED: &[c_long] = &[
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
];

/// The flags of clone(2) that create namespaces.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Why a filter cannot be built or installed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the message says it
pub enum FilterError {
    #[error("cannot build a seccomp filter: {0}")]
    Make(#[from] seccompiler::BackendError),
    #[error("cannot install a seccomp filter, which needs a kernel with CONFIG_SECCOMP_FILTER: {0}")]
    Install(#[from] io::Error),
}

/// A filter of system calls.
#[derive(Clone, Debug)]
pub struct Filter(Vec<BpfProgram>);

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Adds a rule for a system call; on x86-64 also for its x32 number, which would bypass the filter
/// otherwise.
fn refuse(rules: &mut Rules, call: c_long, when: &[SeccompRule]) {
    const X32: i64 = 0x4000_0000;
    rules.insert(call, when.to_vec());
    if cfg!(target_arch = "x86_64") {
        rules.insert(call | X32, when.to_vec());
    }
}

/// A condition on the lower 32 bits of an argument.
fn when(argument: u8, is: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, is, value)?])
}

impl Filter {
    /// The filter of the primary, which its workers inherit.
    ///
    /// # Errors
    /// The machine is not x86-64, arm64 or riscv64.
    pub fn of_primary() -> Result<Self, FilterError> {
        let mut rules = Rules::new();
        REFUSED.iter().for_each(|&call| refuse(&mut rules, call, &[]));
        if cfg!(target_arch = "x86_64") {
            // In x32, ptrace, kexec_load, process_vm_readv and process_vm_writev have these
            // numbers.
            [521, 528, 539, 540].iter().for_each(|&call| refuse(&mut rules, call, &[]));
        }
        let of_clone = |&flag| {
            let flag = u64::from(libc::c_int::unsigned_abs(flag));
            when(0, SeccompCmpOp::MaskedEq(flag), flag)
        };
        // A worker that cloned with CLONE_PARENT would make a child of the primary.
        let flags = NAMESPACES.iter().chain([&libc::CLONE_PARENT]);
        refuse(&mut rules, libc::SYS_clone, &flags.map(of_clone).collect::<Result<Vec<_>, _>>()?);
        // To move shared pages to a huge page, the kernel takes them from the primary as well,
        // which waits for them.
        let collapse = u64::from(libc::c_int::unsigned_abs(libc::MADV_COLLAPSE));
        refuse(&mut rules, libc::SYS_madvise, &[when(2, SeccompCmpOp::Eq, collapse)?]);
        refuse(&mut rules, libc::SYS_process_madvise, &[when(3, SeccompCmpOp::Eq, collapse)?]);
        let join = u64::from(libc::KEYCTL_JOIN_SESSION_KEYRING);
        refuse(&mut rules, libc::SYS_keyctl, &[when(0, SeccompCmpOp::Ne, join)?]);
        // A process that joins the process group of another could make the kernel send SIGHUP to
        // it: a group gets SIGHUP when it becomes orphaned while a member of it is stopped.
        refuse(&mut rules, libc::SYS_setpgid, &[when(1, SeccompCmpOp::Ne, 0)?]);
        // A filter cannot read the flags of clone3(2), which are in memory. With ENOSYS, C
        // libraries fall back to clone(2).
        let mut unknown = Rules::new();
        refuse(&mut unknown, libc::SYS_clone3, &[]);
        Ok(Filter(vec![compile(rules, libc::EPERM)?, compile(unknown, libc::ENOSYS)?]))
    }

    /// The filter of a worker with `worker_sandbox = true`, in addition to the primary's.
    ///
    /// # Errors
    /// Those of [`of_primary`](Self::of_primary).
    pub fn of_sandbox() -> Result<Self, FilterError> {
        let mut rules = Rules::new();
        NOT_SANDBOXED.iter().for_each(|&call| refuse(&mut rules, call, &[]));
        let unix = u64::from(libc::c_int::unsigned_abs(libc::AF_UNIX));
        for call in [libc::SYS_socket, libc::SYS_socketpair] {
            refuse(&mut rules, call, &[when(0, SeccompCmpOp::Ne, unix)?]);
        }
        Ok(Filter(vec![compile(rules, libc::EPERM)?]))
    }

    /// Installs the filter for all threads of this process and everything they start.
    ///
    /// # Errors
    /// The errors of seccomp(2).
    pub fn install_for_all_threads(&self) -> io::Result<()> {
        self.install_with(libc::SECCOMP_FILTER_FLAG_TSYNC)
    }

    /// Installs the filter for the calling thread and everything it starts. Async-signal-safe.
    ///
    /// # Errors
    /// The errors of seccomp(2).
    pub fn install(&self) -> io::Result<()> {
        self.install_with(0)
    }

    fn install_with(&self, flags: libc::c_ulong) -> io::Result<()> {
        // Without this flag, kernels before 5.16 also disable CPU speculation for the process,
        // which would slow lanes and workers down.
        let flags = flags | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        // The kernel requires it without CAP_SYS_ADMIN.
        nix::sys::prctl::set_no_new_privs()?;
        for program in &self.0 {
            // An instruction of seccompiler has the layout of the kernel's: asserted below.
            let program = libc::sock_fprog {
                len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
                filter: program.as_ptr().cast_mut().cast(),
            };
            // SAFETY: the kernel only reads the program, which outlives the call.
            match unsafe {
                libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
            } {
                0 => {}
                // With TSYNC, a positive result is the id of a thread that cannot get the filter.
                ..0 => return Err(io::Error::last_os_error()),
                _ => return Err(io::ErrorKind::Other.into()),
            }
        }
        Ok(())
    }
}

fn compile(rules: Rules, errno: libc::c_int) -> Result<BpfProgram, seccompiler::BackendError> {
    let machine = TargetArch::try_from(std::env::consts::ARCH)?;
    let refused = SeccompAction::Errno(errno.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, refused, machine)?.try_into()
}

const _: () = assert!(size_of::<seccompiler::sock_filter>() == size_of::<libc::sock_filter>());

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` under filters, on a thread of its own: the filters end with the thread.
    fn under(filters: Vec<Filter>, work: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(move || {
            filters.iter().for_each(|filter| filter.install().unwrap());
            work();
        });
        thread.join().unwrap();
    }

    fn answer(result: c_long) -> i32 {
        if result < 0 { io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
    }

    #[test]
    fn listed_calls_are_refused_and_others_work() {
        under(vec![Filter::of_primary().unwrap()], || {
            for &call in REFUSED {
                // No call accepts these arguments, so that a missing filter does no harm.
                // SAFETY: no pointer is valid; the calls fail.
                let result = unsafe { libc::syscall(call, -1, -1, -1, -1, -1, -1) };
                assert_eq!(answer(result), libc::EPERM, "{call}");
            }
            for flag in NAMESPACES {
                // SAFETY: the filter refuses the call, so no child uses the null stack.
                let result = unsafe { libc::syscall(libc::SYS_clone, flag | libc::SIGCHLD, 0, 0, 0, 0) };
                assert_eq!(answer(result), libc::EPERM, "{flag:#x}");
            }
            // SAFETY: as above.
            assert_eq!(answer(unsafe { libc::syscall(libc::SYS_clone3, 0, 0) }), libc::ENOSYS);
            assert!(std::thread::spawn(|| 7).join().is_ok_and(|seven| seven == 7));
            assert!(std::process::Command::new("true").status().unwrap().success());
        });
    }

    #[test]
    fn the_sandbox_allows_only_unix_sockets() {
        under(vec![Filter::of_sandbox().unwrap()], || {
            for &call in NOT_SANDBOXED {
                // SAFETY: no pointer is valid; the calls fail.
                let result = unsafe { libc::syscall(call, -1, -1, -1, -1, -1, -1) };
                assert_eq!(answer(result), libc::EPERM, "{call}");
            }
            for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_XDP, 40]
            {
                // SAFETY: no pointers.
                let result = unsafe { libc::socket(family, libc::SOCK_DGRAM, 0) };
                assert_eq!(answer(result.into()), libc::EPERM, "{family}");
            }
            assert!(std::os::unix::net::UnixDatagram::unbound().is_ok());
            assert!(std::os::unix::net::UnixStream::pair().is_ok());
        });
    }
}
