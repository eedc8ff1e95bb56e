//! From one end of a veth pair to the other: the packets that arrive, and what each costs the
//! receivers.
//!
//! ```text
//!   CPU 0                                              CPU 1
//!   generator ──► tx0 ═ veth ═ rx0 ──► kernel's RX ──► raw AF_XDP, or AF_PACKET fanout to N,
//!                                                      or xfan with N workers
//! ```
//!
//! Each round runs all receivers in turn, so that disturbances of the machine affect them alike. On
//! a veth the sender and the kernel's receive path share a CPU and are slower than most receivers.
//! The busy time per packet therefore tells receivers apart; the rate shows how much of CPU 0 a way
//! to receive costs.

use std::time::Duration;

use xfan_tests::generator::{self, End, Load};
use xfan_tests::netns::{self, Netns};
use xfan_tests::require;
use xfan_tests::veth::{Veth, VethConfig};
use xfan_tests::watchdog::Watchdog;

use crate::Failure;
use crate::line::round_trip_ns;
use crate::receivers::{CPU, Receiver};
use crate::{table, tally};

/// The sending CPU. A veth puts redirected frames into the RX queue of the same number.
const SENDER_CPU: usize = 0;
/// The fraction of packets that may be lost at a lossless rate: the cost of one preemption in a
/// second.
pub const LOSSLESS: f64 = 0.001;
/// Steps of the search for the highest lossless rate: the last one is 1/32 of the received rate.
const STEPS: u32 = 5;
/// The longest time for a run in addition to the measurement.
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of `xfan-bench net`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Bytes of a frame, without FCS
    #[arg(long, default_value = "64,1500", value_name = "LIST", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u16).range(60..=1514))]
    sizes: Vec<u16>,
    /// Workers of xfan, and processes of AF_PACKET fanout
    #[arg(long, default_value = "1,2", value_name = "LIST", value_delimiter = ',')]
    workers: Vec<usize>,
    /// Rounds
    #[arg(long, default_value_t = 5, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    seconds: f64,
    /// Print one JSON object per measurement instead of tables
    #[arg(long)]
    json: bool,
}

/// One measurement.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Run {
    pub round: u32,
    pub frame_bytes: u16,
    #[serde(serialize_with = "by_name")]
    pub receiver: Receiver,
    /// Frames per second that were made, and that arrived.
    pub offered_pps: f64,
    pub received_pps: f64,
    /// The fraction of the frames made that did not arrive.
    pub loss: f64,
    /// Busy nanoseconds per packet that arrived, of the lane and of the readers of the packets.
    pub lane_ns: f64,
    pub reader_ns: f64,
    /// Round trip of a cache line between the two CPUs before and after, in nanoseconds.
    pub line_ns: [f64; 2],
    /// The highest rate with a loss of at most [`LOSSLESS`], in frames per second; none for raw.
    pub lossless_pps: Option<f64>,
}

impl Run {
    /// Busy nanoseconds per packet in total.
    pub fn busy_ns(&self) -> f64 {
        self.lane_ns + self.reader_ns
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde requires this signature
fn by_name<S: serde::Serializer>(receiver: &Receiver, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(receiver)
}

/// Runs the benchmark.
///
/// # Errors
/// A sentence that says what failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    if let Some(reason) = require::missing() {
        return Err(reason.into());
    }
    clean_up_on_signals()?;
    let bench = Bench::new(Duration::try_from_secs_f64(options.seconds)?)?;
    let mut receivers = vec![Receiver::Raw];
    receivers.extend(options.workers.iter().map(|&workers| Receiver::Xfan(workers)));
    receivers.extend(options.workers.iter().map(|&processes| Receiver::Fanout(processes)));
    let mut runs = Vec::new();
    for round in 1..=options.rounds {
        for &frame_bytes in &options.sizes {
            for &receiver in &receivers {
                let run = bench.measure(round, frame_bytes, receiver)?;
                if options.json {
                    println!("{}", serde_json::to_string(&run)?);
                } else {
                    eprintln!("{}", table::line(&run));
                }
                runs.push(run);
            }
        }
    }
    if !options.json {
        options.sizes.iter().for_each(|size| table::print(*size, options.seconds, &receivers, &runs));
    }
    Ok(())
}

/// Makes SIGTERM and SIGINT remove the namespace and end the process. The kernel ends its children.
fn clean_up_on_signals() -> nix::Result<()> {
    tally::heed_signals()?;
    std::thread::spawn(|| {
        while tally::goes_on() {
            std::thread::sleep(Duration::from_millis(50));
        }
        netns::remove_all();
        std::process::exit(1);
    });
    Ok(())
}

/// The veth pair, and how long to use it.
struct Bench {
    namespace: Netns,
    time: Duration,
}

impl Bench {
    fn new(time: Duration) -> Result<Self, Failure> {
        let (namespace, _) = Veth::in_namespace(&VethConfig::queues(2)).map_err(|error| error.to_string())?;
        Ok(Bench { namespace, time })
    }

    /// Measures a receiver at full speed and, except for raw, at its highest lossless rate.
    fn measure(&self, round: u32, frame_bytes: u16, receiver: Receiver) -> Result<Run, Failure> {
        let mut run = self.send(round, frame_bytes, receiver, None)?;
        if receiver == Receiver::Raw {
            return Ok(run);
        }
        let (mut good, mut bad) = (run.received_pps, run.received_pps);
        if run.loss > LOSSLESS {
            good = 0.0;
            for _ in 0..STEPS {
                let middle = f64::midpoint(good, bad);
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // frames per second
                let pace = middle as u64;
                let paced = self.send(round, frame_bytes, receiver, Some(pace.max(generator::MIN_PACE)))?;
                if paced.loss > LOSSLESS {
                    bad = middle;
                } else {
                    good = paced.received_pps;
                }
            }
        }
        run.lossless_pps = Some(good);
        Ok(run)
    }

    /// Starts a receiver, sends, and collects the results.
    #[allow(clippy::cast_precision_loss)] // rates and times
    fn send(
        &self,
        round: u32,
        frame_bytes: u16,
        receiver: Receiver,
        frames_per_second: Option<u64>,
    ) -> Result<Run, Failure> {
        let _watchdog = Watchdog::new(&receiver.to_string(), self.time + PATIENCE);
        let before = round_trip_ns(SENDER_CPU, CPU);
        let running = receiver.start(&self.namespace)?;
        let load = Load {
            frame_bytes,
            frames_per_second,
            cpu: SENDER_CPU,
            ..Load::onto("tx0", End::After(self.time))
        };
        let sent = self.namespace.run(|| generator::run(&load))?;
        let received = running.end(sent.sent)?;
        let per_packet = |ns: u64| ns as f64 / received.packets.max(1) as f64;
        let loss = 1.0 - received.packets as f64 / sent.offered as f64;
        Ok(Run {
            round,
            frame_bytes,
            receiver,
            offered_pps: sent.offered_per_second,
            received_pps: sent.offered_per_second * (1.0 - loss),
            loss,
            lane_ns: per_packet(received.lane_busy_ns),
            reader_ns: per_packet(received.reader_busy_ns),
            line_ns: [before, round_trip_ns(SENDER_CPU, CPU)],
            lossless_pps: None,
        })
    }
}
