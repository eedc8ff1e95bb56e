//! Prints the measurements of `xfan-bench net` as tables.

use crate::net::{LOSSLESS, Run};
use crate::receivers::Receiver;
use crate::spread::Spread;

/// The most busy time with one worker, relative to raw AF_XDP, wanted for 64-byte packets.
const WANTED_BUSY: f64 = 3.2;
/// The least lossless rate with one worker, relative to AF_PACKET fanout, wanted for 64-byte
/// packets.
const WANTED_RATE: f64 = 2.5;

/// One measurement as a line.
pub fn line(run: &Run) -> String {
    format!(
        "round {}, {:4} bytes, {:8}  {:.2} of {:.2} Mpps, lost {:.3} %, busy {:.1} ns, line {:.0}/{:.0} ns",
        run.round,
        run.frame_bytes,
        run.receiver,
        run.received_pps / 1e6,
        run.offered_pps / 1e6,
        run.loss * 100.0,
        run.busy_ns(),
        run.line_ns[0],
        run.line_ns[1]
    )
}

/// Prints the table of one frame size, and the ratios.
pub fn print(frame_bytes: u16, seconds: f64, receivers: &[Receiver], runs: &[Run]) {
    let rounds = runs.iter().map(|run| run.round).max().unwrap_or(0);
    println!(
        "\n{frame_bytes}-byte frames, flat out; medians of {rounds} rounds of {seconds} s (in brackets: least to most)"
    );
    println!("            Mpps           lossless  lost %           busy ns per packet           line");
    println!("receiver    sent received  Mpps      median  most     all in all      lane  reader  ns");
    let of =
        |receiver| runs.iter().filter(move |run| run.frame_bytes == frame_bytes && run.receiver == receiver);
    for &receiver in receivers {
        let spread = |figure: fn(&Run) -> f64| Spread::of(of(receiver).map(figure));
        let busy = spread(Run::busy_ns);
        let loss = spread(|run| run.loss * 100.0);
        let lossless = Spread::of(of(receiver).filter_map(|run| run.lossless_pps)).median / 1e6;
        let lane = if matches!(receiver, Receiver::Xfan(_)) {
            format!("{:.1}", spread(|run| run.lane_ns).median)
        } else {
            "-".into()
        };
        println!(
            "{receiver:10} {:5.2} {:8.2}  {:8}  {:6.2} {:6.2}  {:5.1} ({:.1} to {:.1}) {lane:>5} {:7.1}  {:.0}",
            spread(|run| run.offered_pps).median / 1e6,
            spread(|run| run.received_pps).median / 1e6,
            if receiver == Receiver::Raw { "-".into() } else { format!("{lossless:.2}") },
            loss.median,
            loss.max,
            busy.median,
            busy.min,
            busy.max,
            spread(|run| run.reader_ns).median,
            spread(|run| f64::midpoint(run.line_ns[0], run.line_ns[1])).median,
        );
    }
    println!("ratios, round by round; lossless: at most {} % lost", LOSSLESS * 100.0);
    for &receiver in receivers {
        let Receiver::Xfan(workers) = receiver else { continue };
        let ratio = |other, figure: fn(&Run) -> f64| {
            let pairs = of(receiver).zip(of(other)).filter(|(one, other)| one.round == other.round);
            Spread::of(pairs.map(|(one, other)| figure(one) / figure(other)))
        };
        let wanted = |text: String| if (workers, frame_bytes) == (1, 64) { text } else { String::new() };
        let busy = wanted(format!(", wanted: at most {WANTED_BUSY}"));
        print_ratio(&ratio(Receiver::Raw, Run::busy_ns), &format!("{receiver} busy time : raw"), &busy);
        let rate = wanted(format!(", wanted: at least {WANTED_RATE}"));
        let fanout = Receiver::Fanout(workers);
        let lossless = |run: &Run| run.lossless_pps.unwrap_or(f64::NAN);
        print_ratio(&ratio(fanout, lossless), &format!("{receiver} lossless rate : {fanout}"), &rate);
    }
}

/// Prints a ratio over all rounds.
fn print_ratio(spread: &Spread, name: &str, wanted: &str) {
    println!("  {name:32} {:.2} ({:.2} to {:.2}){wanted}", spread.median, spread.min, spread.max);
}
