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

    // v3: 32-bit jumps and arithmetic, in every kernel that has AF_XDP with need_wakeup (5.4).
    let mut clang_args = vec!["-Wall".to_string(), "-Werror".into(), "-mcpu=v3".into()];
    // The parser in user space must stop where the program stops, so its limits are the program's.
    for (name, limit) in [
        ("MAX_VLAN_TAGS", ethernet::MAX_VLAN_TAGS),
        ("MAX_EXTENSION_HEADERS", ip::MAX_EXTENSION_HEADERS),
        ("MAX_OPTIONS", ip::MAX_OPTIONS),
    ] {
        clang_args.push(format!("-D{name}={limit}"));
    }
    // Debian keeps asm/types.h in a directory per architecture that clang leaves out for -target bpf.
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
            "{SOURCE} did not compile; it needs clang 12 or newer and the kernel's headers \
                (Debian: apt install clang linux-libc-dev): {error:#}"
        );
    }
}
