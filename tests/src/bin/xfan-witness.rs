//! A worker that records every packet of the generator before it commits it, for
//! [`xfan_tests::witness`].

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use xfan_tests::generator::sequence_of;
use xfan_tests::witness::Sighting;
use xfan_worker::{Received, Worker};

/// A worker that records what it sees.
#[derive(Parser)]
struct Arguments {
    /// Attach to the dispatcher behind this control socket
    #[arg(long)]
    attach: Option<PathBuf>,
    /// The folder for its file
    folder: PathBuf,
}

fn main() -> ExitCode {
    match witness(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-witness: {error}");
            ExitCode::FAILURE
        }
    }
}

fn witness(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let mut file = File::create_new(arguments.folder.join(format!("seen-{}", std::process::id())))?;
    let mut builder = Worker::builder().leave_on_signals();
    if let Some(socket) = &arguments.attach {
        builder = builder.socket(socket);
    }
    let mut worker = builder.attach()?;
    let mut seen = Vec::new();
    loop {
        match worker.recv(Duration::from_millis(100))? {
            Received::Packets(batch) => {
                seen.clear();
                for packet in &batch {
                    let Some(number) = sequence_of(packet.data()) else { continue };
                    seen.extend(
                        Sighting {
                            number: u32::try_from(number)?,
                            flow: packet.hash(),
                            stream: u16::try_from(packet.data().len())?,
                            redelivered: packet.is_redelivered(),
                        }
                        .to_bytes(),
                    );
                }
                // The slots may belong to other packets by now.
                if !batch.is_current() {
                    return Err("evicted".into());
                }
                if seen.len() != batch.len() * Sighting::BYTES {
                    return Err("a packet that is not from the generator".into());
                }
                // What a killed process has written persists, and it writes before it commits.
                file.write_all(&seen)?;
                batch.commit();
            }
            Received::Idle => {}
            Received::Closed => return Ok(()),
        }
    }
}
