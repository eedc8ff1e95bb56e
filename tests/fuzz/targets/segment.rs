//! Whatever a worker writes to its segment, and a dispatcher to its own, the other reads without harm.
//!
//! The first byte of the input says how many descriptors are pushed; the next eight are a position and what is written over;
//! the rest is written there, again and again.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use xfan_shm::Descriptor;
use xfan_shm::ids::{LaneId, UmemOffset};
use xfan_shm::layout::{COUNTERS, Down, Geometry, SharedRing, Up};
use xfan_shm::ring::{Consumer, Producer};
use xfan_shm::segment;

const GEOMETRY: Geometry = Geometry { lanes: 2, slots: 64 };

fn scribble(file: &File, bytes: usize, position: usize, noise: &[u8]) {
    let position = position % bytes;
    let end = bytes - position;
    file.write_all_at(&noise[..noise.len().min(end)], position as u64).unwrap();
}

fuzz_target!(|input: &[u8]| {
    let Some((&[pushed, p0, p1, q0, q1], noise)) = input.split_first_chunk::<5>() else { return };
    let down_fd = segment::create("fuzz-down", GEOMETRY.down_bytes()).unwrap();
    let up_fd = segment::create("fuzz-up", GEOMETRY.up_bytes()).unwrap();
    let down = Down::create(&down_fd, GEOMETRY).unwrap();
    let up = Up::create(&up_fd, GEOMETRY).unwrap();
    let (down_file, up_file) = (File::from(down_fd), File::from(up_fd));

    // The dispatcher's side: an index is either possible or an error, and no frame comes back twice or from nowhere.
    let mut producer = Producer::new(SharedRing::new(&down, &up, LaneId(0)));
    for number in 0..u32::from(pushed) {
        producer.push(Descriptor { offset: UmemOffset(number), ..Descriptor::default() });
    }
    let lent = producer.lent();
    scribble(&up_file, GEOMETRY.up_bytes(), usize::from(u16::from_le_bytes([p0, p1])), noise);
    let mut back = Vec::new();
    let taken = producer.take_back(|offset| back.push(offset.0));
    let count = taken.as_ref().copied().unwrap_or(0);
    assert_eq!(count as usize, back.len());
    assert!(back.iter().copied().eq(0..count) && count <= lent);
    producer.take_all(|descriptor| back.push(descriptor.offset.0));
    assert!(back.iter().copied().eq(0..lent), "every frame comes back once");
    assert!(up.published_counters().all(|(name, _)| xfan_shm::layout::counter_name_is_valid(&name)));
    assert!(up.published_counters().count() <= COUNTERS);

    // The worker's side: a segment is refused, or its slots are read as what they are.
    scribble(&down_file, GEOMETRY.down_bytes(), usize::from(u16::from_le_bytes([q0, q1])), noise);
    if let (Ok(down), Ok(up)) = (Down::open(&down_file, GEOMETRY), Up::open(&up_file, GEOMETRY)) {
        for lane in 0..GEOMETRY.lanes {
            let mut consumer = Consumer::new(SharedRing::new(&down, &up, LaneId(lane)));
            let found = consumer.scan(GEOMETRY.slots, |_, _| true);
            assert!(found <= GEOMETRY.slots);
            consumer.commit(found);
        }
        let _ = down.phase();
    }
});
