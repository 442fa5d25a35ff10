use std::hint::black_box;
use std::time::{Duration, Instant};

use super::*;
use crate::cpu::simd::Instructions;
use crate::cpu::simd::tests::{loops, run_on};
use crate::ops::cases::normal;

/// What [`Done`] was called with.
pub(super) struct Taken {
    sums: Vec<f32>,
    times: Vec<usize>,
    columns: usize,
}

impl Taken {
    pub(super) fn new(rows: usize, columns: usize) -> Taken {
        Taken { sums: vec![f32::NAN; rows * columns], times: vec![0; rows * columns], columns }
    }

    pub(super) fn done(&mut self) -> impl FnMut(TileMut<'_, f32>, (usize, usize)) {
        |mut sums, (row, column)| {
            let (rows, columns) = sums.size();
            for r in 0..rows {
                let at = (row + r) * self.columns + column;
                self.sums[at..at + columns].copy_from_slice(sums.row(r));
                self.times[at..at + columns].iter_mut().for_each(|n| *n += 1);
            }
        }
    }

    /// They are all of `want`, each once.
    pub(super) fn were(&self, want: &[f32]) {
        assert_eq!(self.sums, want);
        assert!(self.times.iter().all(|&n| n == 1), "{:?}", self.times);
    }
}

/// Every micro-kernel that the processor has, and the one for other architectures.
#[derive(Clone, Copy, Debug)]
enum By {
    Set(Instructions),
    Lanes,
}

fn kernels() -> impl Iterator<Item = By> {
    loops().map(By::Set).chain([By::Lanes])
}

fn with(by: By, dst: &mut TileMut<'_, f32>, keep: bool, a: Mat<'_>, b: Mat<'_>) {
    multiply(by, dst, keep, a, Right::Lies(b));
}

fn multiply(by: By, dst: &mut TileMut<'_, f32>, keep: bool, a: Mat<'_>, b: Right<'_>) {
    pack::with_room(|room| {
        let product = Product { dst, keep, a, b, end: End::default(), room };
        match by {
            By::Set(set) => run_on(set, product),
            // SAFETY: these are plain numbers.
            By::Lanes => unsafe { product.by::<micro::Lanes<f32, 4>, 6, 3, 2, 8>() },
        }
    });
}

/// Strides of a matrix that is larger than `size`: by rows, by columns, by neither.
fn layouts((rows, cols): (usize, usize)) -> [(usize, usize); 3] {
    [(cols + 3, 1), (1, rows + 5), (2 * cols + 1, 2)]
}

/// Σ_k of the products and of their sizes.
fn sum(a: Mat<'_>, b: Mat<'_>, i: usize, j: usize) -> (f64, f64) {
    let at = |m: Mat<'_>, r: usize, c: usize| f64::from(m.data[r * m.strides.0 + c * m.strides.1]);
    let terms = (0..a.size.1).map(|k| at(a, i, k) * at(b, k, j));
    terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
}

#[test]
fn as_the_sums() {
    let sizes = [
        (1, 1, 1),
        (1, 300, 31),
        (1, 40, 0),
        (6, 16, 256),
        (7, 33, 257),
        (8, 32, 4),
        (50, 15, 600),
        (13, 257, 9),
        (97, 65, 64),
        (5, 40, 0),
        (0, 4, 4),
        (4, 0, 4),
    ];
    for (m, n, k) in sizes {
        for (at, (a_strides, b_strides)) in
            layouts((m, k)).into_iter().flat_map(|a| layouts((k, n)).map(|b| (a, b))).enumerate()
        {
            let (a, b) =
                (normal::<f32>(1, 4 * (m + 9) * (k + 9), 1.0), normal::<f32>(2, 4 * (k + 9) * (n + 9), 1.0));
            let (a, b) = (Mat::new(&a, (m, k), a_strides), Mat::new(&b, (k, n), b_strides));
            let keep = at % 2 == 1;
            // A tile in a larger matrix, which stays as it is.
            let stride = n + 7;
            let mut old = normal::<f32>(3, (m + 4) * stride, 1.0);
            for (r, row) in old.chunks_mut(stride).enumerate() {
                let inside = (2..2 + m).contains(&r);
                row[3..3 + n].iter_mut().filter(|_| inside && !keep).for_each(|x| *x = f32::NAN);
            }
            for by in kernels() {
                let mut got = old.clone();
                let shared = Shared::new(&mut got);
                // SAFETY: it is the only tile.
                let mut dst = unsafe { shared.tile(2 * stride + 3, m, n, stride) };
                with(by, &mut dst, keep, a, b);
                for (i, got) in got.iter().enumerate() {
                    let (r, c) = (i / stride, i % stride);
                    if !(2..2 + m).contains(&r) || !(3..3 + n).contains(&c) {
                        assert_eq!(got.to_bits(), old[i].to_bits(), "{by:?}: {r}, {c} is outside");
                        continue;
                    }
                    let (sum, size) = sum(a, b, r - 2, c - 3);
                    let was = if keep { f64::from(old[i]) } else { 0.0 };
                    let want = sum + was;
                    let tol = (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * (size + was.abs());
                    let err = (f64::from(*got) - want).abs();
                    assert!(
                        err <= tol,
                        "{by:?} {m} × {n} × {k} [{}, {}]: {got}, expected {want}",
                        r - 2,
                        c - 3
                    );
                }
            }
        }
    }
}

#[test]
fn an_element_depends_on_its_row_and_column_alone() {
    let (m, n, k) = (29, 290, 530);
    let (a, b) = (normal::<f32>(1, m * k, 1.0), normal::<f32>(2, n * k, 1.0));
    let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
    for by in kernels() {
        let mut whole = normal::<f32>(3, m * n, 1.0);
        let old = whole.clone();
        with(by, &mut TileMut::new(&mut whole, m, n), true, a, b);
        for (rows, cols) in [(0..2, 0..n), (3..17, 250..290), (11..29, 5..6)] {
            let mut part: Vec<f32> = rows.clone().flat_map(|r| old[r * n..][cols.clone()].to_vec()).collect();
            let mut dst = TileMut::new(&mut part, rows.len(), cols.len());
            with(by, &mut dst, true, a.rows(rows.clone()), b.t().rows(cols.clone()).t());
            for (r, part) in rows.zip(part.chunks(cols.len())) {
                assert_eq!(part, &whole[r * n..][cols.clone()], "{by:?}: row {r}");
            }
        }
    }
}

#[test]
fn packed_columns_give_the_same_bits() {
    for (m, n, k) in
        [(1, 1, 1), (1, 1, 530), (1, 290, 530), (3, 31, 5), (15, 290, 530), (29, 512, 256), (2, 33, 0)]
    {
        let (a, b) = (normal::<f32>(1, m * k, 1.0), normal::<f32>(2, n * k, 1.0));
        let a = Mat::new(&a, (m, k), (k, 1));
        for (by, b) in kernels()
            .flat_map(|by| [Mat::new(&b, (k, n), (n, 1)), Mat::new(&b, (n, k), (k, 1)).t()].map(|b| (by, b)))
        {
            let width = match by {
                By::Set(set) => run_on(set, pack::Width),
                By::Lanes => 8,
            };
            let mut packed = vec![f32::NAN; k * n.next_multiple_of(width)];
            match by {
                By::Set(set) => run_on(set, pack::Pack { out: &mut packed, stride: k * width, b }),
                By::Lanes => pack::panels::<8>(&mut packed, k * width, b),
            }
            let panels = Panels::new(&packed, k * width);
            let old = normal::<f32>(3, m * n, 1.0);
            for keep in [false, true] {
                let (mut got, mut want) = (old.clone(), old.clone());
                multiply(by, &mut TileMut::new(&mut got, m, n), keep, a, Right::Packed(panels));
                multiply(by, &mut TileMut::new(&mut want, m, n), keep, a, Right::Lies(b));
                assert_eq!(got, want, "{by:?} {m} × {n} × {k}");
            }
            // From a panel's column and a block's row on.
            if (m, n, k) == (15, 290, 530) {
                let (mut got, mut want) = (old.clone(), old.clone());
                let (columns, rows) = (n - 256, k - 256);
                let part = Right::Packed(panels.from(256 / width, 256 * width));
                let a = a.block(0..m, 256..k);
                multiply(by, &mut TileMut::new(&mut got, m, columns), true, a, part);
                let part = Right::Lies(b.block(256..k, 256..n));
                multiply(by, &mut TileMut::new(&mut want, m, columns), true, a, part);
                assert_eq!(got, want, "{by:?}: {rows} rows");
            }
        }
    }
}

#[test]
fn sums_over_nothing_are_done_too() {
    for keep in [false, true] {
        let (mut sums, mut taken) = (vec![3f32; 6], Taken::new(2, 3));
        let (a, b) = (Mat::new(&[], (2, 0), (1, 1)), Mat::new(&[], (0, 3), (1, 1)));
        let mut done = taken.done();
        let end = End { more: None, done: Some(&mut done) };
        product(&mut TileMut::new(&mut sums, 2, 3), keep, a, Right::Lies(b), end);
        drop(done);
        taken.were(&[if keep { 3.0 } else { 0.0 }; 6]);
    }
}

#[test]
fn more_is_what_another_product_would_add() {
    for (m, n, k, r) in [(2, 1, 1, 1), (15, 290, 530, 8), (29, 33, 256, 64), (3, 600, 300, 5)] {
        let numbers = |seed, len| normal::<f32>(seed, len, 1.0);
        let (a, b) = (numbers(1, m * k), numbers(2, n * k));
        let (thin_a, thin_b) = (numbers(4, m * (r + 2)), numbers(5, r * (n + 1)));
        let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
        let more =
            More { a: Mat::new(&thin_a, (m, r), (r + 2, 1)), b: Mat::new(&thin_b, (r, n), (n + 1, 1)) };
        let old = numbers(3, m * n);
        for (by, keep) in kernels().flat_map(|by| [(by, false), (by, true)]) {
            let (mut got, mut want) = (old.clone(), old.clone());
            let mut dst = TileMut::new(&mut got, m, n);
            let b = Right::Lies(b);
            let mut taken = Taken::new(m, n);
            pack::with_room(|room| {
                let mut done = taken.done();
                let end = End { more: Some(more), done: Some(&mut done) };
                let product = Product { dst: &mut dst, keep, a, b, end, room };
                match by {
                    By::Set(set) => run_on(set, product),
                    // SAFETY: these are plain numbers.
                    By::Lanes => unsafe { product.by::<micro::Lanes<f32, 4>, 6, 3, 2, 8>() },
                }
            });
            multiply(by, &mut TileMut::new(&mut want, m, n), keep, a, b);
            multiply(by, &mut TileMut::new(&mut want, m, n), true, more.a, Right::Lies(more.b));
            assert_eq!(got, want, "{by:?} {m} × {n} × {k}, {r}");
            taken.were(&want);
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row_and_column() {
    let (m, n, k) = (9, 37, 11);
    let (mut a, mut b) = (vec![1f32; m * k], vec![1f32; k * n]);
    (a[7 * k + 4], b[3 * n + 35]) = (f32::NAN, f32::INFINITY);
    let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (k, n), (n, 1)));
    for by in kernels() {
        let mut c = vec![f32::NAN; m * n];
        with(by, &mut TileMut::new(&mut c, m, n), false, a, b);
        for (i, x) in c.iter().enumerate() {
            let right = match (i / n, i % n) {
                (7, _) => x.is_nan(),
                (_, 35) => *x == f32::INFINITY,
                _ => *x == k as f32,
            };
            assert!(right, "{by:?} [{}, {}] = {x}", i / n, i % n);
        }
    }
}

/// `cargo test --release --lib beside_two_crates -- --ignored --nocapture` prints docs/performance.md's table.
#[test]
#[ignore = "a measurement, not a check"]
fn beside_two_crates() {
    // T, O, I; forward is x Wᵀ over I, backward dy W over O.
    let shapes = [
        (1024, 1024, 1024),
        (1024, 2816, 1024),
        (1024, 1024, 2816),
        (1024, 1127, 1024),
        (256, 32_000, 1024),
        (512, 4096, 4096),
        (1500, 192, 192),
        (1500, 512, 192),
        (1500, 192, 512),
        (4096, 64, 64),
        (4096, 172, 64),
        (4096, 64, 172),
        (4096, 32, 64),
        (1, 1024, 1024),
        (16, 1024, 1024),
    ];
    let numbers = |n: usize| (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.0 - 1.0).collect::<Vec<_>>();
    println!("| T | O | I | forward ours | gemm | matrixmultiply | backward ours | gemm | matrixmultiply |");
    for (t, o, i) in shapes {
        let (x, w, dy) = (numbers(t * i), numbers(o * i), numbers(t * o));
        let (mut y, mut dx) = (vec![0f32; t * o], vec![0f32; t * i]);
        let w_t = Mat::new(&w, (o, i), (i, 1)).t();
        let forward = (Mat::new(&x, (t, i), (i, 1)), w_t);
        let backward = (Mat::new(&dy, (t, o), (o, 1)), w_t.t());
        let mut line = format!("| {t} | {o} | {i} |");
        for (out, (a, b)) in [(&mut y, forward), (&mut dx, backward)] {
            let (m, k, n) = (a.size.0, a.size.1, b.size.1);
            let [ars, acs, brs, bcs] =
                [a.strides.0, a.strides.1, b.strides.0, b.strides.1].map(|s| s as isize);
            let (a_start, b_start, start) = (a.data.as_ptr(), b.data.as_ptr(), out.as_mut_ptr());
            // In turns, so that what else the machine does slows all of them.
            let times = best([
                &mut || product(&mut TileMut::new(out, m, n), false, a, Right::Lies(b), End::default()),
                // SAFETY: sizes and strides are those of the three slices.
                &mut || unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        start,
                        1,
                        n as isize,
                        false,
                        a_start,
                        acs,
                        ars,
                        b_start,
                        bcs,
                        brs,
                        0.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                },
                // SAFETY: sizes and strides are those of the three slices.
                &mut || unsafe {
                    matrixmultiply::sgemm(
                        m, k, n, 1.0, a_start, ars, acs, b_start, brs, bcs, 0.0, start, n as isize, 1,
                    );
                },
            ]);
            black_box(&out);
            for time in times {
                line += &format!(" {:.0} |", (2 * t * o * i) as f64 / time.as_secs_f64() / 1e9);
            }
        }
        println!("{line}");
    }
}

/// The shortest time of each.
fn best(mut all: [&mut dyn FnMut(); 3]) -> [Duration; 3] {
    let mut best = [Duration::MAX; 3];
    let begin = Instant::now();
    for round in 0.. {
        if round >= 12 && begin.elapsed() > Duration::from_millis(300) {
            break;
        }
        for (f, best) in all.iter_mut().zip(&mut best) {
            let start = Instant::now();
            f();
            *best = start.elapsed().min(*best);
        }
    }
    best
}
