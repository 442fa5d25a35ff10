//! `tsv`: TSV-Merge (Gargiulo et al., *Task Singular Vectors*, CVPR 2025) from factors.
//!
//! `wₑDₑ = Uₑ Sₑ Vₑᵀ` with all directions that an update has; `U = [U₁ … U_E]` and `V = [V₁ … V_E]` give way to the
//! nearest matrices with orthonormal columns, `ΔW = λ U_⊥ blockdiag(Sₑ) V_⊥ᵀ`, `U_⊥ = U (UᵀU)^-½`. Where U has more columns
//! than rows that is `(UUᵀ)^-½ U` with the smaller root.

use faer::{Mat, MatRef};

use crate::algebra::{Spread, by_block, gram, inverse_root, symmetric_product};
use crate::error::Result;
use crate::fuse::core::{Core, weighed};
use crate::fuse::factors::{Batch, Factors, Frame, Rows};
use crate::fuse::grams::Grams;
use crate::fuse::linear::{Linear, Pair};

/// What makes the factors `B[O, K]`, `A[K, I]`, K the directions of all updates, at most P.
pub fn pair(frame: &Frame, grams: &Grams, lambda: f64) -> Result<Pair> {
    let own = |x: &Mat<f64>, e: usize| {
        let at = frame.block(e);
        x.submatrix(at.start, at.start, at.len(), at.len()).to_owned()
    };
    let updates = Updates::new(frame, lambda, |e| (own(&grams.b, e), own(&grams.a, e)))?;
    let side = |gram: &Mat<f64>, right| Ok(Linear::Map(updates.map(updates.half(gram, right), right)?));
    Ok(Pair { bt: side(&grams.b, false)?, a: side(&grams.a, true)? })
}

/// The factors that [`pair`] makes, where no Grams are known: no root is larger than the smaller side of a stacked factor.
pub fn fuse(batch: &Batch, lambda: f64) -> Result<Factors> {
    let updates = Updates::new(&batch.frame, lambda, |e| (gram(batch.bt(e)), gram(batch.a(e))))?;
    let (bt, a) = (batch.stack.rows_bt(), batch.stack.rows_a());
    Factors::new(updates.factor(bt, false)?, updates.factor(a, true)?)
}

/// `wₑDₑ = Uₑ Sₑ Vₑᵀ` of all updates.
struct Updates {
    cores: Vec<Core>,
    /// `λ Sₑ`, one after the other.
    d: Vec<f64>,
    spread: Spread,
}

impl Updates {
    /// Of those in `frame`, whose Grams are `grams(e)`.
    fn new(frame: &Frame, lambda: f64, grams: impl Fn(usize) -> (Mat<f64>, Mat<f64>)) -> Result<Updates> {
        let one = |e: usize| {
            let (b, a) = grams(e);
            Core::of(b.as_ref(), a.as_ref(), &vec![frame.weights[e]; b.nrows()])
        };
        let cores: Vec<Core> = (0..frame.edges()).map(one).collect::<Result<_>>()?;
        let d = cores.iter().flat_map(|c| &c.sigma).map(|s| lambda * s).collect();
        Ok(Updates { cores, d, spread: frame.spread() })
    }

    /// What makes Uₑ or Vₑ of each update's factor, `[Rₑ, Kₑ]`.
    fn vectors(&self, right: bool) -> impl Iterator<Item = MatRef<'_, f64>> + Clone {
        let own: fn(&Core) -> MatRef<'_, f64> =
            if right { |core| core.right.as_ref() } else { |core| core.left.as_ref() };
        self.cores.iter().map(own)
    }

    /// `g V`, `[P, K]`, of the Gram g of the stacked factor, with V the block diagonal of all vectors.
    fn half(&self, gram: &Mat<f64>, right: bool) -> Mat<f64> {
        by_block(gram.as_ref(), self.vectors(right))
    }

    /// `√d (VᵀgV)^-½ Vᵀ`, `[K, P]`, from [`Updates::half`], which is dropped before the root takes its room.
    fn map(&self, half: Mat<f64>, right: bool) -> Result<Mat<f64>> {
        let gram = by_block(half.transpose(), self.vectors(right));
        drop(half);
        let root = inverse_root(gram.as_ref(), self.spread)?;
        drop(gram);
        let map = by_block(root.as_ref(), self.vectors(right).map(|w| w.transpose()));
        Ok(weighed(map, &self.d, !right))
    }

    /// [`Updates::map`] of the stacked factor `x[P, n]`, `[K, n]`.
    fn factor(&self, x: &Rows, right: bool) -> Result<Rows> {
        if x.rank() <= x.columns() {
            let half = self.half(&symmetric_product(x.get(), x.get().transpose(), self.spread), right);
            return Ok(Linear::Map(self.map(half, right)?).factor(x, self.spread));
        }
        let u = by_block(x.get().transpose(), self.vectors(right));
        let root =
            inverse_root(symmetric_product(u.as_ref(), u.transpose(), self.spread).as_ref(), self.spread)?;
        Ok(weighed(self.spread.product(u.transpose(), root.as_ref()), &self.d, !right).into())
    }
}
