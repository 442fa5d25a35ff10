//! The stacked factors of several modules on a device: one pass for their Grams, one for the resolved ones.

use std::borrow::Cow;
use std::vec::IntoIter;

use faer::{Mat, MatRef};

use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors, Rows};
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::Resolution;
use crate::ops::apply::Apply;
use crate::ops::gram::{Gram, Stack};
use crate::tensor::Store;

/// One factor of each module, in f64.
struct Half<'a, B: Backend> {
    own: Cow<'a, [f64]>,
    /// On the device, where that has memory of its own.
    copy: <B::Store as Store>::Buf<f64>,
    stacks: Vec<Stack>,
}

/// `[B₁ … B_E]` and `[A₁; …; A_E]ᵀ` of each module.
pub struct Stacks<'b, B: Backend> {
    backend: &'b B,
    batches: Vec<&'b Batch>,
    left: Half<'b, B>,
    right: Half<'b, B>,
}

/// Copies the numbers of `x`, column after column.
fn copy_columns(out: &mut [f64], x: MatRef<'_, f64>) {
    for (out, column) in out.chunks_exact_mut(x.nrows()).zip(x.col_iter()) {
        out.iter_mut().zip(column.iter()).for_each(|(o, x)| *o = *x);
    }
}

/// Room on the device for `len` numbers, where it has memory of its own.
fn room<B: Backend>(backend: &B, name: &str, len: usize) -> Result<<B::Store as Store>::Buf<f64>> {
    backend.alloc(name, if B::Store::HOST { 0 } else { len })
}

/// Brings `copy` to `own`, where the device has memory of its own.
fn fetch<B: Backend>(backend: &B, own: &mut [f64], copy: &<B::Store as Store>::Buf<f64>) -> Result<()> {
    if B::Store::HOST { Ok(()) } else { backend.download(own, B::Store::view(copy, 0..B::Store::len(copy))) }
}

impl<'a, B: Backend> Half<'a, B> {
    fn new(backend: &B, factors: &[&'a Rows]) -> Result<Half<'a, B>> {
        let stacks: Vec<Stack> =
            factors.iter().map(|f| Stack { rows: f.columns(), rank: f.rank() }).collect();
        let mut copy = room(backend, "the factors of a few modules", Stack::numbers(&stacks))?;
        if !B::Store::HOST {
            let mut at = 0;
            for factor in factors {
                let end = at + factor.numbers().len();
                backend.upload(B::Store::view_mut(&mut copy, at..end), factor.numbers())?;
                at = end;
            }
        }
        let own = match factors {
            [one] => Cow::Borrowed(one.numbers()),
            _ if B::Store::HOST => Cow::Owned(factors.iter().flat_map(|f| f.numbers()).copied().collect()),
            _ => Cow::Borrowed(&[][..]),
        };
        Ok(Half { own, copy, stacks })
    }

    fn view(&self) -> <B::Store as Store>::View<'_, f64> {
        B::Store::view_of(&self.own, &self.copy)
    }

    fn grams(&self, backend: &B) -> Result<Vec<f64>> {
        let mut host = vec![0.0; Stack::squares(&self.stacks)];
        let mut copy = room(backend, "Grams", host.len())?;
        let out = B::Store::view_mut_of(&mut host, &mut copy);
        backend.gram(Gram { out, x: self.view(), stacks: &self.stacks })?;
        fetch(backend, &mut host, &copy)?;
        Ok(host)
    }

    /// Each factor, its rows times the map of its module; none where no module has one.
    fn mapped(&self, backend: &B, maps: &[Option<MatRef<'_, f64>>]) -> Result<Option<Vec<Rows>>> {
        if maps.iter().all(Option::is_none) {
            return Ok(None);
        }
        let squares = Stack::squares(&self.stacks);
        let mut by = vec![0.0; squares];
        let mut rest = &mut by[..];
        for (map, stack) in maps.iter().zip(&self.stacks) {
            let (own, after) = rest.split_at_mut(stack.rank * stack.rank);
            match map {
                Some(map) => copy_columns(own, map.transpose()),
                None => copy_columns(own, Mat::identity(stack.rank, stack.rank).as_ref()),
            }
            rest = after;
        }
        let mut w = room(backend, "maps", squares)?;
        if !B::Store::HOST {
            backend.upload(B::Store::view_mut(&mut w, 0..squares), &by)?;
        }
        let mut host = vec![0.0; Stack::numbers(&self.stacks)];
        let mut copy = room(backend, "the resolved factors of a few modules", host.len())?;
        let (out, w) = (B::Store::view_mut_of(&mut host, &mut copy), B::Store::view_of(&by, &w));
        backend.apply(Apply { out, x: self.view(), w, stacks: &self.stacks })?;
        fetch(backend, &mut host, &copy)?;
        // Parted from the end, so that the first keeps the memory.
        let mut out: Vec<Rows> = Vec::with_capacity(self.stacks.len());
        for stack in self.stacks.iter().skip(1).rev() {
            out.push(Rows::new(host.split_off(host.len() - stack.rows * stack.rank), stack.rank));
        }
        out.extend(self.stacks.first().map(|stack| Rows::new(host, stack.rank)));
        out.reverse();
        Ok(Some(out))
    }
}

impl<'b, B: Backend> Stacks<'b, B> {
    /// Brings the factors of `batches` to the device.
    pub fn new(backend: &'b B, batches: Vec<&'b Batch>) -> Result<Stacks<'b, B>> {
        let left = Half::new(backend, &batches.iter().map(|b| b.stack.rows_bt()).collect::<Vec<_>>())?;
        let right = Half::new(backend, &batches.iter().map(|b| b.stack.rows_a()).collect::<Vec<_>>())?;
        Ok(Stacks { backend, batches, left, right })
    }

    /// The Grams of each module.
    pub fn grams(&self) -> Result<Vec<Grams>> {
        let (b, a) = (self.left.grams(self.backend)?, self.right.grams(self.backend)?);
        let mut at = 0;
        let one = |batch: &&Batch| {
            let own = at..at + batch.frame.rank() * batch.frame.rank();
            at = own.end;
            Grams::new(&b[own.clone()], &a[own], batch.frame.bounds())
        };
        Ok(self.batches.iter().map(one).collect())
    }

    /// The batches after their resolutions; an A that was changed is no longer the frozen one.
    pub fn resolved(&self, resolutions: &[Resolution]) -> Result<Vec<Batch>> {
        let left: Vec<_> = resolutions.iter().map(|r| r.left.as_ref().map(Mat::as_ref)).collect();
        let right: Vec<_> =
            resolutions.iter().map(|r| r.right.as_ref().map(|w| w.as_ref().transpose())).collect();
        let mut bt = self.left.mapped(self.backend, &left)?.map(Vec::into_iter);
        let mut a = self.right.mapped(self.backend, &right)?.map(Vec::into_iter);
        let one = |(batch, resolution): (&&Batch, &Resolution)| {
            let new = |next: &mut Option<IntoIter<Rows>>, old: &Rows| {
                next.as_mut().and_then(Iterator::next).unwrap_or_else(|| old.clone())
            };
            let (bt, a) = (new(&mut bt, batch.stack.rows_bt()), new(&mut a, batch.stack.rows_a()));
            let mut out = batch.with_stack(Factors::new(bt, a)?);
            out.frame.frozen &= resolution.right.is_none();
            Ok(out)
        };
        self.batches.iter().zip(resolutions).map(one).collect()
    }
}
