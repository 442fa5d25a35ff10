//! See [`crate::ops::choice`]: distinct rows in chunks.

use super::Cuda;
use super::head::{Head, distinct};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::cuda_sizes::HeadSizes;
use crate::error::Result;
use crate::ops::choice::Choice;
use crate::ops::ensure;
use crate::tensor::{Length, Real};

pub fn choice<T: Real>(cuda: &Cuda, op: Choice<'_, DeviceMemory, T>) -> Result<()> {
    let (v, d) = op.check()?;
    let need = HeadSizes::new(v, d).score(op.rows.len());
    ensure("choice", op.scratch.len() >= need, || {
        format!("scratch holds {} elements, expected {need}", op.scratch.len())
    })?;
    let (list, count) = distinct(op.rows);
    let rows = cuda.list(Kind::Rows, &list)?;
    let ids = cuda.list(Kind::Ids, op.ids)?;
    let (out, scratch) = (op.out.pointer(), op.scratch.pointer());
    Head { w: op.head, x: op.x }.scores(
        cuda,
        out,
        scratch,
        rows.view().pointer(),
        ids.view().pointer(),
        count,
        1.0,
    )
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use crate::cuda::tests::device;
    use crate::ops::cases::choice::conforms;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }
}
