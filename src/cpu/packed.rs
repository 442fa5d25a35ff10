//! Frozen weights packed once, in panels as the micro-kernels read them, for all products that they take part in.
//!
//! Each number is widened and rounded as a product would do it, so that results are the same to the bit.

use std::ops::Range;

use bytemuck::Pod;
use rayon::prelude::*;

use super::operand::Source;
use super::product::pack::{Line, Pack, Panels, Width, with_room};
#[cfg(target_arch = "x86_64")]
use super::product::pairs::{self, Pair, Pairs};
use super::product::{COLUMNS, DEPTH};
use super::simd;
use crate::backend::Pass;
use crate::error::{Error, Result};
use crate::host::HostMatrix;
use crate::tensor::{DType, Frozen, Real};

/// A right factor `[K, columns]` in panels, each with all its rows.
pub(crate) struct Packed {
    lines: Box<[Line]>,
    layout: Layout,
    precision: DType,
}

/// How a right factor is packed. Its elements take four bytes: an f32, or two bf16 of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// Pairs of bf16.
    pairs: bool,
    /// Columns of a panel.
    width: usize,
    /// Elements of a panel.
    stride: usize,
    /// Panels.
    count: usize,
}

impl Layout {
    fn of<T: Real>(depth: usize, columns: usize) -> Layout {
        #[cfg(target_arch = "x86_64")]
        if T::DTYPE == DType::BF16 && Pairs::used().is_some() {
            let (stride, count) = pairs::panels(depth, columns);
            return Layout { pairs: true, width: pairs::PANEL, stride, count };
        }
        let width = simd::run(Width);
        Layout { pairs: false, width, stride: depth * width, count: columns.div_ceil(width) }
    }

    /// Lines of all panels.
    fn lines(&self) -> usize {
        (self.stride * self.count).div_ceil(size_of::<Line>() / size_of::<f32>())
    }

    /// Where row `k` begins in a panel.
    fn at(&self, k: usize) -> usize {
        self.width * if self.pairs { k / 2 } else { k }
    }

    /// Calls `one` for all blocks, which are a product's and fit a thread's room, with the elements from a block's first on, a thread's room, columns and rows.
    fn fill<E: Pod + Send>(
        &self,
        lines: &mut [Line],
        depth: usize,
        columns: usize,
        one: impl Fn(&mut [E], &mut [f32], Range<usize>, Range<usize>) + Sync,
    ) {
        let step = if self.pairs { 2 * DEPTH } else { DEPTH };
        let elements = &mut bytemuck::cast_slice_mut(lines)[..self.stride * self.count];
        let tasks = elements.par_chunks_mut((COLUMNS / self.width * self.stride).max(1)).enumerate();
        tasks.for_each(|(task, out)| {
            let ns = task * COLUMNS..((task + 1) * COLUMNS).min(columns);
            with_room(|room| {
                for k in (0..depth).step_by(step) {
                    one(&mut out[self.at(k)..], room.panels, ns.clone(), k..(k + step).min(depth));
                }
            });
        });
    }
}

/// K and the columns of the right factor that a weight is in a pass.
fn size(of: (usize, usize), pass: Pass) -> (usize, usize) {
    match pass {
        Pass::Forward => (of.1, of.0),
        Pass::Backward => of,
    }
}

/// Bytes of a packed weight `[out, inner]`.
pub(super) fn bytes<T: Real>(of: (usize, usize), pass: Pass) -> usize {
    let (depth, columns) = size(of, pass);
    Layout::of::<T>(depth, columns).lines() * size_of::<Line>()
}

impl Packed {
    /// Packs `w` on all threads of the pool. Fails where the system does not give the memory.
    pub(super) fn new<T: Real>(w: &HostMatrix, pass: Pass) -> Result<Packed> {
        let (depth, columns) = size(w.size(), pass);
        let layout = Layout::of::<T>(depth, columns);
        let mut lines = bytemuck::allocation::try_zeroed_slice_box::<Line>(layout.lines()).map_err(|()| {
            let bytes = layout.lines() * size_of::<Line>();
            Error::Memory(format!("a packed weight: the system does not give {bytes} bytes"))
        })?;
        let weight = Source::<T>::Weight(w);
        let operand = match pass {
            Pass::Forward => weight.by_columns(),
            Pass::Backward => weight.by_rows(),
        };
        match layout.pairs {
            #[cfg(target_arch = "x86_64")]
            true => layout.fill(&mut lines, depth, columns, |out: &mut [Pair], room, ns, ks| {
                let b = operand.halves(ns, ks, bytemuck::cast_slice_mut(room)).t();
                pairs::pack(out, layout.stride, b);
            }),
            _ => layout.fill(&mut lines, depth, columns, |out: &mut [f32], room, ns, ks| {
                let b = operand.block(ns, ks, room).t();
                simd::run(Pack { out, stride: layout.stride, b });
            }),
        }
        Ok(Packed { lines, layout, precision: T::DTYPE })
    }

    /// Whether it serves products of this precision.
    pub(super) fn serves<T: Real>(&self) -> bool {
        self.precision == T::DTYPE
    }

    /// The columns from `n` on, the rows from `k` on, where both begin a block of a product.
    pub(super) fn singles(&self, n: usize, k: usize) -> Panels<'_> {
        assert!(!self.layout.pairs);
        self.block(n, k)
    }

    /// [`singles`](Self::singles) of pairs.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn pairs(&self, n: usize, k: usize) -> Panels<'_, Pair> {
        assert!(self.layout.pairs);
        self.block(n, k)
    }

    fn block<E: Pod>(&self, n: usize, k: usize) -> Panels<'_, E> {
        assert!(n.is_multiple_of(self.layout.width));
        let panels = Panels::new(bytemuck::cast_slice(&self.lines), self.layout.stride);
        panels.from(n / self.layout.width, self.layout.at(k))
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::operand::{Term, depth};
    use super::super::product::{End, TileMut};
    use super::super::tiles::Grid;
    use super::*;
    use crate::backend::{Backend, Scratch};
    use crate::cpu::Cpu;
    use crate::ops::cases::linear::source;
    use crate::ops::cases::normal;

    /// Products with a weight where it lies, and with its packed copy.
    fn conforms<T: Real>(cpu: &Cpu, dtype: DType, size: (usize, usize)) {
        let values = normal::<f32>(7, size.0 * size.1, 1.0);
        let [plain, mut packed] =
            [(); 2].map(|()| Backend::matrix(cpu, source(&values, size, dtype)).expect("a matrix"));
        for pass in [Pass::Forward, Pass::Backward] {
            Backend::pack::<T>(cpu, &mut packed, pass).expect("memory");
            let bytes = size_of_val::<[Line]>(&packed.packed(pass).expect("packed").lines);
            assert_eq!(bytes, Scratch::packed_bytes::<T>(cpu, size, pass));
            let (k, n) = super::size(size, pass);
            for m in [1, 2, 40] {
                let x = normal::<T>(8, m * k, 1.0);
                let x = Source::Real { data: &x, stride: k }.by_columns();
                let product = |w: &HostMatrix| {
                    let w = Source::<T>::Weight(w);
                    let right = if pass == Pass::Forward { w.by_columns() } else { w.by_rows() };
                    let mut out = vec![f32::NAN; m * n];
                    let mut room = vec![0f32; (m + n) * depth(k)];
                    let grid = Grid::new(m, n, 1 << 30);
                    let shared = super::super::product::Shared::new(&mut out);
                    for i in 0..grid.len() {
                        let (rows, columns) = grid.at(i);
                        // SAFETY: tiles of a grid are disjoint.
                        #[allow(unsafe_code)]
                        let mut dst: TileMut<'_, f32> = unsafe {
                            shared.tile(rows.start * n + columns.start, rows.len(), columns.len(), n)
                        };
                        let term = Term { left: x, right, k };
                        term.tile(&mut dst, false, rows, columns, &mut room, End::default());
                    }
                    out
                };
                assert_eq!(product(&packed), product(&plain), "{dtype} {size:?} {pass:?} of {m} rows");
            }
        }
    }

    #[test]
    fn as_the_reference_packed_or_not() {
        let cpu = Cpu::new(2).expect("threads");
        let sizes =
            [(1, 1), (33, 7), (300, 600), (300, 65), (64, 1127), (1127, 64), (520, 1), (1, 520), (8, 1025)];
        for size in sizes {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                conforms::<f32>(&cpu, dtype, size);
                conforms::<bf16>(&cpu, dtype, size);
                conforms::<f16>(&cpu, dtype, size);
            }
        }
    }

    #[test]
    fn products_read_the_copy() {
        let cpu = Cpu::new(1).expect("threads");
        let [one, mut other] =
            [1.0, 2.0].map(|x| Backend::matrix(&cpu, source(&[x; 12], (3, 4), DType::F32)).expect("w"));
        let packed = cpu.pool.install(|| Packed::new::<f32>(&one, Pass::Backward)).expect("memory");
        other.keep_packed(Pass::Backward, packed);
        let x = Source::Real { data: &[1f32; 6][..], stride: 3 }.by_columns();
        let mut out = [f32::NAN; 8];
        let term = Term { left: x, right: Source::Weight(&other).by_rows(), k: 3 };
        term.tile(&mut TileMut::new(&mut out, 2, 4), false, 0..2, 0..4, &mut [], End::default());
        assert_eq!(out, [3.0; 8]);
    }

    #[test]
    fn a_copy_serves_its_precision_alone() {
        let cpu = Cpu::new(1).expect("threads");
        let mut w = Backend::matrix(&cpu, source(&[1.0; 6], (3, 2), DType::F32)).expect("w");
        Backend::pack::<bf16>(&cpu, &mut w, Pass::Forward).expect("memory");
        let packed = w.packed(Pass::Forward).expect("packed");
        assert!(packed.serves::<bf16>() && !packed.serves::<f32>());
        assert!(w.packed(Pass::Backward).is_none());
    }
}
