//! `xfan-flow`: writes one line of JSON for each flow.
//!
//! A flow ends when it has been idle for long enough, when the table is full and it is the longest idle, or when the
//! worker ends. Nothing is lost silently: every packet is in a record, or counted as `packets_unparsed`.

mod community_id;
mod flow_id;
mod meter;
mod output;
mod record;
mod table;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use xfan_worker::{AttachError, CounterError, Received, RecvError, Worker};

use crate::meter::Meter;
use crate::output::{Output, OutputError};
use crate::table::FlowTable;

/// Writes flow records: a worker of the xfan packet dispatcher.
///
/// One JSON object per line: community_id proto src sport dst dport packets bytes first last tcp_flags member.
/// Of ICMP, sport and dport are the type of a message and that of its answer, or its code if nothing answers it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Join the dispatcher behind this control socket; the environment says it to workers that `xfan run` starts.
    #[arg(long, value_name = "SOCKET", visible_alias = "socket")]
    attach: Option<PathBuf>,
    /// The group to join; the dispatcher's first otherwise.
    #[arg(long)]
    group: Option<String>,
    /// The member to become, such as default/0; any vacant one otherwise.
    #[arg(long)]
    member: Option<String>,
    /// When the dispatcher is gone, wait for the next one on the same socket; the flows go on.
    #[arg(long)]
    reconnect: bool,
    /// File to append records to; {member} stands for the member, such as default-0; - is standard output.
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: String,
    /// Most flows in the table (about 150 bytes each); when it is full, the longest idle one is written out.
    #[arg(long, value_name = "FLOWS", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
    max_flows: u32,
    /// A flow without packets for so long is over.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    idle_timeout: Duration,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-flow: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let mut builder = Worker::builder().leave_on_signals();
    if let Some(socket) = &arguments.attach {
        builder = builder.socket(socket);
    }
    if let Some(group) = &arguments.group {
        builder = builder.group(group);
    }
    if let Some(member) = &arguments.member {
        builder = builder.member(member);
    }
    let mut worker = builder.attach()?;
    let output = Output::open(&arguments.output, worker.member())?;
    let idle_timeout = u64::try_from(arguments.idle_timeout.as_nanos()).unwrap_or(u64::MAX);
    let table = FlowTable::new(arguments.max_flows as usize, idle_timeout);
    let mut meter = Meter::new(&mut worker, table, output)?;

    let patience = arguments.reconnect.then_some(Duration::MAX).or(worker.survival());
    let end = receive(&mut worker, &mut meter, patience);
    if let Err(End::Output(error)) = end {
        return Err(error.into()); // nowhere to write the rest to
    }
    let totals = meter.finish()?;
    eprintln!(
        "xfan-flow {}: packets in flows {}, flows written {} (expired {}, evicted {}), packets of no flow {} (not IP, or cut off)",
        worker.member(),
        totals.packets,
        totals.written,
        totals.expired,
        totals.evicted,
        totals.unparsed
    );
    Ok(end?)
}

/// Why receiving ended before its time.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Receive(#[from] RecvError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Counter(#[from] CounterError),
    #[error(transparent)]
    Output(#[from] OutputError),
}

/// Until the end; with `patience` also beyond the dispatcher's.
fn receive(worker: &mut Worker, meter: &mut Meter, patience: Option<Duration>) -> Result<(), End> {
    loop {
        let received = match (worker.recv(Duration::from_millis(500)), patience) {
            (Err(RecvError::PrimaryGone), Some(patience)) => {
                match worker.reattach(patience) {
                    Err(AttachError::Leaving) => return Ok(()),
                    result => result?,
                }
                meter.go_on(worker)?;
                continue;
            }
            (received, _) => received?,
        };
        match received {
            Received::Packets(batch) => {
                meter.add(&batch)?;
                batch.commit();
            }
            Received::Idle => meter.idle()?,
            Received::Closed => return Ok(()),
        }
    }
}
