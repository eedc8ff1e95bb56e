//! One of the other ways, at random.

use std::time::SystemTime;

use clap::Parser;
use nix::sys::signal::{Signal, raise};
use xfan_shm::protocol::{self, Reply, Request};

use crate::membership::{Membership, dial};
use crate::{Outcome, PAUSE, Way, run};

/// The ways to choose from.
const WAYS: [&str; 27] = [
    "deaf",
    "deaf --hidden",
    "fork",
    "again",
    "version 1",
    "noise 1",
    "noise 2",
    "pages",
    "silent",
    "ready-twice",
    "seal",
    "early",
    "hold 300",
    "flood 12",
    "order 300",
    "jam",
    "brood none",
    "brood session",
    "brood family",
    "brood comet",
    "swarm 30",
    "output shut",
    "output fill",
    "output forge",
    "output flood",
    "output close",
    "output leave",
];

/// Behaves until packets arrive, since a failed start proves nothing. Then misbehaves in one of the
/// ways, and does at once what it would do at SIGUSR1.
pub fn riot(seed: u64) -> Outcome<()> {
    let membership = Membership::join()?;
    let control = dial()?;
    loop {
        let (Reply::Stats(report), _) = protocol::ask(&control, &Request::Stats)? else {
            return Err("no report".into());
        };
        let list = |value: &'_ serde_json::Value| value.as_array().cloned().unwrap_or_default();
        let lanes = list(&report["ports"]).into_iter().flat_map(|port| list(&port["lanes"]));
        let redirected = lanes.map(|lane| lane["xdp"]["redirect"].clone());
        if redirected.filter_map(|count| count.as_u64()).sum::<u64>() > 0 {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    drop((membership, control));
    // Another seed at each start.
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros();
    let chance = (u64::try_from(time)? ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let way = WAYS[usize::try_from(chance)? % WAYS.len()];
    println!("riots: {way}");
    // The signal stays pending until it is waited for.
    raise(Signal::SIGUSR1)?;
    run(&Way::try_parse_from(["xfan-hostile"].into_iter().chain(way.split(' ')))?)
}
