//! See [`crate::ops::eigh`].

use super::Cuda;
use super::launch::{Grid, Kernel};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::backend::Backend;
use crate::cpu;
use crate::error::Result;
use crate::ops::eigh::Eigh;
use crate::tensor::Length;

const EIGH: Kernel = Kernel { file: "eigh", name: "eigh" };
/// Rows of the largest matrix that a block's shared memory holds with its vectors.
pub(super) const LIMIT: usize = 64;

/// Threads of a block and bytes of shared memory for matrices of up to `rows` rows.
pub(super) fn grid(matrices: usize, rows: usize, threads: usize) -> Grid {
    let n = rows.next_multiple_of(2);
    Grid { blocks: [matrices, 1, 1], threads, more_shared: 2 * n * (n + 1) * size_of::<f64>() }
}

/// Matrices of more than [`LIMIT`] rows are solved on the host, which waits for them.
pub fn eigh(cuda: &Cuda, op: Eigh<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (mut table, mut large, mut most) = (Vec::new(), Vec::new(), 0);
    let (mut rows, mut squares) = (0, 0);
    for &n in op.sizes {
        if n > LIMIT {
            large.push((rows, squares, n));
        } else if n > 0 {
            for long in [rows as u64, squares as u64] {
                table.extend([long as u32, (long >> 32) as u32]);
            }
            table.extend([n as u32, 0]);
            most = most.max(n);
        }
        rows += n;
        squares += n * n;
    }
    let (values, vectors, a) = (op.values, op.vectors, op.a);
    if !table.is_empty() {
        let matrices = table.len() / 6;
        let table = cuda.list(Kind::Segments, &table)?;
        let args = (values.pointer(), vectors.pointer(), a, table.view());
        let sizes = [("matrices", matrices), ("rows", most)];
        // SAFETY: `check` compared the views with the sizes, one after the other as in the table.
        unsafe { cuda.launch(EIGH, grid(matrices, most, if most > 32 { 256 } else { 128 }), &sizes, args)? };
    }
    if large.is_empty() {
        return Ok(());
    }
    let (mut all_values, mut all_vectors) = (vec![0.0; values.len()], vec![0.0; vectors.len()]);
    cuda.download(&mut all_values, values.reborrow())?;
    cuda.download(&mut all_vectors, vectors.reborrow())?;
    let mut host = vec![0.0; a.len()];
    cuda.download(&mut host, a)?;
    for (at, square, n) in large {
        let own = square..square + n * n;
        cpu::eigh_of(&mut all_values[at..at + n], &mut all_vectors[own.clone()], &host[own], n);
    }
    cuda.upload(values, &all_values)?;
    cuda.upload(vectors, &all_vectors)
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        if let Some(cuda) = crate::cuda::tests::device() {
            crate::ops::cases::eigh::conforms(&[cuda]);
        }
    }
}
