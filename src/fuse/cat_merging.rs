//! `cat-merging`: CAT Merging (Sun et al., ICML 2025): what an update does to the inputs of another, beyond what it does
//! to its own, is projected out of it.
//!
//! With `τₑ = wₑDₑ` and `Cₑ = XₑᵀXₑ / Tₑ`: `Gᵢ = Σ_{j≠i} τⱼ (Cᵢ − Cⱼ) τⱼᵀ`, `Qᵢ` its eigenvectors of positive eigenvalues;
//! each `τⱼ` goes through `I − QᵢQᵢᵀ` for every `i ≠ j` in their order and gets its norm back, `ΔW = λ Σ τⱼ`. Only
//! `Aⱼ Cᵢ Aⱼᵀ` is needed, the eigenproblems are `[P, P]`, and every A stays as it is.

use faer::{Mat, Scale};

use crate::algebra::{Whitening, congruence, eigen, inner, product};
use crate::error::Result;
use crate::fuse::factors::{Batch, Factors};
use crate::fuse::grams::Grams;
use crate::fuse::input_gram::times;
use crate::ops::gate::{NULL_CUT, RANK_CUT};

/// `B = λ [τ-projected B₁ … B_E]`, `A = [A₁; …; A_E]`, rank P.
///
/// An update that is projected out altogether stays zero. Fails where the batch has no input Grams.
pub fn fuse(batch: &Batch, grams: &Grams, lambda: f64) -> Result<Factors> {
    let (frame, inputs) = (&batch.frame, batch.inputs()?.grams());
    let edges = frame.edges();
    let white = Whitening::of(grams.b.as_ref())?;
    let r = white.to.nrows();
    let block = |x: &Mat<f64>, e: usize| {
        let at = frame.block(e);
        x.submatrix(at.start, at.start, at.len(), at.len()).to_owned()
    };
    // What A_j sees of task i's inputs: A_j Cᵢ A_jᵀ.
    let seen: Vec<Vec<Mat<f64>>> = inputs
        .iter()
        .map(|gram| {
            let all = times(batch.stack.a(), gram, 1.0);
            let one = |j: usize| {
                let at = frame.block(j);
                product(all.subrows(at.start, at.len()), batch.a(j).transpose())
            };
            (0..edges).map(one).collect()
        })
        .collect();
    // In the basis Q of all B's, B = Q to: a projection of the outputs is one of Q's coordinates.
    let mut coords = white.to.clone();
    for i in 0..edges {
        let (mut g, mut size) = (Mat::<f64>::zeros(r, r), 0.0);
        for j in (0..edges).filter(|&j| j != i) {
            let at = frame.block(j);
            let to = white.to.subcols(at.start, at.len()).transpose();
            let part = |x: &Mat<f64>| Scale(frame.weights[j].powi(2)) * congruence(x.as_ref(), to);
            let (theirs, own) = (part(&seen[i][j]), part(&seen[j][j]));
            size += (0..r).map(|k| theirs[(k, k)] + own[(k, k)]).sum::<f64>();
            g += theirs - own;
        }
        let (values, vectors) = eigen(g.as_ref())?;
        // What is left of equal terms is rounding.
        let positive = values.iter().take_while(|&&v| v > RANK_CUT * size).count();
        let q = vectors.subcols(0, positive);
        for j in (0..edges).filter(|&j| j != i) {
            let at = frame.block(j);
            let old = coords.subcols(at.start, at.len()).to_owned();
            let gone = product(q, product(q.transpose(), old.as_ref()).as_ref());
            coords.subcols_mut(at.start, at.len()).copy_from(&old - &gone);
        }
    }
    // B = Q coords: what each block of columns has left of its norm, from coordsᵀ coords.
    for j in 0..edges {
        let at = frame.block(j);
        let ga = block(&grams.a, j);
        let now = coords.subcols(at.start, at.len()).to_owned();
        let left = inner(product(now.transpose(), now.as_ref()).as_ref(), ga.as_ref()).max(0.0).sqrt();
        let before = inner(block(&grams.b, j).as_ref(), ga.as_ref()).max(0.0).sqrt();
        let factor = if left > NULL_CUT * before { before / left } else { 0.0 };
        let c = lambda * frame.weights[j] * factor;
        coords.subcols_mut(at.start, at.len()).copy_from(&now * Scale(c));
    }
    let map = product(white.from.as_ref(), coords.as_ref());
    Factors::new(product(map.transpose(), batch.stack.bt()), batch.stack.a().to_owned())
}
