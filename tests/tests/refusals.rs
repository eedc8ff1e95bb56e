//! What cannot work is refused with a message that names the thing, the limit and the remedy, and
//! with its exit code.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::Signal;
use xfan_shm::layout::VERSION;
use xfan_tests::e2e_or_skip;
use xfan_tests::leftovers;
use xfan_tests::netns::Netns;
use xfan_tests::primary::Launch;
use xfan_tests::process::{Exit, Process, binary};
use xfan_tests::receiver::Receiver;
use xfan_tests::replay::Replay;
use xfan_tests::traffic;
use xfan_tests::tx::TxSocket;
use xfan_tests::veth::{Veth, VethConfig, network};

const USAGE: i32 = 2;
const PERMISSION: i32 = 3;
const INTERFACE: i32 = 4;
const BUSY: i32 = 5;
const WORKERS: i32 = 6;

/// The launch of a primary that would run if the test did not prevent it.
fn launch(namespace: &Netns) -> Launch<'_> {
    Launch::on(namespace).unwrap().worker("xfan-count", "").unwrap()
}

/// Checks the exit code and the last line of standard error, which is the message.
#[track_caller]
fn assert_refused(exit: &Exit, code: i32, message: &str) {
    assert_eq!(exit.code, Some(code), "{exit:#?}");
    assert_eq!(exit.stderr.last().map(String::as_str), Some(message), "{exit:#?}");
}

/// As [`assert_refused`]; checks also that nothing is left behind.
#[track_caller]
fn assert_refused_without_trace(namespace: &Netns, exit: &Exit, code: i32, message: &str) {
    assert_refused(exit, code, message);
    assert_eq!(leftovers::processes_in(namespace), Vec::<String>::new());
    assert_eq!(leftovers::xdp_program(namespace, "rx0").unwrap(), None);
}

#[test]
fn a_primary_without_root() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = launch(&namespace);
    let mut command = launch.command().unwrap();
    // SAFETY: between fork and exec the closure makes two plain system calls, after the namespace
    // is entered.
    unsafe {
        command.pre_exec(|| {
            if libc::setgid(65534) < 0 || libc::setuid(65534) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let exit = Process::spawn(command).unwrap().wait();
    assert_refused_without_trace(
        &namespace,
        &exit,
        PERMISSION,
        "xfan: xfan run lacks CAP_NET_ADMIN (to attach the XDP program), CAP_NET_RAW (to make AF_XDP sockets), \
         CAP_BPF (to load the XDP program), CAP_PERFMON (to let the XDP program parse headers), \
         CAP_SYS_ADMIN (to share packet memory with workers), CAP_SETUID (to run workers as an unprivileged user), \
         CAP_SETGID (to run workers as an unprivileged user), CAP_CHOWN (to let workers use the control socket), \
         CAP_KILL (to stop workers of another user), CAP_SETPCAP (to drop capabilities): start it with sudo",
    );
}

#[test]
fn without_a_single_capability() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    for (capability, name, purpose) in [
        (12, "CAP_NET_ADMIN", "attach the XDP program"),
        (13, "CAP_NET_RAW", "make AF_XDP sockets"),
        (39, "CAP_BPF", "load the XDP program"),
        (38, "CAP_PERFMON", "let the XDP program parse headers"),
        (21, "CAP_SYS_ADMIN", "share packet memory with workers"),
        (7, "CAP_SETUID", "run workers as an unprivileged user"),
        (6, "CAP_SETGID", "run workers as an unprivileged user"),
        (0, "CAP_CHOWN", "let workers use the control socket"),
        (5, "CAP_KILL", "stop workers of another user"),
        (8, "CAP_SETPCAP", "drop capabilities"),
    ] {
        let launch = launch(&namespace);
        let mut command = launch.command().unwrap();
        // SAFETY: between fork and exec the closure makes one plain system call.
        unsafe {
            command.pre_exec(move || match libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let exit = Process::spawn(command).unwrap().wait();
        let message = format!("xfan: xfan run lacks {name} (to {purpose}): start it with sudo");
        assert_refused_without_trace(&namespace, &exit, PERMISSION, &message);
    }
}

#[test]
fn an_interface_that_does_not_exist() {
    let _watchdog = e2e_or_skip!();
    let namespace = Netns::quiet().unwrap();
    let exit = launch(&namespace).run().unwrap();
    let message = "xfan: no interface `rx0` in this network namespace; existing interfaces: lo";
    assert_refused(&exit, INTERFACE, message);
}

#[test]
fn a_layer_3_interface() {
    let _watchdog = e2e_or_skip!();
    let namespace = Netns::quiet().unwrap();
    namespace.ip("tuntap add dev rx0 mode tun").unwrap();
    namespace.ip("link set dev rx0 up").unwrap();
    let message = "xfan: `rx0` is a layer-3 device, such as tun or WireGuard: its packets have no Ethernet header; \
                   use the Ethernet interface that carries them, or a tunnel of Ethernet frames (tap, gretap, VXLAN)";
    assert_refused_without_trace(&namespace, &launch(&namespace).run().unwrap(), INTERFACE, message);
    let mut topology = namespace.command(binary("xfan").unwrap());
    topology.args(["topology", "-i", "rx0"]);
    assert_refused(&Process::spawn(topology).unwrap().wait(), INTERFACE, message);
}

#[test]
fn a_queue_that_does_not_exist() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let exit = launch(&namespace).with("--queues 0,2").run().unwrap();
    let message = "xfan: `rx0` has no RX queue 2: it has 2 (0 to 1); see `ethtool -l rx0`";
    assert_refused_without_trace(&namespace, &exit, INTERFACE, message);
}

#[test]
fn a_queue_that_another_program_holds() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let _held = namespace.run(|| TxSocket::open("rx0", 1)).unwrap();
    let exit = launch(&namespace).run().unwrap();
    let message = "xfan: queue 1 of rx0 is bound by another AF_XDP socket: end the program that holds it \
                   (`ss --xdp -p` names it), or leave the queue out with --queues";
    assert_refused_without_trace(&namespace, &exit, BUSY, message);
    // The proposed remedy works.
    let primary = launch(&namespace).with("--queues 0").start().unwrap();
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn an_interface_that_runs_another_xdp_program() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let _other = namespace.run(|| Receiver::open("rx0", &[])).unwrap();
    let exit = launch(&namespace).run().unwrap();
    let id = xdp_program_id(&namespace);
    let message = format!(
        "xfan: rx0 already runs another XDP program, \"redirect\" (id {id}); stop the tool that uses it, or, \
         if that has exited, remove the program with: ip link set dev rx0 xdp off"
    );
    assert_refused(&exit, BUSY, &message);
    assert_eq!(xdp_program_id(&namespace), id, "the other program is still attached");
}

fn xdp_program_id(namespace: &Netns) -> u32 {
    let line = leftovers::xdp_program(namespace, "rx0").unwrap().expect("a program");
    let mut words = line.split_whitespace().skip_while(|word| *word != "id");
    words.nth(1).and_then(|id| id.parse().ok()).expect("an id")
}

#[test]
fn a_second_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = launch(&namespace).start().unwrap();
    let exit = launch(&namespace).run().unwrap();
    let message = format!(
        "xfan: another xfan primary owns rx0 (XDP program xfan_steer, id {}); stop it first: an interface can have only one primary",
        xdp_program_id(&namespace)
    );
    assert_refused(&exit, BUSY, &message);
    // The first primary is unaffected.
    let frames = traffic::synthetic(10, 100, 1).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    assert_eq!(primary.report_after(100, true).totals(), (100, 100, 0));
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_control_socket_that_another_primary_listens_on() {
    let _watchdog = e2e_or_skip!();
    let (first, second) = (network(2), network(2));
    let primary = launch(&first).start().unwrap();
    let mut command = second.command(binary("xfan").unwrap());
    command.args(["run", "-i", "rx0", "--socket"]).arg(primary.socket());
    let exit = Process::spawn(command).unwrap().wait();
    let message = format!(
        "xfan: another primary answers on {}: stop it, or choose another control socket with --socket",
        primary.socket().display()
    );
    assert_refused_without_trace(&second, &exit, BUSY, &message);
    primary.report();
    assert_eq!(primary.stop().0.code, Some(0));
}

#[test]
fn a_control_socket_where_a_file_is() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = launch(&namespace);
    let path = launch.socket();
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let command = launch.command().unwrap();
    let exit = Process::spawn(command).unwrap().wait();
    let message = format!(
        "xfan: {} exists and is no socket: remove it, or choose another control socket with --socket",
        path.display()
    );
    assert_refused_without_trace(&namespace, &exit, USAGE, &message);
    assert_eq!(std::fs::read_to_string(path).unwrap(), "precious");
}

#[test]
fn packets_that_do_not_fit_a_frame() {
    let _watchdog = e2e_or_skip!();
    let namespace = Netns::quiet().unwrap();
    Veth::create(&VethConfig { mtu: 3000, ..VethConfig::queues(2) }, &namespace, &namespace).unwrap();
    let exit = launch(&namespace).config("frame_size = 2048").unwrap().run().unwrap();
    let message = "xfan: the MTU of `rx0` is 3000 bytes, but a frame of 2048 bytes holds packets of an MTU of at most \
                   1770: set `frame_size = 4096`, or run `ip link set dev rx0 mtu 1770`";
    assert_refused_without_trace(&namespace, &exit, INTERFACE, message);
    // The proposed remedy works, and so does the default.
    for config in ["frame_size = 4096", ""] {
        let primary = launch(&namespace).config(config).unwrap().start().unwrap();
        assert_eq!(primary.stop().0.code, Some(0));
    }
}

#[test]
fn an_mtu_that_the_driver_refuses_with_xdp() {
    let _watchdog = e2e_or_skip!();
    let namespace = Netns::quiet().unwrap();
    Veth::create(&VethConfig { mtu: 3600, ..VethConfig::queues(2) }, &namespace, &namespace).unwrap();
    let exit = launch(&namespace).config("frame_size = 4096\nxdp_mode = 'native'").unwrap().run().unwrap();
    assert_eq!(exit.code, Some(INTERFACE), "{exit:#?}");
    let message = exit.stderr.last().unwrap();
    // The message quotes veth's own reason.
    assert!(message.starts_with("xfan: the driver of rx0 refuses native XDP ("), "{message}");
    assert!(message.contains("Peer MTU is too large to set XDP\")"), "{message}");
    assert!(message.contains("lower the MTU (many drivers accept at most some 3000 bytes)"), "{message}");
    // Without a request for native mode it logs the same reason and continues.
    let primary = launch(&namespace).config("frame_size = 4096").unwrap().start().unwrap();
    assert_eq!(primary.report().ports[0].mode, "generic, copy");
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0));
    let warning =
        exit.stderr.iter().find(|line| line.contains("Attaching in generic mode")).expect("a warning");
    assert!(warning.contains("Peer MTU is too large to set XDP"), "{warning}");
}

#[test]
fn modes_that_exclude_each_other() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let config = "xdp_mode = 'generic'\nbind_mode = 'zero-copy'";
    let exit = launch(&namespace).config(config).unwrap().run().unwrap();
    let message = "xfan: `bind_mode = \"zero-copy\"` needs the driver, and `xdp_mode = \"generic\"` leaves it out: set \
                   xdp_mode to \"native\" or \"auto\", or bind_mode to \"copy\" or \"auto\"";
    assert_refused_without_trace(&namespace, &exit, USAGE, message);
}

#[test]
fn zero_copy_that_the_driver_lacks() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let exit = launch(&namespace).config("bind_mode = 'zero-copy'").unwrap().run().unwrap();
    let message = "xfan: queue 0 of rx0 cannot be bound in zero-copy mode (Operation not supported (os error 95)): the \
                   driver or the device does not support it";
    assert_refused_without_trace(&namespace, &exit, INTERFACE, message);
}

#[test]
fn the_interface_is_untouched_until_workers_attach() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("start_timeout = '60s'\nrx_ring = 512").unwrap();
    let primary = launch.worker("/bin/sleep", "1000").unwrap().start_until_it_answers().unwrap();
    // Attaching the program resets the link of most NICs, so it must not happen without workers.
    assert_eq!(leftovers::xdp_program(&namespace, "rx0").unwrap(), None);
    // The frames are posted by then: some drivers take frames only while a program is being
    // attached.
    let report = primary.report();
    assert_eq!(report.ports[0].mode, "not attached, copy");
    assert_eq!(report.lanes().map(|lane| lane.frames.kernel).collect::<Vec<_>>(), [512, 512]);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn a_worker_command_that_does_not_exist() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let exit = Launch::on(&namespace).unwrap().worker("/no/such/worker", "").unwrap().run().unwrap();
    let message = "xfan: worker command `/no/such/worker` not found: give its full path (sudo searches its own \
                   secure_path), or check the name";
    assert_refused_without_trace(&namespace, &exit, WORKERS, message);
}

#[test]
fn a_worker_command_that_may_not_be_executed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap();
    let path = launch.folder().join("worker");
    std::fs::write(&path, "#!/bin/sh\n").unwrap();
    let exit = launch.worker(path.to_str().unwrap(), "").unwrap().run().unwrap();
    let message = format!(
        "xfan: worker command `{}` cannot be executed by user nobody: Permission denied (os error 13); make it \
         executable (chmod a+rx) and every directory above it accessible (chmod a+x), or choose another user with --user",
        path.display()
    );
    assert_refused_without_trace(&namespace, &exit, WORKERS, &message);
}

#[test]
fn a_worker_that_exits_at_once() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    for (program, how) in [("/bin/false", "exit status: 1"), ("/bin/true", "exit status: 0")] {
        let exit = Launch::on(&namespace).unwrap().worker(program, "").unwrap().run().unwrap();
        let message = format!(
            "xfan: worker default/0 ({program}) ended before it attached: {how}. Run it by hand to see why; a worker must \
             attach to the socket named in XFAN_SOCKET"
        );
        assert_refused_without_trace(&namespace, &exit, WORKERS, &message);
    }
}

#[test]
fn a_worker_that_never_attaches() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().config("start_timeout = '200ms'").unwrap();
    let exit = launch.worker("/bin/sleep", "1000").unwrap().run().unwrap();
    let message = "xfan: worker default/0 (/bin/sleep) has not attached within 200ms: is it an xfan worker? If it needs \
                   longer, raise start_timeout";
    assert_refused_without_trace(&namespace, &exit, WORKERS, message);
}

#[test]
fn a_worker_of_another_protocol_version() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap().with("-n 2");
    let program = launch.folder().join("xfan-hostile");
    let exit = launch.hostile_worker("version 99").unwrap().run().unwrap();
    let why = format!(
        "the worker speaks protocol version 99, this primary version {VERSION}: use builds of the same release"
    );
    let message = format!("xfan: worker default/0 ({}) was refused: {why}", program.display());
    assert_refused_without_trace(&namespace, &exit, WORKERS, &message);
    // The worker gets the reason as well.
    let told = format!(" default/0 stderr: xfan-hostile: {why}");
    assert!(exit.stderr.iter().any(|line| line.ends_with(&told)), "{exit:#?}");
}

#[test]
fn a_user_that_does_not_exist() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let exit = launch(&namespace).with("--user no-such-user").run().unwrap();
    let message = "xfan: no user `no-such-user` on this system: set `user` (or --user) to one that `getent passwd` lists";
    assert_refused_without_trace(&namespace, &exit, USAGE, message);
}

#[test]
fn a_configuration_that_cannot_be_read() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let exit = launch(&namespace).with("--config /no/such/file.toml").run().unwrap();
    let message =
        "xfan: cannot read the configuration file /no/such/file.toml: No such file or directory (os error 2)";
    assert_refused(&exit, USAGE, message);
    let exit = launch(&namespace).with("--config /").run().unwrap();
    let message = "xfan: cannot read the configuration file /: Is a directory (os error 21)";
    assert_refused(&exit, USAGE, message);
}

#[test]
fn a_configuration_with_an_unknown_key() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = launch(&namespace).config("workers = 2\nring_slot = 512").unwrap();
    let file = launch.folder().join("xfan.toml");
    let exit = launch.run().unwrap();
    let message =
        format!("xfan: unknown key `ring_slot` in {} (line 2): did you mean `ring_slots`?", file.display());
    assert_refused(&exit, USAGE, &message);
}

#[test]
fn a_configuration_with_a_value_out_of_range() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = launch(&namespace).config("ring_slots = 100").unwrap();
    let file = launch.folder().join("xfan.toml");
    let exit = launch.run().unwrap();
    let message = format!(
        "xfan: `ring_slots` in {} (line 1) is 100, but it must be \"auto\" or a power of two from 64 to 1048576 (slots per \
         lane and worker)",
        file.display()
    );
    assert_refused(&exit, USAGE, &message);
}

#[test]
fn a_frame_budget_that_is_too_small() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = launch(&namespace).with("-n 2").config("frames = 4096\nring_slots = 4096").unwrap();
    let exit = launch.run().unwrap();
    let message = "xfan: `frames` is 4096 per lane, but a lane needs rx_ring (4096) + batch (64) + max_workers (2) × \
                   ring_slots (4096) = 12352: raise `frames` to 12352, or lower `max_workers`, `ring_slots` or `rx_ring`";
    assert_refused_without_trace(&namespace, &exit, USAGE, message);
}

#[test]
fn an_interface_that_vanishes() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let primary = launch(&namespace).with("-n 2").start().unwrap();
    let frames = traffic::synthetic(10, 100, 1).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    primary.report_after(100, true);
    namespace.ip("link delete tx0").unwrap();
    let socket = primary.socket();
    let exit = primary.process.wait();
    assert_refused(
        &exit,
        INTERFACE,
        "xfan: interface rx0 has vanished: it was removed, or moved to another network namespace; start xfan again \
                   once it is back",
    );
    // Its workers were told to end, and printed their totals.
    let counted = exit.json().into_iter();
    assert_eq!(counted.filter_map(|totals| totals["packets"].as_u64()).sum::<u64>(), 100);
    assert_eq!(leftovers::processes_in(&namespace), Vec::<String>::new());
    assert!(!socket.exists());
}

#[test]
fn statistics_without_a_primary() {
    let _watchdog = e2e_or_skip!();
    let stats = |socket: &str| {
        let mut command = Command::new(binary("xfan").unwrap());
        command.args(["stats", "--socket", socket]);
        Process::spawn(command).unwrap().wait()
    };
    let exit = stats("/no/such/xfan.sock");
    let message =
        "xfan: no primary answers on /no/such/xfan.sock: start one with `xfan run`, or name its socket";
    assert_refused(&exit, 1, message);

    // The socket of a killed primary gives the same message.
    let namespace = network(2);
    let primary = launch(&namespace).start().unwrap();
    let socket = primary.socket();
    let (_exit, _folder) = primary.end(Signal::SIGKILL);
    let exit = stats(socket.to_str().unwrap());
    let message = format!(
        "xfan: no primary answers on {}: start one with `xfan run`, or name its socket",
        socket.display()
    );
    assert_refused(&exit, 1, &message);
}
