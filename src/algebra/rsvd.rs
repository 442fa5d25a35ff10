//! The largest singular values of a matrix that is read by blocks of rows, on the threads of the pool that it is called
//! in: a weight in its file's dtype, or an update that exists only as what computes its tiles.
//!
//! The algorithm is that of [`crate::ops::rsvd`].

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;

use super::{eigen, gram, positive, product, scale_columns};
use crate::error::{Error, Result};
use crate::ops::rsvd::{CUT, Sketch, orthonormal};

/// Rows that are read at a time.
const BLOCK: usize = 128;
/// Parts that the rows are cut into; each is summed on its own, and the parts in their order.
const PARTS: usize = 16;

/// A matrix `A[O, I]` that gives blocks of its rows, each as often as it is asked for.
pub trait RowBlocks: Sync {
    /// `(O, I)`.
    fn size(&self) -> (usize, usize);
    /// Writes `rows`, one after the other, into `out`, which holds `rows.len() · I` numbers of any content.
    ///
    /// Every call for the same rows gives the same numbers; calls come from several threads.
    fn read(&self, out: &mut [f32], rows: Range<usize>) -> Result<()>;
}

/// `A ≈ u diag(values) vᵀ`.
#[derive(Clone, Debug)]
pub struct Svd {
    /// `[O, k]`, orthonormal columns; the largest entry of each is positive.
    pub u: Mat<f64>,
    /// `[k]`, descending.
    pub values: Vec<f64>,
    /// `[I, k]`, orthonormal columns.
    pub v: Mat<f64>,
    /// `‖Aᵀ u − v diag(values)‖` of each direction: a singular value of A lies within that distance of the value.
    pub residuals: Vec<f64>,
    /// `‖A‖²`.
    pub energy: f64,
}

impl Svd {
    /// `‖A − u diag(values) vᵀ‖ = √(‖A‖² − Σ values²)`; below some 10⁻³ of `‖A‖` it is the rounding of the values.
    pub fn residual(&self) -> f64 {
        let kept: f64 = self.values.iter().map(|x| x * x).sum();
        (self.energy - kept).max(0.0).sqrt()
    }
}

/// The largest singular values of `source` and their vectors, the start drawn for tensor number `tensor`; see
/// [`crate::ops::rsvd::Rsvd`] for what is computed. The same bytes on any number of threads.
///
/// Reads every row `sketch.iterations + 1` times. Fails where a block cannot be read, and where the matrix holds NaN,
/// infinity, or numbers so large that `AᵀA` is beyond f32.
pub fn rsvd<S: RowBlocks + ?Sized>(source: &S, sketch: &Sketch, tensor: u64) -> Result<Svd> {
    let (o, i) = source.size();
    let (k, l) = (sketch.values((o, i)), sketch.width((o, i)));
    if k == 0 {
        return Err(Error::Op {
            op: "rsvd",
            why: format!(
                "the matrix is [{o}, {i}], {} values are asked for, expected one or more",
                sketch.rank
            ),
        });
    }
    let random = sketch.start(tensor);
    let start = |r: usize, c: usize| f64::from(2.0 * random.uniform((r * l + c) as u64) - 1.0);
    let mut z = narrow(&orth(Mat::from_fn(i, l, start)));
    let mut pass = Pass::over(source, &z)?;
    for _ in 0..sketch.iterations {
        z = narrow(&orth(pass.back));
        pass = Pass::over(source, &z)?;
    }
    let Pass { y, back, energy } = pass;
    let unusable = || {
        let why =
            if energy.is_finite() { "numbers whose products are beyond f32" } else { "NaN or infinity" };
        Error::Numeric(format!("the matrix holds {why}: it has no singular values"))
    };
    if !energy.is_finite() || !back.is_all_finite() {
        return Err(unusable());
    }
    let (lambda, w) = eigen(gram(wide(&y).transpose()).as_ref()).map_err(|_| unusable())?;
    let mut values: Vec<f64> = lambda[..k].iter().map(|x| x.max(0.0).sqrt()).collect();
    let cut = CUT * values[0];
    values.iter_mut().filter(|x| **x <= cut).for_each(|x| *x = 0.0);
    // A direction that is cut has vectors of zeros.
    let inverse: Vec<f64> = values.iter().map(|&x| if x > 0.0 { 1.0 / x } else { 0.0 }).collect();
    let there: Vec<f64> = values.iter().map(|&x| f64::from(u8::from(x > 0.0))).collect();
    let w = w.subcols(0, k);
    let scaled = scale_columns(w, &inverse);
    let mut u = product(wide(&y).as_ref(), scaled.as_ref());
    let mut v = product(wide(&z).as_ref(), scale_columns(w, &there).as_ref());
    let down = product(back.as_ref(), scaled.as_ref());
    let missing = |j: usize| {
        let pairs = down.col_as_slice(j).iter().zip(v.col_as_slice(j));
        pairs.map(|(d, v)| (d - values[j] * v).powi(2)).sum::<f64>().sqrt()
    };
    let residuals = (0..k).map(missing).collect();
    positive(&mut u, &mut v);
    Ok(Svd { u, values, v, residuals, energy })
}

/// `Aᵀ u`, `[I, k]`, of `u[O, k]`, which is rounded to f32: one more reading, with the sums of a pass of [`rsvd`].
///
/// With orthonormal columns of u, `u (Aᵀ u)ᵀ` is all of A that lies in their span.
pub fn transposed_times<S: RowBlocks + ?Sized>(source: &S, u: &Mat<f64>) -> Result<Mat<f64>> {
    let ((o, i), u) = (source.size(), narrow(u));
    let mut out = Mat::<f64>::zeros(i, u.ncols());
    let one = |rows: Range<usize>| -> Result<Mat<f64>> {
        let mut back = Back::new(i, u.ncols());
        blocks(source, rows, |block, _, a| back.add(a, u.subrows(block.start, block.len())))?;
        Ok(back.sum)
    };
    in_parts(o, one, |_, part| out += part)?;
    Ok(out)
}

/// Bytes that [`rsvd`] and [`transposed_times`] hold at most on `threads` threads, the result included.
pub fn bytes((o, i): (usize, usize), sketch: &Sketch, threads: usize) -> u64 {
    let [o, i, l] = [o, i, sketch.width((o, i))].map(|n| n as u64);
    let threads = threads.min(PARTS) as u64;
    // Y in f32 and f64, and u; Z in f32 and f64, the sum of AᵀY, and v; of each part its sum, that of a block, and the block.
    l * (20 * o + 28 * i) + threads * i * (12 * l + 4 * BLOCK as u64)
}

/// What one reading of A gives.
struct Pass {
    /// `A Z`, `[O, l]`.
    y: Mat<f32>,
    /// `Aᵀ A Z`, `[I, l]`.
    back: Mat<f64>,
    /// `‖A‖²`.
    energy: f64,
}

impl Pass {
    fn over<S: RowBlocks + ?Sized>(source: &S, z: &Mat<f32>) -> Result<Pass> {
        let ((o, i), l) = (source.size(), z.ncols());
        let mut all = Pass { y: Mat::zeros(o, l), back: Mat::zeros(i, l), energy: 0.0 };
        let one = |rows: Range<usize>| -> Result<Pass> {
            let (first, mut y, mut energy) = (rows.start, Mat::<f32>::zeros(rows.len(), l), 0.0);
            let mut back = Back::new(i, l);
            blocks(source, rows, |block, numbers, a| {
                energy += sum_of_squares(numbers);
                let mut y = y.subrows_mut(block.start - first, block.len());
                matmul(y.as_mut(), Accum::Replace, a, z, 1.0, Par::Seq);
                back.add(a, y.as_ref());
            })?;
            Ok(Pass { y, back: back.sum, energy })
        };
        in_parts(o, one, |rows, part| {
            all.y.subrows_mut(rows.start, rows.len()).copy_from(&part.y);
            all.back += part.back;
            all.energy += part.energy;
        })?;
        Ok(all)
    }
}

/// `one` of each part of `o` rows, as many at once as there are threads, handed to `add` in the rows' order: no more of
/// them wait than that, and sums do not depend on it.
fn in_parts<T: Send>(
    o: usize,
    one: impl Fn(Range<usize>) -> Result<T> + Sync,
    mut add: impl FnMut(Range<usize>, T),
) -> Result<()> {
    let blocks = o.div_ceil(BLOCK);
    let parts = blocks.min(PARTS);
    let start = |part: usize| (part * blocks / parts * BLOCK).min(o);
    let rows: Vec<Range<usize>> = (0..parts).map(|p| start(p)..start(p + 1)).collect();
    for rows in rows.chunks(rayon::current_num_threads()) {
        // Gathered before the first error is looked for, so that it is always the same one.
        let done: Vec<Result<T>> = rows.par_iter().cloned().map(&one).collect();
        for (rows, part) in rows.iter().zip(done) {
            add(rows.clone(), part?);
        }
    }
    Ok(())
}

/// Calls `f` for each block of the rows `rows`, with its numbers as they lie and as a matrix.
fn blocks<S: RowBlocks + ?Sized>(
    source: &S,
    rows: Range<usize>,
    mut f: impl FnMut(Range<usize>, &[f32], MatRef<'_, f32>),
) -> Result<()> {
    let i = source.size().1;
    let mut read = vec![0f32; BLOCK.min(rows.len()) * i];
    for first in rows.clone().step_by(BLOCK) {
        let block = first..(first + BLOCK).min(rows.end);
        let read = &mut read[..block.len() * i];
        source.read(read, block.clone())?;
        let (read, rows) = (&*read, block.len());
        f(block, read, MatRef::from_row_major_slice(read, rows, i));
    }
    Ok(())
}

/// `Σ aᵀ y` over blocks of rows: a block's sums in f32, those of all blocks in f64.
struct Back {
    sum: Mat<f64>,
    block: Mat<f32>,
}

impl Back {
    fn new(i: usize, l: usize) -> Back {
        Back { sum: Mat::zeros(i, l), block: Mat::zeros(i, l) }
    }

    fn add(&mut self, a: MatRef<'_, f32>, y: MatRef<'_, f32>) {
        matmul(&mut self.block, Accum::Replace, a.transpose(), y, 1.0, Par::Seq);
        for j in 0..self.sum.ncols() {
            let sums = self.sum.col_as_slice_mut(j).iter_mut();
            sums.zip(self.block.col_as_slice(j)).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}

/// `Σ x²` in f64, in eight sums that are added up in their order.
fn sum_of_squares(x: &[f32]) -> f64 {
    let (eights, rest) = x.as_chunks::<8>();
    let mut sums = [0f64; 8];
    for eight in eights {
        for (sum, x) in sums.iter_mut().zip(eight) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    }
    let rest: f64 = rest.iter().map(|x| f64::from(*x).powi(2)).sum();
    sums.iter().sum::<f64>() + rest
}

fn orth(x: Mat<f64>) -> Mat<f64> {
    let once = |x: Mat<f64>| {
        let (g, l) = (gram(x.transpose()), x.ncols());
        let flat: Vec<f64> = (0..l * l).map(|at| g[(at / l, at % l)]).collect();
        product(x.as_ref(), MatRef::from_row_major_slice(&orthonormal(&flat, l), l, l))
    };
    once(once(x))
}

fn narrow(x: &Mat<f64>) -> Mat<f32> {
    x.map(|x| *x as f32)
}

fn wide(x: &Mat<f32>) -> Mat<f64> {
    x.map(|x| f64::from(*x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::rsvd::{self as cases, Found};

    struct Dense(Mat<f64>);

    impl RowBlocks for Dense {
        fn size(&self) -> (usize, usize) {
            (self.0.nrows(), self.0.ncols())
        }
        fn read(&self, out: &mut [f32], rows: Range<usize>) -> Result<()> {
            for (r, out) in rows.zip(out.chunks_mut(self.0.ncols())) {
                out.iter_mut().enumerate().for_each(|(c, out)| *out = self.0[(r, c)] as f32);
            }
            Ok(())
        }
    }

    /// Random numbers of a normal distribution.
    fn normal(seed: u64, rows: usize, columns: usize) -> Mat<f64> {
        let x = crate::ops::cases::normal64(seed, rows * columns, 1.0);
        Mat::from_fn(rows, columns, |r, c| x[r * columns + c])
    }

    /// A matrix with the singular values `of(0), of(1), …`, rounded to f32, and those in f64.
    fn matrix(seed: u64, (o, i): (usize, usize), of: impl Fn(usize) -> f64) -> (Dense, Vec<f64>) {
        let n = o.min(i);
        let (u, v) = (normal(seed, o, n).qr().compute_thin_Q(), normal(seed + 1, i, n).qr().compute_thin_Q());
        let values: Vec<f64> = (0..n).map(of).collect();
        let a = product(scale_columns(u.as_ref(), &values).as_ref(), v.transpose());
        (Dense(a.map(|x| f64::from(*x as f32))), values)
    }

    /// Row by row.
    fn flat(x: &Mat<f64>) -> Vec<f64> {
        (0..x.nrows()).flat_map(|r| x.row(r).iter().copied().collect::<Vec<_>>()).collect()
    }

    /// Whether the vectors are what they are said to be, and the residuals.
    fn check(a: &Dense, got: &Svd) {
        let (u, v) = (flat(&got.u), flat(&got.v));
        let Svd { values, residuals, energy, .. } = got;
        let found = Found { values, residuals, energy: *energy, u: &u, v: &v };
        cases::check("algebra", &flat(&a.0), a.0.ncols(), &found);
        let rest = &a.0 - &product(scale_columns(got.u.as_ref(), values).as_ref(), got.v.transpose());
        let (rest, told) = (rest.squared_norm_l2(), got.residual().powi(2));
        assert!((rest - told).abs() <= 1e-5 * energy, "{rest} {told}");
    }

    #[test]
    fn decaying_spectra_are_found() {
        for (seed, size) in [(1, (300, 200)), (3, (129, 257)), (5, (1000, 40))] {
            let (a, values) = matrix(seed, size, |k| 0.75_f64.powi(k as i32));
            for iterations in [1, 2, 4] {
                let got = rsvd(&a, &Sketch { iterations, ..Sketch::new(6, 7) }, 3).unwrap();
                check(&a, &got);
                // Ritz values are below, and off by (σ_{l+1} / σ_k)^4q times the square of the start's tangent, some I.
                let tangent = a.0.ncols() as f64;
                for (k, (got, want)) in got.values.iter().zip(&values).enumerate() {
                    let gap = 0.75_f64.powi((14 - k) as i32).powi(4 * iterations as i32);
                    let off = (want - got) / want;
                    assert!(
                        off >= -1e-5 && off <= tangent * gap + 1e-5,
                        "q {iterations}, value {k}: {off:e} {gap:e}"
                    );
                }
                // A singular value lies within the residual of each value.
                for (got, missing) in got.values.iter().zip(&got.residuals) {
                    let near = values.iter().map(|x| (x - got).abs()).fold(f64::INFINITY, f64::min);
                    assert!(near <= missing + 1e-5, "{got}: {near:e} {missing:e}");
                }
            }
            // The subspace, whose distance is at most the residual over the gap to the rest of the spectrum.
            let got = rsvd(&a, &Sketch { iterations: 4, ..Sketch::new(6, 7) }, 3).unwrap();
            let exact = a.0.thin_svd().unwrap();
            let v = exact.V().subcols(0, 6).to_owned();
            let inside = product(v.transpose(), got.v.as_ref());
            let outside = (&got.v - &product(v.as_ref(), inside.as_ref())).norm_l2();
            assert!(outside <= 1e-4, "{outside:e}");
        }
    }

    #[test]
    fn flat_spectra_are_approximated_nearly_as_well_as_they_can_be() {
        let a = Dense(normal(9, 400, 256).map(|x| f64::from(*x as f32)));
        let exact: Vec<f64> = a.0.singular_values().unwrap();
        let best = exact[16..].iter().map(|x| x * x).sum::<f64>().sqrt();
        let mut last = f64::INFINITY;
        for iterations in [0, 2, 7] {
            let got = rsvd(&a, &Sketch { iterations, ..Sketch::new(16, 0) }, 0).unwrap();
            check(&a, &got);
            assert!(
                got.residual() <= last && got.residual() <= (1.0 + 0.1 / (1.0 + iterations as f64)) * best
            );
            assert!(got.values.iter().zip(&exact).all(|(got, want)| *got <= want * (1.0 + 1e-6)));
            last = got.residual();
        }
        assert!(last <= 1.003 * best, "{last} {best}");
    }

    #[test]
    fn less_than_was_asked_for() {
        // Rank below the sketch's width; one row; one column; one number; fewer rows than the rank.
        for (size, rank) in
            [((90, 70), 3), ((1, 50), 1), ((50, 1), 1), ((1, 1), 1), ((4, 130), 4), ((130, 4), 4)]
        {
            let (a, values) = matrix(20, size, |k| if k < rank { 2.0 / (1 + k) as f64 } else { 0.0 });
            let got = rsvd(&a, &Sketch::new(5, 1), 2).unwrap();
            check(&a, &got);
            assert_eq!(got.values.len(), 5.min(size.0).min(size.1));
            for (k, (got, want)) in got.values.iter().zip(&values).enumerate() {
                assert!((got - want).abs() <= 2e-6, "{size:?} value {k}: {got} {want}");
                assert!(k < rank || *got == 0.0, "{size:?} value {k} of rank {rank}: {got:e}");
            }
        }
        let got = rsvd(&Dense(Mat::zeros(30, 20)), &Sketch::new(3, 0), 0).unwrap();
        assert!(got.values == [0.0; 3] && got.residuals == [0.0; 3] && got.residual() == 0.0);
        assert!(got.u.norm_l2() == 0.0 && got.v.norm_l2() == 0.0);
    }

    #[test]
    fn the_same_bytes_on_any_number_of_threads() {
        let a = Dense(normal(5, 700, 90));
        let found: Vec<_> = [1, 2, 3]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let got = pool.install(|| rsvd(&a, &Sketch::new(4, 3), 8)).unwrap();
                let bits = |x: &Mat<f64>| {
                    x.col_iter()
                        .flat_map(|c| c.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                        .collect::<Vec<_>>()
                };
                (got.values.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), bits(&got.u), bits(&got.v))
            })
            .collect();
        assert!(found.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn one_more_reading_gives_what_lies_in_the_span() {
        for (seed, size) in [(1, (700, 90)), (2, (130, 300)), (3, (1, 9)), (4, (5, 1))] {
            let a = Dense(normal(seed, size.0, size.1).map(|x| f64::from(*x as f32)));
            let u = normal(seed + 9, size.0, 3.min(size.0)).qr().compute_thin_Q();
            let want = product(a.0.transpose(), u.as_ref());
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let got = pool.install(|| transposed_times(&a, &u)).unwrap();
                let err = (&got - &want).norm_l2() / want.norm_l2();
                assert!(err <= 1e-6, "{size:?}: {err:e}");
            }
            assert_eq!(transposed_times(&a, &Mat::zeros(size.0, 2)).unwrap().norm_max(), 0.0);
        }
    }

    #[test]
    fn what_has_no_singular_values_is_refused() {
        for (bad, why) in
            [(f64::NAN, "NaN or infinity"), (f64::INFINITY, "NaN or infinity"), (1e38, "beyond f32")]
        {
            let mut a = normal(6, 200, 9);
            a[(150, 4)] = bad;
            let err = rsvd(&Dense(a), &Sketch::new(2, 0), 0).unwrap_err().to_string();
            assert!(err.contains(why), "{err}");
        }
        let err = rsvd(&Dense(Mat::zeros(0, 4)), &Sketch::new(2, 0), 0).unwrap_err().to_string();
        assert!(err.contains("[0, 4], 2 values"), "{err}");
        assert!(rsvd(&Dense(Mat::zeros(2, 4)), &Sketch::new(0, 0), 0).is_err());
    }
}
