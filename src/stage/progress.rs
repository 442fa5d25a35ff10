//! Progress of anything that takes more than a moment: bars on a terminal, nothing elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Makes bars, or silent ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    shown: bool,
}

impl Progress {
    /// Bars on stderr if it is a terminal and `quiet` is false.
    pub fn new(quiet: bool) -> Progress {
        Progress { shown: !quiet && std::io::stderr().is_terminal() }
    }

    /// A bar of `len` steps: what is done, how far, the time left, and a message.
    pub fn bar(self, what: &'static str, len: u64) -> ProgressBar {
        if !self.shown {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr_with_hz(5));
        if let Ok(style) =
            ProgressStyle::with_template("{prefix:>10} {bar:30} {pos}/{len} · {eta} left · {msg}")
        {
            bar.set_style(style.progress_chars("━━─"));
        }
        bar.set_prefix(what);
        bar.enable_steady_tick(Duration::from_millis(500));
        bar
    }
}
