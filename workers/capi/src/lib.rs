//! The worker SDK for C. `include/xfan_worker.h` is generated from this crate and its doc comments.
//!
//! C has no lifetimes that tie a batch to its worker. The library therefore remembers how many
//! packets of the last receive call are not committed, and refuses to commit more than that.
//!
//! # Safety
//!
//! The header states once, for all functions, what every pointer argument must be. SAFETY comments
//! here refer to that as the contract of the header: a pointer is null or valid; a worker comes
//! from `xfan_attach`, was not freed, and is used by one thread at a time; text ends with a zero
//! byte; an array has as many elements as its capacity says.
#![allow(clippy::missing_safety_doc)] // see above

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

/// Option: leave on SIGTERM and SIGINT. The first signal makes xfan_receive call
/// xfan_request_detach. The second one terminates the process immediately. The handlers stay
/// installed until the process exits.
pub const XFAN_LEAVE_ON_SIGNALS: u32 = 1;

/// Packet flag: the dispatcher could not read a 5-tuple. The packet is not IP, or cut off within
/// its headers.
pub const XFAN_PACKET_UNPARSED: u8 = 1;
/// Packet flag: the packet was sent to another worker before, which was lost without committing it.
/// That worker may have processed the packet already.
pub const XFAN_PACKET_REDELIVERED: u8 = 2;
/// Packet flag: the data is shorter than the packet's IP length. The packet was cut on its way to
/// this host, or by the NIC's driver.
pub const XFAN_PACKET_CUT: u8 = 4;

/// A worker.
pub struct Handle {
    worker: Worker,
    counters: Vec<Counter>,
    member: CString,
    ports: Vec<CString>,
}

/// Options for xfan_attach. All zero means the defaults.
#[repr(C)]
pub struct Options {
    /// The dispatcher's control socket. NULL: the one that the environment names, which `xfan run`
    /// sets for the workers it starts.
    pub socket: *const c_char,
    /// The group to join. NULL: the dispatcher's first group.
    pub group: *const c_char,
    /// The member to become, such as "default/0". NULL: the member that the environment names, or
    /// any vacant one.
    pub member: *const c_char,
    /// The program name that the dispatcher logs and reports. NULL: the file name of the
    /// executable.
    pub program: *const c_char,
    /// The largest number of packets to receive at once, 1 to 256. 0: 64.
    pub batch: u32,
    /// XFAN_LEAVE_ON_SIGNALS or 0.
    pub flags: u32,
}

/// A packet, read in place from the memory that the NIC or the kernel wrote it to.
#[repr(C)]
pub struct Packet {
    /// The bytes of the packet, from the Ethernet header on. They may be read until the packet is
    /// committed or the worker is freed.
    pub data: *const u8,
    /// When the dispatcher received the packet, in nanoseconds of CLOCK_MONOTONIC: a multiple of
    /// 1,024, and up to 2,000 early. Within a lane it never decreases, except for packets with
    /// XFAN_PACKET_REDELIVERED.
    pub receive_time_ns: u64,
    /// Hash of the packet's flow, equal for both directions.
    pub hash: u32,
    /// Length of the packet in bytes.
    pub length: u16,
    /// The lane that received the packet, less than xfan_lanes. Lanes correspond to RX queues.
    pub lane: u16,
    /// The interface that received the packet, for xfan_port_name.
    pub port: u8,
    /// XFAN_PACKET_UNPARSED, XFAN_PACKET_REDELIVERED and XFAN_PACKET_CUT, combined by OR.
    pub flags: u8,
}

/// The worker that `worker` points to; an error if it is null.
///
/// # Safety
/// The pointer is null, or it comes from `xfan_attach` and was not freed. No other reference to the
/// worker is used while the result is.
#[inline(always)]
unsafe fn handle<'a>(worker: *mut Handle) -> Result<&'a mut Handle, Failure> {
    // SAFETY: `as_mut` requires null, or a valid pointer without another live reference: the caller
    // ensures both.
    unsafe { worker.as_mut() }.ok_or_else(|| Failure::invalid("the worker is NULL"))
}

/// The text that `text` points to; `None` if it is null, an error if it is not UTF-8. `name` is for
/// the error.
///
/// # Safety
/// The pointer is null, or it points to text that ends with a zero byte and does not change while
/// the result is used.
unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: `from_ptr` requires a valid pointer to text with a zero byte, which does not change:
    // it is not null, and the caller ensures the rest.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Failure::invalid(format!("the {name} is not UTF-8: {text:?}")))
}

/// The version of this library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn xfan_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Attaches to a dispatcher as a worker, and pins the calling thread to the core that the
/// dispatcher assigns. NULL means default options.
///
/// Returns the worker, or NULL on an error: see xfan_last_error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_attach(options: *const Options) -> *mut Handle {
    pointer(|| {
        let mut builder = Worker::builder();
        // SAFETY: `as_ref` requires null or a valid pointer: contract of the header.
        if let Some(options) = unsafe { options.as_ref() } {
            if !options.socket.is_null() {
                // SAFETY: not null, so it points to text: contract of the header.
                let path = unsafe { CStr::from_ptr(options.socket) };
                builder = builder.socket(OsStr::from_bytes(path.to_bytes()));
            }
            // SAFETY: each is null or points to text: contract of the header.
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

/// Attaches to the next dispatcher on the same control socket. Call it after XFAN_DISPATCHER_GONE
/// or XFAN_EVICTED.
///
/// The worker asks for the member that it was, and joins as any vacant member if it cannot have
/// that one. If no dispatcher listens yet, it waits for one, at most for `patience_ms`; UINT32_MAX
/// means no limit. Use this in workers that attached on their own, and in workers that survive
/// their dispatcher (see xfan_survival_ms).
///
/// Returns XFAN_OK, or XFAN_CLOSED if a signal asked the worker to leave, or another negative code,
/// after which the call may be repeated. Earlier packets, counters and names are no longer valid:
/// publish the counters again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_reattach(worker: *mut Handle, patience_ms: u32) -> i32 {
    code(|| {
        // SAFETY: contract of the header.
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

/// For how many milliseconds this worker should look for the next dispatcher when the one that
/// started it is gone: the patience for xfan_reattach. It is set by `survive = true` in the
/// dispatcher's configuration. 0 means that the worker should exit. Returns 0 for a NULL worker.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_survival_ms(worker: *mut Handle) -> u32 {
    // SAFETY: contract of the header.
    let survival = unsafe { worker.as_ref() }.and_then(|handle| handle.worker.survival());
    survival.map_or(0, |survival| u32::try_from(survival.as_millis()).unwrap_or(u32::MAX))
}

/// Receives packets of one lane and describes them in the array `packets`: at most `capacity`, and
/// at most a batch. The lanes take turns.
///
/// If there are no packets, the worker waits for at most `timeout_ms`. It spins, then yields, then
/// sleeps, for the times in the dispatcher's configuration. With a timeout of 0 it returns at once.
/// Finding packets costs no system call, lock or allocation.
///
/// Returns the number of packets. Returns 0 if no packet arrived in time or a signal interrupted
/// the sleep: call again. Returns XFAN_CLOSED if no more packets will arrive, or another negative
/// code on an error.
///
/// Packets that were received before and are not committed come again, first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_receive(
    worker: *mut Handle,
    packets: *mut Packet,
    capacity: usize,
    timeout_ms: u32,
) -> i32 {
    code(|| {
        // SAFETY: contract of the header.
        let handle = unsafe { handle(worker)? };
        if packets.is_null() || capacity == 0 {
            return Err(Failure::invalid("cannot receive packets: the array is NULL or its capacity is 0"));
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
            // The descriptor's fields are as narrow as these: only the Rust API widens them.
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
            // SAFETY: `add` and `write` require that the element lies within the array: `count` is
            // less than the capacity, and the array has that many elements (contract of the
            // header).
            unsafe { packets.add(count).write(described) };
            count += 1;
        }
        batch.leave_open(count);
        Ok(i32::try_from(count).unwrap_or(i32::MAX)) // at most a batch
    })
}

/// Whether the packets of the last xfan_receive still belong to this worker.
///
/// Returns 1 if they do: all data read from them so far was data of these packets. Returns 0 if the
/// dispatcher has ended the worker's membership, because the worker hung or did not leave when
/// asked to: the data may be that of other packets. Check it after reading and before acting on the
/// data, where acting on other data would do harm. Returns a negative code on an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_is_current(worker: *mut Handle) -> i32 {
    // SAFETY: contract of the header.
    code(|| Ok(i32::from(!unsafe { handle(worker)? }.worker.is_evicted())))
}

/// Commits the first `packets` of those that the last xfan_receive returned and that are not
/// committed yet: the dispatcher may reuse their memory. Committed packets must not be read any
/// more.
///
/// Returns XFAN_OK. Returns XFAN_INVALID if fewer packets are uncommitted: then nothing is
/// committed. Committing 0 packets always succeeds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_commit(worker: *mut Handle, packets: usize) -> i32 {
    code(|| {
        // SAFETY: contract of the header.
        match unsafe { handle(worker)? }.worker.commit_open(packets) {
            Ok(()) => Ok(XFAN_OK),
            Err(open) => Err(Failure::invalid(format!(
                "cannot commit {packets} packets: {open} are received and not committed"
            ))),
        }
    })
}

/// Asks the dispatcher to detach this worker. Packets on their way to the worker still arrive. To
/// lose none, keep receiving until XFAN_CLOSED, then free the worker. Further calls do nothing.
///
/// Returns XFAN_OK or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_request_detach(worker: *mut Handle) -> i32 {
    code(|| {
        // SAFETY: contract of the header.
        unsafe { handle(worker)? }.worker.request_detach()?;
        Ok(XFAN_OK)
    })
}

/// Ends the membership and frees the worker. Packets that are not committed go to other workers. If
/// no packet may be delivered twice, call xfan_request_detach first and receive until XFAN_CLOSED.
/// NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_free(worker: *mut Handle) {
    if worker.is_null() {
        return;
    }
    code(|| {
        // SAFETY: `from_raw` requires a pointer from `Box::into_raw` that is not used afterwards.
        // It comes from `xfan_attach`, is not null and was not freed (contract of the header).
        drop(unsafe { Box::from_raw(worker) });
        Ok(XFAN_OK)
    });
}

/// Publishes a counter with value 0. `xfan stats` shows it under `name`, next to the member. A name
/// has 1 to 24 characters of a-z, 0-9 and _. A worker can publish 32 counters.
///
/// Returns the counter's number, for xfan_counter_add and xfan_counter_set, or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_counter(worker: *mut Handle, name: *const c_char) -> i32 {
    code(|| {
        // SAFETY: contract of the header, for both.
        let (handle, name) = unsafe { (handle(worker)?, text("name", name)?) };
        let name = name.ok_or_else(|| Failure::invalid("the name is NULL"))?;
        let counter = handle.worker.counter(name)?;
        handle.counters.push(counter);
        Ok(i32::try_from(handle.counters.len() - 1).unwrap_or(i32::MAX)) // less than 32
    })
}

/// Adds `more` to a counter, which wraps around at 2^64. Returns XFAN_OK or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_counter_add(worker: *mut Handle, counter: i32, more: u64) -> i32 {
    code(|| {
        // SAFETY: contract of the header.
        unsafe { handle(worker)? }.counter(counter)?.add(more);
        Ok(XFAN_OK)
    })
}

/// Sets the value of a counter. Use this for a number that can decrease. Returns XFAN_OK or a
/// negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_counter_set(worker: *mut Handle, counter: i32, value: u64) -> i32 {
    code(|| {
        // SAFETY: contract of the header.
        unsafe { handle(worker)? }.counter(counter)?.set(value);
        Ok(XFAN_OK)
    })
}

/// The member that the worker is, such as "default/0"; NULL for a NULL worker. The text is valid
/// until the worker is freed or reattached.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_member(worker: *mut Handle) -> *const c_char {
    // SAFETY: contract of the header.
    pointer(|| Ok(unsafe { handle(worker)? }.member.as_ptr()))
}

/// Number of lanes that send packets to this worker, or a negative code.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_lanes(worker: *mut Handle) -> i32 {
    // SAFETY: contract of the header.
    code(|| Ok(i32::try_from(unsafe { handle(worker)? }.worker.lanes()).unwrap_or(i32::MAX)))
}

/// The name of the interface that a packet's `port` refers to, such as "eth1"; NULL if there is no
/// such port. The text is valid until the worker is freed or reattached.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xfan_port_name(worker: *mut Handle, port: u8) -> *const c_char {
    pointer(|| {
        // SAFETY: contract of the header.
        let name = unsafe { handle(worker)? }.ports.get(usize::from(port));
        Ok(name.ok_or_else(|| Failure::invalid(format!("there is no port {port}")))?.as_ptr())
    })
}

/// The names of a worker's member and ports as C strings.
fn names(worker: &Worker) -> (CString, Vec<CString>) {
    // The names come from JSON, so they could contain a zero byte. Such a name becomes empty.
    let name = |name: &str| CString::new(name).unwrap_or_default();
    (name(worker.member()), worker.ports().iter().map(|port| name(port)).collect())
}

impl Handle {
    fn counter(&mut self, number: i32) -> Result<&mut Counter, Failure> {
        let counter = usize::try_from(number).ok().and_then(|number| self.counters.get_mut(number));
        counter.ok_or_else(|| Failure::invalid(format!("there is no counter {number}")))
    }
}
