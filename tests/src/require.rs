//! Whether end-to-end tests can run here.

use std::io;
use std::process::Command;
use std::sync::OnceLock;

/// Set to 1 where skipping is not allowed: a missing requirement is then a failure.
pub const STRICT: &str = "XFAN_REQUIRE_E2E";

/// What this machine or user lacks for end-to-end tests; `None` if nothing. Checked once per
/// process.
pub fn missing() -> Option<&'static str> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    MISSING.get_or_init(look).as_deref()
}

fn look() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root: run it with sudo".into());
    }
    // SAFETY: plain system calls without pointers; the descriptor is closed once, by its only
    // owner.
    unsafe {
        let socket = libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            let error = io::Error::last_os_error();
            return Some(format!("the kernel gives no AF_XDP socket (CONFIG_XDP_SOCKETS): {error}"));
        }
        libc::close(socket);
    }
    let tools =
        [("ip", "-V", "iproute2"), ("ethtool", "--version", "ethtool"), ("ping", "-V", "iputils-ping")];
    for (tool, argument, package) in tools {
        if let Err(error) = Command::new(tool).arg(argument).output() {
            return Some(format!("it needs the tool {tool} (Debian: apt install {package}): {error}"));
        }
    }
    if let Err(error) = crate::netns::Netns::new() {
        return Some(error.to_string());
    }
    None
}

/// Whether the end-to-end test `test` should run. If not, it has printed why.
///
/// # Panics
/// A requirement is missing and [`STRICT`] is 1.
pub fn met(test: &str) -> bool {
    let Some(reason) = missing() else { return true };
    let strict = std::env::var_os(STRICT).is_some_and(|value| value == "1");
    assert!(!strict, "{test} cannot run, and {STRICT}=1 forbids to skip it: {reason}");
    eprintln!("{test} skipped: {reason}");
    false
}

/// The first line of an end-to-end test. Where the test cannot run, it prints why and returns. It
/// evaluates to a watchdog, which the test holds, and which aborts a test that hangs for more than
/// the given seconds (120).
#[macro_export]
macro_rules! e2e_or_skip {
    () => {
        $crate::e2e_or_skip!(120)
    };
    ($seconds:expr) => {{
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("this test");
        if !$crate::require::met(test) {
            return Default::default();
        }
        $crate::watchdog::Watchdog::new(test, std::time::Duration::from_secs($seconds))
    }};
}
