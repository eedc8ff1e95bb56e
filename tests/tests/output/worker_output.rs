//! The files and streams that `worker_output` names.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::Signal;
use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::proc::{pid_of, signal};
use xfan_tests::replay::send_synthetic;
use xfan_tests::veth::network;

use super::{Bare, PACKETS, assert_served, honest, hostile, member};

#[test]
fn a_shared_file_names_the_worker_of_each_line() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = Launch::on(&namespace).unwrap();
    let file = launch.folder().join("workers.log");
    let config = format!("worker_output = '{}'", file.display());
    let launch = launch.config(&config).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
    let (exit, folder) = launch.start().unwrap().stop();
    assert_eq!(exit.code, Some(0));
    let text = fs::read_to_string(folder.join("workers.log")).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    for (index, line) in lines.iter().enumerate() {
        let rest = line.strip_prefix(&format!("default/{index} stdout: ")).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(rest).unwrap()["packets"], 0);
    }
    assert_eq!((lines.len(), fs::metadata(&file).unwrap().mode() & 0o7777), (2, 0o640));
}

#[test]
fn an_invalid_output_is_refused_before_the_start() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let refused = |config: &str| {
        let launch = Launch::on(&namespace).unwrap().config(config).unwrap();
        let exit = launch.worker("xfan-count", "").unwrap().run().unwrap();
        assert_eq!(exit.code, Some(2), "{exit:#?}");
        exit.stderr.last().unwrap().clone()
    };
    let said = refused("worker_output = '/nowhere/{member}'");
    assert!(said.contains("cannot open the workers' output file /nowhere/default-0: No such file"), "{said}");
    let said = refused("survive = true\nworker_output = '/tmp/all'");
    assert!(said.contains("add {member} to worker_output (/tmp/all)"), "{said}");
    if !Path::new("/run/systemd/journal/stdout").exists() {
        let said = refused("worker_output = 'journal'");
        assert!(said.contains("systemd's journal does not listen on /run/systemd/journal/stdout"), "{said}");
    }
}

#[test]
fn each_worker_has_its_own_journal_stream() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let launch = honest(&namespace).config("worker_output = 'journal'").unwrap();
    let journal = UnixListener::bind(launch.folder().join("stdout")).unwrap();
    // In this process's mount namespace the journal's folder is the test's folder.
    let (run, folder) = (launch.command().unwrap(), launch.folder().display().to_string());
    let mut command = namespace.command("unshare");
    let script =
        "mount -t tmpfs none /run && mkdir /run/systemd && ln -s $0 /run/systemd/journal && exec \"$@\"";
    command.args(["-m", "sh", "-c", script, &folder]).arg(run.get_program()).args(run.get_args());
    let child = command.process_group(0).stdin(Stdio::null()).spawn().unwrap();
    let mut primary = Bare { child, launch };
    primary.started();
    assert_eq!(primary.stop(), Some(0));
    journal.set_nonblocking(true).unwrap();
    let streams = std::iter::from_fn(|| journal.accept().ok()).map(|(mut stream, _)| {
        let mut text = String::new();
        stream.set_nonblocking(false).unwrap();
        stream.read_to_string(&mut text).unwrap();
        text
    });
    // Each worker has a second stream, from the check at the start.
    let mut with_totals: Vec<_> = streams.filter(|text| text.contains("\"packets\":0")).collect();
    with_totals.sort();
    for (index, text) in with_totals.iter().enumerate() {
        assert!(text.starts_with(&format!("xfan-default-{index}\n\n6\n1\n0\n0\n0\n{{")), "{text}");
    }
    assert_eq!(with_totals.len(), 2);
}

#[test]
fn surviving_workers_keep_writing_to_their_own_files() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    for output in ["log", "FOLDER/out-{member}"] {
        let launch = Launch::on(&namespace).unwrap();
        let output = output.replace("FOLDER", &launch.folder().display().to_string());
        let config = format!("survive = true\nworker_output = '{output}'");
        let launch = launch.config(&config).unwrap().with("-n 2").worker("xfan-count", "").unwrap();
        let primary = launch.start().unwrap();
        let before: Vec<_> = primary.report().groups[0].members.iter().map(|member| member.pid).collect();
        let folder = primary.kill();
        let launch = Launch::within(&namespace, folder).config(&config).unwrap().with("-n 2");
        let primary = launch.worker("xfan-count", "").unwrap().start().unwrap();
        send_synthetic(&namespace, 6);
        let report = primary.report_after(PACKETS, true);
        let after: Vec<_> = report.groups[0].members.iter().map(|member| member.pid).collect();
        assert_eq!(before, after);
        let counted: Vec<_> = report.groups[0].members.iter().map(|member| member.committed).collect();
        let (exit, folder) = primary.stop();
        assert_eq!(exit.code, Some(0));
        let null = exit.stderr.iter().any(|line| line.contains("their output goes to /dev/null"));
        assert_eq!(null, output == "log", "{exit:#?}");
        for (index, counted) in counted.into_iter().enumerate().filter(|_| output != "log") {
            let text = fs::read_to_string(folder.join(&format!("out-default-{index}"))).unwrap();
            assert!(text.contains(&format!("\"packets\":{counted}")), "{text}");
        }
    }
}

#[test]
fn a_full_output_file_blocks_nobody() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(2);
    let kept = xfan_tests::primary::Folder::new().unwrap();
    let fifo = kept.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    // The reader never reads.
    let _reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let launch = hostile(&namespace, "flood", &format!("worker_output = '{}'", fifo.display()));
    let log = launch.folder().join("log");
    let mut primary = Bare::spawn(launch, Stdio::null(), Stdio::null(), File::create(log).unwrap().into());
    let report = primary.started();
    signal(pid_of(&report, 0), Signal::SIGUSR1);
    primary.report_when(|report| member(report, 0).output_dropped > 10_000);
    assert_served(&namespace, &mut primary);
    assert_eq!(primary.stop(), Some(0));
    fs::remove_file(fifo).unwrap();
}
