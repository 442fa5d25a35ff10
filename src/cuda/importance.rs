//! See [`crate::ops::importance`].
//!
//! One launch over the tiles of W makes each tile's sums along rows and columns; two add the tiles' sums up.

use super::Cuda;
use super::launch::{Arg, Grid, Kernel, Pointer, int};
use super::lists::Kind;
use super::lora::after;
use super::store::DeviceMemory;
use crate::cuda_sizes::importance_tiles;
use crate::error::Result;
use crate::ops::ensure;
use crate::ops::importance::{Importance, Sample, Score};
use crate::tensor::{Length, MemoryLayout, Real};

const OP: &str = "importance";
const FIRST: Kernel = Kernel { file: "importance", name: "importance_first" };
const SECOND: Kernel = Kernel { file: "importance", name: "importance_second" };
const SUM: Kernel = Kernel { file: "importance", name: "importance_sum" };
/// Scores of one launch.
const SCORES: usize = 7;

#[repr(C)]
#[derive(Clone, Copy)]
struct Scores {
    count: i32,
    kind: [i32; SCORES],
}

// SAFETY: `struct Scores` of importance.cu.
unsafe impl Arg for Scores {
    const SIZE: usize = size_of::<Scores>();
}

/// The scores' numbers in the kernel.
fn number(score: Score) -> i32 {
    match score {
        Score::AbsFirst => 0,
        Score::First => 1,
        Score::Second => 2,
        Score::AbsMix => 3,
    }
}

/// `{first row, rows, weight}` of each sample that has rows, the weight n / nⱼ as bits or zero where it does not count.
/// Without F, samples that follow one another are one.
fn list(samples: &[Sample], second: bool) -> Vec<u32> {
    let total: usize = samples.iter().map(|s| s.supervised).sum();
    let mut all: Vec<[u32; 3]> = Vec::new();
    for s in samples.iter().filter(|s| !s.rows.is_empty()) {
        let (start, rows) = (s.rows.start as u32, s.rows.len() as u32);
        match all.last_mut() {
            Some([first, count, _]) if !second && *first + *count == start => *count += rows,
            _ => {
                let weight = if s.supervised > 0 { total as f64 / s.supervised as f64 } else { 0.0 };
                all.push([start, rows, (weight as f32).to_bits()]);
            }
        }
    }
    all.into_iter().flatten().collect()
}

pub fn importance<T: Real>(cuda: &Cuda, op: Importance<'_, DeviceMemory, T>) -> Result<()> {
    let (o, i) = op.check()?;
    let n = op.scores.len();
    if n == 0 || o == 0 || i == 0 {
        return Ok(());
    }
    ensure(OP, n <= SCORES, || format!("{n} scores, at most {SCORES} at a time"))?;
    let second = op.scores.iter().any(|s| s.needs_second());
    let (down, across) = importance_tiles(o, i, op.scores);
    let (rows, columns) = (across * n * o, down * n * i);
    let need = 2 * (rows + columns);
    ensure(OP, op.scratch.len() >= need, || {
        format!("scratch holds {} elements, expected {need}", op.scratch.len())
    })?;
    let row_parts = op.scratch.pointer();
    let col_parts = after(row_parts, rows, 8);
    int("T", op.tokens)?;
    let list = list(op.samples, second);
    let count = int("samples", list.len() / 3)?;
    // A list is never empty.
    let samples = cuda.list(Kind::Segments, if list.is_empty() { &[0; 3] } else { &list })?;
    let counted = op.samples.iter().filter(|s| s.supervised > 0).count().max(1);
    let mut scores = Scores { count: int("scores", n)?, kind: [0; SCORES] };
    scores.kind.iter_mut().zip(op.scores).for_each(|(to, &score)| *to = number(score));
    let (row_o, row_i) = (DeviceMemory::row(o), int("the row of I", DeviceMemory::row(i))?);
    let args = (
        row_parts,
        col_parts,
        op.dy,
        op.x,
        op.w.pointer(),
        samples.view(),
        count,
        int("samples", counted)?,
        int("O", o)?,
        int("I", i)?,
        int("the row of O", row_o)?,
        row_i,
        row_i,
        scores,
    );
    let sizes = [("T", op.tokens), ("O", o), ("I", i), ("scores", n)];
    let grid = Grid::line(down * across, 256);
    // SAFETY: `check` compared dy, x and the sums with T, O and I and found the samples within T; scratch has room.
    unsafe { cuda.launch(if second { SECOND } else { FIRST }, grid, &sizes, args)? };
    let sums: [(Pointer, Pointer, usize, usize); 2] =
        [(op.row_sums.pointer(), row_parts, across, n * o), (op.col_sums.pointer(), col_parts, down, n * i)];
    for (out, parts, count, length) in sums {
        let args = (out, parts, int("tiles", count)?, length as u64);
        // SAFETY: as above.
        unsafe { cuda.launch(SUM, Grid::line(length.div_ceil(256), 256), &sizes, args)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::tests::device;
    use crate::ops::cases::importance::conforms;
    use crate::tensor::DType;

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda], &[DType::BF16, DType::F32]);
        }
    }

    #[test]
    fn samples_in_a_row_are_one_without_the_second_moment() {
        let sample = |rows, supervised| Sample { rows, supervised };
        let all = [sample(0..3, 2), sample(3..3, 0), sample(3..5, 0), sample(7..8, 2)];
        assert_eq!(list(&all, false), [0, 5, 2f32.to_bits(), 7, 1, 2f32.to_bits()]);
        assert_eq!(list(&all, true), [0, 3, 2f32.to_bits(), 3, 2, 0, 7, 1, 2f32.to_bits()]);
        assert!(list(&[], true).is_empty());
    }
}
