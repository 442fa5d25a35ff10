//! The stacked factors of several modules on a device: one pass for their Grams, one for the resolved ones.

use faer::{Mat, MatRef};

use crate::backend::Backend;
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::Resolution;
use crate::ops::apply::Apply;
use crate::ops::gram::{Gram, Stack};
use crate::tensor::Store;

/// One factor of each module, in f64.
struct Half<B: Backend> {
    x: <B::Store as Store>::Buf<f64>,
    stacks: Vec<Stack>,
}

/// `[B₁ … B_E]` and `[A₁; …; A_E]ᵀ` of each module.
pub struct Stacks<'b, B: Backend> {
    backend: &'b B,
    batches: Vec<&'b Batch>,
    left: Half<B>,
    right: Half<B>,
}

/// The numbers of `x`, column after column.
fn columns(x: MatRef<'_, f64>) -> impl Iterator<Item = f64> {
    x.col_iter().flat_map(|column| column.iter().copied())
}

impl<B: Backend> Half<B> {
    fn new<'a>(backend: &B, factors: impl Iterator<Item = MatRef<'a, f64>> + Clone) -> Result<Half<B>> {
        let stacks: Vec<Stack> =
            factors.clone().map(|f| Stack { rows: f.ncols(), rank: f.nrows() }).collect();
        let mut x = backend.alloc("the factors of a few modules", Stack::numbers(&stacks))?;
        let mut at = 0;
        for factor in factors {
            let numbers: Vec<f64> = columns(factor).collect();
            backend.upload(B::Store::view_mut(&mut x, at..at + numbers.len()), &numbers)?;
            at += numbers.len();
        }
        Ok(Half { x, stacks })
    }

    fn grams(&self, backend: &B) -> Result<Vec<f64>> {
        let n = Stack::squares(&self.stacks);
        let mut out = backend.alloc("Grams", n)?;
        backend.gram(Gram {
            out: B::Store::view_mut(&mut out, 0..n),
            x: B::Store::view(&self.x, 0..Stack::numbers(&self.stacks)),
            stacks: &self.stacks,
        })?;
        let mut host = vec![0.0; n];
        backend.download(&mut host, B::Store::view(&out, 0..n))?;
        Ok(host)
    }

    /// Each factor, its rows times the map of its module; none where no module has one.
    fn mapped(&self, backend: &B, maps: &[Option<MatRef<'_, f64>>]) -> Result<Option<Vec<Mat<f64>>>> {
        if maps.iter().all(Option::is_none) {
            return Ok(None);
        }
        let squares = Stack::squares(&self.stacks);
        let mut by = Vec::with_capacity(squares);
        for (map, stack) in maps.iter().zip(&self.stacks) {
            match map {
                Some(map) => by.extend(columns(map.transpose())),
                None => by.extend(columns(Mat::identity(stack.rank, stack.rank).as_ref())),
            }
        }
        let n = Stack::numbers(&self.stacks);
        let mut w = backend.alloc("maps", squares)?;
        backend.upload(B::Store::view_mut(&mut w, 0..squares), &by)?;
        let mut out = backend.alloc("the resolved factors of a few modules", n)?;
        backend.apply(Apply {
            out: B::Store::view_mut(&mut out, 0..n),
            x: B::Store::view(&self.x, 0..n),
            w: B::Store::view(&w, 0..squares),
            stacks: &self.stacks,
        })?;
        let mut host = vec![0.0; n];
        backend.download(&mut host, B::Store::view(&out, 0..n))?;
        let mut rest = &host[..];
        let split = self.stacks.iter().map(|stack| {
            let (own, after) = rest.split_at(stack.rows * stack.rank);
            rest = after;
            MatRef::from_column_major_slice(own, stack.rank, stack.rows).to_owned()
        });
        Ok(Some(split.collect()))
    }
}

impl<'b, B: Backend> Stacks<'b, B> {
    /// Brings the factors of `batches` to the device.
    pub fn new(backend: &'b B, batches: Vec<&'b Batch>) -> Result<Stacks<'b, B>> {
        let left = Half::new(backend, batches.iter().map(|b| b.stack.bt()))?;
        let right = Half::new(backend, batches.iter().map(|b| b.stack.a()))?;
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
            let bt = bt.as_mut().and_then(Iterator::next).unwrap_or_else(|| batch.stack.bt().to_owned());
            let a = a.as_mut().and_then(Iterator::next).unwrap_or_else(|| batch.stack.a().to_owned());
            let mut out = batch.with_stack(Factors::new(bt, a)?);
            out.frame.frozen &= resolution.right.is_none();
            Ok(out)
        };
        self.batches.iter().zip(resolutions).map(one).collect()
    }
}
