//! A worker that misbehaves, for tests. It speaks the protocol itself, without the SDK, since no SDK would do these things.
//!
//! Of the members that a dispatcher starts only the first is hostile: the others become `xfan-count`.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::ptr;
use std::time::Duration;

use clap::Parser;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::getppid;
use xfan_shm::layout::{Geometry, Up, VERSION};
use xfan_shm::protocol::{
    self, Attach, Attached, ENV_MEMBER, ENV_SOCKET, ENV_TOKEN, MAX_REPLY, Reply, Request,
};
use xfan_shm::segment::Mapping;

/// Between two looks, or two rounds of noise.
const PAUSE: Duration = Duration::from_millis(2);

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A worker that misbehaves. Each way waits for SIGTERM in the end, unless it says otherwise.
#[derive(Parser)]
enum Way {
    /// Never takes a packet, and ignores SIGTERM.
    Deaf {
        /// Goes to its parent's process group, and does not want to hear of its end.
        #[arg(long)]
        hidden: bool,
    },
    /// At SIGUSR1 ends with status 0, and leaves a child that keeps its connection for a while.
    Fork,
    /// At SIGUSR1 attaches and hangs up, again and again.
    Again,
    /// Survives its primary, and then speaks another version of the protocol.
    Relic,
    /// Speaks another version of the protocol.
    Version { version: u32 },
    /// Tries all that a worker must not be able to do, and prints what came of each.
    Probe,
    /// At SIGUSR1 fills its own segment with noise, again and again, until SIGTERM.
    Noise { seed: u64 },
    /// At SIGUSR1 stuffs its doorbell so that who rings it blocks, if it can, and claims to sleep.
    Jam,
}

fn main() -> ExitCode {
    let way = Way::parse();
    if std::env::var(ENV_MEMBER).is_ok_and(|member| !member.ends_with("/0")) {
        let count = std::env::current_exe().unwrap_or_default().with_file_name("xfan-count");
        eprintln!("xfan-hostile: {}", Command::new(count).exec());
        return ExitCode::FAILURE;
    }
    match run(&way) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-hostile: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(way: &Way) -> Outcome<()> {
    // Before anything is opened.
    let inherited = descriptors("self")?;
    let waited = [Signal::SIGTERM, Signal::SIGUSR1].into_iter().collect::<SigSet>();
    waited.thread_block()?;
    // Held until the end: whoever hangs up is out.
    let _place = match way {
        Way::Version { version } => {
            return ask(*version, member(), token())
                .map(|_| eprintln!("xfan-hostile: attached all the same"));
        }
        Way::Again => {
            let place = Place::take()?;
            waited.wait()?;
            drop(place);
            // It is not known to have gone when it comes again.
            loop {
                drop(Place::take());
            }
        }
        Way::Relic => {
            let place = Place::take()?;
            // The end of the connection.
            let _ = protocol::receive::<Reply>(&place.control, MAX_REPLY);
            loop {
                // Until the next one has answered.
                match ask(VERSION + 1, member(), token()) {
                    Err(error) if !error.to_string().contains("protocol version") => {
                        std::thread::sleep(PAUSE);
                    }
                    answer => return answer.map(drop),
                }
            }
        }
        Way::Fork => {
            let _place = Place::take()?;
            waited.wait()?;
            // SAFETY: there is one thread.
            if let nix::unistd::ForkResult::Child = unsafe { nix::unistd::fork() }? {
                nix::sys::prctl::set_pdeathsig(None)?;
                std::thread::sleep(Duration::from_secs(3));
            }
            return Ok(());
        }
        Way::Deaf { hidden } => {
            if *hidden {
                let group = nix::unistd::getpgid(Some(getppid()))?;
                nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), group)?;
                nix::sys::prctl::set_pdeathsig(None)?;
            }
            let _place = Place::take()?;
            loop {
                std::thread::sleep(Duration::MAX);
            }
        }
        Way::Probe => {
            let place = Place::take()?;
            let mut report = BTreeMap::from([("descriptors at start".to_owned(), inherited.join(" "))]);
            probe_self(&mut report)?;
            probe_segments(&place, &mut report);
            probe_processes(&mut report)?;
            probe_places(&mut report);
            println!("{}", serde_json::to_string(&report)?);
            place
        }
        Way::Noise { seed } => {
            let place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return place.make_noise(*seed);
            }
            return Ok(());
        }
        Way::Jam => {
            let place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                place.jam()?;
                println!("jammed");
            }
            place
        }
    };
    while waited.wait()? != Signal::SIGTERM {}
    Ok(())
}

fn member() -> Option<String> {
    std::env::var(ENV_MEMBER).ok()
}

fn token() -> Option<String> {
    std::env::var(ENV_TOKEN).ok()
}

/// A connection to the dispatcher.
fn dial() -> Outcome<OwnedFd> {
    let path = std::env::var_os(ENV_SOCKET).ok_or("no socket")?;
    let control = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(control.as_raw_fd(), &UnixAddr::new(path.as_os_str())?)?;
    Ok(control)
}

/// Asks to attach, on a connection of its own. The error is the refusal.
fn ask(
    version: u32,
    member: Option<String>,
    token: Option<String>,
) -> Outcome<(OwnedFd, Attached, Vec<OwnedFd>)> {
    let control = dial()?;
    let attach = Attach { version, group: None, member, token, program: "hostile".into() };
    protocol::send(&control, &Request::Attach(attach), &[])?;
    match protocol::receive(&control, MAX_REPLY)? {
        (Reply::Attached(attached), fds) => Ok((control, attached, fds)),
        (Reply::Refused(refusal), _) => Err(refusal.message.into()),
        (Reply::Stats(_) | Reply::Events(_) | Reply::Ordered(_), _) => Err("statistics".into()),
    }
}

/// A place that was taken.
struct Place {
    control: OwnedFd,
    geometry: Geometry,
    umem_bytes: usize,
    umem: OwnedFd,
    down: OwnedFd,
    up: OwnedFd,
    doorbell: OwnedFd,
}

impl Place {
    fn take() -> Outcome<Self> {
        let (control, attached, fds) = ask(VERSION, member(), token())?;
        let [umem, down, up, doorbell] = <[OwnedFd; protocol::ATTACHED_FDS]>::try_from(fds)
            .map_err(|_| "other descriptors than expected")?;
        let umem_bytes = usize::try_from(attached.umem_bytes)?;
        Ok(Place { control, geometry: attached.geometry, umem_bytes, umem, down, up, doorbell })
    }

    /// Writes noise over its own segment, headers and all, until SIGTERM.
    fn make_noise(&self, seed: u64) -> Outcome<()> {
        let segment = Mapping::read_write(&self.up, self.geometry.up_bytes())?;
        let mut state = seed;
        loop {
            for word in 0..segment.length() / 8 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // SAFETY: in bounds and aligned: mappings begin at a page; the segment is ours to write.
                unsafe { segment.address().cast::<u64>().add(word).write_volatile(state ^ state >> 29) };
            }
            if pending_signals()?.contains(Signal::SIGTERM) {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Has whoever rings the doorbell block, if the descriptor allows it, and claims to sleep, so that it is rung.
    fn jam(&self) -> Outcome<()> {
        let up = Up::open(&self.up, self.geometry)?;
        let fd = self.doorbell.as_raw_fd();
        // SAFETY: no pointers.
        unsafe { libc::fcntl(fd, libc::F_SETFL, 0) };
        let full = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: the buffer is as long as said.
        unsafe { libc::write(fd, full.as_ptr().cast(), full.len()) };
        up.epoch().store(1, std::sync::atomic::Ordering::Release);
        Ok(())
    }
}

fn pending_signals() -> Outcome<SigSet> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the pointer leads to room for a set.
    Errno::result(unsafe { libc::sigpending(set.as_mut_ptr()) })?;
    // SAFETY: the call succeeded and has filled the set.
    Ok(unsafe { SigSet::from_sigset_t_unchecked(set.assume_init()) })
}

/// The descriptors of a process that were open before it was looked.
fn descriptors(process: &str) -> io::Result<Vec<String>> {
    let folder = format!("/proc/{process}/fd");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder)? {
        let name = entry?.file_name();
        // The one that lists them leads to the folder itself.
        let target = fs::read_link(format!("{folder}/{}", name.display())).unwrap_or_default();
        if !target.ends_with("fd") {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Name of the error, or `done`.
fn said<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "done".into(),
        Err(error) => error
            .raw_os_error()
            .map_or_else(|| error.to_string(), |raw| format!("{:?}", Errno::from_raw(raw))),
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Rights this process has.
fn probe_self(report: &mut BTreeMap<String, String>) -> Outcome<()> {
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

/// All ways to change a segment.
fn probe_segments(place: &Place, report: &mut BTreeMap<String, String>) {
    let Geometry { .. } = place.geometry;
    let (down, up) = (place.geometry.down_bytes(), place.geometry.up_bytes());
    for (name, fd, length) in
        [("umem", &place.umem, place.umem_bytes), ("down", &place.down, down), ("up", &place.up, up)]
    {
        let mut tell = |what: &str, outcome: String| report.insert(format!("{name} {what}"), outcome);
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let c_path = CString::new(path.clone()).unwrap_or_default();
        let raw = fd.as_raw_fd();
        tell("map writable", said(Mapping::read_write(fd, length)));
        tell("make a mapping writable", said(make_writable(fd.as_fd(), length)));
        tell("open for writing", said(OpenOptions::new().write(true).open(&path)));
        tell("open for both", said(OpenOptions::new().read(true).write(true).open(&path)));
        // SAFETY: no pointers but to a string that ends in a null byte, and to a buffer as long as said.
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
            if name != "up" {
                tell("take pages away", said(take_away(fd.as_fd(), length)));
                let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                tell("punch a hole", said(checked(libc::fallocate(raw, punch, 0, 4096))));
                let wrote = libc::pwrite(raw, b"x".as_ptr().cast(), 1, 0);
                tell("write", said(checked(libc::c_int::try_from(wrote).unwrap_or(0))));
                let seals = libc::F_SEAL_WRITE;
                tell("seal", said(checked(libc::fcntl(raw, libc::F_ADD_SEALS, seals))));
            }
        }
    }
}

/// posix_fallocate returns its error.
fn errno_of(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// Maps read-only, then asks for more.
fn make_writable(fd: BorrowedFd<'_>, length: usize) -> io::Result<libc::c_int> {
    let mapping = Mapping::read_only(fd, length)?;
    let address = mapping.address().as_ptr().cast();
    // SAFETY: the range is that of our own mapping, of which nobody has a reference.
    checked(unsafe { libc::mprotect(address, length, libc::PROT_READ | libc::PROT_WRITE) })
}

/// Asks the kernel to take the first page away, which is to write zeros.
fn take_away(fd: BorrowedFd<'_>, length: usize) -> io::Result<libc::c_int> {
    let mapping = Mapping::read_only(fd, length)?;
    // SAFETY: as above.
    checked(unsafe { libc::madvise(mapping.address().as_ptr().cast(), 4096, libc::MADV_REMOVE) })
}

/// The primary and the other members, through /proc and by signals.
fn probe_processes(report: &mut BTreeMap<String, String>) -> Outcome<()> {
    let primary = getppid();
    let mut tell = |what: &str, outcome: String| report.insert(what.to_owned(), outcome);
    tell("primary list descriptors", said(descriptors(&primary.to_string())));
    tell("primary list mappings", said(fs::read_dir(format!("/proc/{primary}/map_files"))));
    tell("primary read memory", said(File::open(format!("/proc/{primary}/mem"))));
    tell("primary read environment", said(File::open(format!("/proc/{primary}/environ"))));
    // SAFETY: the pointers are null, as ptrace(2) and pidfd_getfd(2) have it for these.
    unsafe {
        let none = ptr::null_mut::<libc::c_void>();
        let traced = libc::ptrace(libc::PTRACE_ATTACH, primary.as_raw(), none, none);
        tell("primary trace", said(checked(libc::c_int::try_from(traced).unwrap_or(0))));
        let pidfd = libc::syscall(libc::SYS_pidfd_open, primary.as_raw(), 0);
        let taken = libc::syscall(libc::SYS_pidfd_getfd, pidfd, 3, 0);
        tell("primary take a descriptor", said(checked(libc::c_int::try_from(taken).unwrap_or(0))));
    }
    tell("primary kill", said(kill(primary, Signal::SIGKILL).map_err(io::Error::from)));

    // A user's other processes may be looked at, but what they have mapped or open is not to be had from there.
    let peer = peer()?;
    for segment in ["down", "up"] {
        let name = format!("memfd:xfan-{segment}");
        let range = loop {
            // It maps them a little after it is said to run.
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

/// Places that are not ours.
fn probe_places(report: &mut BTreeMap<String, String>) {
    let other = || Some("default/1".to_owned());
    for (what, member, token) in [
        ("other's place without a token", other(), None),
        ("other's place with our token", other(), token()),
        ("our place without a token", member(), None),
        ("our place again", member(), token()),
        ("any place", None, None),
        ("a place that is not there", Some("default/9".to_owned()), None),
    ] {
        let answer = ask(VERSION, member, token);
        report
            .insert(format!("take {what}"), answer.map_or_else(|error| error.to_string(), |_| "done".into()));
    }
}
