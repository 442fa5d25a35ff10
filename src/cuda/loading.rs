//! From the host to the device: through a ring of pinned memory, piece by piece, so that the device's copies run while
//! the next piece is read, and never straight from a file mapping, which the driver cannot pin.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};
use half::bf16;
use rayon::prelude::*;

use super::driver::{After, Driver, locked, new_event};
use super::store::{DeviceMemory, Matrix};
use crate::error::{Error, Result};
use crate::host::{Elements, HostMatrix};
use crate::tensor::{Real, Store};

/// Bytes of the ring.
const RING: usize = 16 << 20;
/// The most that is copied at a time.
pub const PIECE: usize = RING / 4;

/// The pinned ring.
pub struct Ring {
    driver: Arc<Driver>,
    base: *mut u8,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: usize,
    /// Pieces that the device may still be reading, oldest first.
    pending: VecDeque<(Range<usize>, sys::CUevent)>,
    /// Events to use again.
    idle: Vec<sys::CUevent>,
}

// SAFETY: the pinned memory and the events belong to this value alone and are used under its mutex.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    pub fn new(driver: Arc<Driver>) -> Result<Ring> {
        driver.enter()?;
        // SAFETY: given back when the ring is dropped.
        let base = unsafe { result::malloc_host(RING, 0) }
            .map_err(|e| driver.failed(&format!("{RING} bytes of pinned memory"), e))?;
        Ok(Ring { driver, base: base.cast(), state: Mutex::default() })
    }

    /// Lets `fill` write `len` bytes, at most [`PIECE`], and copies them to `to`; kernels that come later wait for it.
    pub fn put(&self, to: u64, after: After, len: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        if len > PIECE {
            return Err(Error::Device(format!("a copy of {len} bytes at once, expected at most {PIECE}")));
        }
        self.driver.enter()?;
        let what = |e| self.driver.failed("copying to the device", e);
        let mut state = locked(&self.state);
        let start = if state.next + len > RING { 0 } else { state.next };
        let piece = start..start + len;
        state.next = piece.end.next_multiple_of(256);
        while state.pending.iter().any(|(p, _)| p.start < piece.end && piece.start < p.end) {
            let Some((_, event)) = state.pending.pop_front() else { break };
            // SAFETY: the event was recorded below.
            let done = unsafe { result::event::synchronize(event) };
            state.idle.push(event);
            done.map_err(what)?;
        }
        let event = match state.idle.pop() {
            Some(event) => event,
            None => new_event().map_err(what)?,
        };
        // SAFETY: the piece lies in the ring, and the copies that read it are done; the mutex keeps others away.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.base.add(piece.start), len) };
        bytes.fill(0);
        fill(bytes);
        let copied = self.driver.transfer(after, |stream| {
            // SAFETY: the caller's view is `len` bytes long; the piece is left alone until the event has happened.
            unsafe { result::memcpy_htod_async(to, bytes, stream) }?;
            // SAFETY: the event is ours.
            unsafe { result::event::record(event, stream) }
        });
        state.pending.push_back((piece, event));
        copied
    }

    /// Copies `from` to `to`.
    pub fn copy(&self, to: u64, after: After, from: &[u8]) -> Result<()> {
        for (n, part) in from.chunks(PIECE).enumerate() {
            self.put(to + (n * PIECE) as u64, after, part.len(), |bytes| bytes.copy_from_slice(part))?;
        }
        Ok(())
    }

    /// Fills `to` from `from`, rounded to bf16, its rows padded with zeros.
    pub fn matrix(&self, to: &mut Matrix, from: &HostMatrix) -> Result<()> {
        let ((rows, width), row) = (to.size, to.row());
        let len = DeviceMemory::len(&to.elements);
        let start = DeviceMemory::view_mut(&mut to.elements, 0..len).pointer().0;
        // Rows of up to a piece go together; a longer row goes in pieces.
        let at_once = (PIECE / (2 * row.max(1))).max(1);
        let mut first = 0;
        while first < rows {
            let some = at_once.min(rows - first);
            let columns = if some == 1 { PIECE / 2 } else { row };
            let mut column = 0;
            while column < row {
                let wide = columns.min(row - column);
                let place = first * row + column;
                self.put(start + 2 * place as u64, After::Kernels, 2 * some * wide, |bytes| {
                    let out: &mut [bf16] = bytemuck::cast_slice_mut(bytes);
                    out.par_chunks_mut(wide).enumerate().for_each(|(n, out)| {
                        let at = (first + n) * width;
                        let held = at + column.min(width)..at + (column + wide).min(width);
                        round(out, from, held);
                    });
                })?;
                column += wide;
            }
            first += some;
        }
        Ok(())
    }
}

/// The elements at `range`, rounded to bf16, at the start of `out`.
fn round(out: &mut [bf16], from: &HostMatrix, range: Range<usize>) {
    match from.elements() {
        Elements::BF16(w) => out[..range.len()].copy_from_slice(&w[range]),
        Elements::F16(w) => out.iter_mut().zip(&w[range]).for_each(|(o, w)| *o = bf16::from_f32(w.to_f32())),
        Elements::F32(w) => {
            out.iter_mut().zip(&w[range]).for_each(|(o, &w)| *o = <bf16 as Real>::from_f32(w))
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.driver.synchronize().is_err() {
            return;
        }
        let mut state = locked(&self.state);
        let State { pending, idle, .. } = &mut *state;
        for event in pending.drain(..).map(|(_, event)| event).chain(idle.drain(..)) {
            // SAFETY: created by `put`, and not used again.
            let _ = unsafe { result::event::destroy(event) };
        }
        // SAFETY: made by `new`; no copy reads it any more.
        let _ = unsafe { result::free_host(self.base.cast()) };
    }
}
