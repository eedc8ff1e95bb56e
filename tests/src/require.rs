//! May an end-to-end test run here?

use std::io;
use std::process::Command;
use std::sync::OnceLock;

/// Set to 1 where skipping is not allowed: then a missing requirement is a failure.
pub const STRICT: &str = "XFAN_REQUIRE_E2E";

/// What this machine or this user lacks for end-to-end tests; `None` if nothing. Looked up once per process.
pub fn missing() -> Option<&'static str> {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    MISSING.get_or_init(look).as_deref()
}

fn look() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root: run it with sudo".into());
    }
    // SAFETY: plain system calls without pointers; the descriptor is closed once, by its only owner.
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

/// Whether the end-to-end test `test` should run; if not, it has said why.
///
/// # Panics
/// Something is missing and [`STRICT`] is set to 1.
pub fn met(test: &str) -> bool {
    let Some(reason) = missing() else { return true };
    let strict = std::env::var_os(STRICT).is_some_and(|value| value == "1");
    assert!(!strict, "{test} cannot run, and {STRICT}=1 forbids to skip it: {reason}");
    eprintln!("{test} skipped: {reason}");
    false
}

/// First line of an end-to-end test: returns from it, saying why, where it cannot run. Evaluates to a watchdog, to be
/// held for the time of the test, which ends a test that hangs after the given seconds, or after 120.
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
