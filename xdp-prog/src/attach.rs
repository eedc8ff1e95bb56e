//! Attaching the program to an interface: a link that the kernel removes when the process exits.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use libbpf_rs::query::ProgInfoIter;
use libbpf_rs::{Xdp, XdpFlags, libbpf_sys};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use thiserror::Error;

use crate::libbpf_log;
use crate::privilege::Lacking;

/// The program's name in the kernel, by which a primary recognises the program of another primary.
const PROGRAM_NAME: &str = "xfan_steer";

/// Where on the receive path of an interface the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, before the kernel allocates a socket buffer for the packet.
    Native,
    /// After the driver, at the cost of a socket buffer and a copy for each packet. Works with
    /// every driver.
    Generic,
}

impl XdpMode {
    fn flag(self) -> XdpFlags {
        match self {
            Self::Native => XdpFlags::DRV_MODE,
            Self::Generic => XdpFlags::SKB_MODE,
        }
    }
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// Why the program could not be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The program of another primary is attached.
    #[error(
        "another xfan primary owns {interface} (XDP program {PROGRAM_NAME}, id {id}); \
         stop it first: an interface can have only one primary"
    )]
    AnotherPrimary {
        /// The interface.
        interface: String,
        /// The other program's id.
        id: u32,
    },
    /// An XDP program of another tool is attached.
    #[error(
        "{interface} already runs another XDP program, {} (id {id}); stop the tool that uses it, \
         or, if that has exited, remove the program with: ip link set dev {interface} xdp off",
        quoted(name.as_deref())
    )]
    AnotherProgram {
        /// The interface.
        interface: String,
        /// The other program's name; `None` if this process lacks CAP_SYS_ADMIN, which is required
        /// to read the name.
        name: Option<String>,
        /// The other program's id.
        id: u32,
    },
    /// This program is already attached.
    #[error("cannot attach the XDP program to {interface}: it is already attached; detach it first")]
    Twice {
        /// The interface that the caller named.
        interface: String,
    },
    /// The process has no permission.
    #[error("the kernel does not let this process attach an XDP program to {interface} ({source}); {advice}")]
    Privilege {
        /// The interface.
        interface: String,
        /// The kernel's error.
        source: io::Error,
        /// The missing capabilities, and what to do.
        advice: String,
    },
    /// The driver cannot run a program in native mode, or cannot with the interface's current
    /// settings.
    #[error("the driver of {interface} refuses native XDP ({source}{}); {}", said(reason.as_deref()), way_out(source))]
    NoNativeMode {
        /// The interface.
        interface: String,
        /// The kernel's error.
        source: io::Error,
        /// The driver's error message, if it returns one.
        reason: Option<String>,
    },
    /// No interface has this index, or the interface has been removed.
    #[error("interface {interface} (index {ifindex}) does not exist in this network namespace")]
    NoSuchInterface {
        /// The interface.
        interface: String,
        /// Its index.
        ifindex: u32,
    },
    /// The kernel refuses for another reason.
    #[error("the kernel refuses to attach the XDP program to {interface} in {mode} mode: {source}")]
    Refused {
        /// The interface.
        interface: String,
        /// The mode of the last attempt.
        mode: XdpMode,
        /// The kernel's error.
        source: io::Error,
    },
}

/// The driver's error message, quoted.
fn said(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!(": \"{reason}\""))
}

/// What an operator can do if the driver refuses native mode.
fn way_out(source: &io::Error) -> &'static str {
    if lacks_xdp(source) {
        "it has no XDP, or none for this device: choose generic mode"
    } else {
        "the interface's settings may not allow it: lower the MTU (many drivers accept at most some 3000 bytes), \
         turn off LRO or use fewer channels (ethtool -L); else choose generic mode"
    }
}

/// The name of a program, quoted.
fn quoted(name: Option<&str>) -> String {
    match name {
        Some(name) => format!("\"{name}\""),
        None => "whose name only CAP_SYS_ADMIN may read".into(),
    }
}

/// A program that is attached to an interface. Dropping it detaches the program.
#[derive(Debug)]
pub(crate) struct Attachment {
    link: OwnedFd,
    mode: XdpMode,
}

impl Attachment {
    pub(crate) fn new(
        program: BorrowedFd<'_>,
        ifindex: u32,
        interface: &str,
        mode: XdpMode,
    ) -> Result<Self, AttachError> {
        let Ok(device) = i32::try_from(ifindex) else {
            return Err(AttachError::NoSuchInterface { interface: interface.into(), ifindex });
        };
        match create_link(program, device, mode) {
            Ok(link) => Ok(Self { link, mode }),
            Err(error) => Err(explain(program, device, interface, mode, error)),
        }
    }

    pub(crate) fn mode(&self) -> XdpMode {
        self.mode
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Closing the link detaches the program only if no other process holds a copy of the
        // descriptor, and a child process between fork and exec may hold one. So detach explicitly.
        // If that fails, for example because the interface was removed, closing the link suffices.
        // SAFETY: the function takes no pointers. `link` stays open until this function returns.
        unsafe { libbpf_sys::bpf_link_detach(self.link.as_raw_fd()) };
    }
}

/// Whether native mode failed because of the driver, so that generic mode may work. Drivers return
/// different errors: EOPNOTSUPP or the kernel-internal ENOTSUPP without support for XDP; EINVAL,
/// ERANGE, E2BIG or EFBIG for an MTU, LRO or channel setting that they cannot combine with XDP;
/// ENOSPC or ENOMEM for too few TX queues or buffers.
fn driver_cannot(error: &io::Error) -> bool {
    lacks_xdp(error)
        || error.raw_os_error().map(Errno::from_raw).is_some_and(|errno| {
            matches!(
                errno,
                Errno::EINVAL | Errno::ERANGE | Errno::E2BIG | Errno::EFBIG | Errno::ENOSPC | Errno::ENOMEM
            )
        })
}

/// Whether the driver does not support XDP at all.
fn lacks_xdp(error: &io::Error) -> bool {
    /// An errno internal to the kernel, which some drivers return to user space.
    const ENOTSUPP: i32 = 524;
    error.raw_os_error().is_some_and(|raw| raw == ENOTSUPP || raw == Errno::EOPNOTSUPP as i32)
}

/// The driver's error message (extack) about native mode. bpf(2) does not return it, but attaching
/// by netlink does. So this function attempts to attach once more, by netlink.
fn reason_of_driver(program: BorrowedFd<'_>, ifindex: i32) -> Option<String> {
    let xdp = Xdp::new(program);
    let flags = XdpFlags::DRV_MODE | XdpFlags::UPDATE_IF_NOEXIST;
    let (attached, log) = libbpf_log::collect(|| xdp.attach(ifindex, flags));
    if attached.is_ok() {
        // This attempt succeeded, so there is no error message.
        let _ = xdp.detach(ifindex, XdpFlags::DRV_MODE);
        return None;
    }
    let (_, reason) = log.split_once("Kernel error message: ")?;
    Some(reason.lines().next()?.trim().to_owned()).filter(|reason| !reason.is_empty())
}

/// Attaches as libbpf's `bpf_program__attach_xdp` does, which has no parameter for the mode.
fn create_link(program: BorrowedFd<'_>, ifindex: i32, mode: XdpMode) -> io::Result<OwnedFd> {
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        flags: mode.flag().bits(),
        ..Default::default()
    };
    // SAFETY: the function requires a valid `options` whose `sz` is its size: it outlives the call,
    // and its pointers are null, as an XDP link has it. `program` is an open file descriptor.
    let fd = unsafe {
        libbpf_sys::bpf_link_create(program.as_raw_fd(), ifindex, libbpf_sys::BPF_XDP, &raw const options)
    };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: `from_raw_fd` requires an open descriptor without another owner: the call returned a
    // new one.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Turns the kernel's error into one that an operator can act on.
fn explain(
    program: BorrowedFd<'_>,
    device: i32,
    interface: &str,
    mode: XdpMode,
    source: io::Error,
) -> AttachError {
    let interface = interface.to_string();
    let ifindex = device.unsigned_abs();
    match source.raw_os_error().map(Errno::from_raw) {
        // EEXIST: a program is attached in the other mode.
        Some(Errno::EBUSY | Errno::EEXIST) => {
            occupant(program, ifindex, &interface).unwrap_or(AttachError::Refused { interface, mode, source })
        }
        Some(Errno::EPERM | Errno::EACCES) => {
            AttachError::Privilege { interface, source, advice: Lacking::of_this_thread().to_string() }
        }
        _ if if_nametoindex(interface.as_str()) != Ok(ifindex) => {
            AttachError::NoSuchInterface { interface, ifindex }
        }
        _ if mode == XdpMode::Native && driver_cannot(&source) => {
            let reason = reason_of_driver(program, device);
            AttachError::NoNativeMode { interface, source, reason }
        }
        _ => AttachError::Refused { interface, mode, source },
    }
}

/// The error that names the program attached to an interface; `None` if there is none. `any` may be
/// any program: libbpf's API requires one.
pub(crate) fn occupant(any: BorrowedFd<'_>, ifindex: u32, interface: &str) -> Option<AttachError> {
    let interface = interface.to_owned();
    match attached_program(any, i32::try_from(ifindex).ok()?)? {
        (id, Some(name)) if name == PROGRAM_NAME => Some(AttachError::AnotherPrimary { interface, id }),
        (id, name) => Some(AttachError::AnotherProgram { interface, name, id }),
    }
}

/// The id of the program attached to an interface, and its name if this process may read it. `any`
/// may be any program.
fn attached_program(any: BorrowedFd<'_>, ifindex: i32) -> Option<(u32, Option<String>)> {
    let found = Xdp::new(any).query(ifindex, XdpFlags::NONE).ok()?;
    let ids = [found.prog_id, found.drv_prog_id, found.skb_prog_id, found.hw_prog_id];
    let id = ids.into_iter().find(|&id| id != 0)?;
    let program = ProgInfoIter::default().find(|program| program.id == id);
    Some((id, program.map(|program| program.name.to_string_lossy().into_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_driver_errors_allow_generic_mode() {
        let cannot = |raw| driver_cannot(&io::Error::from_raw_os_error(raw));
        for errno in [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::ERANGE, Errno::ENOMEM] {
            assert!(cannot(errno as i32), "{errno}");
        }
        assert!(cannot(524));
        for errno in [Errno::EBUSY, Errno::EEXIST, Errno::EPERM, Errno::EACCES, Errno::ENODEV] {
            assert!(!cannot(errno as i32), "{errno}");
        }
    }

    #[test]
    fn the_error_names_the_other_program() {
        let another = |name: Option<&str>| AttachError::AnotherProgram {
            interface: "eth1".into(),
            name: name.map(String::from),
            id: 7,
        };
        assert!(
            another(Some("xdp_pass"))
                .to_string()
                .starts_with("eth1 already runs another XDP program, \"xdp_pass\" (id 7); stop the tool")
        );
        assert!(another(None).to_string().contains("whose name only CAP_SYS_ADMIN may read (id 7)"));
    }
}
