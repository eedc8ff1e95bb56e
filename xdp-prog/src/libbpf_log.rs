//! The messages of libbpf, such as the verifier's log. libbpf prints them instead of returning
//! them.

use std::cell::RefCell;
use std::sync::Once;

use libbpf_rs::{PrintLevel, set_print};

thread_local! {
    /// What libbpf has printed on this thread since `collect` was called; `None` outside of it.
    static COLLECTED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work`, and returns its result and what libbpf printed meanwhile on this thread. What
/// libbpf prints at other times is logged.
pub(crate) fn collect<T>(work: impl FnOnce() -> T) -> (T, String) {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        set_print(Some((PrintLevel::Warn, receive)));
    });
    COLLECTED.set(Some(String::new()));
    let result = work();
    (result, COLLECTED.take().unwrap_or_default())
}

fn receive(_level: PrintLevel, message: String) {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(text) => text.push_str(&message),
        None => tracing::warn!("libbpf: {}", message.trim_end()),
    });
}
