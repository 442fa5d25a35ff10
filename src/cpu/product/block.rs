//! Products of blocks that lie in the nearest caches, such as attention's: nothing is packed.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128, __m256, __m512};

use super::TileMut;
use super::micro::{self, Vector};
#[cfg(target_arch = "x86_64")]
use super::pairs::Pairs;
use crate::cpu::simd::{self, Instructions, Isa, Kernel};

/// Columns of a right factor and of a result come in multiples of this; the rest is padding.
pub(in crate::cpu) const COLUMNS: usize = 8;

/// Rows and columns of a square of sums that [`product_in_tiles`] makes at a time.
pub(in crate::cpu) const SIDE: usize = 32;
/// Pairs of k that it takes at a time.
pub(in crate::cpu) const STEP: usize = 16;

/// `n` rounded up to whole columns.
pub(in crate::cpu) fn padded(n: usize) -> usize {
    n.next_multiple_of(COLUMNS)
}

/// A left factor: where `a[i, k]` lies.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Left<'a> {
    data: &'a [f32],
    by_row: usize,
    by_depth: usize,
}

impl<'a> Left<'a> {
    /// `a[i, k]` at `i · stride + k`.
    pub(in crate::cpu) fn by_row(data: &'a [f32], stride: usize) -> Left<'a> {
        Left { data, by_row: stride, by_depth: 1 }
    }

    /// `a[i, k]` at `k · stride + i`.
    pub(in crate::cpu) fn by_column(data: &'a [f32], stride: usize) -> Left<'a> {
        Left { data, by_row: 1, by_depth: stride }
    }
}

#[cfg(test)]
impl<'a> Left<'a> {
    /// What it lies in.
    pub(in crate::cpu) fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Where `a[i, k]` lies.
    pub(in crate::cpu) fn at(&self, i: usize, k: usize) -> usize {
        i * self.by_row + k * self.by_depth
    }
}

/// Sizes of a product.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Size {
    /// Rows of a and c.
    pub rows: usize,
    /// Columns of b and c, a multiple of [`COLUMNS`]; rows of both follow one another.
    pub columns: usize,
    /// Columns of a, rows of b.
    pub depth: usize,
}

/// `c[i, j] = Σ_k a[i, k] b[k, j]`, or added to c; k ascends.
pub(in crate::cpu) fn product(c: &mut [f32], add: bool, a: Left<'_>, b: &[f32], size: Size) {
    simd::run(Product { c, add, a, b, size });
}

struct Product<'a> {
    c: &'a mut [f32],
    add: bool,
    a: Left<'a>,
    b: &'a [f32],
    size: Size,
}

/// Whether pairs of bf16 are multiplied in registers, not in tiles nor as f32: where [`product_of_pairs`] can be called.
pub(in crate::cpu) fn dots_are_used() -> bool {
    cfg!(target_arch = "x86_64") && Instructions::used() == Instructions::Avx512Bf16
}

/// [`product`] of factors whose every f32 stands for two bf16, its bits: `c[i, j] = Σ_k a[i, k]₀ b[k, j]₀ + a[i, k]₁ b[k, j]₁`.
/// Sums are f32, and subnormal numbers count as 0.
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) fn product_of_pairs(c: &mut [f32], add: bool, a: Left<'_>, b: &[f32], size: Size) {
    assert!(dots_are_used());
    // SAFETY: the instructions are used, so the processor has them.
    unsafe { Product { c, add, a, b, size }.of_pairs() }
}

/// There are no instructions for it.
#[cfg(not(target_arch = "x86_64"))]
pub(in crate::cpu) fn product_of_pairs(_: &mut [f32], _: bool, _: Left<'_>, _: &[f32], _: Size) {
    unreachable!("pairs are not used")
}

/// Whether pairs of bf16 are multiplied in tiles: where [`product_in_tiles`] can be called.
pub(in crate::cpu) fn tiles_are_used() -> bool {
    cfg!(target_arch = "x86_64") && Instructions::used() == Instructions::Amx
}

/// [`product_of_pairs`] in tiles, of a left factor that lies by rows. Rows are rounded up to [`SIDE`], of which c and a have
/// as many, columns are a multiple of it, and the depth is one of [`STEP`].
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) fn product_in_tiles(c: &mut [f32], add: bool, a: Left<'_>, b: &[f32], size: Size) {
    assert!(tiles_are_used() && a.by_depth == 1);
    if let Some(pairs) = Pairs::used() {
        pairs.block(c, add, (a.data, a.by_row), b, size);
    }
}

/// There are no instructions for it.
#[cfg(not(target_arch = "x86_64"))]
pub(in crate::cpu) fn product_in_tiles(_: &mut [f32], _: bool, _: Left<'_>, _: &[f32], _: Size) {
    unreachable!("tiles are not used")
}

impl Product<'_> {
    /// Whether there is anything to write; both factors have the sizes.
    #[inline(always)]
    fn checked(&self) -> bool {
        let &Product { a, b, size: Size { rows, columns, depth }, .. } = self;
        if rows == 0 || columns == 0 {
            return false;
        }
        assert!(columns.is_multiple_of(COLUMNS));
        assert!(depth.checked_mul(columns).is_some_and(|n| n <= b.len()));
        let last = |n: usize, by: usize| n.saturating_sub(1).checked_mul(by);
        let last = last(rows, a.by_row).zip(last(depth, a.by_depth)).and_then(|(i, k)| i.checked_add(k));
        assert!(depth == 0 || last.is_some_and(|n| n < a.data.len()));
        true
    }

    /// [`product_of_pairs`].
    ///
    /// # Safety
    /// The processor has the instructions.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    unsafe fn of_pairs(self) {
        use micro::Dotted;
        if !self.checked() {
            return;
        }
        let Product { c, add, a, b, size } = self;
        let (mut c, mut j) = (TileMut::new(c, size.rows, size.columns), 0);
        // SAFETY: as the caller says; both factors have the sizes (`checked`), and b has N columns from j on.
        unsafe {
            while j + 32 <= size.columns {
                strip::<Dotted<__m512>, 8, 2, 32>(&mut c, j, add, a, b, size);
                j += 32;
            }
            if j + 16 <= size.columns {
                strip::<Dotted<__m512>, 8, 1, 16>(&mut c, j, add, a, b, size);
                j += 16;
            }
            if j < size.columns {
                strip::<Dotted<__m256>, 8, 1, 8>(&mut c, j, add, a, b, size);
            }
        }
    }
}

impl Kernel for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        if !self.checked() {
            return;
        }
        let Product { c, add, a, b, size } = self;
        let columns = size.columns;
        let (mut c, mut j) = (TileMut::new(c, size.rows, columns), 0);
        // SAFETY: kernels run with instructions that the processor has (`simd::run`), and these are I's; b has N columns
        // from j on.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            if I::WIDE {
                while j + 32 <= columns {
                    strip::<__m512, 8, 2, 32>(&mut c, j, add, a, b, size);
                    j += 32;
                }
                if j + 16 <= columns {
                    strip::<__m512, 8, 1, 16>(&mut c, j, add, a, b, size);
                    j += 16;
                }
            }
            if I::FMA {
                while j + 16 <= columns {
                    strip::<__m256, 6, 2, 16>(&mut c, j, add, a, b, size);
                    j += 16;
                }
                if j < columns {
                    strip::<__m256, 8, 1, 8>(&mut c, j, add, a, b, size);
                }
            } else {
                while j < columns {
                    strip::<__m128, 6, 2, 8>(&mut c, j, add, a, b, size);
                    j += 8;
                }
            }
        }
        // SAFETY: these are plain numbers; b has as many columns from j on.
        #[cfg(not(target_arch = "x86_64"))]
        unsafe {
            while j < columns {
                strip::<micro::Lanes<f32, 4>, 6, 2, 8>(&mut c, j, add, a, b, size);
                j += 8;
            }
        }
    }
}

/// N columns from `j` on, which are C vectors; M rows at a time, or 4, 2 or 1 where no more are left.
///
/// # Safety
/// The processor has `V`; a has the size's rows and depth, b its depth and N columns from `j` on.
#[inline(always)]
unsafe fn strip<V: Vector<Of = f32>, const M: usize, const C: usize, const N: usize>(
    c: &mut TileMut<'_, f32>,
    j: usize,
    add: bool,
    a: Left<'_>,
    b: &[f32],
    size: Size,
) {
    let mut i = 0;
    while i < size.rows {
        let left = size.rows - i;
        // SAFETY: as the caller says.
        unsafe {
            match left {
                1 => tile::<V, 1, C, N>(c, (i, j), add, a, b, size),
                2 => tile::<V, 2, C, N>(c, (i, j), add, a, b, size),
                3 | 4 => tile::<V, 4, C, N>(c, (i, j), add, a, b, size),
                _ => tile::<V, M, C, N>(c, (i, j), add, a, b, size),
            }
        }
        i += match left {
            1..=4 => left,
            _ => M.min(left),
        };
    }
}

/// At most M rows from `i` on and N columns from `j` on, in registers; the last row again for those that there are not.
///
/// # Safety
/// As for [`strip`].
#[inline(always)]
unsafe fn tile<V: Vector<Of = f32>, const M: usize, const C: usize, const N: usize>(
    c: &mut TileMut<'_, f32>,
    (i, j): (usize, usize),
    add: bool,
    a: Left<'_>,
    b: &[f32],
    size: Size,
) {
    let some = M.min(size.rows - i);
    let mut rows = [a.data.as_ptr(); M];
    for (m, row) in rows.iter_mut().enumerate() {
        *row = row.wrapping_add((i + m.min(some - 1)) * a.by_row);
    }
    let a = micro::Rows { starts: rows, step: a.by_depth };
    let b = micro::Panel { start: b.as_ptr().wrapping_add(j), stride: size.columns, depth: size.depth };
    let mut c = c.block(i..i + some, j..j + N);
    // SAFETY: as the caller says; rows past the last are the last one.
    unsafe { micro::tile::<V, M, C, N>(&mut c, add, a, b, ()) }
}

#[cfg(test)]
mod tests {
    #[cfg(target_arch = "x86_64")]
    use half::bf16;

    use super::*;
    use crate::cpu::simd::tests::{loops, run_on};
    use crate::ops::cases::normal;

    fn check(set: Instructions, rows: usize, columns: usize, depth: usize, add: bool) {
        // Strides are larger than what they hold.
        let (a, b) =
            (normal::<f32>(1, (rows + 3) * (depth + 3), 1.0), normal::<f32>(2, depth * columns, 1.0));
        let old = normal::<f32>(3, rows * columns, 1.0);
        let size = Size { rows, columns, depth };
        let (mut by_row, mut by_column) = (old.clone(), old.clone());
        let left = Left::by_row(&a, depth + 3);
        run_on(set, Product { c: &mut by_row, add, a: left, b: &b, size });
        let left = Left::by_column(&a, rows + 3);
        run_on(set, Product { c: &mut by_column, add, a: left, b: &b, size });
        for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
            let sum = |at: &dyn Fn(usize) -> usize| -> f64 {
                (0..depth).map(|k| f64::from(a[at(k)]) * f64::from(b[k * columns + j])).sum()
            };
            let at = i * columns + j;
            let old = if add { f64::from(old[at]) } else { 0.0 };
            let want = [sum(&|k| i * (depth + 3) + k) + old, sum(&|k| k * (rows + 3) + i) + old];
            for (got, want) in [by_row[at], by_column[at]].into_iter().zip(want) {
                let tol = 1.5e-7 * depth as f64 + 2e-7 * want.abs() + 5e-7;
                assert!((f64::from(got) - want).abs() <= tol, "{size:?} [{i}, {j}] = {got}, expected {want}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn of_pairs_as_the_sums() {
        if Instructions::here().all(|set| set != Instructions::Avx512Bf16) {
            return;
        }
        let cases = (1..20).flat_map(|n| [8, 16, 24, 40, 48].map(|columns| (n, columns)));
        for ((rows, columns), depth) in cases.flat_map(|of| [0, 1, 5, 32].map(|depth| (of, depth))) {
            let halves = |seed, n: usize| normal::<bf16>(seed, 2 * n, 1.0);
            let single = |x: &[bf16]| bytemuck::pod_collect_to_vec::<_, f32>(x);
            let (a, b) = (halves(1, (rows + 3) * (depth + 1)), halves(2, depth * columns));
            let (of_a, of_b) = (single(&a), single(&b));
            let old = normal::<f32>(3, rows * columns, 1.0);
            let size = Size { rows, columns, depth };
            let lefts = [(Left::by_row(&of_a, depth + 1), true), (Left::by_column(&of_a, rows + 3), false)];
            for (left, add) in lefts {
                let mut c = if add { old.clone() } else { vec![f32::NAN; rows * columns] };
                let product = Product { c: &mut c, add, a: left, b: &of_b, size };
                // SAFETY: the processor has the instructions, as was just seen.
                unsafe { product.of_pairs() };
                for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                    let terms = (0..2 * depth).map(|k| {
                        let of_a = (i * left.by_row + k / 2 * left.by_depth) * 2 + k % 2;
                        a[of_a].to_f64() * b[(k / 2 * columns + j) * 2 + k % 2].to_f64()
                    });
                    let old = if add { f64::from(old[i * columns + j]) } else { 0.0 };
                    let (got, want) = (c[i * columns + j], old + terms.sum::<f64>());
                    let tol = 3e-7 * depth as f64 + 2e-7 * want.abs() + 5e-7;
                    let err = (f64::from(got) - want).abs();
                    assert!(err <= tol, "{size:?} [{i}, {j}] = {got}, expected {want}");
                }
            }
        }
    }

    #[test]
    fn as_the_sums() {
        let sizes = |n: usize| [8, 16, 24, 32, 48, 80].map(|columns| (n, columns));
        for (rows, columns) in (1..20).flat_map(sizes) {
            for (depth, add) in [0, 1, 5, 64].into_iter().flat_map(|n| [(n, false), (n, true)]) {
                loops().for_each(|set| check(set, rows, columns, depth, add));
            }
        }
    }
}
