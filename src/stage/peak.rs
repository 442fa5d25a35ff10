//! The most anonymous memory that this process has while something runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;

use super::metrics::anonymous_bytes;

/// Time between two samples.
const EVERY: Duration = Duration::from_millis(2);

/// A thread that samples `RssAnon` of `/proc/self/status`.
#[derive(Debug)]
pub struct Peak {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Peak {
    /// Starts to sample; none where the kernel does not say or there is no thread to be had.
    pub fn start() -> Option<Peak> {
        anonymous_bytes()?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let sample = move || {
            let mut peak = 0;
            loop {
                let last = told.load(Ordering::Relaxed);
                peak = anonymous_bytes().unwrap_or(0).max(peak);
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

/// Bytes of GPU memory that the management library counts for this process, context included; none where it does not
/// answer or sees other process numbers.
pub fn gpu_bytes() -> Option<u64> {
    let nvml = Nvml::init().ok()?;
    let own = |device: nvml_wrapper::Device<'_>| -> Option<u64> {
        let processes = device.running_compute_processes().ok()?;
        let used = |p: &ProcessInfo| match p.used_gpu_memory {
            UsedGpuMemory::Used(bytes) if p.pid == std::process::id() => Some(bytes),
            _ => None,
        };
        processes.iter().find_map(used)
    };
    (0..nvml.device_count().ok()?).filter_map(|n| own(nvml.device_by_index(n).ok()?)).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_touched_is_seen() {
        let before = anonymous_bytes().unwrap();
        let peak = Peak::start().unwrap();
        let held = vec![1u8; 64 << 20];
        std::thread::sleep(Duration::from_millis(50));
        assert!(held.iter().all(|&b| b == 1));
        drop(held);
        let most = peak.finish().unwrap();
        assert!(most >= before.max(64 << 20), "{most} bytes seen");
    }
}
