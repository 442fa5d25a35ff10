//! The driver: a device's context, its two streams, and errors by the driver's names.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::DriverError;
use cudarc::driver::{result, sys};

use super::images;
use super::launch::Functions;
use crate::error::{Error, Result};

/// The oldest devices that have bf16 tensor instructions and asynchronous copies.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);
/// The one capability that has warpgroup products.
const HOPPER: (i32, i32) = (9, 0);
/// How many launches an error of the device tells.
const REMEMBERED: usize = 4;

/// What a call of the driver gives.
pub type Outcome = std::result::Result<(), DriverError>;

/// A launch, for errors: the kernel and its sizes.
pub type Launched = (&'static str, Vec<(&'static str, usize)>);

/// A stream, and the event by which the other one waits for it.
#[derive(Clone, Copy)]
struct Lane {
    stream: sys::CUstream,
    done: sys::CUevent,
}

/// What one stream has that the other has not waited for yet.
#[derive(Default)]
struct Order {
    computed: bool,
    copied: bool,
}

/// What a copy waits for.
#[derive(Clone, Copy)]
pub enum After {
    /// All kernels so far: some of them may use the place that it goes to.
    Kernels,
    /// The work before this event, which is all that uses the place.
    Event(sys::CUevent),
}

/// A device that is in use.
pub struct Driver {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    kernels: Lane,
    copies: Lane,
    order: Mutex<Order>,
    /// What the driver calls the device.
    pub name: String,
    /// Major and minor compute capability.
    pub capability: (i32, i32),
    /// How many multiprocessors the device has.
    pub multiprocessors: usize,
    /// Whether the device runs kernels of `*_sm90.cu`, and this build has them.
    pub hopper: bool,
    /// Whether the device shares the system's memory.
    pub unified: bool,
    /// Kernels that have been used.
    pub functions: Mutex<Functions>,
    launched: Mutex<VecDeque<Launched>>,
}

// SAFETY: the handles are tokens of the driver, which may be used from any thread; each entry point makes the context
// current on its thread first.
unsafe impl Send for Driver {}
// SAFETY: as above; what changes on our side lies behind mutexes.
unsafe impl Sync for Driver {}

/// The first version of CUDA whose drivers have all functions that are called.
const OLDEST: (i32, i32) = (12, 4);

/// The oldest driver that this build runs on, as a version of CUDA: kernels run on drivers of their nvcc's major version.
pub fn least() -> (i32, i32) {
    (images::toolkit().0, 0).max(OLDEST)
}

/// The driver's version, as `(13, 0)`, and how many devices it has.
pub fn probe() -> Result<((i32, i32), usize)> {
    // SAFETY: looks whether the library can be opened. Every other call panics where it cannot.
    if !unsafe { sys::is_culib_present() } {
        return Err(device_error(
            "no NVIDIA driver: libcuda.so.1 is not found; install the driver, or use --device cpu",
        ));
    }
    let mut version = 0;
    // SAFETY: writes one number.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    asked.map_err(|e| failed("the driver's version", e))?;
    let version = (version / 1000, version % 1000 / 10);
    match result::init() {
        Ok(()) => {}
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok((version, 0)),
        Err(e) => return Err(failed("the driver does not start", e)),
    }
    let count = result::device::get_count().map_err(|e| failed("counting devices", e))?;
    Ok((version, count.max(0) as usize))
}

impl Driver {
    /// Device `ordinal`, if this build has kernels that it can run.
    pub fn new(ordinal: usize) -> Result<Driver> {
        if images::all().is_empty() {
            return Err(device_error(
                "this build has no CUDA kernels, because nvcc was not found; run tools/setup-cuda and build again, or \
                 use --device cpu",
            ));
        }
        let (version, count) = probe()?;
        let least = least();
        if version < least {
            let older = match version < OLDEST {
                true => String::new(),
                false => format!(", or build with an nvcc of version {}", version.0),
            };
            return Err(device_error(format!(
                "the driver is for CUDA {}.{}, this build needs one for CUDA {}.{} or later; update the driver{older}",
                version.0, version.1, least.0, least.1
            )));
        }
        if ordinal >= count {
            return Err(device_error(match count {
                0 => format!("device cuda:{ordinal} does not exist: the driver finds none; use --device cpu"),
                1 => format!("device cuda:{ordinal} does not exist: the driver finds one, cuda:0"),
                _ => {
                    format!("device cuda:{ordinal} does not exist: the driver finds {count}, from cuda:0 on")
                }
            }));
        }
        let what = |e| failed(&format!("cuda:{ordinal}"), e);
        let device = result::device::get(ordinal as i32).map_err(what)?;
        let name = result::device::get_name(device).map_err(what)?;
        let attribute = |attribute| {
            // SAFETY: `device` came from the driver.
            unsafe { result::device::get_attribute(device, attribute) }.map_err(what)
        };
        use sys::CUdevice_attribute as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LEAST_CAPABILITY {
            return Err(device_error(format!(
                "cuda:{ordinal} ({name}) has compute capability {}.{}, the kernels need {}.{} or later; use another \
                 device, or --device cpu",
                capability.0, capability.1, LEAST_CAPABILITY.0, LEAST_CAPABILITY.1
            )));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize;
        let hopper = capability == HOPPER && images::all().iter().any(|i| i.file.ends_with("_sm90"));
        let unified = attribute(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
        // SAFETY: `device` came from the driver; the context is released when this value is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(what)?;
        let release = |e| {
            // SAFETY: retained above and given up here.
            let _ = unsafe { result::primary_ctx::release(device) };
            what(e)
        };
        // SAFETY: the context was retained above.
        unsafe { result::ctx::set_current(context) }.map_err(release)?;
        // What is left where the second fails ends with the context.
        let (kernels, copies) = (Lane::new().map_err(release)?, Lane::new().map_err(release)?);
        Ok(Driver {
            ordinal,
            device,
            context,
            kernels,
            copies,
            order: Mutex::default(),
            name,
            capability,
            multiprocessors,
            hopper,
            unified,
            functions: Mutex::default(),
            launched: Mutex::default(),
        })
    }

    /// Makes the context current on this thread.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as this value lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| self.failed("the context", e))
    }

    /// Puts `work` on the stream of kernels, after every copy that came before. `what` is told in errors.
    pub fn compute(
        &self,
        what: impl FnOnce() -> String,
        work: impl FnOnce(sys::CUstream) -> Outcome,
    ) -> Result<()> {
        self.enter()?;
        let mut order = locked(&self.order);
        let started = if order.copied { self.copies.before(self.kernels) } else { Ok(()) };
        let done = started.and_then(|()| {
            order.copied = false;
            order.computed = true;
            work(self.kernels.stream)
        });
        done.map_err(|e| self.failed(&what(), e))
    }

    /// Puts `work` on the stream of copies: kernels that come later wait for it.
    pub fn transfer(&self, after: After, work: impl FnOnce(sys::CUstream) -> Outcome) -> Result<()> {
        self.enter()?;
        let mut order = locked(&self.order);
        let started = match after {
            After::Kernels if order.computed => {
                self.kernels.before(self.copies).map(|()| order.computed = false)
            }
            After::Kernels => Ok(()),
            After::Event(event) => self.copies.wait(event),
        };
        let done = started.and_then(|()| {
            order.copied = true;
            work(self.copies.stream)
        });
        done.map_err(|e| self.failed("copying to the device", e))
    }

    /// Lets `event` happen when the kernels so far are done.
    pub fn mark(&self, event: sys::CUevent) -> Result<()> {
        // SAFETY: the caller's event lives, and the stream as long as this value.
        self.compute(|| "an event".into(), |stream| unsafe { result::event::record(event, stream) })
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<()> {
        // The kernels' stream comes after every copy.
        // SAFETY: the stream lives as long as this value.
        self.compute(|| "waiting for the device".into(), |s| unsafe { result::stream::synchronize(s) })?;
        locked(&self.launched).clear();
        Ok(())
    }

    /// Free and total bytes of the device's memory. Where it is the system's, what the kernel calls available, because
    /// the driver does not count the file cache as free.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(|e| self.failed("the device's memory", e))?;
        let (free, total) = (free as u64, total as u64);
        let available = if self.unified { crate::host::available_memory() } else { None };
        Ok((available.map_or(free, |a| a.min(total)), total))
    }

    /// `cuda:0`.
    pub fn label(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// Keeps a launch for the text of a later error.
    pub fn remember(&self, launched: Launched) {
        let mut last = locked(&self.launched);
        if last.len() == REMEMBERED {
            last.pop_front();
        }
        last.push_back(launched);
    }

    /// An error of the driver; where the device is what failed, with the launches before it.
    pub fn failed(&self, what: &str, error: DriverError) -> Error {
        use sys::CUresult as Code;
        let told = failed(&format!("{}: {what}", self.label()), error);
        let fault = !matches!(
            error.0,
            Code::CUDA_ERROR_OUT_OF_MEMORY | Code::CUDA_ERROR_INVALID_VALUE | Code::CUDA_ERROR_NOT_FOUND
        );
        let last = locked(&self.launched);
        if !fault || last.is_empty() {
            return told;
        }
        let launches: Vec<String> = last.iter().map(describe).collect();
        Error::Device(format!(
            "{told}; launched last: {}; run it again with CUDA_LAUNCH_BLOCKING=1 to see which it was, and report it; \
             --device cpu does without",
            launches.join(", ")
        ))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // What is left undone here ends with the process.
        if self.enter().is_ok() {
            for Lane { stream, .. } in [self.copies, self.kernels] {
                // SAFETY: the stream is ours.
                let _ = unsafe { result::stream::synchronize(stream) };
            }
            locked(&self.functions).unload();
            for Lane { stream, done } in [self.copies, self.kernels] {
                // SAFETY: both are ours and nothing uses them any more: all that does holds this value.
                let _ =
                    unsafe { result::stream::destroy(stream).and_then(|()| result::event::destroy(done)) };
            }
        }
        // SAFETY: retained in `new`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Lane {
    /// A stream that no other waits for by itself; the context must be current.
    fn new() -> std::result::Result<Lane, DriverError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Lane { stream, done: new_event()? })
    }

    /// Lets `other` wait for all that is on this stream now.
    fn before(self, other: Lane) -> Outcome {
        // SAFETY: event and stream live as long as the driver.
        unsafe { result::event::record(self.done, self.stream) }?;
        other.wait(self.done)
    }

    /// Lets this stream wait for `event`.
    fn wait(self, event: sys::CUevent) -> Outcome {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream live as long as the driver.
        unsafe { result::stream::wait_event(self.stream, event, flags) }
    }
}

/// An event that keeps no time; the context must be current.
pub fn new_event() -> std::result::Result<sys::CUevent, DriverError> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
}

/// `rms_norm (T 5, D 64)`.
pub fn describe((kernel, sizes): &Launched) -> String {
    let sizes: Vec<String> = sizes.iter().map(|(letter, n)| format!("{letter} {n}")).collect();
    format!("{kernel} ({})", sizes.join(", "))
}

/// What lies behind `mutex`; a thread that panicked with it left it whole.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn device_error(text: impl Into<String>) -> Error {
    Error::Device(text.into())
}

/// `what: CUDA_ERROR_… (the driver's sentence)`.
fn failed(what: &str, error: DriverError) -> Error {
    let name =
        error.error_name().map_or_else(|_| format!("{:?}", error.0), |n| n.to_string_lossy().into_owned());
    let text = error.error_string().map_or_else(|_| String::new(), |s| format!(" ({})", s.to_string_lossy()));
    Error::Device(format!("{what}: {name}{text}"))
}
