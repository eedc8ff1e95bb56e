//! The dispatcher reads anything that a worker writes to its segment without harm, and vice versa.
//!
//! The first byte of the input is the number of descriptors to push. The next eight are a position
//! and the bytes to write over it. The rest is written there repeatedly.

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

    // The dispatcher's side: an index is valid or an error, and each lent frame comes back exactly
    // once.
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

    // The worker's side: it refuses the segment, or reads its slots as they are.
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
