//! Products of blocks that lie in the nearest caches.

use crate::cpu::simd::{self, Isa, Kernel, fma};

/// Columns of a right factor and of a result come in multiples of this; the rest is padding.
pub(super) const COLUMNS: usize = 8;

/// `n` rounded up to whole columns.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(COLUMNS)
}

/// A left factor: how `a[i, k]` lies.
pub(super) trait Left: Copy {
    /// A function from k to `a[i..i + M, k]`, k below `depth`.
    fn rows<const M: usize>(self, i: usize, depth: usize) -> impl Fn(usize) -> [f32; M];
}

/// `a[i, k]` at `i · stride + k`.
#[derive(Clone, Copy)]
pub(super) struct ByRow<'a>(pub &'a [f32], pub usize);

/// `a[i, k]` at `k · stride + i`.
#[derive(Clone, Copy)]
pub(super) struct ByColumn<'a>(pub &'a [f32], pub usize);

impl Left for ByRow<'_> {
    #[inline(always)]
    fn rows<const M: usize>(self, i: usize, depth: usize) -> impl Fn(usize) -> [f32; M] {
        let rows: [&[f32]; M] = std::array::from_fn(|m| &self.0[(i + m) * self.1..][..depth]);
        // Loops, because `from_fn` is not always inlined.
        #[inline(always)]
        move |k| {
            let mut a = [0f32; M];
            for m in 0..M {
                a[m] = rows[m][k];
            }
            a
        }
    }
}

impl Left for ByColumn<'_> {
    #[inline(always)]
    fn rows<const M: usize>(self, i: usize, _: usize) -> impl Fn(usize) -> [f32; M] {
        let (a, stride) = (&self.0[i..], self.1);
        #[inline(always)]
        move |k| {
            let column = &a[k * stride..][..M];
            let mut a = [0f32; M];
            a.copy_from_slice(column);
            a
        }
    }
}

/// Sizes of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Rows of a and c.
    pub rows: usize,
    /// Columns of b and c, a multiple of [`COLUMNS`]; rows of both follow one another.
    pub columns: usize,
    /// Columns of a, rows of b.
    pub depth: usize,
}

/// `c[i, j] = Σ_k a[i, k] b[k, j]`, or added to c; k ascends.
pub(super) fn product(c: &mut [f32], add: bool, a: impl Left, b: &[f32], size: Size) {
    simd::run(Product { c, add, a, b, size });
}

struct Product<'a, A> {
    c: &'a mut [f32],
    add: bool,
    a: A,
    b: &'a [f32],
    size: Size,
}

impl<A: Left> Kernel for Product<'_, A> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        let Product { c, add, a, b, size } = self;
        let mut j = 0;
        if I::WIDE {
            while j + 4 * COLUMNS <= size.columns {
                strip::<I, 6, { 4 * COLUMNS }>(&mut c[j..], add, a, &b[j..], size);
                j += 4 * COLUMNS;
            }
        }
        while j + 2 * COLUMNS <= size.columns {
            strip::<I, 6, { 2 * COLUMNS }>(&mut c[j..], add, a, &b[j..], size);
            j += 2 * COLUMNS;
        }
        if j < size.columns {
            strip::<I, 12, COLUMNS>(&mut c[j..], add, a, &b[j..], size);
        }
    }
}

/// `N` columns, `M` rows at a time: as many sums as there are registers for.
#[inline(always)]
fn strip<I: Isa, const M: usize, const N: usize>(
    c: &mut [f32],
    add: bool,
    a: impl Left,
    b: &[f32],
    size: Size,
) {
    let Size { rows, columns, depth } = size;
    let mut i = 0;
    while i + M <= rows {
        tile::<I, M, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size);
        i += M;
    }
    if i + 6 <= rows {
        tile::<I, 6, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size);
        i += 6;
    }
    match rows - i {
        1 => tile::<I, 1, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size),
        2 => tile::<I, 2, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size),
        3 => tile::<I, 3, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size),
        4 => tile::<I, 4, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size),
        5 => tile::<I, 5, N>(&mut c[i * columns..], add, a.rows(i, depth), b, size),
        _ => {}
    }
}

/// `M × N` sums in registers.
#[inline(always)]
fn tile<I: Isa, const M: usize, const N: usize>(
    c: &mut [f32],
    add: bool,
    a: impl Fn(usize) -> [f32; M],
    b: &[f32],
    size: Size,
) {
    let mut sums = [[0f32; N]; M];
    for k in 0..size.depth {
        let b = &b[k * size.columns..][..N];
        let a = a(k);
        for m in 0..M {
            for n in 0..N {
                sums[m][n] = fma::<I>(a[m], b[n], sums[m][n]);
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        let c = &mut c[m * size.columns..][..N];
        if add {
            c.iter_mut().zip(sums).for_each(|(c, s)| *c += s);
        } else {
            c.copy_from_slice(sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Baseline, Isa};
    use crate::ops::cases::normal;

    struct Wide;
    impl Isa for Wide {
        const FMA: bool = true;
        const WIDE: bool = true;
    }

    fn check<I: Isa>(rows: usize, columns: usize, depth: usize, add: bool) {
        // Strides are larger than what they hold.
        let (a, b) =
            (normal::<f32>(1, (rows + 3) * (depth + 3), 1.0), normal::<f32>(2, depth * columns, 1.0));
        let old = normal::<f32>(3, rows * columns, 1.0);
        let size = Size { rows, columns, depth };
        let (mut by_row, mut by_column) = (old.clone(), old.clone());
        let left = ByRow(&a, depth + 3);
        Product { c: &mut by_row, add, a: left, b: &b, size }.run::<I>();
        let left = ByColumn(&a, rows + 3);
        Product { c: &mut by_column, add, a: left, b: &b, size }.run::<I>();
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
    fn as_the_sums() {
        for rows in 1..20 {
            for columns in [8, 16, 24, 32, 48, 80] {
                for depth in [1, 5, 64] {
                    check::<Wide>(rows, columns, depth, rows % 2 == 0);
                    check::<Baseline>(rows, columns, depth, rows % 2 == 1);
                }
            }
        }
    }
}
