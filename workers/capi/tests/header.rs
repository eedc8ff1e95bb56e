//! The committed header is the one that cbindgen generates. C and C++ compilers accept it, and the
//! worker in docs/workers-c.md. `XFAN_WRITE_HEADER=1 cargo test -p xfan-worker-capi --test header`
//! writes the header.

use std::path::Path;
use std::process::Command;

use cbindgen::{Builder, Config};

const WRITE: &str = "XFAN_WRITE_HEADER";

fn header() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/include/xfan_worker.h"))
}

#[test]
fn the_header_is_up_to_date() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let builder = Builder::new().with_config(config).with_src(folder.join("src/lib.rs"));
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    if std::env::var_os(WRITE).is_some_and(|value| value == "1") {
        std::fs::write(header(), &made).unwrap();
    }
    let found = std::fs::read_to_string(header()).unwrap_or_default();
    assert!(
        found == made,
        "include/xfan_worker.h is out of date: run this test with {WRITE}=1. It should be:\n{made}"
    );
}

fn compile(language: &str, standard: &str, source: &Path) {
    let mut command = Command::new("cc");
    command.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", language]);
    command.arg(format!("-std={standard}")).arg("-I").arg(header().parent().unwrap()).arg(source);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{standard}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn compilers_accept_the_header() {
    for (language, standard) in [("c", "c99"), ("c", "c17"), ("c++", "c++11")] {
        compile(language, standard, header());
    }
}

#[test]
fn compilers_accept_the_documented_worker() {
    let page = include_str!("../../../docs/workers-c.md");
    let (_, code) = page.split_once("\n```c\n").expect("a block of C");
    let (code, _) = code.split_once("\n```\n").expect("the end of the block");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{code}\n")).unwrap();
    compile("c", "c99", file.path());
}
