//! Time on the device: between two events on the stream of kernels.

use std::time::Duration;

use cudarc::driver::{result, sys};

use super::Cuda;
use super::driver::{Driver, device_error, probe};
use crate::error::Result;

/// An event, given back when it is dropped.
struct Event<'a> {
    driver: &'a Driver,
    handle: sys::CUevent,
}

impl<'a> Event<'a> {
    /// Happens when the stream has come to it.
    fn record(driver: &'a Driver) -> Result<Event<'a>> {
        driver.enter()?;
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| driver.failed("an event", e))?;
        let event = Event { driver, handle };
        driver.mark(handle)?;
        Ok(event)
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        if self.driver.enter().is_ok() {
            // SAFETY: created by `record`, and not used again.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}

impl Cuda {
    /// How long the device is busy with what `work` asks of it, from when it comes to the first until the last is done.
    pub fn elapsed(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        // The function below came with that version.
        let ((major, minor), _) = probe()?;
        if (major, minor) < (12, 8) {
            return Err(device_error(format!(
                "the driver is for CUDA {major}.{minor}, the time between two events wants one for CUDA 12.8 or later"
            )));
        }
        let start = Event::record(&self.driver)?;
        work()?;
        let end = Event::record(&self.driver)?;
        self.synchronize()?;
        // SAFETY: both events have happened.
        let milliseconds = unsafe { result::event::elapsed(start.handle, end.handle) }
            .map_err(|e| self.driver.failed("the time between two events", e))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::device;
    use crate::backend::Backend;
    use crate::cuda::DeviceMemory;
    use crate::tensor::Store;

    #[test]
    fn work_takes_time_and_its_errors_are_told() {
        let Some(cuda) = device() else { return };
        let mut a = cuda.alloc::<f32>("a", 1 << 20).unwrap();
        let time =
            cuda.elapsed(|| (0..8).try_for_each(|_| cuda.zero(DeviceMemory::view_mut(&mut a, 0..1 << 20))));
        assert!(time.unwrap().as_nanos() > 0);
        let other = cuda.alloc::<f32>("b", 1).unwrap();
        let wrong = cuda
            .elapsed(|| cuda.copy(DeviceMemory::view_mut(&mut a, 0..2), DeviceMemory::view(&other, 0..1)));
        assert!(wrong.is_err());
    }
}
