use super::super::Shared;
use super::super::amx;
use super::super::tests::Taken;
use super::*;
use crate::ops::cases::normal;

/// The instructions that the processor has, and tiles, one instruction at a time where it has none.
fn all() -> Vec<Pairs> {
    let mut all: Vec<Pairs> = Instructions::here().filter_map(Pairs::of).collect();
    #[cfg(target_os = "linux")]
    if !amx::built_in() && all.iter().all(|pairs| pairs.0 != By::Tiles) {
        amx::trap::install();
        all.push(Pairs(By::Tiles));
    }
    all
}

fn at(m: Mat<'_, bf16>, r: usize, c: usize) -> f64 {
    m.data[r * m.strides.0 + c * m.strides.1].to_f64()
}

#[test]
fn as_the_sums() {
    let sizes = [
        (2, 1, 1),
        (3, 31, 5),
        (5, 17, 0),
        (32, 32, 64),
        (33, 65, 33),
        (64, 32, 1024),
        (40, 257, 530),
        (37, 9, 1127),
        (0, 4, 4),
        (4, 0, 4),
    ];
    for (m, n, k) in sizes {
        // Rows that are longer than what they hold, and columns.
        let layouts = |rows: usize, columns: usize| [(columns + 3, 1), (1, rows + 5)];
        let both = layouts(m, k).into_iter().flat_map(|a| layouts(k, n).map(|b| (a, b)));
        for (i, (a_strides, b_strides)) in both.enumerate() {
            let keep = i % 2 == 1;
            let numbers =
                |seed, rows: usize, columns: usize| normal::<bf16>(seed, (rows + 5) * (columns + 5), 1.0);
            let (a, b) = (numbers(1, m, k), numbers(2, k, n));
            let (a, b) = (Mat::new(&a, (m, k), a_strides), Mat::new(&b, (k, n), b_strides));
            let stride = n + 7;
            let old = normal::<f32>(3, (m + 4) * stride, 1.0);
            for pairs in all() {
                let mut got = old.clone();
                for (r, row) in got.chunks_mut(stride).enumerate() {
                    let inside = (2..2 + m).contains(&r) && !keep;
                    row[3..3 + n].iter_mut().filter(|_| inside).for_each(|x| *x = f32::NAN);
                }
                let shared = Shared::new(&mut got);
                // SAFETY: it is the only tile.
                let mut dst = unsafe { shared.tile(2 * stride + 3, m, n, stride) };
                pairs.product(&mut dst, keep, a, Right::Lies(b), End::default());
                for (i, got) in got.iter().enumerate() {
                    let (r, c) = (i / stride, i % stride);
                    if !(2..2 + m).contains(&r) || !(3..3 + n).contains(&c) {
                        assert_eq!(got.to_bits(), old[i].to_bits(), "{pairs:?}: {r}, {c} is outside");
                        continue;
                    }
                    let terms = (0..k).map(|k| at(a, r - 2, k) * at(b, k, c - 3));
                    let was = if keep { f64::from(old[i]) } else { 0.0 };
                    let (sum, size) = terms.fold((was, was.abs()), |(s, z), x| (s + x, z + x.abs()));
                    let tol = (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * size;
                    let err = (f64::from(*got) - sum).abs();
                    assert!(
                        err <= tol,
                        "{pairs:?} {m} × {n} × {k} [{}, {}]: {got}, expected {sum}",
                        r - 2,
                        c - 3
                    );
                }
            }
        }
    }
}

#[test]
fn a_left_factor_in_f32_is_rounded() {
    let (m, n, k) = (35, 40, 70);
    let (a, b) = (normal::<f32>(1, m * k, 1.0), normal::<bf16>(2, k * n, 1.0));
    let rounded: Vec<bf16> = a.iter().map(|x| bf16::from_f32(*x)).collect();
    let b = Mat::new(&b, (k, n), (n, 1));
    for pairs in all() {
        let (mut got, mut want) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
        let left = Mat::new(&a, (m, k), (k, 1));
        pairs.product(&mut TileMut::new(&mut got, m, n), false, left, Right::Lies(b), End::default());
        let a = Mat::new(&rounded, (m, k), (k, 1));
        pairs.product(&mut TileMut::new(&mut want, m, n), false, a, Right::Lies(b), End::default());
        assert_eq!(got, want, "{pairs:?}");
    }
}

#[test]
fn an_element_depends_on_its_row_and_column_alone() {
    let (m, n, k) = (70, 290, 530);
    let (a, b) = (normal::<bf16>(1, m * k, 1.0), normal::<bf16>(2, n * k, 1.0));
    let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
    for pairs in all() {
        let mut whole = normal::<f32>(3, m * n, 1.0);
        let old = whole.clone();
        pairs.product(&mut TileMut::new(&mut whole, m, n), true, a, Right::Lies(b), End::default());
        for (rows, cols) in [(0..2, 0..n), (3..17, 250..290), (31..70, 5..6)] {
            let mut part: Vec<f32> = rows.clone().flat_map(|r| old[r * n..][cols.clone()].to_vec()).collect();
            let mut dst = TileMut::new(&mut part, rows.len(), cols.len());
            let right = Right::Lies(b.t().rows(cols.clone()).t());
            pairs.product(&mut dst, true, a.rows(rows.clone()), right, End::default());
            for (r, part) in rows.zip(part.chunks(cols.len())) {
                assert_eq!(part, &whole[r * n..][cols.clone()], "{pairs:?}: row {r}");
            }
        }
    }
}

#[test]
fn packed_columns_give_the_same_bits() {
    for (m, n, k) in [(1, 1, 1), (35, 31, 5), (70, 290, 1127), (3, 512, 512), (2, 33, 0), (0, 33, 1127)] {
        let (a, b) = (normal::<bf16>(1, m * k, 1.0), normal::<bf16>(2, n * k, 1.0));
        let a = Mat::new(&a, (m, k), (k, 1));
        for b in [Mat::new(&b, (k, n), (n, 1)), Mat::new(&b, (n, k), (k, 1)).t()] {
            let (stride, count) = panels(k, n);
            let mut packed = vec![[bf16::NAN; 2]; stride * count];
            for at in (0..k).step_by(DEPTH) {
                let rows = at..(at + DEPTH).min(k);
                pack(&mut packed[at / 2 * PANEL..], stride, b.block(rows, 0..n));
            }
            let packed = Panels::new(&packed, stride);
            let old = normal::<f32>(3, m * n, 1.0);
            for (pairs, keep) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
                let (mut got, mut want) = (old.clone(), old.clone());
                pairs.product(
                    &mut TileMut::new(&mut got, m, n),
                    keep,
                    a,
                    Right::Packed(packed),
                    End::default(),
                );
                pairs.product(&mut TileMut::new(&mut want, m, n), keep, a, Right::Lies(b), End::default());
                assert_eq!(got, want, "{pairs:?} {m} × {n} × {k}");
            }
        }
    }
}

#[test]
fn sums_over_nothing_are_done_too() {
    for (pairs, keep) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let (mut sums, mut taken) = (vec![3f32; 6], Taken::new(2, 3));
        let (a, b) = (Mat::<bf16>::new(&[], (2, 0), (1, 1)), Mat::new(&[], (0, 3), (1, 1)));
        let mut done = taken.done();
        let end = End { more: None, done: Some(&mut done) };
        pairs.product(&mut TileMut::new(&mut sums, 2, 3), keep, a, Right::Lies(b), end);
        drop(done);
        taken.were(&[if keep { 3.0 } else { 0.0 }; 6]);
    }
}

#[test]
fn more_is_what_another_product_would_add() {
    for (m, n, k, r) in [(2, 1, 1, 1), (35, 290, 530, 8), (70, 33, 512, 64), (3, 600, 300, 5)] {
        let (a, b) = (normal::<bf16>(1, m * k, 1.0), normal::<bf16>(2, n * k, 1.0));
        let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (n, k), (k, 1)).t());
        let (thin_a, thin_b) = (normal::<f32>(4, m * r, 1.0), normal::<f32>(5, r * n, 1.0));
        let more = More { a: Mat::new(&thin_a, (m, r), (r, 1)), b: Mat::new(&thin_b, (r, n), (n, 1)) };
        let rounded: Vec<bf16> = thin_b.iter().map(|x| bf16::from_f32(*x)).collect();
        let alone = Right::Lies(Mat::new(&rounded, (r, n), (n, 1)));
        let old = normal::<f32>(3, m * n, 1.0);
        for (pairs, keep) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
            let (mut got, mut want) = (old.clone(), old.clone());
            let mut taken = Taken::new(m, n);
            let mut done = taken.done();
            let end = End { more: Some(more), done: Some(&mut done) };
            pairs.product(&mut TileMut::new(&mut got, m, n), keep, a, Right::Lies(b), end);
            drop(done);
            pairs.product(&mut TileMut::new(&mut want, m, n), keep, a, Right::Lies(b), End::default());
            pairs.product(&mut TileMut::new(&mut want, m, n), true, more.a, alone, End::default());
            let mut added = old.clone();
            pairs.product(&mut TileMut::new(&mut added, m, n), keep, a, Right::Lies(b), End::default());
            pairs.add(&mut TileMut::new(&mut added, m, n), more);
            assert_eq!(added, want, "{pairs:?} {m} × {n} × {k}, {r}");
            assert_eq!(got, want, "{pairs:?} {m} × {n} × {k}, {r}");
            taken.were(&want);
        }
    }
}

#[test]
fn blocks_as_the_sums() {
    for (rows, columns, depth) in [(1, 32, 16), (32, 64, 32), (33, 32, 0), (64, 64, 48), (0, 32, 16)] {
        let whole = usize::next_multiple_of(rows, SIDE);
        // The stride is larger than what it holds.
        let stride = depth + 3;
        let (a, b) =
            (normal::<bf16>(1, 2 * whole * stride, 1.0), normal::<bf16>(2, 2 * depth * columns, 1.0));
        let single = |x: &[bf16]| bytemuck::pod_collect_to_vec::<_, f32>(x);
        let (of_a, of_b) = (single(&a), single(&b));
        let old = normal::<f32>(3, whole * columns, 1.0);
        for (pairs, add) in all().into_iter().flat_map(|p| [(p, false), (p, true)]) {
            let mut c = if add { old.clone() } else { vec![f32::NAN; whole * columns] };
            pairs.block(&mut c, add, (&of_a, stride), &of_b, Size { rows, columns, depth });
            for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
                let of_b = |k: usize| b[(k / 2 * columns + j) * 2 + k % 2].to_f64();
                let terms = (0..2 * depth).map(|k| a[2 * i * stride + k].to_f64() * of_b(k));
                let want = terms.sum::<f64>() + if add { f64::from(old[i * columns + j]) } else { 0.0 };
                let (got, tol) = (c[i * columns + j], 3e-7 * depth as f64 + 2e-7 * want.abs() + 5e-7);
                let err = (f64::from(got) - want).abs();
                assert!(
                    err <= tol,
                    "{pairs:?} {rows} × {columns} × {depth} [{i}, {j}] = {got}, expected {want}"
                );
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row_and_column() {
    let (m, n, k) = (9, 37, 11);
    let (mut a, mut b) = (vec![bf16::ONE; m * k], vec![bf16::ONE; k * n]);
    (a[7 * k + 4], b[3 * n + 35]) = (bf16::NAN, bf16::INFINITY);
    let (a, b) = (Mat::new(&a, (m, k), (k, 1)), Mat::new(&b, (k, n), (n, 1)));
    for pairs in all() {
        let mut c = vec![f32::NAN; m * n];
        pairs.product(&mut TileMut::new(&mut c, m, n), false, a, Right::Lies(b), End::default());
        for (i, x) in c.iter().enumerate() {
            let right = match (i / n, i % n) {
                (7, _) => x.is_nan(),
                (_, 35) => *x == f32::INFINITY,
                _ => *x == k as f32,
            };
            assert!(right, "{pairs:?} [{}, {}] = {x}", i / n, i % n);
        }
    }
}
