//! Every setting of xfan: the only place that says what it is called, what it may be, what it is by
//! default, which flag sets it, and what it does.
//!
//! The file and its errors, the flags and their help, the output of `xfan check`, and the generated
//! documentation (`docs/configuration.md`, `docs/xfan.toml`, `docs/man/`, `docs/completions/`) are
//! made from these tables. To add a setting, add it here, use the field, and regenerate the
//! documentation: `cargo test -p xfan --test generated` says how.
//!
//! A section is a type of its own, so that a configuration can hold several ports or groups.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::table::{chosen, default, required, section};
use super::value::{
    absolute_path, auto, choice, command, cores, duration, frame_size, hash_key, interface, memory, mode, ms,
    names, number, optional, or_word, owner, power_of_two, queues, rules, socket, truth, user, worker_output,
};
use super::{
    BindMode, LogLevel, MAX_MEMBERS, ModeChoice, OnEmpty, OnLoss, Owner, PassRule, Policy, Queues,
    WorkerOutput,
};

/// Workers of a group.
const MEMBERS: RangeInclusive<i64> = 1..=MAX_MEMBERS as i64;

section! {
    /// One interface, and how its packets reach xfan.
    PortConfig, "Interface", "":

    /// The interface whose packets xfan dispatches.
    interface: String = interface(), required("\"eth1\"").short('i', "IFACE");

    /// The RX queues that get a lane.
    ///
    /// Packets of the other queues go to the kernel as before.
    queues: Queues = queues(), default("\"all\"").flag("LIST");

    /// Packets that go to the kernel stack instead of the workers, as a list of rules.
    ///
    /// A rule is a protocol, or a protocol and a destination port, such as `tcp/22`. A protocol is a
    /// number or one of icmp, igmp, tcp, udp, gre, esp, ah, icmpv6, ospf, pim, vrrp and sctp; only
    /// tcp, udp and sctp have ports. Fragments other than the first match no rule with a port. ARP,
    /// IPv6 neighbour discovery and other non-IP frames always go to the kernel. The flag is given
    /// once per rule, and its rules replace the list in the file.
    pass: Vec<PassRule> = rules(), default("[]").items("RULE");

    /// How the XDP program is attached.
    ///
    /// `native` runs it in the driver. `generic` runs it in the kernel, which is slower. `auto`
    /// tries native, and falls back to generic with a warning.
    xdp_mode: ModeChoice = choice(&[
        ("auto", ModeChoice::Auto),
        ("native", ModeChoice::Native),
        ("generic", ModeChoice::Generic),
    ]), default("\"auto\"");

    /// How the AF_XDP sockets are bound.
    ///
    /// With `zero-copy` the NIC writes to packet memory. With `copy` the kernel copies each packet.
    /// `auto` tries zero-copy, and falls back to copy with a warning.
    bind_mode: BindMode = choice(&[
        ("auto", BindMode::Auto),
        ("zero-copy", BindMode::ZeroCopy),
        ("copy", BindMode::Copy),
    ]), default("\"auto\"");

    /// Frames that each lane keeps posted to the kernel.
    ///
    /// In zero-copy mode xfan raises it to the size of the NIC's own RX ring. The FILL ring has
    /// twice as many entries.
    rx_ring: u32 = power_of_two(64..=32_768, "frames"), default("4096");
}

section! {
    /// The primary: its control socket, its CPUs, its packet memory and its lanes.
    PrimaryConfig, "Primary", "":

    /// The control socket, through which workers attach and operators ask.
    ///
    /// xfan makes its folder if it is missing. The folder must belong to root or to the user of
    /// xfan, and nobody else may be able to write to it. So `/tmp` cannot hold the socket.
    socket: PathBuf = socket(), chosen("/run/xfan/IFACE.sock", "\"/run/xfan/eth1.sock\"").flag("PATH");

    /// The CPUs that lanes and workers run on: the first ones for lanes, the next ones for workers.
    ///
    /// `xfan topology` shows which thread would run where, and why.
    cores: Option<Vec<usize>> =
        optional(cores()), chosen("the nearest to the interface", "\"2-5,7\"").flag("LIST");

    /// The size of a frame, which must hold a packet and 256 bytes of headroom.
    ///
    /// `auto` is 4096 where the MTU needs it. In zero-copy mode it is also 4096 unless the driver
    /// is known to fill frames of 2048 bytes without cutting packets. Otherwise it is 2048.
    frame_size: Option<u32> = auto(frame_size()), default("\"auto\"");

    /// Frames of each lane.
    ///
    /// `auto` is the smallest number that suffices: see "Packet memory" in `docs/configuration.md`.
    frames: Option<u32> = auto(number(128..=2_097_152, "frames per lane")), default("\"auto\"");

    /// The most packets that a lane takes at once.
    batch: usize = number(1..=64, "packets"), default("64");

    /// The key of the flow hash.
    ///
    /// With a fixed key, and the same workers, a flow goes to the same worker at every start.
    hash_key: Option<[u8; 16]> =
        optional(hash_key()), chosen("random at every start", "\"000102030405060708090a0b0c0d0e0f\"");
}

section! {
    /// The group of workers that shares the packets.
    GroupConfig, "Workers", "":

    /// The program that each worker runs, and its arguments.
    ///
    /// Without a program xfan starts no workers, and every member stays vacant until a worker
    /// attaches through the control socket. On the command line the program follows `--`.
    command: Vec<String> = command(), default("[]").rest("COMMAND");

    /// The number of workers to start.
    workers: usize = number(MEMBERS, "workers"), default("1").short('n', "WORKERS");

    /// The most workers at a time, those that join later included.
    ///
    /// `auto` is two more than `workers`, or fewer where packet memory would exceed 1 GiB or
    /// `frames`. A number below `workers` counts as `workers`.
    max_workers: Option<usize> = auto(number(MEMBERS, "workers")), default("\"auto\"");

    /// Slots of the ring from each lane to each worker.
    ///
    /// `auto` is 8192 where threads share a CPU, else 4096. It is halved, but not below 512, until
    /// packet memory fits 1 GiB and `frames`.
    ring_slots: Option<u32> =
        auto(power_of_two(64..=1_048_576, "slots per lane and worker")), default("\"auto\"");

    /// The user that the workers run as.
    ///
    /// A worker that runs as `root` could write to the packets of all others, so xfan never chooses
    /// root by itself.
    user: Option<String> =
        optional(user()), chosen("the user who called sudo, else nobody", "\"nobody\"").flag("NAME");

    /// How long a worker may take from its start until it has attached.
    start_timeout: Duration = duration(ms(100..=600_000)), default("\"10s\"");

    /// How long a worker may take to finish its packets, and then to exit after SIGTERM.
    ///
    /// xfan sends SIGKILL to a worker that takes longer.
    stop_timeout: Duration = duration(ms(0..=600_000)), default("\"5s\"");

    /// Which exits of a worker make xfan restart it.
    ///
    /// `on-failure`: every exit except one with status 0. `always`: every exit. `no`: none.
    restart: Policy = choice(&[
        ("no", Policy::No),
        ("on-failure", Policy::OnFailure),
        ("always", Policy::Always),
    ]), default("\"on-failure\"");

    /// The delay before a restart.
    ///
    /// It doubles with each restart that follows soon, up to 60s.
    restart_delay: Duration = duration(ms(1..=60_000)), default("\"100ms\"");

    /// The most starts of a worker within `start_limit_interval`.
    ///
    /// If the worker exits once more, it stays down, and its flows go to the other workers. Workers
    /// that xfan did not start may attach this many times per member, counted together for each user.
    start_limit_burst: u32 = number(1..=1_000_000, "starts"), default("5");

    /// The time over which `start_limit_burst` counts starts.
    start_limit_interval: Duration = duration(ms(1..=86_400_000)), default("\"10s\"");

    /// How long a worker may hold packets and take none before it counts as hung.
    ///
    /// A worker that asks for packets meanwhile is not hung. xfan kills a hung worker, or evicts it
    /// if xfan did not start it. `0s`: never.
    hang_timeout: Duration = duration(ms(0..=3_600_000)), default("\"30s\"");

    /// Whether workers survive a primary that is killed.
    ///
    /// They look for the next primary on the same socket for a minute. Otherwise they end with the
    /// primary.
    survive: bool = truth(), default("false");

    /// What happens to the packets that a lost worker had not committed, and to its flows.
    ///
    /// `requeue`: they go to the other workers. `hold`: they wait for the next worker of the same
    /// member, for `hold_timeout` at most, as long as the member's rings have free slots.
    on_loss: OnLoss = choice(&[
        ("requeue", OnLoss::Requeue),
        ("hold", OnLoss::Hold),
    ]), default("\"requeue\"");

    /// With `on_loss = "hold"`: how long packets and flows wait before they are requeued.
    ///
    /// Packets keep their receive time.
    hold_timeout: Duration = duration(ms(1..=3_600_000)), default("\"4s\"");

    /// What happens to packets while no worker runs.
    ///
    /// `drop`: xfan drops them and counts them as `no_worker`. `pass`: they go to the kernel, as
    /// without xfan.
    on_empty: OnEmpty = choice(&[
        ("drop", OnEmpty::Drop),
        ("pass", OnEmpty::Pass),
    ]), default("\"drop\"");

    /// The memory that a worker and all its descendants may use.
    ///
    /// A worker that uses more is killed. Without cgroups the limit applies to the private memory
    /// of each process.
    worker_memory: Option<u64> = or_word("unlimited", memory()), default("\"unlimited\"");

    /// The most processes and threads of a worker and all its descendants.
    ///
    /// Needs cgroups.
    worker_processes: u32 = number(1..=4_194_304, "processes and threads"), default("1024");

    /// A worker's share of CPU time where there is too little for all.
    ///
    /// Needs cgroups.
    worker_cpu_weight: u32 = number(1..=10_000, "a weight; others have 100"), default("100");

    /// Whether workers are confined to what packet processing needs.
    ///
    /// They are then refused sockets other than Unix sockets, bpf, perf events, io_uring and
    /// keyrings.
    worker_sandbox: bool = truth(), default("false");

    /// Where the standard output and standard error of workers go.
    ///
    /// `log`: to xfan's log, escaped, at most 100 lines per second and member. `null`: nowhere.
    /// `journal`: to systemd's journal. A path: whole lines are appended to that file, after the
    /// name of the member unless the path contains `{member}`. With `survive = true`, `log` means
    /// `null`, and a path must contain `{member}`.
    worker_output: WorkerOutput = worker_output(), default("\"log\"");
}

section! {
    /// Who else may use the control socket.
    ///
    /// Users who may attach workers can read all packets, and can read the counters. Root and the
    /// user of the workers always may. Only root may add, drain, restart and remove workers.
    ControlAccess, "Control socket", "control":

    /// Users who may attach workers and read the counters.
    allow_users: Vec<String> = names("names of users, such as [\"alice\"]"), default("[]");

    /// Groups whose members may attach workers and read the counters.
    allow_groups: Vec<String> = names("names of groups, such as [\"adm\"]"), default("[]");

    /// The owner of the socket's file.
    socket_owner: Option<Owner> = optional(owner()), chosen("the workers' user; xfan's if all may write", "\":adm\"");

    /// The permissions of the socket's file.
    ///
    /// xfan checks who connects in any case.
    socket_mode: Option<u32> =
        optional(mode()), chosen("\"0600\", or \"0666\" with allow_users or allow_groups", "\"0660\"");
}

section! {
    /// What lanes and workers do while there are no packets.
    ///
    /// They spin, then yield their CPU, then sleep.
    IdleConfig, "Idle threads", "idle":

    /// How long an idle lane or worker spins.
    ///
    /// Threads that share a CPU never spin.
    spin: Duration = duration(ms(0..=1000)), default("\"50us\"");

    /// How long an idle lane or worker then yields its CPU before it sleeps.
    r#yield: Duration = duration(ms(0..=1000)), default("\"1ms\"");
}

section! {
    /// What xfan logs, and where.
    LogConfig, "Log", "log":

    /// The least important messages that are logged.
    level: LogLevel = choice(&[
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ]), default("\"info\"").alias("log", "LEVEL");

    /// The file that xfan appends its log to.
    ///
    /// xfan opens it anew on SIGHUP.
    file: Option<PathBuf> = optional(absolute_path()), chosen("standard error", "\"/var/log/xfan.log\"");
}
