//! Runs that are ended at a moment counted in lines of what they write, which means the same on a fast and on a slow
//! machine.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// Whole lines of the file at `path`; none where there is no file yet.
pub fn lines(path: &Path) -> usize {
    std::fs::read(path).map_or(0, |text| text.iter().filter(|b| **b == b'\n').count())
}

/// Waits until the file at `path`, which `child` writes, has `until` lines or the child has ended.
#[track_caller]
pub fn wait(child: &mut Child, path: &Path, until: usize) {
    let began = Instant::now();
    while lines(path) < until && child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(600), "{}: line {until} never came", path.display());
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Kills `child` the time `after` its file at `path` had `until` lines. Whether it was killed: one that ended before
/// must have ended well.
#[track_caller]
pub fn at_lines(mut child: Child, path: &Path, until: usize, after: Duration) -> bool {
    wait(&mut child, path, until);
    std::thread::sleep(after);
    child.kill().unwrap();
    let ended = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.code().is_none_or(|c| c == 0), "{error}");
    ended.status.code().is_none()
}
