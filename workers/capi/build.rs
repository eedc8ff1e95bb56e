//! Sets the soname of the shared library to the version of its binary interface: 0.N before 1.0,
//! the major version from then on.

use std::env;

fn main() {
    let version = env::var("CARGO_PKG_VERSION").expect("cargo sets CARGO_PKG_VERSION");
    let mut numbers = version.split('.');
    let interface = match (numbers.next(), numbers.next()) {
        (Some("0"), Some(minor)) => format!("0.{minor}"),
        (Some(major), _) => major.to_owned(),
        (None, _) => version.clone(),
    };
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libxfan_worker_c.so.{interface}");
    println!("cargo::rerun-if-changed=build.rs");
}
