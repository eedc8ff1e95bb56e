//! A minimal dispatcher, with only what a worker sees of one: a socket, segments, rings, a
//! doorbell.
#![allow(dead_code)] // each test binary uses a part

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept, bind, listen, socket};
use xfan_shm::Descriptor;
use xfan_shm::bell;
use xfan_shm::clock::{monotonic_ns, stamp};
use xfan_shm::doorbell::Ringer;
use xfan_shm::ids::{LaneId, PortId, UmemOffset};
use xfan_shm::layout::{Down, Geometry, SharedRing, Up};
use xfan_shm::protocol::{self, Attach, Attached, MAX_REQUEST, Reply, Request};
use xfan_shm::ring::Producer;
use xfan_shm::segment::{self, Mapping};
use xfan_worker::{AttachError, Builder, Worker};

/// Bytes of a frame.
pub const FRAME: usize = 64;
/// Frames in the packet memory.
pub const FRAMES: usize = 64;

/// A listening control socket.
pub struct Socket {
    listener: OwnedFd,
    pub path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Socket {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        Socket { listener, path, _folder: folder }
    }

    /// Accepts one connection and reads its first request.
    pub fn accept(&self) -> (OwnedFd, Request) {
        // SAFETY: accept(2) returned a new descriptor, which nobody else owns.
        let connection = unsafe { OwnedFd::from_raw_fd(accept(self.listener.as_raw_fd()).unwrap()) };
        let (request, _) = protocol::receive(&connection, MAX_REQUEST).unwrap();
        (connection, request)
    }
}

/// A dispatcher with one worker.
pub struct Primary {
    pub down: Down,
    pub up: Up,
    pub connection: OwnedFd,
    pub request: Attach,
    pub lanes: Vec<Producer<SharedRing>>,
    umem: Mapping,
    doorbell: OwnedFd,
    ringer: Ringer,
    next_frame: usize,
}

/// The default answer to a worker: two lanes, and sleep as soon as the rings are empty.
pub fn attached() -> Attached {
    Attached {
        member: "default/0".into(),
        ports: vec!["east".into(), "west".into()],
        geometry: Geometry { lanes: 2, slots: 8 },
        umem_bytes: (FRAME * FRAMES) as u64,
        core: None,
        spin_ns: 0,
        yield_ns: 0,
    }
}

/// Attaches a worker to a dispatcher that gives this answer.
pub fn attach(answer: Attached) -> (Primary, Worker) {
    let (primary, worker) = try_attach(answer, |builder| builder);
    (primary, worker.unwrap())
}

pub fn try_attach(
    answer: Attached,
    options: impl FnOnce(Builder) -> Builder,
) -> (Primary, Result<Worker, AttachError>) {
    let socket = Socket::new();
    let path = socket.path.clone();
    let primary = thread::spawn(move || Primary::answer(&socket, &answer));
    let worker = options(Worker::builder().socket(path)).attach();
    (primary.join().unwrap(), worker)
}

/// Answers one worker with one message, in a thread of its own.
pub fn reply_once(socket: Socket, reply: Reply) -> JoinHandle<()> {
    thread::spawn(move || {
        let (connection, _) = socket.accept();
        protocol::send(&connection, &reply, &[]).unwrap();
    })
}

impl Primary {
    /// Accepts a worker and makes it a member.
    pub fn answer(socket: &Socket, answer: &Attached) -> Self {
        let (connection, request) = socket.accept();
        let Request::Attach(request) = request else { panic!("{request:?}") };
        let create = |name, length| segment::create(name, length).unwrap();
        let (umem_fd, down_fd, up_fd) = (
            create("umem", FRAME * FRAMES),
            create("down", answer.geometry.down_bytes()),
            create("up", answer.geometry.up_bytes()),
        );
        let umem = Mapping::read_write(&umem_fd, FRAME * FRAMES).unwrap();
        let (down, up) =
            (Down::create(&down_fd, answer.geometry).unwrap(), Up::create(&up_fd, answer.geometry).unwrap());
        let (doorbell, sleeper) = bell::create().unwrap();
        let read_only = |fd| segment::reopen_read_only(fd).unwrap();
        let (umem_fd, down_fd) = (read_only(&umem_fd), read_only(&down_fd));
        let fds = [umem_fd.as_fd(), down_fd.as_fd(), up_fd.as_fd(), sleeper.as_fd()];
        protocol::send(&connection, &Reply::Attached(answer.clone()), &fds).unwrap();
        let lanes = (0..answer.geometry.lanes)
            .map(|lane| Producer::new(SharedRing::new(&down, &up, LaneId(lane))))
            .collect();
        // A worker that cannot use the segments closes the connection instead.
        if protocol::receive::<Request>(&connection, MAX_REQUEST)
            .is_ok_and(|(said, _)| said == Request::Ready)
        {
            protocol::send(&connection, &Reply::Joined, &[]).unwrap();
        }
        Primary {
            down,
            up,
            connection,
            request,
            lanes,
            umem,
            doorbell,
            ringer: Ringer::default(),
            next_frame: 0,
        }
    }

    /// Publishes a packet whose bytes are all `content`, and rings if the worker sleeps. Returns
    /// whether it rang.
    pub fn send(&mut self, lane: usize, content: u8) -> bool {
        self.send_frame(lane, &[content; FRAME])
    }

    /// Like [`send`](Self::send), with these bytes. The first one is also the hash.
    pub fn send_frame(&mut self, lane: usize, bytes: &[u8; FRAME]) -> bool {
        let offset = self.next_frame % FRAMES * FRAME;
        self.next_frame += 1;
        // SAFETY: `write` requires valid memory: `offset` is that of one of the mapping's `FRAMES`
        // frames. Bytes need no alignment. No worker reads the frame before its descriptor is
        // pushed.
        unsafe { self.umem.address().add(offset).cast::<[u8; FRAME]>().write(*bytes) };
        let descriptor = Descriptor {
            offset: UmemOffset(u32::try_from(offset).unwrap()),
            time: stamp(monotonic_ns()),
            length: u16::try_from(FRAME).unwrap(),
            port: PortId(u8::try_from(lane).unwrap()),
            flags: 0,
            hash: bytes[0].into(),
        };
        assert!(self.lanes[lane].push(descriptor));
        Ringer::fence();
        let ring = self.ringer.must_ring(self.up.epoch());
        if ring {
            bell::ring(&self.doorbell);
        }
        ring
    }

    /// Takes back the packets that the worker has committed on a lane. Returns their number.
    pub fn take_back(&mut self, lane: usize) -> u32 {
        self.lanes[lane].take_back(|_| ()).unwrap()
    }
}
