//! Tries what a worker must not be able to do, and reports the results.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::getppid;
use xfan_shm::layout::{Geometry, VERSION};
use xfan_shm::protocol::{self, MAX_REPLY, Reply, Request};
use xfan_shm::segment::Mapping;

use crate::connections::{attach_through, connect, inherited};
use crate::membership::{Membership, ask, dial, member, token};
use crate::{Outcome, PAUSE};

/// The descriptors of a process that were open before this call.
pub fn descriptors(process: &str) -> io::Result<Vec<String>> {
    let folder = format!("/proc/{process}/fd");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder)? {
        let name = entry?.file_name();
        // The descriptor that lists them leads to the folder itself.
        let target = fs::read_link(format!("{folder}/{}", name.display())).unwrap_or_default();
        if !target.ends_with("fd") {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The name of the error, or `done`.
pub fn said<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "done".into(),
        Err(error) => error
            .raw_os_error()
            .map_or_else(|| error.to_string(), |raw| format!("{:?}", Errno::from_raw(raw))),
    }
}

pub fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The privileges of this process.
pub fn probe_self(report: &mut BTreeMap<String, String>) -> Outcome<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    for line in status.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        if ["Uid", "Gid", "Groups", "NoNewPrivs"].contains(&key)
            || (key.starts_with("Cap") && key != "CapBnd")
        {
            report.insert(format!("status {key}"), value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    Ok(())
}

/// Every way to change a segment.
pub fn probe_segments(membership: &Membership, report: &mut BTreeMap<String, String>) {
    let Geometry { .. } = membership.geometry;
    let (down, up) = (membership.geometry.down_bytes(), membership.geometry.up_bytes());
    for (name, fd, length) in [
        ("umem", &membership.umem, membership.umem_bytes),
        ("down", &membership.down, down),
        ("up", &membership.up, up),
    ] {
        let mut tell = |what: &str, outcome: String| report.insert(format!("{name} {what}"), outcome);
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let c_path = CString::new(path.clone()).unwrap_or_default();
        let raw = fd.as_raw_fd();
        tell("map writable", said(Mapping::read_write(fd, length)));
        tell("make a mapping writable", said(make_writable(fd.as_fd(), length)));
        tell("open for writing", said(OpenOptions::new().write(true).open(&path)));
        tell("open for both", said(OpenOptions::new().read(true).write(true).open(&path)));
        // SAFETY: the pointers are a string that ends in a null byte and a buffer of the given
        // length.
        unsafe {
            tell("shrink", said(checked(libc::ftruncate(raw, 0))));
            tell("grow", said(checked(libc::ftruncate(raw, 1 << 40))));
            tell("shrink by path", said(checked(libc::truncate(c_path.as_ptr(), 0))));
            tell("change the mode", said(checked(libc::fchmod(raw, 0o666))));
            tell("change the mode by path", said(checked(libc::chmod(c_path.as_ptr(), 0o666))));
            tell(
                "grow by writing beyond the end",
                said(checked(libc::posix_fallocate(raw, 0, 1 << 40)).and_then(errno_of)),
            );
            tell("remove pages", said(remove_page(fd.as_fd(), length)));
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            tell("punch a hole", said(checked(libc::fallocate(raw, punch, 0, 4096))));
            let wrote = libc::pwrite(raw, b"x".as_ptr().cast(), 1, 0);
            tell("write", said(checked(libc::c_int::try_from(wrote).unwrap_or(0))));
            let seals = libc::F_SEAL_WRITE;
            tell("seal", said(checked(libc::fcntl(raw, libc::F_ADD_SEALS, seals))));
        }
    }
    report.insert("up remove pages through the mapping".into(), said(membership.remove_page()));
}

/// posix_fallocate returns the error instead of setting errno.
fn errno_of(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Maps the file read-only, then asks for write permission.
fn make_writable(fd: BorrowedFd<'_>, length: usize) -> io::Result<libc::c_int> {
    let mapping = Mapping::read_only(fd, length)?;
    let address = mapping.address().as_ptr().cast();
    // SAFETY: the range is this function's own mapping, to which nothing has a reference.
    checked(unsafe { libc::mprotect(address, length, libc::PROT_READ | libc::PROT_WRITE) })
}

/// Asks the kernel to remove the first page, which then reads as zeros.
fn remove_page(fd: BorrowedFd<'_>, length: usize) -> io::Result<libc::c_int> {
    let mapping = Mapping::read_only(fd, length)?;
    // SAFETY: as above.
    checked(unsafe { libc::madvise(mapping.address().as_ptr().cast(), 4096, libc::MADV_REMOVE) })
}

/// Tries to reach the primary and the other members through /proc and by signals.
pub fn probe_processes(report: &mut BTreeMap<String, String>) -> Outcome<()> {
    let primary = getppid();
    let mut tell = |what: &str, outcome: String| report.insert(what.to_owned(), outcome);
    tell("primary list descriptors", said(descriptors(&primary.to_string())));
    tell("primary list mappings", said(fs::read_dir(format!("/proc/{primary}/map_files"))));
    tell("primary read memory", said(File::open(format!("/proc/{primary}/mem"))));
    tell("primary read environment", said(File::open(format!("/proc/{primary}/environ"))));
    // SAFETY: the pointers are null, as ptrace(2) and pidfd_getfd(2) allow for these requests.
    unsafe {
        let none = ptr::null_mut::<libc::c_void>();
        let traced = libc::ptrace(libc::PTRACE_ATTACH, primary.as_raw(), none, none);
        tell("primary trace", said(checked(libc::c_int::try_from(traced).unwrap_or(0))));
        let pidfd = libc::syscall(libc::SYS_pidfd_open, primary.as_raw(), 0);
        let taken = libc::syscall(libc::SYS_pidfd_getfd, pidfd, 3, 0);
        tell("primary take a descriptor", said(checked(libc::c_int::try_from(taken).unwrap_or(0))));
    }
    tell("primary kill", said(kill(primary, Signal::SIGKILL).map_err(io::Error::from)));

    // A process may inspect others of its user, but must not obtain their mappings or descriptors.
    let peer = peer()?;
    for segment in ["down", "up"] {
        let name = format!("memfd:xfan-{segment}");
        let range = loop {
            // The worker maps its segments a little after it is reported as running.
            let maps = fs::read_to_string(format!("/proc/{peer}/maps"))?;
            if let Some(line) = maps.lines().find(|line| line.contains(&name)) {
                break line.split_whitespace().next().unwrap_or_default().to_owned();
            }
            std::thread::sleep(PAUSE);
        };
        let opened = OpenOptions::new().write(true).open(format!("/proc/{peer}/map_files/{range}"));
        tell(&format!("peer open {segment}"), said(opened));
    }
    Ok(())
}

/// The process of another member, once it has attached.
fn peer() -> Outcome<u64> {
    let control = dial()?;
    loop {
        protocol::send(&control, &Request::Stats, &[])?;
        let (Reply::Stats(report), _) = protocol::receive(&control, MAX_REPLY)? else {
            return Err("no report".into());
        };
        let member = &report["groups"][0]["members"][1];
        if member["state"] == "running" {
            return member["pid"].as_u64().ok_or_else(|| "no pid".into());
        }
        std::thread::sleep(PAUSE);
    }
}

/// Gives an order as an operator would.
fn order_through(control: &OwnedFd) -> Outcome<()> {
    let order = protocol::WorkersOrder::Remove("default/1".into());
    match protocol::ask(control, &Request::Workers(order))?.0 {
        Reply::Refused(refusal) => Err(refusal.message.into()),
        _ => Ok(()),
    }
}

/// Tries to take members that belong to others.
pub fn probe_members(report: &mut BTreeMap<String, String>) {
    let other = || Some("default/1".to_owned());
    for (what, member, token) in [
        ("other member without a token", other(), None),
        ("other member with our token", other(), token()),
        ("our member without a token", member(), None),
        ("our member again", member(), token()),
        ("any member", None, None),
        ("a member that does not exist", Some("default/9".to_owned()), None),
    ] {
        let answer = ask(VERSION, member, token);
        report
            .insert(format!("take {what}"), answer.map_or_else(|error| error.to_string(), |_| "done".into()));
    }
    // Through the inherited connection, and through those made with it.
    let mut tell = |what: &str, answer: Outcome<()>| {
        let answer = answer.map_or_else(|error| error.to_string(), |()| "done".into());
        report.insert(format!("inherited {what}"), answer);
    };
    let Ok(inherited) = inherited() else { return };
    tell("takes our member again", attach_through(inherited, None));
    tell("takes other member", attach_through(inherited, Some("default/1")));
    tell("takes a vacant member", attach_through(inherited, Some("default/2")));
    tell("orders", order_through(inherited));
    let through: Vec<_> = (0..5).map(|_| connect(inherited)).collect();
    let made = through.iter().filter(|made| made.is_ok()).count();
    tell("makes connections", Err(made.to_string().into()));
    for made in through {
        match made {
            Ok(made) => tell("made takes other member", attach_through(&made, Some("default/1"))),
            Err(error) => tell("makes too many", Err(error)),
        }
    }
    let sent = protocol::send(inherited, &Request::Detach, &[inherited.as_fd()]);
    tell("passes descriptors", sent.map_err(Into::into));
}
