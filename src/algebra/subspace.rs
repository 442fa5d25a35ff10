//! The shared singular subspace of several updates, and what each of them keeps of it.
//!
//! Given R with `[B₁ … B_E] = Q R` for a Q of orthonormal columns, which is never formed, and the rows A:
//! `R blockdiag(Aᵢ Aᵢᵀ) Rᵀ = E diag(σ²) Eᵀ` has the left singular pairs `(σₖ, Q eₖ)` of `[B₁A₁ … B_EA_E]`, and
//! `uₖᵀ Bᵢ Aᵢ = coordsᵢ[k, :] Aᵢ` with `coords = Eᵀ R`. The resolved updates have `E diag(γᵢ) coordsᵢ` for R.

use std::ops::Range;

use faer::{Mat, MatRef};
use rayon::prelude::*;

use super::{Spread, by_block, gram, product, symmetric_product};
use crate::error::Result;
use crate::ops::gate::{Rule, agreement, opposition, paper, shares};

/// Directions that are worked on at once.
const DIRECTIONS: usize = 256;
/// Products of pairs of rows that are held at once, where a gate looks at pairs.
const PAIRS: usize = 1 << 22;

/// What is known of `[A₁; …; A_E]`.
#[derive(Clone, Copy)]
pub enum Other<'a> {
    /// `A Aᵀ`, `[P, P]`.
    Gram(MatRef<'a, f64>),
    /// A, `[P, I]`: less work, and no `[P, P]`, where P is larger than I.
    Factor(MatRef<'a, f64>),
}

impl Other<'_> {
    /// `Aᵢ Aᵢᵀ` of the rows `at`.
    fn block(&self, at: &Range<usize>) -> Mat<f64> {
        match self {
            Other::Gram(g) => g.submatrix(at.start, at.start, at.len(), at.len()).to_owned(),
            Other::Factor(a) => gram(a.subrows(at.start, at.len())),
        }
    }

    /// `x Aᵢ Aᵀ` with `x[n, R]` and the rows `at`, `[n, P]`.
    fn through(&self, x: MatRef<'_, f64>, at: &Range<usize>) -> Mat<f64> {
        match self {
            Other::Gram(g) => product(x, g.subrows(at.start, at.len())),
            Other::Factor(a) => product(product(x, a.subrows(at.start, at.len())).as_ref(), a.transpose()),
        }
    }
}

/// The left singular pairs `(σₖ, Q eₖ)`, and what each update is in their terms.
pub struct Shared {
    /// `σₖ`, descending.
    pub sigma: Vec<f64>,
    /// `Σ σ²` over all directions, kept or not.
    pub energy: f64,
    /// `eₖ` as columns, `[q, K]`.
    pub vectors: Mat<f64>,
    /// `[K, P]`.
    pub coords: Mat<f64>,
    /// Each update's columns of R.
    blocks: Vec<Range<usize>>,
    /// `Aᵢ Aᵢᵀ`.
    grams: Vec<Mat<f64>>,
}

impl Shared {
    /// The directions that `rule` keeps, of the updates that `r[q, P]` and `rows` describe, the bounds of each one's
    /// columns of R in `bounds`; none where every update is zero.
    ///
    /// Fails where a number is not finite.
    pub fn of(
        r: MatRef<'_, f64>,
        rows: Other<'_>,
        bounds: &[usize],
        rule: Rule,
        spread: Spread,
    ) -> Result<Option<Shared>> {
        let blocks: Vec<Range<usize>> = bounds.windows(2).map(|w| w[0]..w[1]).collect();
        let grams: Vec<Mat<f64>> = blocks.iter().map(|at| rows.block(at)).collect();
        let core = {
            let weighed = by_block(r, grams.iter().map(Mat::as_ref));
            symmetric_product(weighed.as_ref(), r.transpose(), spread)
        };
        let (squares, e) = spread.eigen(core.as_ref())?;
        drop(core);
        let mut sigma: Vec<f64> = squares.iter().map(|s| s.max(0.0).sqrt()).collect();
        let energy: f64 = squares.iter().map(|s| s.max(0.0)).sum();
        let kept = rule.kept(&sigma, energy);
        if kept == 0 {
            return Ok(None);
        }
        sigma.truncate(kept);
        let vectors = e.subcols(0, kept).to_owned();
        let coords = spread.product(vectors.transpose(), r);
        Ok(Some(Shared { sigma, energy, vectors, coords, blocks, grams }))
    }
}

/// One direction: `σₖ`, `cₖ` and, an entry an adapter, `‖zₖ‖`, `cos(zₖ, z̄ₖ)` and `γₖ`.
pub struct Found {
    /// `σₖ`.
    pub sigma: f64,
    /// `cₖ`.
    pub conflict: f64,
    /// `‖zᵢₖ‖`, `cos(zᵢₖ, z̄ₖ)`, `γᵢₖ`.
    pub tables: [Vec<f64>; 3],
}

/// What was found in the shared subspace.
pub struct Subspace {
    /// `Σ σ²` over all directions, kept or not.
    pub energy: f64,
    /// The kept ones, by descending σ.
    pub directions: Vec<Found>,
    /// `eₖ` as columns, `[q, K]`.
    vectors: Mat<f64>,
    /// `γᵢₖ coordsᵢ`, `[K, P]`.
    coords: Mat<f64>,
}

impl Subspace {
    /// R of the resolved updates, `[q, P]`.
    pub fn resolved(self, spread: Spread) -> Mat<f64> {
        spread.product(self.vectors.as_ref(), self.coords.as_ref())
    }
}

/// Compares the updates that `r[q, P]` and `rows` describe, the bounds of each one's columns of R in `bounds`; none where
/// every update is zero.
///
/// Fails where a number is not finite.
pub fn resolve(
    r: MatRef<'_, f64>,
    rows: Other<'_>,
    bounds: &[usize],
    rule: Rule,
    spread: Spread,
) -> Result<Option<Subspace>> {
    let Some(Shared { sigma, energy, vectors, mut coords, blocks, grams }) =
        Shared::of(r, rows, bounds, rule, spread)?
    else {
        return Ok(None);
    };
    let kept = sigma.len();
    let at_once = match rule.opposition {
        false => DIRECTIONS,
        true => (PAIRS / (blocks.len() * blocks.len())).clamp(1, DIRECTIONS),
    };
    let chunk = |first: usize| {
        let own = coords.subrows(first, at_once.min(kept - first));
        gates(own, &sigma[first..], rows, &blocks, &grams, rule)
    };
    let firsts: Vec<usize> = (0..kept).step_by(at_once).collect();
    let directions: Vec<Found> = match spread {
        Spread::Thread => firsts.into_iter().flat_map(chunk).collect(),
        Spread::Pool => firsts.into_par_iter().flat_map_iter(chunk).collect(),
    };
    for (edge, at) in blocks.iter().enumerate() {
        for column in at.clone() {
            let column = coords.col_as_slice_mut(column).iter_mut();
            column.zip(&directions).for_each(|(x, d)| *x *= d.tables[2][edge]);
        }
    }
    Ok(Some(Subspace { energy, directions, vectors, coords }))
}

/// `Σ x[k, l] y[k, l]` over the columns l of each block: a row a block, an entry a direction.
fn by_rows(x: MatRef<'_, f64>, y: MatRef<'_, f64>, blocks: &[Range<usize>]) -> Mat<f64> {
    let mut out = Mat::zeros(x.nrows(), blocks.len());
    for (edge, at) in blocks.iter().enumerate() {
        let sums = out.col_as_slice_mut(edge);
        for l in at.clone() {
            let both = x.col(l).iter().zip(y.col(l).iter());
            sums.iter_mut().zip(both).for_each(|(sum, (x, y))| *sum += x * y);
        }
    }
    out
}

/// The directions whose coordinates are `coords[n, P]`.
fn gates(
    coords: MatRef<'_, f64>,
    sigma: &[f64],
    rows: Other<'_>,
    blocks: &[Range<usize>],
    grams: &[Mat<f64>],
    rule: Rule,
) -> Vec<Found> {
    let (n, edges) = (coords.nrows(), blocks.len());
    let squares = by_rows(by_block(coords, grams.iter().map(Mat::as_ref)).as_ref(), coords, blocks);
    let norms: Vec<Vec<f64>> =
        (0..n).map(|k| (0..edges).map(|i| squares[(k, i)].max(0.0).sqrt()).collect()).collect();
    let share: Vec<Vec<f64>> = norms.iter().zip(sigma).map(|(norm, &sigma)| shares(sigma, norm)).collect();
    // Entry [k, i] is ⟨zᵢₖ, zⱼₖ⟩.
    let pairs: Vec<Mat<f64>> = match rule.opposition {
        false => Vec::new(),
        true => blocks
            .iter()
            .map(|at| by_rows(rows.through(coords.subcols(at.start, at.len()), at).as_ref(), coords, blocks))
            .collect(),
    };
    let along = match rule.opposition {
        true => Mat::from_fn(n, edges, |k, i| (0..edges).map(|j| share[k][j] * pairs[j][(k, i)]).sum()),
        false => {
            let mut consensus = coords.to_owned();
            for (edge, at) in blocks.iter().enumerate() {
                for column in at.clone() {
                    let column = consensus.col_as_slice_mut(column).iter_mut();
                    column.zip(&share).for_each(|(x, share)| *x *= share[edge]);
                }
            }
            by_rows(rows.through(consensus.as_ref(), &(0..coords.ncols())).as_ref(), coords, blocks)
        }
    };
    let one = |(k, (norm, share)): (usize, (Vec<f64>, Vec<f64>))| {
        let along: Vec<f64> = (0..edges).map(|i| along[(k, i)]).collect();
        let (cos, conflict) = agreement(&norm, &share, &along);
        let gamma = match rule.opposition {
            false => paper(&cos, conflict),
            true => opposition(&norm, &share, |i, j| pairs[j][(k, i)]),
        };
        Found { sigma: sigma[k], conflict, tables: [norm, cos, gamma] }
    };
    norms.into_iter().zip(share).enumerate().map(one).collect()
}
