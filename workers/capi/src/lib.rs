//! The worker SDK for C. `include/xfan_worker.h` is made from here; what it says is what is said here.
//!
//! C has no lifetimes that would keep a batch and its worker together. So the library remembers how much of the last burst is
//! not committed, and refuses to commit more than that.
#![allow(clippy::missing_safety_doc)] // the head of the header says it once for all functions

mod error;

use std::ffi::{CStr, CString, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use xfan_worker::{AttachError, Counter, Received, Worker};

use error::{Failure, code, pointer};
pub use error::{
    XFAN_CLOSED, XFAN_COUNTER, XFAN_DISPATCHER_GONE, XFAN_EVICTED, XFAN_INTERNAL, XFAN_INVALID,
    XFAN_NO_DISPATCHER, XFAN_NO_SOCKET, XFAN_OK, XFAN_PERMISSION, XFAN_PROTOCOL, XFAN_REFUSED, XFAN_SYSTEM,
    xfan_last_error, xfan_last_error_code,
};

/// An option: SIGTERM and SIGINT make xfan_receive do what xfan_request_detach does; the second ends the
/// process at once. The handlers stay until the process ends.
pub const XFAN_LEAVE_ON_SIGNALS: u32 = 1;

/// Of a packet: the dispatcher could not read a 5-tuple. It is no IP, or cut off.
pub const XFAN_PACKET_UNPARSED: u8 = 1;
/// Of a packet: another worker had it before, and is gone without having committed it. It may have done with
/// it what this one is about to do.
pub const XFAN_PACKET_REDELIVERED: u8 = 2;
/// Of a packet: its data is shorter than its IP length. It was cut on its way to this host, or by
/// the network card's driver.
pub const XFAN_PACKET_CUT: u8 = 4;

/// A worker.
pub struct Handle {
    worker: Worker,
    counters: Vec<Counter>,
    member: CString,
    ports: Vec<CString>,
}

/// How to attach. All zero is a good choice.
#[repr(C)]
pub struct Options {
    /// The dispatcher's control socket. NULL: the environment says where, as it does for workers that
    /// `xfan run` starts.
    pub socket: *const c_char,
    /// The group to join. NULL: the dispatcher's first.
    pub group: *const c_char,
    /// The member to become, such as "default/0". NULL: the one the environment names, or any vacant one.
    pub member: *const c_char,
    /// The program's name, for the dispatcher's log. NULL: the executable's file name.
    pub program: *const c_char,
    /// Most packets that are received at once, 1 to 256. 0: 64.
    pub batch: u32,
    /// XFAN_LEAVE_ON_SIGNALS, or 0.
    pub flags: u32,
}

/// A packet, where the network card put it.
#[repr(C)]
pub struct Packet {
    /// Its bytes, from the Ethernet header on. They may be read until the packet is committed or the worker
    /// is freed.
    pub data: *const u8,
    /// When the dispatcher received it, in nanoseconds of CLOCK_MONOTONIC: a multiple of 1,024, up
    /// to 2,000 early. Within a lane it never decreases, but for packets of
    /// XFAN_PACKET_REDELIVERED.
    pub receive_time_ns: u64,
    /// The hash of its flow, equal for both directions.
    pub hash: u32,
    /// Number of its bytes.
    pub length: u16,
    /// The lane that received it, which is to say the RX queue; less than xfan_lanes.
    pub lane: u16,
    /// The interface that it came in by, for xfan_port_name.
    pub port: u8,
    /// XFAN_PACKET_UNPARSED, XFAN_PACKET_REDELIVERED, XFAN_PACKET_CUT.
    pub flags: u8,
}

/// The worker behind a pointer from C.
///
/// # Safety
/// The pointer is null or from `xfan_attach`, was not freed, and no other thread uses it.
#[inline(always)]
unsafe fn handle<'a>(worker: *mut Handle) -> Result<&'a mut Handle, Failure> {
    // SAFETY: as the caller promises.
    unsafe { worker.as_mut() }.ok_or_else(|| Failure::invalid("the worker is NULL"))
}

/// The text behind a pointer from C; none if it is null.
///
/// # Safety
/// The pointer is null or leads to a text with a zero byte at its end, which nobody changes.
unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Failure::invalid(format!("the {name} is no UTF-8: {text:?}")))
}

/// The version of this library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn xfan_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Becomes a worker of a dispatcher, and pins the calling thread to the core that it names. NULL for the
/// options is the same as options that are all zero. Returns NULL if it does not succeed: xfan_last_error says
/// why.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_attach(options: *const Options) -> *mut Handle {
    pointer(|| {
        let mut builder = Worker::builder();
        // SAFETY: the pointer is null or leads to options, as the header asks for.
        if let Some(options) = unsafe { options.as_ref() } {
            if !options.socket.is_null() {
                // SAFETY: text, as the header asks for.
                let path = unsafe { CStr::from_ptr(options.socket) };
                builder = builder.socket(OsStr::from_bytes(path.to_bytes()));
            }
            // SAFETY: null or text, as the header asks for.
            let [group, member, program] = unsafe {
                [
                    text("group", options.group)?,
                    text("member", options.member)?,
                    text("program", options.program)?,
                ]
            };
            if let Some(group) = group {
                builder = builder.group(group);
            }
            if let Some(member) = member {
                builder = builder.member(member);
            }
            if let Some(program) = program {
                builder = builder.program(program);
            }
            if options.batch != 0 {
                builder = builder.batch(usize::try_from(options.batch).unwrap_or(usize::MAX));
            }
            match options.flags {
                0 => {}
                XFAN_LEAVE_ON_SIGNALS => builder = builder.leave_on_signals(),
                unknown => return Err(Failure::invalid(format!("unknown flags: {unknown:#x}"))),
            }
        }
        let worker = builder.attach()?;
        let (member, ports) = names(&worker);
        Ok(Box::into_raw(Box::new(Handle { worker, counters: Vec::new(), member, ports })))
    })
}

/// After XFAN_DISPATCHER_GONE or XFAN_EVICTED: attaches to the dispatcher that listens on the same socket now, or
/// will within `patience_ms`, as the member that the worker was if that can be had, else as any; UINT32_MAX:
/// however long it takes. For workers that came by themselves, and for those that survive (xfan_survival_ms).
///
/// Returns XFAN_OK; XFAN_CLOSED if a signal asked the worker to leave; or another negative code, and may be
/// tried again. Packets, counters and names from before are no more: publish the counters anew.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_reattach(worker: *mut Handle, patience_ms: u32) -> i32 {
    code(|| {
        // SAFETY: the header asks for it.
        let handle = unsafe { handle(worker)? };
        let patience = match patience_ms {
            u32::MAX => Duration::MAX,
            limited => Duration::from_millis(limited.into()),
        };
        match handle.worker.reattach(patience) {
            Err(AttachError::Leaving) => return Ok(XFAN_CLOSED),
            result => result?,
        }
        handle.counters.clear();
        (handle.member, handle.ports) = names(&handle.worker);
        Ok(XFAN_OK)
    })
}

/// For how many milliseconds a worker that a dispatcher started is to look for the next one when that is gone
/// (`survive = true` in its configuration): the patience for xfan_reattach. 0: it is to end then; also for a
/// NULL worker.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_survival_ms(worker: *mut Handle) -> u32 {
    // SAFETY: the header asks for it.
    let survival = unsafe { worker.as_ref() }.and_then(|handle| handle.worker.survival());
    survival.map_or(0, |survival| u32::try_from(survival.as_millis()).unwrap_or(u32::MAX))
}

/// Receives packets of one lane, at most `capacity` of them and at most a batch, and describes them in
/// `packets`. If there are none, waits for `timeout_ms`: spinning, yielding and sleeping for as long as the
/// dispatcher's configuration says; 0 does none of these.
///
/// Returns the number of packets; 0 if none came in time or a signal came: call again; or a negative code,
/// XFAN_CLOSED among them.
///
/// What was received before and is not committed comes again, first. Finding packets costs no system call, lock
/// or allocation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_receive(
    worker: *mut Handle,
    packets: *mut Packet,
    capacity: usize,
    timeout_ms: u32,
) -> i32 {
    code(|| {
        // SAFETY: the header asks for it.
        let handle = unsafe { handle(worker)? };
        if packets.is_null() || capacity == 0 {
            return Err(Failure::invalid(
                "there is no room for packets: the array is NULL, or its capacity 0",
            ));
        }
        let batch = match handle.worker.recv(Duration::from_millis(timeout_ms.into()))? {
            Received::Packets(batch) => batch,
            Received::Idle => return Ok(0),
            Received::Closed => return Ok(XFAN_CLOSED),
        };
        let mut count = 0;
        for packet in batch.iter().take(capacity) {
            let data = packet.data();
            let mut flags = 0;
            if !packet.is_parsed() {
                flags |= XFAN_PACKET_UNPARSED;
            }
            if packet.is_redelivered() {
                flags |= XFAN_PACKET_REDELIVERED;
            }
            if packet.is_cut() {
                flags |= XFAN_PACKET_CUT;
            }
            // What it is made from is as narrow as the fields; only the Rust interface widens it.
            #[allow(clippy::cast_possible_truncation)]
            let described = Packet {
                data: data.as_ptr(),
                receive_time_ns: packet.time().as_nanos() as u64,
                hash: packet.hash(),
                length: data.len() as u16,
                lane: packet.lane().0 as u16,
                port: packet.port().0,
                flags,
            };
            // SAFETY: `count` is less than the capacity, and the header asks for room for so many.
            unsafe { packets.add(count).write(described) };
            count += 1;
        }
        batch.leave_open(count);
        Ok(i32::try_from(count).unwrap_or(i32::MAX)) // at most a batch
    })
}

/// Whether the packets of the last xfan_receive are still this worker's: 1, or 0 if the dispatcher has ended its
/// membership since, because it hung or did not leave when it was to. What was read of them may then have been of
/// other packets: ask after reading and before acting on it, where that matters. Or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_is_current(worker: *mut Handle) -> i32 {
    // SAFETY: the header asks for it.
    code(|| Ok(i32::from(!unsafe { handle(worker)? }.worker.is_evicted())))
}

/// Gives back the first `packets` of those that the last xfan_receive returned and that were not committed since:
/// all, or a part. They must not be read any more; the others may. Committing more than there are is
/// XFAN_INVALID, and then nothing is committed. 0 is always possible.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_commit(worker: *mut Handle, packets: usize) -> i32 {
    code(|| {
        // SAFETY: the header asks for it.
        match unsafe { handle(worker)? }.worker.commit_open(packets) {
            Ok(()) => Ok(XFAN_OK),
            Err(open) => Err(Failure::invalid(format!(
                "cannot commit {packets} packets: {open} are received and not committed"
            ))),
        }
    })
}

/// Asks the dispatcher to let this worker go. Packets that are on their way still come: keep receiving
/// until XFAN_CLOSED, then free the worker, and nothing is lost. Asking again does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_request_detach(worker: *mut Handle) -> i32 {
    code(|| {
        // SAFETY: the header asks for it.
        unsafe { handle(worker)? }.worker.request_detach()?;
        Ok(XFAN_OK)
    })
}

/// Ends the membership and frees the worker. What is not committed goes to other workers, so request to detach
/// first if nothing may come twice. NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_free(worker: *mut Handle) {
    if worker.is_null() {
        return;
    }
    code(|| {
        // SAFETY: it is from `xfan_attach`, where it came out of a box, and the header asks for it not to be used after this.
        drop(unsafe { Box::from_raw(worker) });
        Ok(XFAN_OK)
    });
}

/// Publishes a counter with value 0: `xfan stats` shows it under this name, of 1 to 24 characters a-z, 0-9
/// and _. Returns its number, for the following functions, or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_counter(worker: *mut Handle, name: *const c_char) -> i32 {
    code(|| {
        // SAFETY: the header asks for both.
        let (handle, name) = unsafe { (handle(worker)?, text("name", name)?) };
        let name = name.ok_or_else(|| Failure::invalid("the name is NULL"))?;
        let counter = handle.worker.counter(name)?;
        handle.counters.push(counter);
        Ok(i32::try_from(handle.counters.len() - 1).unwrap_or(i32::MAX)) // there are few
    })
}

/// Adds to a counter; wraps around at 2^64.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_counter_add(worker: *mut Handle, counter: i32, more: u64) -> i32 {
    code(|| {
        // SAFETY: the header asks for it.
        unsafe { handle(worker)? }.counter(counter)?.add(more);
        Ok(XFAN_OK)
    })
}

/// Sets a counter, for what goes up and down.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_counter_set(worker: *mut Handle, counter: i32, value: u64) -> i32 {
    code(|| {
        // SAFETY: the header asks for it.
        unsafe { handle(worker)? }.counter(counter)?.set(value);
        Ok(XFAN_OK)
    })
}

/// The member that the worker is, such as "default/0"; NULL for a NULL worker. Valid until the worker is
/// freed or attached again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_member(worker: *mut Handle) -> *const c_char {
    // SAFETY: the header asks for it.
    pointer(|| Ok(unsafe { handle(worker)? }.member.as_ptr()))
}

/// Number of lanes that serve it, or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_lanes(worker: *mut Handle) -> i32 {
    // SAFETY: the header asks for it.
    code(|| Ok(i32::try_from(unsafe { handle(worker)? }.worker.lanes()).unwrap_or(i32::MAX)))
}

/// The name of an interface, such as "eth1", from a packet's port; NULL if there is no such port. Valid until
/// the worker is freed or attached again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_port_name(worker: *mut Handle, port: u8) -> *const c_char {
    pointer(|| {
        // SAFETY: the header asks for it.
        let name = unsafe { handle(worker)? }.ports.get(usize::from(port));
        Ok(name.ok_or_else(|| Failure::invalid(format!("there is no port {port}")))?.as_ptr())
    })
}

/// Names of a worker's member and ports, for C.
fn names(worker: &Worker) -> (CString, Vec<CString>) {
    // They come from JSON, where they could hold a zero byte.
    let name = |name: &str| CString::new(name).unwrap_or_default();
    (name(worker.member()), worker.ports().iter().map(|port| name(port)).collect())
}

impl Handle {
    fn counter(&mut self, number: i32) -> Result<&mut Counter, Failure> {
        let counter = usize::try_from(number).ok().and_then(|number| self.counters.get_mut(number));
        counter.ok_or_else(|| Failure::invalid(format!("there is no counter {number}")))
    }
}
