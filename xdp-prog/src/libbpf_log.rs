//! What libbpf has to say about a failure, the verifier's log above all. It prints instead of returning it.

use std::cell::RefCell;
use std::sync::Once;

use libbpf_rs::{PrintLevel, set_print};

thread_local! {
    /// While this thread collects: what libbpf has printed so far.
    static COLLECTED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work` and returns what libbpf printed meanwhile on this thread, besides what `work` returns.
/// Whatever libbpf prints at other times is logged.
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
