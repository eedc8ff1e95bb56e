//! The functions as C calls them, under a minimal dispatcher. Needs no privileges.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::thread;

use common::{FRAME, Primary, Socket, attached, reply_once};
use xfan_shm::Descriptor;
use xfan_shm::clock::monotonic_ns;
use xfan_shm::ids::{PortId, UmemOffset};
use xfan_shm::layout::Phase;
use xfan_shm::protocol::{self, MAX_REQUEST, Refusal, RefusalCode, Reply, Request};
use xfan_worker_c::*;

const LONG: u32 = 30_000;

/// A worker as C sees it, and the array that it receives into.
struct C {
    worker: *mut Handle,
    packets: [MaybeUninit<Packet>; 64],
}

impl C {
    fn receive(&mut self, capacity: usize, timeout_ms: u32) -> i32 {
        assert!(capacity <= self.packets.len());
        // SAFETY: a worker or null, and an array of at least `capacity` elements.
        unsafe { xfan_receive(self.worker, self.packets.as_mut_ptr().cast(), capacity, timeout_ms) }
    }

    /// The received packet with this index.
    fn packet(&self, index: usize) -> &Packet {
        // SAFETY: the tests only ask for packets that were received, which are initialised.
        unsafe { self.packets[index].assume_init_ref() }
    }

    fn data(&self, index: usize) -> &[u8] {
        let Packet { data, length, .. } = *self.packet(index);
        // SAFETY: the packet is not committed, so its data is valid.
        unsafe { std::slice::from_raw_parts(data, usize::from(length)) }
    }

    fn commit(&self, packets: usize) -> i32 {
        // SAFETY: a worker or null.
        unsafe { xfan_commit(self.worker, packets) }
    }

    fn counter(&self, name: *const c_char) -> i32 {
        // SAFETY: a worker or null, and text or null.
        unsafe { xfan_counter(self.worker, name) }
    }
}

impl Drop for C {
    fn drop(&mut self) {
        // SAFETY: a worker or null, which is not used afterwards.
        unsafe { xfan_free(self.worker) };
    }
}

fn text(text: *const c_char) -> String {
    // SAFETY: the library returns text that ends with a zero byte.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned()
}

/// The last error.
fn error() -> (i32, String) {
    (xfan_last_error_code(), text(xfan_last_error()))
}

fn invalid(what: &str) {
    assert_eq!(error(), (XFAN_INVALID, what.to_owned()));
}

fn options(socket: *const c_char) -> Options {
    Options { socket, group: null(), member: null(), program: null(), batch: 0, flags: 0 }
}

/// Attaches with these options, which must fail. Returns the error.
fn refused(options: &Options) -> (i32, String) {
    // SAFETY: valid options.
    assert!(unsafe { xfan_attach(options) }.is_null());
    error()
}

fn path(socket: &Socket) -> CString {
    CString::new(socket.path.to_str().unwrap()).unwrap()
}

fn attach(change: impl FnOnce(&mut Options)) -> (Primary, C) {
    let socket = Socket::new();
    let path = path(&socket);
    let primary = thread::spawn(move || Primary::answer(&socket, &attached()));
    let mut options = options(path.as_ptr());
    change(&mut options);
    // SAFETY: valid options.
    let worker = unsafe { xfan_attach(&options) };
    assert!(!worker.is_null(), "{:?}", error());
    (primary.join().unwrap(), C { worker, packets: [const { MaybeUninit::uninit() }; 64] })
}

#[test]
fn the_introduction_and_its_answer_arrive() {
    let (primary, c) = attach(|options| {
        options.group = c"ids".as_ptr();
        options.member = c"ids/3".as_ptr();
        options.program = c"me".as_ptr();
    });
    let request = &primary.request;
    let said = [request.group.as_deref(), request.member.as_deref(), Some(&*request.program)];
    assert_eq!(said, [Some("ids"), Some("ids/3"), Some("me")]);
    // SAFETY: a worker.
    let (member, lanes, ports) = unsafe {
        (xfan_member(c.worker), xfan_lanes(c.worker), [0, 1, 2].map(|port| xfan_port_name(c.worker, port)))
    };
    assert_eq!((text(member), lanes), ("default/0".into(), 2));
    assert_eq!((text(ports[0]), text(ports[1]), ports[2]), ("east".into(), "west".into(), null()));
    invalid("there is no port 2");
    assert_eq!(text(xfan_version()), env!("CARGO_PKG_VERSION"));
}

#[test]
fn packets_are_described_and_committed_in_parts() {
    let (mut primary, mut c) = attach(|_| ());
    let before = monotonic_ns();
    for content in 0..5 {
        primary.send(0, content);
    }
    let flags = Descriptor::UNPARSED | Descriptor::REDELIVERED | Descriptor::CUT;
    assert!(primary.lanes[1].push(Descriptor { flags, port: PortId(9), hash: 7, ..Descriptor::default() }));

    assert_eq!(c.receive(2, LONG), 2);
    assert_eq!((c.data(0), c.data(1)), (&[0; FRAME][..], &[1; FRAME][..]));
    let Packet { hash, lane, port, flags, receive_time_ns, .. } = *c.packet(1);
    assert_eq!((hash, lane, port, flags), (1, 0, 0, 0));
    assert!((before - before % 1024..=monotonic_ns()).contains(&receive_time_ns));
    // Not more than were received, although the ring holds more.
    assert_eq!(c.commit(3), XFAN_INVALID);
    invalid("cannot commit 3 packets: 2 are received and not committed");
    assert_eq!((c.commit(0), primary.take_back(0)), (XFAN_OK, 0));
    assert_eq!((c.commit(1), primary.take_back(0)), (XFAN_OK, 1));
    assert_eq!(c.data(1), [1; FRAME], "an uncommitted packet may be read");
    // Uncommitted packets come again, first.
    assert_eq!((c.receive(64, LONG), c.data(0)[0], c.data(3)[0]), (4, 1, 4));
    assert_eq!((c.commit(4), primary.take_back(0)), (XFAN_OK, 4));
    assert_eq!(c.commit(1), XFAN_INVALID);
    assert_eq!(c.receive(64, LONG), 1);
    let Packet { hash, lane, port, flags, length, .. } = *c.packet(0);
    assert_eq!((hash, lane, port, flags, length), (7, 1, 9, 7, 0));
    assert_eq!(XFAN_PACKET_UNPARSED | XFAN_PACKET_REDELIVERED | XFAN_PACKET_CUT, 7);
    assert_eq!((c.commit(usize::MAX), c.commit(1)), (XFAN_INVALID, XFAN_OK));
    assert_eq!(c.receive(64, 1), 0);
    assert_eq!(c.commit(1), XFAN_INVALID);
}

#[test]
fn a_call_receives_at_most_a_batch() {
    let (mut primary, mut c) = attach(|options| options.batch = 3);
    for content in 0..5 {
        primary.send(0, content);
    }
    assert_eq!((c.receive(64, LONG), c.commit(3), c.receive(64, LONG), c.commit(2)), (3, 0, 2, 0));
}

#[test]
fn a_worker_that_asks_to_detach_is_closed() {
    let (mut primary, mut c) = attach(|_| ());
    // SAFETY: a worker.
    assert_eq!(unsafe { (xfan_request_detach(c.worker), xfan_request_detach(c.worker)) }, (XFAN_OK, XFAN_OK));
    let (request, _) = protocol::receive::<Request>(&primary.connection, MAX_REQUEST).unwrap();
    assert_eq!(request, Request::Detach);
    primary.send(0, 1);
    primary.down.set_phase(Phase::Closing);
    assert_eq!((c.receive(64, LONG), c.commit(1)), (1, XFAN_OK));
    assert_eq!((c.receive(64, LONG), c.receive(64, 0)), (XFAN_CLOSED, XFAN_CLOSED));
    assert_eq!(xfan_last_error_code(), XFAN_OK, "being closed is not an error");
    drop(c);
    let next = protocol::receive::<Request>(&primary.connection, MAX_REQUEST);
    assert!(matches!(next, Err(protocol::ProtocolError::Closed)), "{next:?}");
}

#[test]
fn faults_of_the_dispatcher_have_codes() {
    let (primary, mut c) = attach(|_| ());
    drop(primary.connection);
    assert_eq!(c.receive(64, LONG), XFAN_DISPATCHER_GONE);
    assert!(error().1.starts_with("the dispatcher is gone"), "{:?}", error());

    let (mut primary, mut c) = attach(|_| ());
    assert!(primary.lanes[0].push(Descriptor {
        offset: UmemOffset(u32::MAX),
        length: 1,
        ..Descriptor::default()
    }));
    assert_eq!(c.receive(64, LONG), XFAN_PROTOCOL);
    assert!(error().1.starts_with("lane 0 sent a corrupt descriptor"), "{:?}", error());
}

#[test]
fn counters_have_numbers() {
    let (primary, c) = attach(|_| ());
    let (alerts, depth) = (c.counter(c"alerts".as_ptr()), c.counter(c"depth".as_ptr()));
    assert_eq!((alerts, depth), (0, 1));
    // SAFETY: a worker.
    unsafe {
        assert_eq!((xfan_counter_add(c.worker, alerts, 2), xfan_counter_add(c.worker, alerts, 3)), (0, 0));
        assert_eq!((xfan_counter_set(c.worker, depth, 9), xfan_counter_set(c.worker, depth, 4)), (0, 0));
        assert_eq!((xfan_counter_add(c.worker, 2, 1), xfan_counter_set(c.worker, -1, 1)), (-2, -2));
    }
    invalid("there is no counter -1");
    let seen: Vec<_> = primary.up.published_counters().collect();
    assert_eq!(seen, [("alerts".into(), 5), ("depth".into(), 4)]);
    assert_eq!((c.counter(c"alerts".as_ptr()), c.counter(c"A-B".as_ptr())), (XFAN_COUNTER, XFAN_COUNTER));
    assert!(error().1.starts_with("\"A-B\" is not a valid counter name"), "{:?}", error());
    assert_eq!(c.counter(c"\xff".as_ptr()), XFAN_INVALID);
    assert_eq!(c.counter(null()), XFAN_INVALID);
    invalid("the name is NULL");
}

#[test]
fn null_is_an_error() {
    let (mut nobody, name) = (C { worker: null_mut(), packets: [const { MaybeUninit::uninit() }; 64] }, c"n");
    // SAFETY: null, which all of them accept.
    let results = unsafe {
        [
            nobody.receive(64, 0),
            nobody.commit(0),
            nobody.counter(name.as_ptr()),
            xfan_request_detach(null_mut()),
            xfan_counter_add(null_mut(), 0, 1),
            xfan_counter_set(null_mut(), 0, 1),
            xfan_lanes(null_mut()),
        ]
    };
    assert_eq!(results, [XFAN_INVALID; 7]);
    invalid("the worker is NULL");
    // SAFETY: null, which all of them accept.
    unsafe {
        assert!(xfan_member(null_mut()).is_null() && xfan_port_name(null_mut(), 0).is_null());
        xfan_free(null_mut());
    }
    let (mut primary, mut c) = attach(|_| ());
    primary.send(0, 1);
    // SAFETY: a worker, and null.
    assert_eq!(unsafe { xfan_receive(c.worker, null_mut(), 64, 0) }, XFAN_INVALID);
    assert_eq!(c.receive(0, 0), XFAN_INVALID);
    invalid("cannot receive packets: the array is NULL or its capacity is 0");
    assert_eq!(c.receive(1, LONG), 1);
}

#[test]
fn errors_say_why_attaching_failed() {
    // SAFETY: null, which it accepts.
    assert!(unsafe { xfan_attach(null()) }.is_null());
    assert_eq!(error().0, XFAN_NO_SOCKET, "unless the tests run under xfan");
    let (code, text) = refused(&options(c"/nowhere/x.sock".as_ptr()));
    assert_eq!(code, XFAN_NO_DISPATCHER);
    assert!(text.starts_with("no dispatcher listens on /nowhere/x.sock: start one"), "{text}");
    let (code, text) = refused(&options(CString::new("x".repeat(200)).unwrap().as_ptr()));
    assert!((code, text.contains("cannot connect to")) == (XFAN_SYSTEM, true), "{code} {text}");
    let socket = c"/nowhere".as_ptr();
    assert_eq!(
        refused(&Options { flags: 2, ..options(socket) }),
        (XFAN_INVALID, "unknown flags: 0x2".into())
    );
    assert_eq!(refused(&Options { batch: 257, ..options(socket) }).0, XFAN_INVALID);
    let (code, text) = refused(&Options { group: c"\xff".as_ptr(), ..options(socket) });
    assert!((code, text.starts_with("the group is not UTF-8")) == (XFAN_INVALID, true), "{code} {text}");

    let socket = Socket::new();
    let path = path(&socket);
    let refusal = Refusal { code: RefusalCode::Occupied, message: "all have workers".into() };
    let dispatcher = reply_once(socket, Reply::Refused(refusal));
    let answer = refused(&options(path.as_ptr()));
    dispatcher.join().unwrap();
    assert_eq!(answer, (XFAN_REFUSED, "the dispatcher refused this worker: all have workers".into()));
}

/// The system allocator, with a count of each thread's allocations.
struct Counting;

thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: forwards every call to the system allocator, which upholds the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = TAKEN.try_with(|taken| taken.set(taken.get() + 1));
        // SAFETY: the caller upholds the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) };
    }
}

#[global_allocator]
static MEMORY: Counting = Counting;

#[test]
fn receiving_and_committing_allocates_nothing() {
    let (mut primary, mut c) = attach(|_| ());
    let counter = c.counter(c"packets".as_ptr());
    for _ in 0..100 {
        for content in 0..8 {
            primary.send(usize::from(content & 1), content);
        }
        let before = TAKEN.get();
        for _ in 0..2 {
            assert_eq!((c.receive(64, LONG), c.commit(1), c.commit(3)), (4, XFAN_OK, XFAN_OK));
            // SAFETY: a worker.
            assert_eq!(unsafe { xfan_counter_add(c.worker, counter, 4) }, XFAN_OK);
        }
        assert_eq!(c.receive(64, 0), 0);
        assert_eq!(TAKEN.get(), before);
        assert_eq!((primary.take_back(0), primary.take_back(1)), (4, 4));
    }
}
