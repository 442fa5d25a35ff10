//! See [`crate::ops::scatter`].

use super::Cuda;
use super::launch::{Grid, Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::error::Result;
use crate::ops::ensure;
use crate::ops::scatter::{Part, Scatter};

const SCATTER: Kernel = Kernel { file: "scatter", name: "scatter" };
const THREADS: usize = 256;
/// Units that a block moves.
const BLOCK: usize = 2048;

/// The most bytes that can be moved at once.
fn unit(part: &Part, dst: u64, src: u64) -> usize {
    let aligned = (dst + part.dst as u64) | (src + part.src as u64) | part.item as u64 | 16;
    1 << aligned.trailing_zeros()
}

pub fn scatter(cuda: &Cuda, op: Scatter<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (dst, src) = (op.dst.pointer(), op.src.pointer());
    let (mut table, mut blocks, mut parts) = (Vec::new(), 0, 0);
    for part in op.parts {
        let unit = unit(part, dst.0, src.0);
        let units = part.outer * part.places * part.item / unit;
        if units == 0 {
            continue;
        }
        ensure("scatter", u32::try_from(units).is_ok() && part.kept < 1 << 32, || {
            format!("{part:?} is {units} units, the kernel counts to {}", u32::MAX)
        })?;
        for long in [part.dst, part.src, part.from] {
            table.extend([long as u32, (long as u64 >> 32) as u32]);
        }
        let short = [blocks, part.places, part.kept, part.item / unit, units, unit];
        table.extend(short.map(|n| n as u32));
        blocks += units.div_ceil(BLOCK);
        parts += 1;
    }
    let (from, table) = (cuda.list(Kind::Rows, op.from)?, cuda.list(Kind::Segments, &table)?);
    let args = (dst, src, from.view(), table.view(), int("parts", parts)?);
    // SAFETY: `check` compared the parts and their lists with the views.
    unsafe { cuda.launch(SCATTER, Grid::line(blocks, THREADS), &[("parts", parts)], args) }
}

#[cfg(test)]
mod tests {
    use crate::cuda::tests::device;
    use crate::ops::cases::scatter::{conforms, refuses};

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            refuses(&cuda);
            conforms(&[cuda]);
        }
    }
}
