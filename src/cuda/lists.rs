//! Short lists of numbers that operations bring from the host: token ids, table rows, segments, targets.

use std::sync::{Arc, Mutex, MutexGuard};

use super::driver::{Driver, locked};
use super::loading::Ring;
use super::memory::Memory;
use super::store::{Buffer, DeviceMemory, View};
use crate::error::Result;
use crate::tensor::Store;

/// What a list is; one of each is on the device at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Token ids: of a batch, of targets, of choices.
    Ids,
    /// Rows of tables, of supervised tokens, of choices.
    Rows,
    /// Who sees whom, or which rows belong to which sample or adapter.
    Segments,
}

/// Numbers that there is room for from the beginning, which is before memory is measured.
const ROOM: usize = 1 << 18;

/// The last list of each kind. One that is the same as the last is not sent again.
pub struct Lists {
    memory: Arc<Memory>,
    held: [Mutex<Held>; 3],
}

#[derive(Default)]
struct Held {
    content: Vec<u32>,
    buffer: Option<Buffer<u32>>,
}

/// A list on the device; no other of its kind takes its place before this is dropped, which is after the launch.
pub struct List<'a>(MutexGuard<'a, Held>);

impl List<'_> {
    /// The numbers.
    pub fn view(&self) -> View<'_, u32> {
        match &self.0.buffer {
            Some(buffer) => DeviceMemory::view(buffer, 0..self.0.content.len()),
            None => unreachable!("a list has a buffer"),
        }
    }
}

impl Lists {
    /// Room for lists of 1 MiB each; a longer one takes more. It belongs to the context, not to a run's plan.
    pub fn new(driver: Arc<Driver>) -> Result<Lists> {
        let lists = Lists { memory: Arc::new(Memory::new(driver, None)), held: Default::default() };
        for held in &lists.held {
            locked(held).buffer = Some(lists.buffer(ROOM)?);
        }
        Ok(lists)
    }

    fn buffer(&self, len: usize) -> Result<Buffer<u32>> {
        let block = self.memory.take("a batch's lists", 4 * len as u64)?;
        Ok(Buffer::new(Some(block), len))
    }

    /// `content` on the device, for launches that follow on the stream.
    pub fn put(&self, ring: &Ring, kind: Kind, content: &[u32]) -> Result<List<'_>> {
        let mut held = locked(&self.held[kind as usize]);
        let room = held.buffer.as_ref().map(DeviceMemory::len);
        if room.is_some() && held.content == content {
            return Ok(List(held));
        }
        if room.is_none_or(|r| r < content.len()) {
            // Out before the new one is made: what still reads it does so on the stream before the new one is written.
            *held = Held::default();
            held.buffer = Some(self.buffer(content.len())?);
        }
        held.content.clear();
        if let Some(buffer) = &held.buffer {
            let start = DeviceMemory::view(buffer, 0..content.len()).pointer();
            ring.copy(start.0, bytemuck::cast_slice(content))?;
        }
        held.content.extend_from_slice(content);
        Ok(List(held))
    }
}
