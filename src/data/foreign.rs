//! Calls into libraries that panic where a file is not as they expect, nest as deep as it says, or do not come back.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

/// The stack of a call that may nest deeply; only what is used of it takes memory.
const STACK: usize = 512 << 20;
/// How long such a call may take.
const PATIENCE: Duration = Duration::from_secs(60);

thread_local! {
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What `call` gives, or what it panicked with, in one line; nothing is printed about it.
///
/// What `call` changes must not be used after an error.
pub fn catch<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    static HOOK: Once = Once::new();
    // Other panics are told as before.
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CAUGHT.get() {
                before(info);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(outer);
    result.map_err(|payload| reason(payload.as_ref()).lines().collect::<Vec<_>>().join(" "))
}

/// [`catch`] on a thread of its own with a large stack. A call that takes more than a minute is an error; it is left
/// behind and ends with the process.
pub fn apart<R: Send + 'static>(call: impl FnOnce() -> R + Send + 'static) -> Result<R, String> {
    within(PATIENCE, call)
}

fn within<R: Send + 'static>(
    patience: Duration,
    call: impl FnOnce() -> R + Send + 'static,
) -> Result<R, String> {
    let (send, receive) = sync_channel(1);
    // Nobody listens to a call that comes back too late.
    let work = move || drop(send.send(catch(call)));
    thread::Builder::new()
        .stack_size(STACK)
        .spawn(work)
        .map_err(|e| format!("cannot start a thread with {STACK} bytes of stack: {e}"))?;
    receive
        .recv_timeout(patience)
        .unwrap_or_else(|_| Err(format!("takes more than {} seconds", patience.as_secs())))
}

/// The text that a panic carries.
fn reason(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_text() {
        assert_eq!(catch(|| 3), Ok(3));
        let text = "a number\nof ids".to_string();
        assert_eq!(catch(|| panic!("{text}")), Err::<(), _>("a number of ids".into()));
        let at = "x".len() + 1;
        let err = catch(|| [0, 1][at]).unwrap_err();
        assert!(err.contains("out of bounds"), "{err}");
        assert_eq!(apart(|| panic!("nothing")), Err::<(), _>("nothing".into()));
    }

    #[test]
    fn what_nests_deeply_or_never_ends_comes_back() {
        fn depth(n: u64) -> u64 {
            if n == 0 { 0 } else { 1 + depth(std::hint::black_box(n - 1)) }
        }
        assert_eq!(apart(|| depth(1_000_000)), Ok(1_000_000));
        let err = within(Duration::ZERO, || thread::sleep(Duration::from_secs(2))).unwrap_err();
        assert!(err.contains("takes more than"), "{err}");
    }
}
