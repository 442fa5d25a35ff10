//! The most memory that this process has while something runs: of the system, or of a GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;

/// Time between two samples.
const EVERY: Duration = Duration::from_millis(2);

/// A thread that samples a number of bytes.
#[derive(Debug)]
pub struct Peak {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Peak {
    /// Starts to sample `bytes`; none where it does not say or there is no thread to be had.
    pub fn start(bytes: impl Fn() -> Option<u64> + Send + 'static) -> Option<Peak> {
        let mut peak = bytes()?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let sample = move || {
            loop {
                let last = told.load(Ordering::Relaxed);
                peak = bytes().unwrap_or(0).max(peak);
                if last {
                    return peak;
                }
                std::thread::sleep(EVERY);
            }
        };
        let thread = Builder::new().name("peak".into()).spawn(sample).ok()?;
        Some(Peak { stop, thread })
    }

    /// The most that was seen, in bytes.
    pub fn finish(self) -> Option<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok()
    }
}

/// NVIDIA's management library.
#[derive(Debug)]
pub struct GpuMemory(Nvml);

impl GpuMemory {
    /// Opens the library; none where there is none, as on Jetson, which is normal.
    pub fn open() -> Option<GpuMemory> {
        Nvml::init().ok().map(GpuMemory)
    }

    /// Bytes of all devices that the library counts for this process, context included; none where it does not answer
    /// or sees other process numbers, as in a container.
    pub fn of_process(&self) -> Option<u64> {
        let own = |device: nvml_wrapper::Device<'_>| -> Option<u64> {
            let processes = device.running_compute_processes().ok()?;
            let used = |p: &ProcessInfo| match p.used_gpu_memory {
                UsedGpuMemory::Used(bytes) if p.pid == std::process::id() => Some(bytes),
                _ => None,
            };
            processes.iter().find_map(used)
        };
        let devices = 0..self.0.device_count().ok()?;
        devices.filter_map(|n| own(self.0.device_by_index(n).ok()?)).reduce(|a, b| a + b)
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::anonymous_bytes;
    use super::*;

    #[test]
    fn what_is_touched_is_seen() {
        let before = anonymous_bytes().unwrap();
        let peak = Peak::start(anonymous_bytes).unwrap();
        let held = vec![1u8; 64 << 20];
        std::thread::sleep(Duration::from_millis(50));
        assert!(held.iter().all(|&b| b == 1));
        drop(held);
        let most = peak.finish().unwrap();
        assert!(most >= before.max(64 << 20), "{most} bytes seen");
    }
}
