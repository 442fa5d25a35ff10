//! Modules in order, several at once, in memory of those alone.

use std::slice;

use rayon::prelude::*;

use super::common::Common;
use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::Frame;

/// The most bytes of results that wait to be written.
const RESULTS: u64 = 64 << 20;

/// Computes `one` for each frame and hands the results on in order, until `take` says no; `bytes` says how large a result
/// is, or nothing of a module that is worked on alone, and `kept` what there is when the process is asked to stop.
///
/// On a device of its own a few modules are one call. Threads of this machine take a module each, and share those that
/// are worked on alone; results do not depend on how many there are.
pub(super) fn in_order<B: Backend, T: Send>(
    backend: &B,
    frames: &[Frame],
    bytes: impl Fn(&Frame) -> Option<u64>,
    (common, kept): (&Common, &str),
    one: impl Fn(&[Frame]) -> Result<Vec<T>> + Sync,
    mut take: impl FnMut(Vec<T>) -> bool,
) -> Result<()> {
    let threads = rayon::current_num_threads();
    let mut rest = frames;
    while let Some(first) = rest.first() {
        common.check_stop(kept)?;
        let most = if backend.side_by_side() { 16 * threads } else { 2 * threads };
        let (mut count, mut size) = (1, bytes(first));
        while let (Some(so_far), Some(more)) = (size, rest.get(count).and_then(&bytes))
            && count < most
            && (count < threads || so_far < RESULTS)
        {
            (count, size) = (count + 1, Some(so_far.saturating_add(more)));
        }
        let (now, after) = rest.split_at(count);
        rest = after;
        let done = if backend.side_by_side() && count > 1 {
            // Gathered before the first error is looked for, so that it is always the same one.
            let done: Vec<_> = now.par_iter().map(|frame| one(slice::from_ref(frame))).collect();
            done.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()
        } else {
            one(now)?
        };
        if !take(done) {
            break;
        }
    }
    Ok(())
}
