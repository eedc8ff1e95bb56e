//! Compiles the eBPF programs of the test tools with clang.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const PROGRAMS: [&str; 2] = ["generate", "redirect"];

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=src/bpf");

    let headers = out.join("include/bpf");
    fs::create_dir_all(&headers).expect("OUT_DIR is writable");
    for (name, text) in libbpf_sys::API_HEADERS {
        fs::write(headers.join(name), text).expect("OUT_DIR is writable");
    }
    for program in PROGRAMS {
        compile(program, &out);
    }
}

fn compile(program: &str, out: &Path) {
    let source = format!("src/bpf/{program}.bpf.c");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    // v3 has 32-bit jumps and arithmetic; every kernel with live frames (5.18) supports it.
    let mut command = Command::new(&clang);
    command.args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror", "-c"]);
    command.arg("-I").arg(out.join("include"));
    // Debian has asm/types.h in a directory per architecture, which clang does not search with
    // -target bpf.
    let multiarch = format!("/usr/include/{arch}-linux-gnu");
    if Path::new(&multiarch).is_dir() {
        command.args(["-idirafter", &multiarch]);
    }
    command.arg(&source).arg("-o").arg(out.join(format!("{program}.bpf.o")));
    let status = command.status().unwrap_or_else(|error| {
        panic!("{clang} did not start: {error}; install it (Debian: apt install clang linux-libc-dev)")
    });
    assert!(
        status.success(),
        "{source} did not compile; it needs clang 12 or newer and the kernel's headers"
    );
}
