//! The header that is checked in is the one that cbindgen makes, and C and C++ compilers take it.
//! `XFAN_WRITE_HEADER=1 cargo test -p xfan-worker-capi --test header` writes it.

use std::path::Path;
use std::process::Command;

use cbindgen::{Builder, Config};

const WRITE: &str = "XFAN_WRITE_HEADER";

fn header() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/include/xfan_worker.h"))
}

#[test]
fn is_what_cbindgen_makes() {
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

#[test]
fn compilers_take_it() {
    for (language, standard) in [("c", "c99"), ("c", "c17"), ("c++", "c++11")] {
        let mut command = Command::new("cc");
        command.args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", language]);
        let output = command.arg(format!("-std={standard}")).arg(header()).output().unwrap();
        assert!(output.status.success(), "{standard}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
