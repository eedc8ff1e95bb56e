//! A worker that misbehaves, for tests. It speaks the protocol without the SDK, which would not do
//! these things.
//!
//! Only the first member that a dispatcher starts is hostile. The others become `xfan-count` or,
//! beside a rioting worker, `xfan-witness`.

mod brood;
mod connections;
mod membership;
mod neighbours;
mod output;
mod probe;
mod riot;
mod segment;
mod traits;
mod waiters;

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

use crate::membership::{Membership, ask, member, token};
use crate::output::{Deed, misuse};
use crate::probe::{descriptors, probe_members, probe_processes, probe_segments, probe_self};

/// The pause between two checks, or two rounds of noise.
const PAUSE: Duration = Duration::from_millis(2);

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A worker that misbehaves. Unless stated otherwise it finally waits for SIGTERM.
#[derive(Parser)]
enum Way {
    /// Never takes a packet, and ignores SIGTERM.
    Deaf {
        /// Moves to its parent's process group, and does not ask to be told of the parent's end.
        #[arg(long)]
        hidden: bool,
    },
    /// At SIGUSR1 ends with status 0, and leaves a child that holds its connection for a while.
    Fork,
    /// At SIGUSR1 attaches and hangs up repeatedly.
    Again,
    /// Survives its primary, then speaks another version of the protocol.
    Relic,
    /// Speaks another version of the protocol.
    Version { version: u32 },
    /// Tries everything that a worker must not be able to do, and prints the results.
    Probe,
    /// At SIGUSR1 fills its own segment with noise repeatedly, until SIGTERM.
    Noise { seed: u64 },
    /// At SIGUSR1 tries repeatedly to remove the pages of its own segment from the dispatcher's
    /// mapping.
    Pages,
    /// Attaches and never reports that it is ready.
    Silent,
    /// Attaches and reports twice that it is ready.
    ReadyTwice,
    /// Before it is ready, prevents its own segment from being sealed against further writers.
    Seal,
    /// Removes pages of its own segment before it is ready.
    Early,
    /// Holds as many connections as it gets.
    Hold { connections: usize },
    /// At SIGUSR1 asks for reports without a pause on as many connections as it gets.
    Flood { connections: usize },
    /// Gives this many orders to remove a worker, then ends.
    Order { times: usize },
    /// Becomes xfan-count, with this descriptor as its supposed connection.
    Robbed { number: String },
    /// Prints its scheduling attributes, limits and signal state.
    Traits,
    /// Prints the result of each call that the sandbox refuses.
    Sandbox,
    /// Starts a daemon that resists being ended; at SIGUSR1 ends with status 0.
    Brood { disguise: brood::Disguise },
    /// At SIGUSR1 starts up to this many processes, and prints how many it could start.
    Swarm { count: u32 },
    /// At SIGUSR1 allocates this many MiB of memory, and prints that it has.
    Glutton { mib: usize },
    /// At SIGUSR1 fills its doorbell, so that ringing it blocks if possible, and claims to sleep.
    Jam,
    /// At SIGUSR1 has many epoll entries wait for its doorbell, and claims to fall asleep
    /// repeatedly.
    Wakeful,
    /// At SIGUSR1 has many epoll entries wait for its connection, asks for reports, and prints
    /// after how many milliseconds the third arrived.
    Slow,
    /// At SIGUSR1 stops a new process of its user before that runs its program.
    Stopper,
    /// At SIGUSR1 uses up the key quota of its user.
    Keys,
    /// At SIGUSR1 gives the autogroup of its session the lowest priority.
    Autogroup,
    /// At SIGUSR1 misuses its descriptors 0 to 2.
    Output { deed: Deed },
    /// Once packets arrive, misbehaves in a random way.
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
    // Before any descriptor is opened.
    let control = std::env::var(protocol::ENV_CONTROL_FD);
    let name = |number| if Ok(&number) == control.as_ref() { "control".into() } else { number };
    let inherited: Vec<String> = descriptors("self")?.into_iter().map(name).collect();
    let waited = [Signal::SIGTERM, Signal::SIGUSR1].into_iter().collect::<SigSet>();
    waited.thread_block()?;
    // Held until the end: hanging up ends the membership.
    let _membership = match way {
        Way::Version { version } => {
            return ask(*version, member(), token())
                .map(|_| eprintln!("xfan-hostile: attached nevertheless"));
        }
        Way::Again => {
            let membership = Membership::join()?;
            waited.wait()?;
            drop(membership);
            // The next attach comes before the primary knows of the hang-up.
            loop {
                drop(Membership::join());
            }
        }
        Way::Relic => {
            let membership = Membership::join()?;
            // The connection ends.
            let _ = protocol::receive::<Reply>(&membership.control, MAX_REPLY);
            loop {
                // Until the next primary has answered.
                match ask(VERSION + 1, member(), token()) {
                    Err(error) if !error.to_string().contains("protocol version") => {
                        std::thread::sleep(PAUSE);
                    }
                    answer => return answer.map(drop),
                }
            }
        }
        Way::Fork => {
            let _membership = Membership::join()?;
            waited.wait()?;
            // SAFETY: the process has one thread.
            if let nix::unistd::ForkResult::Child = unsafe { nix::unistd::fork() }? {
                nix::sys::prctl::set_pdeathsig(None)?;
                std::thread::sleep(Duration::from_secs(3));
            }
            return Ok(());
        }
        Way::Deaf { hidden } => {
            if *hidden {
                let group = nix::unistd::getpgid(Some(getppid()))?;
                // A seccomp filter may refuse this.
                let _ = nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), group);
                nix::sys::prctl::set_pdeathsig(None)?;
            }
            let _membership = Membership::join()?;
            loop {
                std::thread::sleep(Duration::MAX);
            }
        }
        Way::Probe => {
            let membership = Membership::join()?;
            let mut report = BTreeMap::from([("descriptors at start".to_owned(), inherited.join(" "))]);
            probe_self(&mut report)?;
            probe_segments(&membership, &mut report);
            probe_processes(&mut report)?;
            probe_members(&mut report);
            println!("{}", serde_json::to_string(&report)?);
            membership
        }
        Way::Noise { seed } => {
            let membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return membership.make_noise(*seed);
            }
            return Ok(());
        }
        Way::Pages => {
            let membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return membership.take_pages();
            }
            return Ok(());
        }
        Way::Silent => Membership::ask()?,
        Way::ReadyTwice => {
            let membership = Membership::join()?;
            waited.wait()?;
            let second = membership::ready(&membership.control);
            println!("second: {}", second.map_or_else(|error| error.to_string(), |()| "done".into()));
            membership
        }
        Way::Seal => {
            let membership = Membership::ask()?;
            // SAFETY: the call takes no pointers.
            probe::checked(unsafe {
                libc::fcntl(membership.up.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SEAL)
            })?;
            return membership::ready(&membership.control);
        }
        Way::Early => {
            let membership = Membership::ask()?;
            membership.remove_page()?;
            membership.seal_and_ready()?;
            println!("ready");
            membership
        }
        Way::Hold { connections } => {
            let membership = Membership::join()?;
            let held = connections::hold(*connections)?;
            println!("holds {} connections", held.len());
            while waited.wait()? != Signal::SIGTERM {}
            drop(held);
            membership
        }
        Way::Flood { connections } => {
            let _membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                return connections::flood(*connections);
            }
            return Ok(());
        }
        Way::Order { times } => {
            for _ in 0..*times {
                let order = protocol::WorkersOrder::Remove("default/0".into());
                protocol::ask(&membership::dial()?, &protocol::Request::Workers(order))?;
            }
            return Ok(());
        }
        Way::Robbed { number } => return connections::become_robbed(number),
        Way::Traits => {
            let traits = serde_json::to_string(&traits::inherited()?)?;
            let membership = Membership::join()?;
            println!("{traits}");
            membership
        }
        Way::Sandbox => {
            let membership = Membership::join()?;
            println!("{}", serde_json::to_string(&traits::sandbox())?);
            membership
        }
        Way::Brood { disguise } => {
            brood::hatch(*disguise)?;
            let _membership = Membership::join()?;
            while waited.wait()? != Signal::SIGUSR1 {}
            return Ok(());
        }
        Way::Swarm { count } => {
            let membership = Membership::join()?;
            while waited.wait()? != Signal::SIGUSR1 {}
            println!("swarm of {}", brood::swarm(*count));
            membership
        }
        Way::Glutton { mib } => {
            let membership = Membership::join()?;
            while waited.wait()? != Signal::SIGUSR1 {}
            let taken = std::hint::black_box(vec![1u8; mib << 20]);
            println!("took {}", taken.len() >> 20);
            membership
        }
        Way::Jam => {
            let membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                membership.jam()?;
                println!("jammed");
            }
            membership
        }
        Way::Wakeful => {
            let membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                let waiters = waiters::Waiters::of(&membership.doorbell)?;
                println!("{} waiters", waiters.count);
                membership.sleep_again_and_again()?;
            }
            return Ok(());
        }
        Way::Slow => {
            let _membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                connections::ask_slowly()?;
            }
            return Ok(());
        }
        Way::Stopper => {
            let membership = Membership::join()?;
            if waited.wait()? != Signal::SIGUSR1 {
                return Ok(());
            }
            neighbours::stop_a_new_process()?;
            membership
        }
        Way::Keys => {
            let membership = Membership::join()?;
            if waited.wait()? != Signal::SIGUSR1 {
                return Ok(());
            }
            println!("made {} keyrings", neighbours::use_up_keys());
            membership
        }
        Way::Autogroup => {
            let membership = Membership::join()?;
            if waited.wait()? != Signal::SIGUSR1 {
                return Ok(());
            }
            neighbours::lower_autogroup()?;
            println!("lowered its autogroup");
            membership
        }
        Way::Output { deed } => {
            let membership = Membership::join()?;
            if waited.wait()? == Signal::SIGUSR1 {
                misuse(*deed)?;
            }
            membership
        }
        Way::Riot { seed, .. } => return riot::riot(*seed),
    };
    while waited.wait()? != Signal::SIGTERM {}
    Ok(())
}
