//! Limits of open files.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use xfan_shm::protocol::{self, MAX_REPLY, Reply};
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::proc::limit_descriptors;
use xfan_tests::process::{Process, binary};
use xfan_tests::veth::network;

/// Sets a command's limits of open files.
fn with_limit(command: &mut Command, soft: u64, hard: u64) {
    // SAFETY: the closure makes one system call on its own copy of the limits.
    unsafe {
        command.pre_exec(move || setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from));
    }
}

#[test]
fn an_insufficient_descriptor_limit_is_reported() {
    let _watchdog = e2e_or_skip!(300);
    for (queues, workers) in [(1, 1), (4, 3)] {
        let namespace = network(queues);
        let mut refused = 0;
        for limit in 8.. {
            let launch = Launch::on(&namespace).unwrap().with(&format!("-n {workers}"));
            let launch = launch.worker("xfan-count", "").unwrap();
            let primary = launch.spawn_with(|command| with_limit(command, limit, limit)).unwrap();
            match primary.process.wait_for_line(" running ") {
                Ok(_) => {
                    // The limit suffices for a tool's connection as well.
                    primary.report();
                    let exit = primary.stop().0;
                    assert_eq!(exit.code, Some(0), "{exit:#?}");
                    assert!(!exit.stderr.join("\n").contains("Too many open files"), "{exit:#?}");
                    break;
                }
                Err(error) => {
                    refused += 1;
                    let named = format!("RLIMIT_NOFILE of this process is {limit} (ulimit -n, LimitNOFILE=)");
                    assert!(error.to_string().contains(&named), "{limit}: {error}");
                }
            }
        }
        assert!(refused > 20, "{refused}");
    }
}

#[test]
fn connections_wait_when_descriptors_run_out() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let primary = Launch::on(&namespace).unwrap().start().unwrap();
    let pid = primary.process.pid();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let highest = open.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max().unwrap();
    // Enough descriptors for a few connections.
    let limit = highest + 3;
    limit_descriptors(pid, limit);
    let silent: Vec<_> = (0..60).map(|_| primary.dial()).collect();
    let line = primary.process.wait_for_line("the control socket cannot accept a connection").unwrap();
    assert!(
        line.contains(&format!("RLIMIT_NOFILE of this process is {limit} (ulimit -n, LimitNOFILE=)")),
        "{line}"
    );
    drop(silent);
    primary.report();
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(exit.stderr.join("\n").matches("cannot accept a connection").count(), 1, "{exit:#?}");
}

#[test]
fn connections_leave_descriptors_for_other_uses() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap();
    let primary = launch.spawn_with(|command| with_limit(command, 64, 64)).unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    let silent: Vec<_> = (0..4).map(|_| primary.dial()).collect();
    let refused = primary.dial();
    let Reply::Refused(refusal) = protocol::receive::<Reply>(&refused, MAX_REPLY).unwrap().0 else {
        panic!("four connections are open, the limit")
    };
    assert_eq!(
        refusal.message,
        "there are 4 connections of root, which is the limit: close some, or raise the limit of open files, of which it \
         is a part: RLIMIT_NOFILE is 64 (ulimit -n, LimitNOFILE=)"
    );
    drop(silent);
    let exit = primary.stop().0;
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert!(!exit.stderr.join("\n").contains("cannot accept a connection"), "{exit:#?}");
}

#[test]
fn a_worker_without_descriptors_names_the_limit() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let primary = Launch::on(&namespace).unwrap().start().unwrap();
    let mut refused = 0;
    for limit in 4.. {
        let mut command = Command::new(binary("xfan-count").unwrap());
        command.arg("--attach").arg(primary.socket());
        with_limit(&mut command, limit, limit);
        let mut worker = Process::spawn(command).unwrap();
        let attached = || {
            let report = primary.report();
            let mut members = report.groups.iter().flat_map(|group| &group.members);
            members.any(|member| {
                member.state == "running" && member.pid == worker.pid().as_raw().cast_unsigned()
            })
        };
        let runs = loop {
            if attached() {
                break true;
            }
            if fs::read_to_string(format!("/proc/{}/stat", worker.pid())).unwrap_or_default().contains(") Z ")
            {
                break false;
            }
            std::thread::yield_now();
        };
        // The worker may have attached and failed later.
        worker.signal(Signal::SIGTERM);
        let exit = worker.wait();
        if runs && exit.code == Some(0) {
            break;
        }
        refused += 1;
        let stderr = exit.stderr.join("\n");
        assert!(
            stderr.contains(&format!("RLIMIT_NOFILE of this process is {limit} (ulimit -n")),
            "{limit}: {stderr}"
        );
    }
    assert!(refused > 2, "{refused}");
    assert_eq!(primary.stop().0.code, Some(0));
}

/// A process's soft and hard limit of open files.
fn limits(pid: u32) -> Vec<String> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().skip(3).take(2).map(str::to_owned).collect()
}

#[test]
fn a_low_soft_limit_is_raised_only_for_the_primary() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let primary = launch.spawn_with(|command| with_limit(command, 20, 3000)).unwrap();
    primary.process.wait_for_line(" running ").unwrap();
    let pid = primary.process.pid().as_raw().cast_unsigned();
    assert_eq!(limits(pid), ["3000", "3000"]);
    for member in &primary.report().groups[0].members {
        assert_eq!(limits(member.pid), ["20", "3000"]);
    }
    assert_eq!(primary.stop().0.code, Some(0));
}
