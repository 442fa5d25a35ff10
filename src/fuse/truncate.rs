//! The best approximation of `B A` at a smaller rank, from the factors.

use faer::Mat;

use crate::algebra::{Spread, eigen, product, scale_columns, symmetric_product};
use crate::error::{Error, Result};
use crate::fuse::factors::Factors;
use crate::ops::gate::RANK_CUT;

/// `B A ≈ B' A'` with `B'[O, q]`, `A'[q, I]`, and the share of the energy that is kept.
///
/// `B = Q_B R_B`, `Aᵀ = Q_A R_A`, `R_B R_Aᵀ = E S Fᵀ`; `B' = Q_B E_q S_q^½`, `A' = S_q^½ F_qᵀ Q_Aᵀ`. The largest entry
/// of each column of B' is positive. A product whose rank is at most q is returned as it is.
pub fn truncate(factors: Factors, q: usize) -> Result<(Factors, f64)> {
    if q >= factors.rank() {
        return Ok((factors, 1.0));
    }
    if factors.is_large() && factors.rank() >= factors.size().0.min(factors.size().1) {
        return truncate_dense(&factors, q);
    }
    let fail = || Error::Numeric("the singular values of an update could not be computed".into());
    let (qb, qa) = (factors.b().qr(), factors.a().transpose().qr());
    let core = product(qb.thin_R(), qa.thin_R().transpose());
    if !core.is_all_finite() {
        return Err(fail());
    }
    let svd = core.thin_svd().map_err(|_| fail())?;
    let s: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let energy: f64 = s.iter().map(|s| s * s).sum();
    let kept: f64 = s.iter().take(q).map(|s| s * s).sum();
    let k = q.min(s.len());
    let scaled = |x: faer::MatRef<'_, f64>| Mat::from_fn(x.nrows(), k, |i, j| x[(i, j)] * s[j].sqrt());
    let b = product(qb.compute_thin_Q().as_ref(), scaled(svd.U()).as_ref());
    let at = product(qa.compute_thin_Q().as_ref(), scaled(svd.V()).as_ref());
    Ok((signed(b, at)?, if energy > 0.0 { kept / energy } else { 1.0 }))
}

/// [`truncate`] of a product of more ranks than rows or columns, by way of the dense `[O, I]` product D and the smaller of
/// its Grams: what is left of D is exact, what is below 1e-8 of the largest singular value is not found.
fn truncate_dense(factors: &Factors, q: usize) -> Result<(Factors, f64)> {
    let (o, i) = factors.size();
    let d = Spread::Pool.product(factors.b(), factors.a());
    let wide = o <= i;
    let side = if wide { d.as_ref() } else { d.transpose() };
    let (squares, vectors) = eigen(symmetric_product(side, side.transpose(), Spread::Pool).as_ref())?;
    let found = squares.iter().take_while(|&&s| s > RANK_CUT * squares[0] && s > 0.0).count();
    let energy: f64 = squares.iter().map(|s| s.max(0.0)).sum();
    let kept: f64 = squares.iter().take(q.min(found)).sum();
    // One direction is there even where D is zero.
    let k = q.min(found).max(1);
    let root: Vec<f64> = squares[..k].iter().map(|s| s.max(0.0).sqrt().sqrt()).collect();
    let back: Vec<f64> = root.iter().map(|r| if *r > 0.0 { 1.0 / r } else { 0.0 }).collect();
    let vectors = vectors.subcols(0, k);
    let (own, other) =
        (scale_columns(vectors, &root), scale_columns(product(side.transpose(), vectors).as_ref(), &back));
    let factors = if wide { signed(own, other)? } else { signed(other, own)? };
    Ok((factors, if energy > 0.0 { kept / energy } else { 1.0 }))
}

/// `B[O, K]` and `Aᵀ[I, K]` with signs such that the largest entry of each column of B is positive.
fn signed(mut b: Mat<f64>, mut at: Mat<f64>) -> Result<Factors> {
    for j in 0..b.ncols() {
        let largest = b.col_as_slice(j).iter().fold(0.0_f64, |m, x| if x.abs() > m.abs() { *x } else { m });
        if largest < 0.0 {
            b.col_as_slice_mut(j).iter_mut().for_each(|x| *x = -*x);
            at.col_as_slice_mut(j).iter_mut().for_each(|x| *x = -*x);
        }
    }
    Factors::new(b.transpose().to_owned(), at.transpose().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dense_way_gives_what_the_factors_give() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
        };
        for (rank, o, i) in [(9, 7, 5), (12, 5, 11), (6, 1, 4), (8, 8, 8)] {
            let strength = |k: usize| 0.6_f64.powi(k as i32);
            let bt = Mat::from_fn(rank, o, |k, _| strength(k) * next());
            let factors = Factors::new(bt, Mat::from_fn(rank, i, |_, _| next())).unwrap();
            for q in [1, 3, 5] {
                let (want, share) = truncate(factors.clone(), q).unwrap();
                let (got, found) = truncate_dense(&factors, q).unwrap();
                let [got, want] = [got, want].map(|f| f.b() * f.a());
                assert!((&got - &want).norm_l2() <= 1e-10 * want.norm_l2(), "{rank} {o} {i} {q}");
                assert!((share - found).abs() <= 1e-12);
            }
        }
        let (zero, share) = truncate_dense(&Factors::zeros(3, (2, 2)), 1).unwrap();
        assert!(zero.rank() == 1 && zero.is_finite() && share == 1.0);
    }
}
