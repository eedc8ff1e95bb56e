//! A worker that misbehaves, for tests. It speaks the protocol itself, without the SDK, since no SDK would do these things.
//!
//! Of the members that a dispatcher starts only the first is hostile: the others become `xfan-count`, or, where it riots,
//! `xfan-witness`.

mod brood;
mod connections;
mod output;
mod place;
mod probe;
mod riot;
mod segment;
mod traits;

use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::getppid;
use xfan_shm::layout::VERSION;
use xfan_shm::protocol::{self, ENV_MEMBER, MAX_REPLY, Reply};

use crate::output::{Deed, misuse};
use crate::place::{Place, ask, member, token};
use crate::probe::{descriptors, probe_places, probe_processes, probe_segments, probe_self};

/// Between two looks, or two rounds of noise.
const PAUSE: Duration = Duration::from_millis(2);

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A worker that misbehaves. Each way waits for SIGTERM in the end, unless it says otherwise.
#[derive(Parser)]
enum Way {
    /// Never takes a packet, and ignores SIGTERM.
    Deaf {
        /// Goes to its parent's process group, and does not want to hear of its end.
        #[arg(long)]
        hidden: bool,
    },
    /// At SIGUSR1 ends with status 0, and leaves a child that keeps its connection for a while.
    Fork,
    /// At SIGUSR1 attaches and hangs up, again and again.
    Again,
    /// Survives its primary, and then speaks another version of the protocol.
    Relic,
    /// Speaks another version of the protocol.
    Version { version: u32 },
    /// Tries all that a worker must not be able to do, and prints what came of each.
    Probe,
    /// At SIGUSR1 fills its own segment with noise, again and again, until SIGTERM.
    Noise { seed: u64 },
    /// At SIGUSR1 tries to take the pages of its own segment away from the dispatcher, again and
    /// again.
    Pages,
    /// Takes a place and never says that it is ready.
    Silent,
    /// Takes a place and says twice that it is ready.
    ReadyTwice,
    /// Does not seal its own segment against further writers before it is ready, but so that nobody
    /// can.
    Seal,
    /// Takes pages of its own segment away before it is ready.
    Early,
    /// Holds as many connections as it gets.
    Hold { connections: usize },
    /// At SIGUSR1 asks for reports on as many connections as it gets, without a pause.
    Flood { connections: usize },
    /// Orders so many times that a worker be removed, and ends.
    Order { times: usize },
    /// Becomes xfan-count, which is told that this descriptor is its connection.
    Robbed { number: String },
    /// Prints how it is scheduled, limited and signalled.
    Traits,
    /// Prints what came of each call that the sandbox refuses.
    Sandbox,
    /// Starts a daemon that does not want to end; at SIGUSR1 ends with status 0.
    Brood { disguise: brood::Disguise },
    /// At SIGUSR1 starts so many processes, if it can, and prints how many it could.
    Swarm { count: u32 },
    /// At SIGUSR1 takes so many MiB of memory, and prints that it has.
    Glutton { mib: usize },
    /// At SIGUSR1 stuffs its doorbell so that who rings it blocks, if it can, and claims to sleep.
    Jam,
    /// At SIGUSR1 misuses its descriptors 0 to 2.
    Output { deed: Deed },
    /// Once packets come, goes one of the other ways, by chance.
    Riot { seed: u64, folder: String },
}

fn main() -> ExitCode {
    let way = Way::parse();
    if std::env::var(ENV_MEMBER).is_ok_and(|member| !member.ends_with("/0")) {
        let (program, argument) = match &way {
            Way::Riot { folder, .. } => ("xfan-witness", Some(folder)),
            _ => ("xfan-count", None),
        };
        let program = std::env::current_exe().unwrap_or_default().with_file_name(program);
        eprintln!("xfan-hostile: {}", Command::new(program).args(argument).exec());
        return ExitCode::FAILURE;
    }
    match run(&way) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xfan-hostile: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(way: &Way) -> Outcome<()> {
    // Before anything is opened.
    let control = std::env::var(protocol::ENV_CONTROL_FD);
    let name = |number| if Ok(&number) == control.as_ref() { "control".into() } else { number };
    let inherited: Vec<String> = descriptors("self")?.into_iter().map(name).collect();
    let waited = [Signal::SIGTERM, Signal::SIGUSR1].into_iter().collect::<SigSet>();
    waited.thread_block()?;
    // Held until the end: whoever hangs up is out.
    let _place = match way {
        Way::Version { version } => {
            return ask(*version, member(), token())
                .map(|_| eprintln!("xfan-hostile: attached all the same"));
        }
        Way::Again => {
            let place = Place::take()?;
            waited.wait()?;
            drop(place);
            // It is not known to have gone when it comes again.
            loop {
                drop(Place::take());
            }
        }
        Way::Relic => {
            let place = Place::take()?;
            // The end of the connection.
            let _ = protocol::receive::<Reply>(&place.control, MAX_REPLY);
            loop {
                // Until the next one has answered.
                match ask(VERSION + 1, member(), token()) {
                    Err(error) if !error.to_string().contains("protocol version") => {
                        std::thread::sleep(PAUSE);
                    }
                    answer => return answer.map(drop),
                }
            }
        }
        Way::Fork => {
            let _place = Place::take()?;
            waited.wait()?;
            // SAFETY: there is one thread.
            if let nix::unistd::ForkResult::Child = unsafe { nix::unistd::fork() }? {
                nix::sys::prctl::set_pdeathsig(None)?;
                std::thread::sleep(Duration::from_secs(3));
            }
            return Ok(());
        }
        Way::Deaf { hidden } => {
            if *hidden {
                let group = nix::unistd::getpgid(Some(getppid()))?;
                // Refused where there is a seccomp filter.
                let _ = nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), group);
                nix::sys::prctl::set_pdeathsig(None)?;
            }
            let _place = Place::take()?;
            loop {
                std::thread::sleep(Duration::MAX);
            }
        }
        Way::Probe => {
            let place = Place::take()?;
            let mut report = BTreeMap::from([("descriptors at start".to_owned(), inherited.join(" "))]);
            probe_self(&mut report)?;
            probe_segments(&place, &mut report);
            probe_processes(&mut report)?;
            probe_places(&mut report);
            println!("{}", serde_json::to_string(&report)?);
            place
        }
        Way::Noise { seed } => {
            let place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return place.make_noise(*seed);
            }
            return Ok(());
        }
        Way::Pages => {
            let place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return place.take_pages();
            }
            return Ok(());
        }
        Way::Silent => Place::ask()?,
        Way::ReadyTwice => {
            let place = Place::take()?;
            waited.wait()?;
            let second = place::ready(&place.control);
            println!("second: {}", second.map_or_else(|error| error.to_string(), |()| "done".into()));
            place
        }
        Way::Seal => {
            let place = Place::ask()?;
            // SAFETY: no pointers.
            probe::checked(unsafe {
                libc::fcntl(place.up.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SEAL)
            })?;
            return place::ready(&place.control);
        }
        Way::Early => {
            let place = Place::ask()?;
            place.take_away()?;
            place.seal_and_ready()?;
            println!("ready");
            place
        }
        Way::Hold { connections } => {
            let place = Place::take()?;
            let held = connections::hold(*connections)?;
            println!("holds {} connections", held.len());
            while waited.wait()? != Signal::SIGTERM {}
            drop(held);
            place
        }
        Way::Flood { connections } => {
            let _place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return connections::flood(*connections);
            }
            return Ok(());
        }
        Way::Order { times } => {
            for _ in 0..*times {
                let order = protocol::WorkersOrder::Remove("default/0".into());
                protocol::ask(&place::dial()?, &protocol::Request::Workers(order))?;
            }
            return Ok(());
        }
        Way::Robbed { number } => return connections::become_robbed(number),
        Way::Traits => {
            let traits = serde_json::to_string(&traits::inherited()?)?;
            let place = Place::take()?;
            println!("{traits}");
            place
        }
        Way::Sandbox => {
            let place = Place::take()?;
            println!("{}", serde_json::to_string(&traits::sandbox())?);
            place
        }
        Way::Brood { disguise } => {
            brood::hatch(*disguise)?;
            let _place = Place::take()?;
            while waited.wait()? != Signal::SIGUSR1 {}
            return Ok(());
        }
        Way::Swarm { count } => {
            let place = Place::take()?;
            while waited.wait()? != Signal::SIGUSR1 {}
            println!("swarm of {}", brood::swarm(*count));
            place
        }
        Way::Glutton { mib } => {
            let place = Place::take()?;
            while waited.wait()? != Signal::SIGUSR1 {}
            let taken = std::hint::black_box(vec![1u8; mib << 20]);
            println!("took {}", taken.len() >> 20);
            place
        }
        Way::Jam => {
            let place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                place.jam()?;
                println!("jammed");
            }
            place
        }
        Way::Output { deed } => {
            let place = Place::take()?;
            if waited.wait()? == Signal::SIGUSR1 {
                misuse(*deed)?;
            }
            place
        }
        Way::Riot { seed, .. } => return riot::riot(*seed),
    };
    while waited.wait()? != Signal::SIGTERM {}
    Ok(())
}
