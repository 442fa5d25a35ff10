//! See [`crate::ops::merge`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::merge::{Merge, ROWS};
use crate::tensor::{DType, Real};

fn kernel(dtype: DType) -> Kernel {
    let name = match dtype {
        DType::BF16 => "merge_bf16",
        DType::F16 => "merge_f16",
        DType::F32 => "merge_f32",
    };
    Kernel { file: "merge", name }
}

pub fn merge<T: Real>(cuda: &Cuda, op: Merge<'_, DeviceMemory, T>) -> Result<()> {
    op.check()?;
    let mut table = Vec::with_capacity(6 * op.updates.len());
    for update in &op.updates {
        for long in [update.a.pointer().0, update.b.pointer().0] {
            table.extend([long as u32, (long >> 32) as u32]);
        }
        table.extend([int("R", update.rank)? as u32, update.scale.to_bits()]);
    }
    let (updates, table) = (int("updates", op.updates.len())?, cuda.list(Kind::Segments, &table)?);
    let args = (op.w, op.sums, table.view(), updates, int("O", op.out)?, int("I", op.inner)?);
    let sizes = [("O", op.out), ("I", op.inner), ("updates", op.updates.len())];
    // SAFETY: `check` compared all views with O, I and the ranks.
    unsafe { cuda.launch(kernel(T::DTYPE), Grid::line(op.out.div_ceil(ROWS), 256), &sizes, args) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        if let Some(cuda) = crate::cuda::tests::device() {
            crate::ops::cases::merge::conforms(&[cuda]);
        }
    }
}
