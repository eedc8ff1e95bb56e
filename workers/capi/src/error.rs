//! Errors: a function returns a code, and a sentence is kept for [`xfan_last_error`].

use std::any::Any;
use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use xfan_worker::{AttachError, CounterError, RecvError};

/// Success.
pub const XFAN_OK: i32 = 0;
/// Not an error: no more packets will arrive, and all that arrived are committed. Free the worker.
pub const XFAN_CLOSED: i32 = -1;
/// An argument is invalid: NULL, not UTF-8, or out of range.
pub const XFAN_INVALID: i32 = -2;
/// Neither the environment nor the options name a control socket.
pub const XFAN_NO_SOCKET: i32 = -3;
/// No dispatcher listens on the socket.
pub const XFAN_NO_DISPATCHER: i32 = -4;
/// The permissions of the socket or of its directory deny access.
pub const XFAN_PERMISSION: i32 = -5;
/// The dispatcher refused the worker. xfan_last_error has its reason.
pub const XFAN_REFUSED: i32 = -6;
/// The dispatcher has died. All packets that arrived are committed.
pub const XFAN_DISPATCHER_GONE: i32 = -7;
/// The dispatcher sent invalid data. Worker and dispatcher must be of the same release.
pub const XFAN_PROTOCOL: i32 = -8;
/// A counter's name is invalid or in use, or the worker has published as many as it can.
pub const XFAN_COUNTER: i32 = -9;
/// A system call failed.
pub const XFAN_SYSTEM: i32 = -10;
/// A bug in this library. The worker can only be freed.
pub const XFAN_INTERNAL: i32 = -11;

/// The dispatcher has ended this worker's membership, because the worker hung or did not leave when
/// asked to. Its packets went to other workers.
pub const XFAN_EVICTED: i32 = -12;

/// An error to be returned to C.
pub(crate) struct Failure {
    code: i32,
    message: Cow<'static, str>,
}

impl Failure {
    pub(crate) fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Failure { code: XFAN_INVALID, message: message.into() }
    }

    fn panicked(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text =
            text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no reason");
        Failure { code: XFAN_INTERNAL, message: format!("a bug in xfan, please report it: {text}").into() }
    }

    /// Keeps the error for `xfan_last_error`. Returns its code.
    fn keep(self) -> i32 {
        // This fails only in a thread that is exiting, which has dropped its thread-locals.
        let _ = LAST.try_with(|last| {
            let message = self.message.replace('\0', " ");
            *last.borrow_mut() = (self.code, CString::new(message).unwrap_or_default());
        });
        self.code
    }
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Self {
        let code = match &error {
            AttachError::NoSocket => XFAN_NO_SOCKET,
            AttachError::NoDispatcher(_) => XFAN_NO_DISPATCHER,
            AttachError::Permission(_) => XFAN_PERMISSION,
            AttachError::Refused { .. } => XFAN_REFUSED,
            AttachError::Batch(_) => XFAN_INVALID,
            AttachError::NoAnswer(_)
            | AttachError::Protocol(..)
            | AttachError::Unexpected(_)
            | AttachError::Layout(_) => XFAN_PROTOCOL,
            AttachError::Connect(..)
            | AttachError::Inherited { .. }
            | AttachError::Umem(_)
            | AttachError::Seal(_)
            | AttachError::Core(_)
            | AttachError::Leaving
            | AttachError::Signals(_) => XFAN_SYSTEM,
        };
        Failure { code, message: error.to_string().into() }
    }
}

impl From<RecvError> for Failure {
    fn from(error: RecvError) -> Self {
        let code = match &error {
            RecvError::PrimaryGone => XFAN_DISPATCHER_GONE,
            RecvError::Evicted => XFAN_EVICTED,
            RecvError::Corrupt { .. } => XFAN_PROTOCOL,
            RecvError::System(..) => XFAN_SYSTEM,
        };
        Failure { code, message: error.to_string().into() }
    }
}

impl From<CounterError> for Failure {
    fn from(error: CounterError) -> Self {
        Failure { code: XFAN_COUNTER, message: error.to_string().into() }
    }
}

thread_local! {
    static LAST: RefCell<(i32, CString)> = RefCell::default();
}

/// Runs the body of a C function. Turns an error or a panic into a code, and keeps its sentence.
#[inline]
pub(crate) fn code(body: impl FnOnce() -> Result<i32, Failure>) -> i32 {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(result)) => result,
        Ok(Err(failure)) => failure.keep(),
        Err(payload) => Failure::panicked(&*payload).keep(),
    }
}

/// Like [`code`], for functions that return a pointer: null on an error or a panic.
pub(crate) fn pointer<P: Pointer>(body: impl FnOnce() -> Result<P, Failure>) -> P {
    let mut result = P::null();
    code(|| {
        result = body()?;
        Ok(XFAN_OK)
    });
    result
}

/// A pointer type that a C function returns.
pub(crate) trait Pointer {
    fn null() -> Self;
}

impl<T> Pointer for *mut T {
    fn null() -> Self {
        ptr::null_mut()
    }
}

impl<T> Pointer for *const T {
    fn null() -> Self {
        ptr::null()
    }
}

/// The last error of the calling thread as a sentence; empty if there was none. The pointer is
/// valid until the thread's next error. A successful call does not change it.
#[unsafe(no_mangle)]
pub extern "C" fn xfan_last_error() -> *const c_char {
    pointer(|| Ok(LAST.try_with(|last| last.borrow().1.as_ptr()).unwrap_or(c"".as_ptr())))
}

/// The last error of the calling thread as a code; XFAN_OK if there was none.
#[unsafe(no_mangle)]
pub extern "C" fn xfan_last_error_code() -> i32 {
    code(|| Ok(LAST.try_with(|last| last.borrow().0).unwrap_or(XFAN_OK)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn a_panic_becomes_an_error_of_its_thread() {
        assert_eq!((xfan_last_error_code(), text()), (XFAN_OK, String::new()));
        assert_eq!(code(|| panic!("number {}", 7)), XFAN_INTERNAL);
        assert_eq!(text(), "a bug in xfan, please report it: number 7");
        assert!(pointer(|| -> Result<*const u8, Failure> { panic!("plain") }).is_null());
        assert_eq!(text(), "a bug in xfan, please report it: plain");
        assert_eq!(code(|| Err(Failure::invalid("a\0b"))), XFAN_INVALID);
        assert_eq!(code(|| Ok(5)), 5);
        assert_eq!((xfan_last_error_code(), text()), (XFAN_INVALID, "a b".into()));
        std::thread::spawn(|| assert_eq!(xfan_last_error_code(), XFAN_OK)).join().unwrap();
    }

    fn text() -> String {
        // SAFETY: the pointer is to text with a zero byte, valid until the thread's next error.
        unsafe { CStr::from_ptr(xfan_last_error()) }.to_str().unwrap().to_owned()
    }
}
