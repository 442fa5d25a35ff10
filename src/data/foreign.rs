//! Calls into libraries that panic where a file is not as they expect.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

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
    }
}
