//! Short lists of numbers that operations bring from the host: token ids, table rows, segments, targets.

use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::{result, sys};

use super::driver::{After, Driver, locked, new_event};
use super::loading::Ring;
use super::memory::Memory;
use super::store::{Buffer, DeviceMemory, View};
use crate::error::Result;
use crate::tensor::Store;

/// What a list is.
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
const ROOM: usize = 1 << 17;

/// The last two lists of each kind: while kernels read one, the next is on its way into the other. One that is still
/// there is not sent again.
pub struct Lists {
    driver: Arc<Driver>,
    memory: Arc<Memory>,
    kinds: [Mutex<Pair>; 3],
}

struct Pair {
    places: [Place; 2],
    /// The one that was used last.
    last: usize,
}

struct Place {
    content: Vec<u32>,
    /// Whether `content` is on the device.
    held: bool,
    buffer: Buffer<u32>,
    /// Happens when the kernels that read the list are done.
    read: sys::CUevent,
}

// SAFETY: an event is a token of the driver; each is used under its mutex.
unsafe impl Send for Place {}

/// A list on the device; no other of its kind takes its place before this is dropped, which is after the launch.
pub struct List<'a> {
    driver: &'a Driver,
    pair: MutexGuard<'a, Pair>,
}

impl List<'_> {
    /// The numbers.
    pub fn view(&self) -> View<'_, u32> {
        let place = &self.pair.places[self.pair.last];
        DeviceMemory::view(&place.buffer, 0..place.content.len())
    }
}

impl Drop for List<'_> {
    fn drop(&mut self) {
        let place = &self.pair.places[self.pair.last];
        // Without the mark nobody knows when it has been read, so it is not overwritten unless everything is done.
        if self.driver.mark(place.read).is_err() {
            let _ = self.driver.synchronize();
        }
    }
}

impl Lists {
    /// Room for two lists of 512 KiB of each kind; a longer one takes more. It belongs to the context, not to a run's plan.
    pub fn new(driver: Arc<Driver>) -> Result<Lists> {
        let memory = Arc::new(Memory::new(driver.clone(), None));
        let place = || -> Result<Place> {
            let buffer = buffer(&memory, ROOM)?;
            let read = new_event().map_err(|e| driver.failed("an event", e))?;
            Ok(Place { content: Vec::new(), held: false, buffer, read })
        };
        let pair = || Ok(Mutex::new(Pair { places: [place()?, place()?], last: 0 }));
        let kinds = [pair()?, pair()?, pair()?];
        Ok(Lists { driver, memory, kinds })
    }

    /// `content` on the device, for launches that follow.
    pub fn put(&self, ring: &Ring, kind: Kind, content: &[u32]) -> Result<List<'_>> {
        let mut pair = locked(&self.kinds[kind as usize]);
        let found = pair.places.iter().position(|p| p.held && p.content == content);
        pair.last = found.unwrap_or(1 - pair.last);
        if found.is_none() {
            let at = pair.last;
            self.send(ring, &mut pair.places[at], content)?;
        }
        Ok(List { driver: &self.driver, pair })
    }

    fn send(&self, ring: &Ring, place: &mut Place, content: &[u32]) -> Result<()> {
        place.held = false;
        if DeviceMemory::len(&place.buffer) < content.len() {
            // Out before the new one is made; the driver waits for what still reads it.
            place.buffer = Buffer::new(None, 0);
            place.buffer = buffer(&self.memory, content.len())?;
        }
        let start = DeviceMemory::view(&place.buffer, 0..content.len()).pointer();
        ring.copy(start.0, After::Event(place.read), bytemuck::cast_slice(content))?;
        place.content.clear();
        place.content.extend_from_slice(content);
        place.held = true;
        Ok(())
    }
}

fn buffer(memory: &Arc<Memory>, len: usize) -> Result<Buffer<u32>> {
    let block = memory.take("a batch's lists", 4 * len as u64)?;
    Ok(Buffer::new(Some(block), len))
}

impl Drop for Lists {
    fn drop(&mut self) {
        if self.driver.synchronize().is_err() {
            return;
        }
        for pair in &self.kinds {
            for place in &locked(pair).places {
                // SAFETY: made by `new`, and nothing waits for it any more.
                let _ = unsafe { result::event::destroy(place.read) };
            }
        }
    }
}
