//! `xfan-flow`: writes one line of JSON for each flow.
//!
//! A flow ends when it has been idle for `--idle-timeout`, when the table is full and the flow is
//! the longest idle one, or when the worker exits. Every packet is accounted for: it is part of a
//! record, or counted as `packets_unparsed`, or, if its record could not be written, as
//! `packets_lost`.

#![forbid(unsafe_code)]

mod community_id;
mod flow_id;
mod meter;
mod output;
mod record;
mod table;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use signal_hook::consts::SIGHUP;
use xfan_worker::{AttachError, CounterError, Received, RecvError, Worker, say};

use crate::meter::Meter;
use crate::output::Output;
use crate::table::FlowTable;

/// Writes flow records: a worker of the xfan packet dispatcher.
///
/// One JSON object per line: community_id proto src sport dst dport packets bytes first last
/// tcp_flags member. For ICMP, sport is the type of the message, and dport is the type of its
/// answer, or its code if the type has no answer.
///
/// SIGHUP reopens the output file. While the file cannot be written to, up to 16 MiB of records are
/// kept in memory.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Control socket of the dispatcher to join [default: the one that `xfan run` sets in the
    /// environment].
    #[arg(long, value_name = "SOCKET", visible_alias = "socket")]
    attach: Option<PathBuf>,
    /// Group to join [default: the dispatcher's first].
    #[arg(long)]
    group: Option<String>,
    /// Member to become, such as default/0 [default: any vacant member].
    #[arg(long)]
    member: Option<String>,
    /// When the dispatcher exits, keep the flows and wait for the next one on the same socket.
    #[arg(long)]
    reconnect: bool,
    /// File to append records to. {member} stands for the member, such as default-0. - is standard
    /// output.
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: String,
    /// Largest number of flows in the table, about 150 bytes each. When the table is full, the
    /// longest idle flow is written out.
    #[arg(long, value_name = "FLOWS", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..=1 << 26))]
    max_flows: u32,
    /// A flow without packets for this long has ended.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    idle_timeout: Duration,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format!("xfan-flow: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    // Before anything else: SIGHUP must not terminate the worker.
    let reopen = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGHUP, reopen.clone())?;
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
    let end = receive(&mut worker, &mut meter, patience, &reopen);
    let (totals, written) = meter.finish();
    let records = totals.records;
    say(format!(
        "xfan-flow {}: packets in flows {}, flows written {} (expired {}, evicted {}), packets of no flow {} (not IP, or cut off), \
         records lost {} of {} packets (unwritten at exit {})",
        worker.member(),
        totals.packets,
        records.written,
        totals.expired,
        totals.evicted,
        totals.unparsed,
        records.lost,
        records.packets_lost,
        totals.waited
    ));
    end?;
    written?;
    if records.lost > 0 {
        return Err(format!("lost {} flow records of {} packets", records.lost, records.packets_lost).into());
    }
    Ok(())
}

/// The error that ended receiving.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error(transparent)]
    Receive(#[from] RecvError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error(transparent)]
    Counter(#[from] CounterError),
}

/// Meters packets until the dispatcher closes the worker, or until the reader of the records has
/// closed its pipe. With `patience`, also waits that long for the next dispatcher.
fn receive(
    worker: &mut Worker,
    meter: &mut Meter,
    patience: Option<Duration>,
    reopen: &AtomicBool,
) -> Result<(), End> {
    while !meter.is_in_vain() {
        if reopen.swap(false, Ordering::Relaxed) {
            meter.reopen();
        }
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
                meter.add(&batch);
                batch.commit();
            }
            Received::Idle => meter.idle(),
            Received::Closed => return Ok(()),
        }
    }
    Ok(())
}
