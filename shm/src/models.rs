//! Models of ring and doorbell for loom, which runs every interleaving of their steps with every
//! value that a relaxed load may return. Run them with `scripts/loom`.
//!
//! Each model is small on purpose: an error between two laps or around a sleep shows in the first
//! few of them. Loom reports a lost wake-up as a deadlock, and a frame that is written while its
//! reader may still read it as a data race.

use std::collections::VecDeque;

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use crate::Descriptor;
use crate::doorbell::{Ringer, Sleeper};
use crate::ids::UmemOffset;
use crate::ring::heap::HeapRing;
use crate::ring::{Consumer, Producer, Reserved};
use crate::sync::{AtomicU32, Ordering};

/// Runs a model that is too large to be explored completely: every interleaving with at most
/// `preemptions` preemptions.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Packet memory. Loom fails the model if one thread reads a frame while another writes it.
type Frames = Arc<Vec<UnsafeCell<u32>>>;

fn frames(count: u32) -> Frames {
    Arc::new((0..count).map(|_| UnsafeCell::new(0)).collect())
}

/// Writes packet `n` into a frame, as the lane that owns it.
fn write(frames: &Frames, frame: u32, n: u32) {
    frames[frame as usize].with_mut(|body| {
        // SAFETY: loom runs one thread at a time, and fails the model if another one accesses the
        // frame concurrently.
        unsafe { *body = n }
    });
}

/// Reads a frame, as the worker that it was lent to.
fn read(frames: &Frames, frame: u32) -> u32 {
    frames[frame as usize].with(|body| {
        // SAFETY: loom runs one thread at a time, and fails the model if another one writes the
        // frame concurrently.
        unsafe { *body }
    })
}

/// A model of `bell`: remembers rings, and sleeps until there is one.
#[derive(Default)]
struct Bell {
    rings: Mutex<u32>,
    rung: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rings.lock().unwrap() += 1;
        self.rung.notify_one();
    }

    fn sleep(&self) -> u32 {
        let mut rings = self.rings.lock().unwrap();
        while *rings == 0 {
            rings = self.rung.wait(rings).unwrap();
        }
        std::mem::take(&mut *rings)
    }
}

/// Moves `items` packets through a ring of `slots` slots, filled and committed in batches of up to
/// `batch`. The ring starts two laps before positions wrap around. There are as many frames as
/// slots, and each is overwritten as soon as it comes back.
fn packets_pass_and_frames_return(slots: u32, items: u32, batch: u32) {
    let start = 0u32.wrapping_sub(2 * slots);
    let ring = Arc::new(HeapRing::starting_at(slots, start));
    let memory = frames(slots);
    let mut producer = Producer::starting_at(ring.clone(), start);
    let mut consumer = Consumer::starting_at(ring, start);

    let theirs = memory.clone();
    let worker = thread::spawn(move || {
        let mut next = 0;
        while next < items {
            let mut expected = next;
            let seen = consumer.scan(batch, |_, packet| {
                assert_eq!(packet.hash, expected, "packets come in order");
                assert_eq!(read(&theirs, packet.offset.0), expected, "with their contents");
                expected += 1;
                true
            });
            if seen == 0 {
                thread::yield_now();
            } else {
                consumer.commit(seen);
                next += seen;
            }
        }
        assert_eq!(consumer.peek(0), None, "and no more than were sent");
    });

    let mut free: Vec<u32> = (0..slots).collect();
    let mut reserved = Vec::new();
    let fill = |producer: &mut Producer<_>, reserved: &mut Vec<(Reserved, Descriptor)>| {
        for (slot, descriptor) in reserved.drain(..).rev() {
            // SAFETY: the ring exists, and each slot is filled once.
            unsafe { slot.fill(descriptor) };
        }
        producer.filled();
    };
    let mut sent = VecDeque::new();
    let take = |producer: &mut Producer<_>, sent: &mut VecDeque<u32>, free: &mut Vec<u32>| {
        let count = producer.take_back(|offset| {
            assert_eq!(Some(offset.0), sent.pop_front(), "frames return in order, once");
            free.push(offset.0);
        });
        if count.unwrap() == 0 {
            thread::yield_now();
        }
    };
    for n in 0..items {
        while free.is_empty() {
            fill(&mut producer, &mut reserved);
            take(&mut producer, &mut sent, &mut free);
        }
        let frame = free.remove(0);
        write(&memory, frame, n);
        sent.push_back(frame);
        let descriptor = Descriptor { offset: UmemOffset(frame), hash: n, ..Descriptor::default() };
        reserved.push((producer.reserve().expect("as many slots as frames"), descriptor));
        // The first batch has one packet, so that a later batch crosses the end of a lap.
        if n % batch == 0 {
            take(&mut producer, &mut sent, &mut free);
            fill(&mut producer, &mut reserved);
        }
    }
    fill(&mut producer, &mut reserved);
    while free.len() < slots as usize {
        take(&mut producer, &mut sent, &mut free);
    }
    assert_eq!(producer.lent(), 0);
    worker.join().unwrap();
}

#[test]
fn one_slot_across_the_wrap_of_positions() {
    check(3, || packets_pass_and_frames_return(1, 4, 1));
}

#[test]
fn two_slots_across_the_wrap_of_positions() {
    check(2, || packets_pass_and_frames_return(2, 5, 1));
}

#[test]
fn two_slots_committed_in_batches() {
    check(3, || packets_pass_and_frames_return(2, 4, 2));
}

/// A consumer dies with uncommitted packets. What it committed and what it did not are all packets.
#[test]
fn nothing_is_lost_with_a_dead_consumer() {
    loom::model(|| {
        let ring = Arc::new(HeapRing::new(2));
        let mut producer = Producer::new(ring.clone());
        let mut consumer = Consumer::new(ring);
        let worker = thread::spawn(move || {
            if consumer.peek(0).is_some() {
                consumer.commit(1);
            }
        });
        let mut pushed = 0;
        let mut back = Vec::new();
        for n in 0..3 {
            pushed += u32::from(producer.push(Descriptor { offset: UmemOffset(n), ..Descriptor::default() }));
            producer.take_back(|offset| back.push(offset.0)).unwrap();
        }
        // The worker may still run: the dispatcher does not wait for a worker that it has evicted.
        producer.take_all(|packet| back.push(packet.offset.0));
        assert!(back.into_iter().eq(0..pushed));
        worker.join().unwrap();
    });
}

/// A worker that takes `items` packets, and sleeps on its bell when there are none. Returns how
/// often it slept.
fn sleeper(bell: &Bell, epoch: &AtomicU32, items: u32, mut take: impl FnMut() -> u32) -> u32 {
    let mut sleeper = Sleeper::default();
    let (mut taken, mut sleeps) = (0, 0);
    while taken < items {
        let mut now = take();
        if now == 0 {
            sleeper.announce(epoch);
            sleeps += 1;
            now = take();
            if now == 0 {
                bell.sleep(); // a deadlock, if the bell is never rung
            }
            sleeper.awake(epoch);
        }
        taken += now;
    }
    sleeps
}

/// One lane and one worker. The work is the packets in the ring between them.
#[test]
fn no_wake_up_is_lost() {
    const ITEMS: u32 = 2;
    loom::model(|| {
        let ring = Arc::new(HeapRing::new(2));
        let mut producer = Producer::new(ring.clone());
        let mut consumer = Consumer::new(ring);
        let (bell, epoch) = (Arc::new(Bell::default()), Arc::new(AtomicU32::new(0)));
        let (their_bell, their_epoch) = (bell.clone(), epoch.clone());
        let worker = thread::spawn(move || {
            sleeper(&their_bell, &their_epoch, ITEMS, || {
                let found = u32::from(consumer.peek(0).is_some());
                if found == 1 {
                    consumer.commit(1);
                }
                found
            })
        });
        let mut ringer = Ringer::default();
        let mut rings = 0;
        for _ in 0..ITEMS {
            assert!(producer.push(Descriptor::default()));
            Ringer::fence();
            if ringer.must_ring(&epoch) {
                rings += 1;
                bell.ring();
            }
        }
        let sleeps = worker.join().unwrap();
        assert!(rings <= sleeps, "{rings} rings for {sleeps} sleeps");
    });
}

/// Two lanes and one worker. Each lane remembers its own rings and does not rely on the other's.
#[test]
fn two_ringers_wake_one_sleeper() {
    check(3, || {
        let work = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let (bell, epoch) = (Arc::new(Bell::default()), Arc::new(AtomicU32::new(0)));
        let ringers: Vec<_> = (0..2)
            .map(|lane| {
                let (work, bell, epoch) = (work.clone(), bell.clone(), epoch.clone());
                thread::spawn(move || {
                    work[lane].store(1, Ordering::Relaxed);
                    Ringer::fence();
                    if Ringer::default().must_ring(&epoch) {
                        bell.ring();
                    }
                })
            })
            .collect();
        let mut taken = [0; 2];
        sleeper(&bell, &epoch, 2, || {
            let mut found = 0;
            for lane in 0..2 {
                let published = work[lane].load(Ordering::Relaxed);
                found += published - taken[lane];
                taken[lane] = published;
            }
            found
        });
        for ringer in ringers {
            ringer.join().unwrap();
        }
    });
}
