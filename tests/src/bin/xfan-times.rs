//! A worker that checks each packet's receive time and publishes counters: `packets`; `wrong`, the
//! packets whose time is earlier than that of the lane's previous packet, or later than the clock;
//! `first_ns` and `last_ns`, the times of the first and the last packet.

use std::process::ExitCode;
use std::time::Duration;

use xfan_shm::clock::monotonic_ns;
use xfan_worker::{Received, Worker};

fn main() -> ExitCode {
    match watch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-times: {error}");
            ExitCode::FAILURE
        }
    }
}

fn watch() -> Result<(), Box<dyn std::error::Error>> {
    let mut worker = Worker::builder().leave_on_signals().attach()?;
    let mut packets = worker.counter("packets")?;
    let mut wrong = worker.counter("wrong")?;
    let mut first = worker.counter("first_ns")?;
    let mut last = worker.counter("last_ns")?;
    let mut before = vec![0; worker.lanes()];
    let (mut seen, mut earliest, mut latest) = (0, u64::MAX, 0);
    loop {
        match worker.recv(Duration::from_millis(100))? {
            Received::Packets(batch) => {
                let before = &mut before[batch.lane().index()];
                for packet in &batch {
                    let time = u64::try_from(packet.time().as_nanos())?;
                    if time < *before || time > monotonic_ns() {
                        wrong.add(1);
                    }
                    *before = time;
                    (earliest, latest) = (earliest.min(time), latest.max(time));
                    seen += 1;
                }
                first.set(earliest);
                last.set(latest);
                packets.set(seen);
                batch.commit();
            }
            Received::Idle => {}
            Received::Closed => return Ok(()),
        }
    }
}
