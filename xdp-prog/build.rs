//! Compiles the XDP program with clang and generates its typed skeleton.

use std::env;
use std::path::{Path, PathBuf};

use libbpf_cargo::SkeletonBuilder;
use xfan_packet::{ethernet, ip};

const SOURCE: &str = "src/bpf/xfan.bpf.c";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    println!("cargo::rerun-if-changed=src/bpf");

    // BPF CPU v3 has 32-bit jumps and arithmetic. Every kernel that has AF_XDP with need_wakeup
    // (Linux 5.4) runs it.
    let mut clang_args = vec!["-Wall".to_string(), "-Werror".into(), "-mcpu=v3".into()];
    // The parser in user space must stop where the program stops, so both have the same limits.
    for (name, limit) in [
        ("MAX_VLAN_TAGS", ethernet::MAX_VLAN_TAGS),
        ("MAX_EXTENSION_HEADERS", ip::MAX_EXTENSION_HEADERS),
        ("MAX_OPTIONS", ip::MAX_OPTIONS),
    ] {
        clang_args.push(format!("-D{name}={limit}"));
    }
    // Debian keeps asm/types.h in a directory for each architecture, which clang does not search
    // with -target bpf.
    let multiarch = format!("/usr/include/{arch}-linux-gnu");
    if Path::new(&multiarch).is_dir() {
        clang_args.extend(["-idirafter".into(), multiarch]);
    }

    let built = SkeletonBuilder::new()
        .source(SOURCE)
        .obj(out.join("xfan.bpf.o"))
        .clang_args(clang_args)
        .build_and_generate(out.join("xfan.skel.rs"));
    if let Err(error) = built {
        panic!(
            "cannot compile {SOURCE}, which needs clang 12 or newer and the kernel's headers \
                (Debian: apt install clang linux-libc-dev): {error:#}"
        );
    }
}
