//! Cases of [`crate::ops::eigh`].

use super::device::{flat, holding, same_on};
use super::normal64;
use crate::backend::Backend;
use crate::ops::eigh::{Eigh, reference};

/// A symmetric matrix: a Gram of `rank` columns whose strengths fall off, negated and shifted where asked.
fn matrix(seed: u64, n: usize, rank: usize, indefinite: bool) -> Vec<f64> {
    let x = normal64(seed, n * rank, 1.0);
    let strength = |k: usize| 0.8_f64.powi(k as i32);
    let mut a = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            a[i * n + j] = (0..rank).map(|k| x[i * rank + k] * x[j * rank + k] * strength(k)).sum();
            let sign = if indefinite && (i + j) % 2 == 1 { -1.0 } else { 1.0 };
            a[i * n + j] *= sign;
        }
        a[i * n + i] -= if indefinite { 3.0 } else { 0.0 };
    }
    a
}

/// Matrices of all sizes, whole and rank-deficient, beside zero, the identity and one that holds NaN, in one launch.
pub fn conforms<B: Backend>(backends: &[B]) {
    let mut sizes = Vec::new();
    let mut a = Vec::new();
    for (seed, n) in [1usize, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70].into_iter().enumerate() {
        for (rank, indefinite) in [(n, false), (n.div_ceil(2), false), (n, true)] {
            sizes.push(n);
            a.extend(matrix(seed as u64, n, rank, indefinite));
        }
    }
    for diagonal in [0.0, 1.0] {
        sizes.push(9);
        a.extend((0..81).map(|i| if i % 10 == 0 { diagonal } else { 0.0 }));
    }
    let good = sizes.len();
    for n in [5, 66] {
        sizes.push(n);
        a.extend((0..n * n).map(|i| if i == n { f64::NAN } else { 1.0 }));
    }
    let (rows, squares) = (sizes.iter().sum(), a.len());
    let mut want = (vec![0.0; rows], vec![0.0; squares]);
    let op = Eigh { values: &mut want.0[..], vectors: &mut want.1[..], a: &a[..], sizes: &sizes };
    reference(op).expect("reference");
    let (values, vectors) = same_on(backends, |b| {
        let a = flat(b, &a);
        let (mut values, mut vectors) =
            (holding(b, &vec![0.5; rows], -77.0), holding(b, &vec![0.5; squares], -77.0));
        b.eigh(Eigh { values: values.view_mut(), vectors: vectors.view_mut(), a: a.view(), sizes: &sizes })
            .expect("eigh");
        // As bits, so that NaN equals itself.
        let bits = |x: Vec<f64>| x.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        (bits(values.done(b)), bits(vectors.done(b)))
    });
    let (mut row, mut square) = (0, 0);
    for (m, &n) in sizes.iter().enumerate() {
        let own: Vec<f64> = values[row..row + n].iter().map(|&x| f64::from_bits(x)).collect();
        let v: Vec<f64> = vectors[square..square + n * n].iter().map(|&x| f64::from_bits(x)).collect();
        let (a, want) = (&a[square..square + n * n], &want.0[row..row + n]);
        (row, square) = (row + n, square + n * n);
        if m >= good {
            assert!(own.iter().chain(&v).all(|x| x.is_nan()), "NaN in matrix {m}");
            continue;
        }
        let size = want.iter().fold(0.0_f64, |s, x| s.max(x.abs()));
        assert!(own.windows(2).all(|w| w[0] >= w[1]), "matrix {m} of {n}: {own:?}");
        for (k, (got, want)) in own.iter().zip(want).enumerate() {
            let err = (got - want).abs();
            assert!(err <= 1e-13 * size, "value {k} of matrix {m} of {n}: {got} {want}");
            for i in 0..n {
                let of: f64 = (0..n).map(|j| a[i * n + j] * v[j * n + k]).sum();
                let err = (of - got * v[i * n + k]).abs();
                assert!(err <= 1e-13 * size, "vector {k} of matrix {m} of {n}: off by {err:e}");
            }
            for other in 0..n {
                let product: f64 = (0..n).map(|j| v[j * n + k] * v[j * n + other]).sum();
                let err = (product - f64::from(u8::from(k == other))).abs();
                assert!(err <= 1e-13, "vectors {k} and {other} of matrix {m} of {n}: {product}");
            }
        }
    }
}
