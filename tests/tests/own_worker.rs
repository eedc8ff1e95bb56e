//! The workers in docs/workers-rust.md and docs/workers-c.md, built outside the workspace by the
//! steps that the pages give, count every packet.

use std::path::{Path, PathBuf};
use std::process::Command;

use xfan_tests::balance::assert_balanced;
use xfan_tests::primary::Launch;
use xfan_tests::process::binary;
use xfan_tests::replay::Replay;
use xfan_tests::veth::{Veth, VethConfig};
use xfan_tests::{command, e2e_or_skip, traffic};

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The one code block of a language, in a page of docs/, that contains a text.
fn block(page: &str, language: &str, containing: &str) -> String {
    let text = std::fs::read_to_string(format!("{ROOT}/docs/{page}")).unwrap();
    let begin = format!("\n```{language}\n");
    let blocks = text.split(&begin).skip(1);
    let blocks = blocks.map(|rest| rest.split_once("\n```\n").expect("a block ends").0);
    let mut found = blocks.filter(|block| block.contains(containing));
    let block = found.next().unwrap_or_else(|| panic!("{page} has no {language} with {containing}"));
    assert_eq!(found.next(), None, "{page} has two");
    format!("{block}\n")
}

/// Builds the project of workers-rust.md in the folder.
fn build_in_rust(folder: &Path) -> PathBuf {
    let manifest = block("workers-rust.md", "toml", "[package]");
    let here = manifest.replace("/path/to/xfan", ROOT);
    assert_ne!(here, manifest, "the manifest does not say where the SDK is");
    std::fs::create_dir(folder.join("src")).unwrap();
    std::fs::write(folder.join("Cargo.toml"), here).unwrap();
    std::fs::write(folder.join("src/main.rs"), block("workers-rust.md", "rust", "fn main")).unwrap();
    // The same versions as here, so that nothing has to be downloaded.
    std::fs::copy(format!("{ROOT}/Cargo.lock"), folder.join("Cargo.lock")).unwrap();

    // Not the workspace's own target folder: what is compiled here stays for the next time.
    let target = concat!(env!("CARGO_TARGET_TMPDIR"), "/own-worker");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--offline", "--target-dir", target]).current_dir(folder);
    let built = command::run(&mut cargo);
    // What root builds must not be root's: the owner of the checkout may want to remove it.
    command::run(Command::new("chown").args(["-R", "--reference", ROOT, target])).unwrap();
    built.unwrap();
    let program = folder.join("my-worker");
    std::fs::copy(format!("{target}/debug/my-worker"), &program).unwrap();
    program
}

/// Builds the worker of workers-c.md in the folder.
fn build_in_c(folder: &Path) -> PathBuf {
    let (prefix, library) = (folder.join("sdk"), binary("libxfan_worker_c.so").unwrap());
    let mut install = Command::new(format!("{ROOT}/scripts/install-capi"));
    install.env_remove("DESTDIR").arg("--from").arg(library.parent().unwrap()).arg(&prefix);
    command::run(&mut install).unwrap();
    std::fs::write(folder.join("my-worker.c"), block("workers-c.md", "c", "int main")).unwrap();
    // With the library shared, then with the library inside.
    for kind in ["$(pkg-config --cflags", "$(pkg-config --static"] {
        let mut sh = Command::new("sh");
        sh.args(["-ec", &block("workers-c.md", "sh", kind)]).current_dir(folder);
        sh.env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
        command::run(&mut sh).unwrap();
    }
    std::fs::remove_dir_all(prefix).unwrap();
    folder.join("my-worker")
}

/// Runs two workers on known packets, and compares what they count.
fn counts_every_packet(build: fn(&Path) -> PathBuf) {
    const PACKETS: u64 = 600;
    let (namespace, _) = Veth::in_namespace(&VethConfig::queues(2)).unwrap();
    let launch = Launch::on(&namespace).unwrap().with("-n 2");
    let program = build(launch.folder());
    let primary = launch.worker(program.to_str().unwrap(), "").unwrap().start().unwrap();
    let frames = traffic::synthetic(60, 600, 8).frames;
    namespace.run(|| Replay::onto("tx0").run(&frames)).unwrap();
    let report = primary.report_after(PACKETS, true);
    assert_balanced(&report, PACKETS);

    let members = &report.groups[0].members;
    assert!(members.iter().all(|member| member.committed > 0), "{members:#?}");
    assert_eq!(members.iter().map(|member| member.committed).sum::<u64>(), PACKETS);
    let tiny = frames.iter().filter(|frame| frame.len() < 64).count() as u64;
    assert!(tiny > 0 && tiny < PACKETS, "{tiny}");
    assert_eq!(members.iter().map(|member| member.counters["tiny_packets"]).sum::<u64>(), tiny);
    let (exit, _folder) = primary.stop();
    assert_eq!(exit.code, Some(0), "{exit:#?}");
}

#[test]
fn a_worker_in_rust_outside_the_workspace() {
    let _watchdog = e2e_or_skip!(1800);
    counts_every_packet(build_in_rust);
}

#[test]
fn a_worker_in_c_outside_the_workspace() {
    let _watchdog = e2e_or_skip!(240);
    counts_every_packet(build_in_c);
}
