//! `tsv`: TSV-Merge (Gargiulo et al., *Task Singular Vectors*, CVPR 2025) from factors.
//!
//! `wₑDₑ = Uₑ Sₑ Vₑᵀ` with all directions that an update has; `U = [U₁ … U_E]` and `V = [V₁ … V_E]` give way to the
//! nearest matrices with orthonormal columns, `ΔW = λ U_⊥ blockdiag(Sₑ) V_⊥ᵀ`, `U_⊥ = U (UᵀU)^-½`.

use faer::Mat;

use crate::algebra::{congruence, inverse_root, product};
use crate::error::Result;
use crate::fuse::core::{Core, balanced};
use crate::fuse::factors::Frame;
use crate::fuse::grams::Grams;
use crate::fuse::linear::Pair;

/// What makes the factors `B[O, K]`, `A[K, I]`, K the directions of all updates, at most P.
pub fn pair(frame: &Frame, grams: &Grams, lambda: f64) -> Result<Pair> {
    let own = |x: &Mat<f64>, e: usize| {
        let at = grams.block(e);
        x.submatrix(at.start, at.start, at.len(), at.len()).to_owned()
    };
    let weights = &frame.weights;
    let cores = (0..grams.edges())
        .map(|e| {
            let c = vec![weights[e]; grams.block(e).len()];
            Core::of(own(&grams.b, e).as_ref(), own(&grams.a, e).as_ref(), &c)
        })
        .collect::<Result<Vec<_>>>()?;
    let polar = |gram: &Mat<f64>, side: fn(&Core) -> &Mat<f64>| -> Result<Mat<f64>> {
        let vectors = diagonal(grams, cores.iter().map(side));
        let root = inverse_root(congruence(gram.as_ref(), vectors.as_ref()).as_ref())?;
        Ok(product(vectors.as_ref(), root.as_ref()))
    };
    let (left, right) = (polar(&grams.b, |c| &c.left)?, polar(&grams.a, |c| &c.right)?);
    let d: Vec<f64> = cores.iter().flat_map(|c| &c.sigma).map(|s| lambda * s).collect();
    Ok(balanced(left.as_ref(), &d, right.as_ref()))
}

/// `blockdiag(xₑ)`, `[P, K]`, from each adapter's `[Rₑ, Kₑ]`.
fn diagonal<'a>(grams: &Grams, x: impl Iterator<Item = &'a Mat<f64>> + Clone) -> Mat<f64> {
    let mut out = Mat::zeros(grams.rank(), x.clone().map(|x| x.ncols()).sum());
    let mut column = 0;
    for (e, x) in x.enumerate() {
        let at = grams.block(e);
        out.submatrix_mut(at.start, column, at.len(), x.ncols()).copy_from(x);
        column += x.ncols();
    }
    out
}
