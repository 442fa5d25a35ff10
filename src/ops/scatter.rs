//! Moving rows and columns to places that a list names: recovery of a pruned adapter, and pruning, its inverse.

use super::ensure;
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Length, Store};

/// The op's name in errors.
const OP: &str = "scatter";

/// In a list: nothing comes to this place, it is zero.
pub const NONE: u32 = u32::MAX;

/// `dst[x, j, :] = src[x, from[j], :]`, zero where `from[j]` is [`NONE`]; bytes, moved as they are, and every one written.
///
/// The rows of `B[O, R]` are places of R elements under x = 1, the columns of `A[R, I]` places of one element under
/// x < R. With the list of [`places`] it recovers, with the kept positions themselves it prunes. All parts of an adapter
/// are one launch.
pub struct Scatter<'a, S: Store> {
    /// The parts' results.
    pub dst: S::ViewMut<'a, u8>,
    /// The parts' operands.
    pub src: S::View<'a, u8>,
    /// The parts' lists.
    pub from: &'a [u32],
    /// By where they lie in `dst`, without overlap.
    pub parts: &'a [Part],
}

/// One tensor of a [`Scatter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where its result begins in `dst`, in bytes.
    pub dst: usize,
    /// Where its operand begins in `src`, in bytes.
    pub src: usize,
    /// Where its list begins.
    pub from: usize,
    /// x of the result and of the operand.
    pub outer: usize,
    /// j of the result: the list's length.
    pub places: usize,
    /// j of the operand.
    pub kept: usize,
    /// Bytes of one item.
    pub item: usize,
}

impl Part {
    /// Bytes of the result and of the operand; none where a product is larger than any memory.
    fn bytes(&self) -> Option<(usize, usize)> {
        let outer = self.outer.checked_mul(self.item)?;
        Some((outer.checked_mul(self.places)?, outer.checked_mul(self.kept)?))
    }
}

/// The list that brings what is at `kept` (ascending) back to its place among `full`.
pub fn places(kept: &[usize], full: usize) -> Vec<u32> {
    let mut from = vec![NONE; full];
    kept.iter().zip(0..).for_each(|(&k, j)| from[k] = j);
    from
}

impl<S: Store> Scatter<'_, S> {
    /// Compares the sizes, and looks whether every part lies in the operands and after the one before it.
    pub fn check(&self) -> Result<()> {
        let mut free = 0;
        for (n, part) in self.parts.iter().enumerate() {
            let within =
                |begin: usize, len: usize, all: usize| begin.checked_add(len).is_some_and(|e| e <= all);
            let fits = part.bytes().is_some_and(|(to, of)| {
                part.dst >= free
                    && within(part.dst, to, self.dst.len())
                    && within(part.src, of, self.src.len())
                    && within(part.from, part.places, self.from.len())
            });
            ensure(OP, fits && part.item > 0, || {
                format!(
                    "part {n}, {part:?}, is not within {} and {} bytes and {} places, after the part before it",
                    self.dst.len(),
                    self.src.len(),
                    self.from.len()
                )
            })?;
            free = part.dst + part.outer * part.places * part.item;
            let list = &self.from[part.from..part.from + part.places];
            let beyond = list.iter().find(|&&f| f != NONE && f as usize >= part.kept);
            ensure(OP, beyond.is_none(), || {
                format!("part {n} takes item {} of {}", beyond.copied().unwrap_or(NONE), part.kept)
            })?;
        }
        Ok(())
    }
}

/// The definition.
pub fn reference(op: Scatter<'_, Host>) -> Result<()> {
    op.check()?;
    for part in op.parts {
        for x in 0..part.outer {
            for j in 0..part.places {
                let from = op.from[part.from + j];
                let to = part.dst + (x * part.places + j) * part.item;
                for byte in 0..part.item {
                    op.dst[to + byte] = match from {
                        NONE => 0,
                        k => op.src[part.src + (x * part.kept + k as usize) * part.item + byte],
                    };
                }
            }
        }
    }
    Ok(())
}
