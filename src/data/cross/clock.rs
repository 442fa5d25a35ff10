//! Time, so that waiting for minutes can be tested in no time.

use std::time::{Duration, Instant};

/// Tells the time and lets it pass.
pub trait Clock: Sync {
    /// The time since some moment.
    fn now(&self) -> Duration;
    /// Returns after `time`.
    fn sleep(&self, time: Duration);
}

/// The clock on the wall.
#[derive(Debug)]
pub struct Wall(Instant);

impl Default for Wall {
    fn default() -> Wall {
        Wall(Instant::now())
    }
}

impl Clock for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
