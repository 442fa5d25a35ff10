//! Launching kernels: a function by file and name, its arguments checked against what the image says.

use std::collections::HashMap;
use std::ffi::{CString, c_void};

use cudarc::driver::{result, sys};

use super::driver::{Driver, describe, locked};
use super::images;
use super::store::{View, ViewMut};
use crate::error::{Error, Result};
use crate::tensor::Elem;

/// What every launch of the driver may have.
const MAX_GRID: [usize; 3] = [0x7fff_ffff, 65535, 65535];
/// Shared memory that needs no leave.
const COMMON_SHARED: usize = 48 << 10;

/// A kernel: `kernels/<file>.cu` and the function's name.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub file: &'static str,
    pub name: &'static str,
}

/// How many blocks of how many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: [usize; 3],
    pub threads: usize,
    /// Bytes of shared memory after the kernel's struct.
    pub more_shared: usize,
}

impl Grid {
    /// Blocks in one dimension.
    pub fn line(blocks: usize, threads: usize) -> Grid {
        Grid { blocks: [blocks, 1, 1], threads, more_shared: 0 }
    }
}

/// What a kernel takes by value.
///
/// # Safety
/// The first `SIZE` bytes of a value are the parameter as the kernel declares it.
pub unsafe trait Arg {
    const SIZE: usize;
}

macro_rules! plain {
    ($($t:ty),*) => {$(
        // SAFETY: the value is the parameter.
        unsafe impl Arg for $t { const SIZE: usize = size_of::<$t>(); }
    )*};
}
plain!(i32, u32, i64, u64, f32, f64, Pointer);

// SAFETY: the first field is the device pointer.
unsafe impl<T: Elem> Arg for View<'_, T> {
    const SIZE: usize = size_of::<u64>();
}
// SAFETY: the first field is the device pointer.
unsafe impl<T: Elem> Arg for ViewMut<'_, T> {
    const SIZE: usize = size_of::<u64>();
}

/// A device pointer, or null.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer(pub u64);

impl Pointer {
    pub const NULL: Pointer = Pointer(0);
}

/// A kernel's arguments: a tuple of [`Arg`].
pub trait Args {
    /// Where each lies, and its size.
    fn each(&self, f: impl FnMut(*const c_void, usize));
}

macro_rules! tuples {
    ($first:ident $($rest:ident)*) => {
        impl<$first: Arg, $($rest: Arg),*> Args for ($first, $($rest,)*) {
            #[allow(non_snake_case)]
            fn each(&self, mut f: impl FnMut(*const c_void, usize)) {
                let ($first, $($rest,)*) = self;
                f(std::ptr::from_ref($first).cast(), $first::SIZE);
                $(f(std::ptr::from_ref($rest).cast(), $rest::SIZE);)*
            }
        }
        tuples!($($rest)*);
    };
    () => {};
}
tuples!(A B C D E F G H I J K L M N O P Q R S T U V W X);

/// `n` as a kernel's int.
pub fn int(what: &'static str, n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::Device(format!("{what} is {n}, kernels count to {}", i32::MAX)))
}

/// A function of an image that is loaded.
#[derive(Clone)]
struct Function {
    handle: sys::CUfunction,
    /// Sizes of its parameters.
    parameters: Vec<usize>,
    /// Bytes of its shared struct.
    shared: usize,
    /// Shared memory that it has leave for.
    allowed: usize,
}

/// Images and functions that are loaded.
#[derive(Default)]
pub struct Functions {
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
}

impl Functions {
    /// Gives the images back; the context must be current and nothing may run.
    pub fn unload(&mut self) {
        self.functions.clear();
        for (_, module) in self.modules.drain() {
            // SAFETY: loaded by `load`, and not used again.
            let _ = unsafe { result::module::unload(module) };
        }
    }

    fn get(&mut self, driver: &Driver, kernel: Kernel) -> Result<&mut Function> {
        if !self.functions.contains_key(kernel.name) {
            let module = self.module(driver, kernel.file)?;
            let function = load(driver, module, kernel)?;
            self.functions.insert(kernel.name, function);
        }
        Ok(self.functions.get_mut(kernel.name).unwrap_or_else(|| unreachable!("inserted above")))
    }

    fn module(&mut self, driver: &Driver, file: &'static str) -> Result<sys::CUmodule> {
        if let Some(&module) = self.modules.get(file) {
            return Ok(module);
        }
        let image = images::all().iter().find(|i| i.file == file);
        let image = image.ok_or_else(|| Error::Device(format!("this build has no kernels/{file}.cu")))?;
        // SAFETY: the image lies in this program, whole and aligned.
        let module = unsafe { result::module::load_data(image.bytes.as_ptr().cast()) }.map_err(|e| {
            let told = driver.failed(&format!("loading kernels/{file}.cu"), e);
            match e.0 {
                sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => Error::Device(format!(
                    "{told}; the device has compute capability {}.{}, this build has {}: build with \
                     ANABRANCH_CUDA_ARCHS=sm_{}{}",
                    driver.capability.0,
                    driver.capability.1,
                    images::architectures(),
                    driver.capability.0,
                    driver.capability.1
                )),
                _ => told,
            }
        })?;
        self.modules.insert(file, module);
        Ok(module)
    }
}

fn load(driver: &Driver, module: sys::CUmodule, kernel: Kernel) -> Result<Function> {
    let name = |s: String| CString::new(s).unwrap_or_default();
    // SAFETY: the module is loaded.
    let handle = unsafe { result::module::get_function(module, name(kernel.name.into())) }
        .map_err(|e| driver.failed(&format!("{} in kernels/{}.cu", kernel.name, kernel.file), e))?;
    let mut parameters = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: writes two numbers; past the last parameter it says that the value is invalid.
        let told = unsafe { sys::cuFuncGetParamInfo(handle, parameters.len(), &mut offset, &mut size) };
        if told.result().is_err() {
            break;
        }
        parameters.push(size);
    }
    let mut shared = [0u32];
    // SAFETY: the module is loaded; the variable is an unsigned.
    let global = unsafe { result::module::get_global(module, name(format!("{}_shared_bytes", kernel.name))) };
    // A kernel without shared memory has no such variable.
    if let Ok((pointer, 4)) = global {
        // SAFETY: four bytes from the variable into four of ours, done when the call returns.
        unsafe { result::memcpy_dtoh_sync(&mut shared, pointer) }
            .map_err(|e| driver.failed(&format!("shared memory of {}", kernel.name), e))?;
    }
    Ok(Function { handle, parameters, shared: shared[0] as usize, allowed: COMMON_SHARED })
}

impl Driver {
    /// Starts `kernel` on the stream; `sizes` are told in errors. A grid without blocks is no launch.
    ///
    /// # Safety
    /// With these arguments the kernel touches only what the views among them hold.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: Grid,
        sizes: &[(&'static str, usize)],
        args: impl Args,
    ) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let launched = (kernel.name, sizes.to_vec());
        if grid.blocks.iter().zip(MAX_GRID).any(|(&n, most)| n > most) {
            let [x, y, z] = grid.blocks;
            return Err(Error::Device(format!("{}: a grid of {x} × {y} × {z} blocks", describe(&launched))));
        }
        self.enter()?;
        let mut functions = locked(&self.functions);
        let function = functions.get(self, kernel)?;
        let (mut pointers, mut given) = (Vec::with_capacity(24), Vec::with_capacity(24));
        args.each(|at, size| {
            pointers.push(at.cast_mut());
            given.push(size);
        });
        if given != function.parameters {
            return Err(Error::Device(format!(
                "{}: arguments of {given:?} bytes, the kernel takes {:?}",
                kernel.name, function.parameters
            )));
        }
        let shared = function.shared + grid.more_shared;
        if shared > function.allowed {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared as i32) }
                .map_err(|e| {
                    self.failed(&format!("{shared} bytes of shared memory for {}", kernel.name), e)
                })?;
            function.allowed = shared;
        }
        let handle = function.handle;
        drop(functions);
        let [x, y, z] = grid.blocks.map(|n| n as u32);
        // SAFETY: count and sizes of the arguments are the kernel's, they live until the call returns, and the caller
        // answers for what they mean.
        let start = |stream| unsafe {
            let (threads, shared) = ((grid.threads as u32, 1, 1), shared as u32);
            result::launch_kernel(handle, (x, y, z), threads, shared, stream, &mut pointers)
        };
        self.compute(|| format!("launching {}", describe(&launched)), start)?;
        self.remember(launched);
        Ok(())
    }
}
