//! The singular values of `B A`, and its best approximation at a smaller rank, from the factors.

use faer::Mat;

use crate::algebra::{Spread, alone, positive, product, scale_columns, symmetric_product};
use crate::error::{Error, Result};
use crate::fuse::factors::Factors;
use crate::ops::gate::RANK_CUT;

/// The largest singular values of a product and their vectors.
#[derive(Clone, Debug)]
pub struct Svd {
    /// `[O, q]`; the largest entry of each column is positive.
    u: Mat<f64>,
    /// `[q]`, descending.
    s: Vec<f64>,
    /// `[I, q]`.
    v: Mat<f64>,
    /// The share of `Σ σ²` that they hold.
    pub energy_kept: f64,
}

impl Svd {
    /// The q largest of `B A`.
    pub fn of(factors: &Factors, q: usize) -> Result<Svd> {
        let (o, i) = factors.size();
        if factors.is_large() && factors.rank() >= o.min(i) {
            return Svd::dense(factors, q);
        }
        Svd::thin(factors, q)
    }

    /// By way of the dense `[O, I]` product D and the smaller of its Grams, where the factors have more ranks than D has
    /// rows or columns: what is left of D is exact, what is below 1e-6 of the largest singular value counts as zero.
    fn dense(factors: &Factors, q: usize) -> Result<Svd> {
        let (o, i) = factors.size();
        let d = Spread::Pool.product(factors.b(), factors.a());
        let side = if o <= i { d.as_ref() } else { d.transpose() };
        let (squares, vectors) =
            Spread::Pool.eigen(symmetric_product(side, side.transpose(), Spread::Pool).as_ref())?;
        let k = q.min(squares.len());
        let s: Vec<f64> =
            squares.iter().take(k).map(|&s| if s > RANK_CUT * squares[0] { s.sqrt() } else { 0.0 }).collect();
        let energy: f64 = squares.iter().map(|s| s.max(0.0)).sum();
        let kept: f64 = s.iter().map(|s| s * s).sum();
        let back: Vec<f64> = s.iter().map(|s| if *s > 0.0 { 1.0 / s } else { 0.0 }).collect();
        let own = vectors.subcols(0, k).to_owned();
        let other = scale_columns(Spread::Pool.product(side.transpose(), own.as_ref()).as_ref(), &back);
        let (mut u, mut v) = if o <= i { (own, other) } else { (other, own) };
        positive(&mut u, &mut v);
        Ok(Svd { u, s, v, energy_kept: if energy > 0.0 { kept / energy } else { 1.0 } })
    }

    /// `B = Q_B R_B`, `Aᵀ = Q_A R_A`, `R_B R_Aᵀ = E S Fᵀ`, `U = Q_B E`, `V = Q_A F`.
    fn thin(factors: &Factors, q: usize) -> Result<Svd> {
        let fail = || Error::Numeric("the singular values of an update could not be computed".into());
        alone();
        let (qb, qa) = (factors.b().qr(), factors.a().transpose().qr());
        let core = product(qb.thin_R(), qa.thin_R().transpose());
        if !core.is_all_finite() {
            return Err(fail());
        }
        let svd = core.thin_svd().map_err(|_| fail())?;
        let all = svd.S().column_vector();
        let k = q.min(all.nrows());
        let energy: f64 = all.iter().map(|s| s * s).sum();
        let s: Vec<f64> = all.iter().take(k).copied().collect();
        let kept: f64 = s.iter().map(|s| s * s).sum();
        let mut u = product(qb.compute_thin_Q().as_ref(), svd.U().subcols(0, k));
        let mut v = product(qa.compute_thin_Q().as_ref(), svd.V().subcols(0, k));
        positive(&mut u, &mut v);
        Ok(Svd { u, s, v, energy_kept: if energy > 0.0 { kept / energy } else { 1.0 } })
    }

    /// `B = U diag(f(σ).0)`, `A = diag(f(σ).1) Vᵀ`.
    pub fn factors(&self, f: impl Fn(f64) -> (f64, f64)) -> Result<Factors> {
        let (u, v) = (&self.u, &self.v);
        Factors::new(
            Mat::from_fn(u.ncols(), u.nrows(), |k, o| u[(o, k)] * f(self.s[k]).0),
            Mat::from_fn(v.ncols(), v.nrows(), |k, i| v[(i, k)] * f(self.s[k]).1),
        )
    }
}

/// The singular values of `B A`, descending: as many as the smallest of R, O and I.
pub fn singular_values(factors: &Factors) -> Result<Vec<f64>> {
    Ok(Svd::of(factors, usize::MAX)?.s)
}

/// `B A ≈ B' A'` with `B'[O, q] = U_q S_q^½`, `A'[q, I] = S_q^½ V_qᵀ`, and the share of the energy that is kept.
///
/// A product whose rank is at most q is returned as it is.
pub fn truncate(factors: Factors, q: usize) -> Result<(Factors, f64)> {
    if q >= factors.rank() {
        return Ok((factors, 1.0));
    }
    let svd = Svd::of(&factors, q)?;
    Ok((svd.factors(|s| (s.sqrt(), s.sqrt()))?, svd.energy_kept))
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
                let (want, got) = (Svd::thin(&factors, q).unwrap(), Svd::dense(&factors, q).unwrap());
                assert_eq!(got.s.len(), want.s.len());
                assert!((got.energy_kept - want.energy_kept).abs() <= 1e-12);
                let [got, want] = [got, want].map(|svd| svd.factors(|s| (s.sqrt(), s.sqrt())).unwrap());
                let [got, want] = [got, want].map(|f| f.b() * f.a());
                assert!((&got - &want).norm_l2() <= 1e-10 * want.norm_l2(), "{rank} {o} {i} {q}");
            }
        }
        let zero = Svd::dense(&Factors::zeros(3, (2, 2)), 1).unwrap();
        assert!(zero.s == [0.0] && zero.energy_kept == 1.0);
        assert!(zero.factors(|s| (s, 1.0)).unwrap().is_finite());
    }
}
