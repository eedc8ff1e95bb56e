//! The control socket, the note about the workers, and their folder.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use xfan_tests::e2e_or_skip;
use xfan_tests::primary::Launch;
use xfan_tests::process::Process;
use xfan_tests::tmpfs::Tmpfs;
use xfan_tests::veth::network;

/// The workers' user when xfan was not started through sudo.
const NOBODY: u32 = 65534;

/// A file's permissions and owner.
fn mode(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.mode() & 0o7777, metadata.uid())
}

fn beside(socket: &Path, more: &str) -> PathBuf {
    PathBuf::from(format!("{}{more}", socket.display()))
}

/// Sets the umask of a command.
fn with_umask(command: &mut Command, umask: u32) {
    // SAFETY: the closure makes one system call, without pointers.
    unsafe {
        command.pre_exec(move || {
            libc::umask(umask);
            Ok(())
        });
    }
}

#[test]
fn file_modes_do_not_depend_on_the_umask() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    for umask in [0, 0o027, 0o077] {
        let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
        let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
        let primary = launch.spawn_with(|command| with_umask(command, umask)).unwrap();
        primary.process.wait_for_line(" running ").unwrap();
        let socket = primary.socket();
        assert_eq!(mode(socket.parent().unwrap()), (0o711, 0), "umask {umask:03o}");
        assert_eq!(mode(&socket), (0o600, NOBODY), "umask {umask:03o}");
        assert_eq!(mode(&beside(&socket, ".workers")), (0o600, 0), "umask {umask:03o}");
        let (exit, _folder) = primary.stop();
        assert_eq!(exit.code, Some(0), "{exit:#?}");
        assert_eq!(fs::read_dir(socket.parent().unwrap()).unwrap().count(), 0);
    }
}

#[test]
fn a_folder_listable_by_others_is_reported() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    for mode in [0o755, 0o711] {
        let launch = Launch::on(&namespace).unwrap().with("-n 1").worker("xfan-count", "").unwrap();
        let folder = launch.socket().parent().unwrap().to_owned();
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
        let (exit, _folder) = launch.start().unwrap().stop();
        assert_eq!(exit.code, Some(0), "{exit:#?}");
        let warning = "other users can list the directory";
        let warnings = exit.stderr.iter().filter(|line| line.contains(warning)).count();
        assert_eq!(warnings, usize::from(mode == 0o755), "{exit:#?}");
    }
}

#[test]
fn a_folder_writable_by_others_is_refused() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    for mode in [0o777, 0o775, 0o1777] {
        let launch = Launch::on(&namespace).unwrap();
        let folder = launch.socket().parent().unwrap().to_owned();
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
        let exit = launch.run().unwrap();
        let (stderr, path) = (exit.stderr.join("\n"), folder.display());
        assert_eq!(exit.code, Some(2), "{stderr}");
        let message = format!(
            "xfan: no control socket: directory {path} (owner root, mode {mode:04o}) can be changed by"
        );
        assert!(stderr.contains(&message), "{stderr}");
    }
}

#[test]
fn symbolic_links_for_its_files_are_not_followed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
    let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
    let (socket, target) = (launch.socket(), launch.folder().join("target"));
    fs::create_dir(socket.parent().unwrap()).unwrap();
    fs::write(&target, "[]").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o600)).unwrap();
    let note = beside(&socket, ".workers");
    for link in [&note, &beside(&socket, ".workers.new")] {
        symlink(&target, link).unwrap();
    }
    // The file of the socket itself is a link.
    symlink(&target, &socket).unwrap();
    let exit = Process::spawn(launch.command().unwrap()).unwrap().wait();
    assert_eq!(exit.code, Some(2), "{exit:#?}");
    assert!(exit.stderr.join("\n").contains("exists and is no socket"), "{exit:#?}");
    fs::remove_file(&socket).unwrap();

    let primary = launch.start().unwrap();
    assert!(fs::symlink_metadata(&note).unwrap().is_file());
    assert_eq!((fs::read_to_string(&target).unwrap().as_str(), mode(&target)), ("[]", (0o600, 0)));
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(fs::read_to_string(&target).unwrap(), "[]");
}

#[test]
fn a_full_disk_is_reported_and_leaves_no_partial_note() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    let launch = Launch::on(&namespace).unwrap().config("survive = true").unwrap();
    let launch = launch.with("-n 1").worker("xfan-count", "").unwrap();
    let run = launch.socket().parent().unwrap().to_owned();
    fs::create_dir(&run).unwrap();
    let disk = Tmpfs::mount(&run, 64, 0o755).unwrap();
    disk.fill().unwrap();
    let primary = launch.start().unwrap();
    let line = primary.process.wait_for_line("the next primary will not find them").unwrap();
    assert!(line.contains("No space left on device"), "{line}");
    let names = || {
        let mut names: Vec<_> = fs::read_dir(&run)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["filler", "xfan.sock"]);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
    assert_eq!(names(), ["filler"]);
}

#[test]
fn a_killed_primarys_partial_note_is_removed() {
    let _watchdog = e2e_or_skip!();
    let namespace = network(1);
    // This applies even to a primary that has no workers to record.
    let launch = Launch::on(&namespace).unwrap();
    let half = beside(&launch.socket(), ".workers.new");
    fs::create_dir(half.parent().unwrap()).unwrap();
    fs::write(&half, "[{\"member\":\"defa").unwrap();
    let primary = launch.start().unwrap();
    assert!(!half.exists());
    assert_eq!(primary.stop().0.code, Some(0));
}
