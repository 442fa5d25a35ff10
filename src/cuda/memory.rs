//! The device's memory: one arena made from the memory plan, and parts of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};

use super::driver::{Driver, locked};
use crate::cuda_sizes::CudaSizes;
use crate::error::{Error, Result, human_bytes};
use crate::tensor::MemoryLayout;

/// Memory of one device, never more than a limit.
pub struct Memory {
    pub driver: Arc<Driver>,
    limit: Option<u64>,
    slabs: Mutex<Vec<Slab>>,
}

/// One allocation of the driver, from which parts are taken.
struct Slab {
    base: sys::CUdeviceptr,
    size: u64,
    /// What is free: sizes by offset, never two that touch.
    free: BTreeMap<u64, u64>,
    /// Made before its parts were asked for, and kept when they are all given back.
    kept: bool,
}

/// A part of a slab, given back when it is dropped. Kernels that use it may still run then: whoever gets the part next
/// uses it after them, on the same stream or by a copy that waits for it.
pub struct Block {
    memory: Arc<Memory>,
    base: sys::CUdeviceptr,
    offset: u64,
    size: u64,
}

impl Block {
    /// Where it starts.
    pub fn pointer(&self) -> sys::CUdeviceptr {
        self.base + self.offset
    }
}

impl Slab {
    fn take(&mut self, size: u64) -> Option<u64> {
        let (&offset, &free) = self.free.iter().find(|(_, free)| **free >= size)?;
        self.free.remove(&offset);
        if free > size {
            self.free.insert(offset + size, free - size);
        }
        Some(offset)
    }

    fn give(&mut self, mut offset: u64, mut size: u64) {
        if let Some(after) = self.free.remove(&(offset + size)) {
            size += after;
        }
        if let Some((&before, &free)) = self.free.range(..offset).next_back()
            && before + free == offset
        {
            self.free.remove(&before);
            (offset, size) = (before, size + free);
        }
        self.free.insert(offset, size);
    }

    fn unused(&self) -> bool {
        self.free.get(&0) == Some(&self.size)
    }
}

impl Memory {
    pub fn new(driver: Arc<Driver>, limit: Option<u64>) -> Memory {
        Memory { driver, limit, slabs: Mutex::default() }
    }

    /// Bytes that the driver was asked for.
    pub fn held(&self) -> u64 {
        locked(&self.slabs).iter().map(|s| s.size).sum()
    }

    /// Makes room for buffers of `bytes` together, in one piece; an earlier piece that nobody uses is given back.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let mut slabs = locked(&self.slabs);
        self.driver.enter()?;
        let unused = slabs.extract_if(.., |s| s.unused());
        unused.for_each(|s| self.free(s.base));
        if bytes > 0 {
            let slab = self.slab(&slabs, "the arena", bytes, true)?;
            slabs.push(slab);
        }
        Ok(())
    }

    /// Room for `bytes`, at a multiple of 256.
    pub fn take(self: &Arc<Memory>, name: &str, bytes: u64) -> Result<Block> {
        let size = bytes.max(1).next_multiple_of(CudaSizes::ALIGN);
        let mut slabs = locked(&self.slabs);
        let block = |base, offset| Block { memory: self.clone(), base, offset, size };
        for slab in slabs.iter_mut() {
            if let Some(offset) = slab.take(size) {
                return Ok(block(slab.base, offset));
            }
        }
        let mut slab = self.slab(&slabs, name, size, false)?;
        let offset = slab.take(size).unwrap_or_else(|| unreachable!("the slab was made for it"));
        let base = slab.base;
        slabs.push(slab);
        Ok(block(base, offset))
    }

    fn slab(&self, slabs: &[Slab], name: &str, size: u64, kept: bool) -> Result<Slab> {
        let held: u64 = slabs.iter().map(|s| s.size).sum();
        if let Some(limit) = self.limit.filter(|&l| held.saturating_add(size) > l) {
            return Err(Error::Memory(format!(
                "{name} takes {} beside {}, the memory limit is {}",
                human_bytes(size),
                human_bytes(held),
                human_bytes(limit)
            )));
        }
        self.driver.enter()?;
        let bytes = usize::try_from(size).unwrap_or(usize::MAX);
        // SAFETY: the memory is given back when the slab is dropped from the list.
        let base = unsafe { result::malloc_sync(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let left = self.driver.memory().map_or_else(
                    |_| String::new(),
                    |(free, total)| format!(", of {} {} are free", human_bytes(total), human_bytes(free)),
                );
                Error::Memory(format!(
                    "{}: CUDA_ERROR_OUT_OF_MEMORY: {name} takes {}{left}; lower --batch, --seq or --rank, or raise \
                     --recompute",
                    self.driver.label(),
                    human_bytes(size)
                ))
            }
            _ => self.driver.failed(&format!("{} of memory for {name}", human_bytes(size)), e),
        })?;
        Ok(Slab { base, size, free: BTreeMap::from([(0, size)]), kept })
    }

    fn free(&self, base: sys::CUdeviceptr) {
        // SAFETY: the slab is out of the list and none of its parts is in use. The driver waits for running work.
        let _ = unsafe { result::free_sync(base) };
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut slabs = locked(&self.memory.slabs);
        let Some(at) = slabs.iter().position(|s| s.base == self.base) else { return };
        slabs[at].give(self.offset, self.size);
        if slabs[at].unused() && !slabs[at].kept && self.memory.driver.enter().is_ok() {
            let slab = slabs.swap_remove(at);
            self.memory.free(slab.base);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.driver.enter().is_ok() {
            for slab in locked(&self.slabs).drain(..) {
                // SAFETY: every part holds this value, so none is left.
                let _ = unsafe { result::free_sync(slab.base) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_again() {
        let mut slab = Slab { base: 0, size: 1024, free: BTreeMap::from([(0, 1024)]), kept: true };
        let parts: Vec<u64> = (0..4).map(|_| slab.take(256).unwrap()).collect();
        assert_eq!(parts, [0, 256, 512, 768]);
        assert_eq!(slab.take(256), None);
        for offset in [256, 768, 512] {
            slab.give(offset, 256);
        }
        assert_eq!(slab.free, BTreeMap::from([(256, 768)]));
        assert_eq!(slab.take(512), Some(256));
        slab.give(0, 256);
        slab.give(256, 512);
        assert!(slab.unused());
    }
}
