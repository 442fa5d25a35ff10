//! One side of LoRA-CR: how much of each shared direction every update keeps, from the Grams of the factors.

use super::eigh::jacobi;
use super::{dot, ensure, holds};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::tensor::Store;

/// Eigenvalues of a Gram matrix up to this share of the largest one are zero.
pub const RANK_CUT: f64 = 1e-12;
/// Singular values up to this share of the largest one are no directions of the shared subspace.
pub const SIGMA_CUT: f64 = 1e-6;
/// A row up to this share of σₖ, or a consensus up to this share of the largest row, is zero.
pub const NULL_CUT: f64 = 1e-7;

/// Which directions are kept and what is kept of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// At most so many directions.
    pub top: usize,
    /// As few directions as hold this share of the energy; 0 for all.
    pub share: f64,
    /// `1 − Σ_{j≠i} aⱼ / (Σ_{l≠i} aₗ) max(0, −cos(zᵢ, zⱼ))` in place of `(1 − c) max(0, cos(zᵢ, z̄))`.
    pub opposition: bool,
}

impl Rule {
    /// How many of the directions with singular values `sigma` (descending, squares adding up to `energy`) are kept.
    pub fn kept(&self, sigma: &[f64], energy: f64) -> usize {
        let above = sigma.iter().take_while(|&&s| s > SIGMA_CUT * sigma[0]).count();
        let mut sum = 0.0;
        let reached = sigma.iter().position(|s| {
            sum += s * s;
            self.share > 0.0 && sum >= self.share * energy
        });
        above.min(self.top).min(reached.map_or(sigma.len(), |k| k + 1))
    }
}

/// `D_i^CR = U diag(γᵢ) Uᵀ Dᵢ` as a map of `[B₁ … B_E]`, with U the left singular vectors of `[D₁ … D_E]`; f64.
///
/// A column of B and its row of A are first given equal norms, which changes no update, so that the cut on `Λ` does not
/// depend on how a product is split into factors: `G_B = V Λ Vᵀ`, `R = Λ^½ Vᵀ`,
/// `R blockdiag(G_Aⁱⁱ) Rᵀ = E diag(σ²) Eᵀ`, `basis = V Λ^-½ E`, `coords = Eᵀ R`,
/// `Hₖ(i, j) = ⟨zᵢₖ, zⱼₖ⟩ = coordsᵢ[k, :] G_Aⁱʲ coordsⱼ[k, :]ᵀ`; `map = basis diag(γᵢ) coordsᵢ` in the columns of i.
pub struct Gate<'a, S: Store> {
    /// `[P, P]` of each module, written: `[B₁ … B_E]` times it are the resolved ones. Zero where no direction is kept.
    pub map: S::ViewMut<'a, f64>,
    /// What [`Layout`] says of each module, written.
    pub directions: S::ViewMut<'a, f64>,
    /// As long as `map`; what is written means nothing.
    pub scratch: S::ViewMut<'a, f64>,
    /// `[P, P]`, the Gram of B, of each module.
    pub b: S::View<'a, f64>,
    /// `[P, P]`, the Gram of A, of each module.
    pub a: S::View<'a, f64>,
    /// Of each module where its adapters' rows begin and where the last end: E + 1 numbers from 0 to P, ascending.
    pub modules: &'a [&'a [usize]],
    /// For all modules.
    pub rule: Rule,
}

/// Where the numbers of one module lie in `directions`: K and `Σ σ²` of all directions, kept or not; then by direction
/// `σ[P]`, `c[P]`, `‖z‖[P, E]`, `cos[P, E]`, `γ[P, E]`. Those past K are zero. K is NaN where the Grams are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// P.
    pub rank: usize,
    /// E.
    pub edges: usize,
}

impl Layout {
    /// Of a module with these bounds.
    pub fn of(bounds: &[usize]) -> Layout {
        Layout { rank: bounds.last().copied().unwrap_or(0), edges: bounds.len().saturating_sub(1) }
    }

    /// Numbers of the module.
    pub fn len(&self) -> usize {
        2 + 2 * self.rank + 3 * self.rank * self.edges
    }

    /// Whether the module has no adapter.
    pub fn is_empty(&self) -> bool {
        self.edges == 0
    }

    /// `(σₖ, cₖ)` and, an entry an adapter, `(‖zₖ‖, cos, γ)` of direction `k`.
    pub fn direction<'a>(&self, all: &'a [f64], k: usize) -> (f64, f64, [&'a [f64]; 3]) {
        let (p, e) = (self.rank, self.edges);
        let table = |n: usize| &all[2 + 2 * p + n * p * e + k * e..][..e];
        (all[2 + k], all[2 + p + k], [table(0), table(1), table(2)])
    }

    /// Puts direction `k` where [`Layout::direction`] finds it.
    pub fn put(&self, all: &mut [f64], k: usize, sigma: f64, conflict: f64, tables: [&[f64]; 3]) {
        let (p, e) = (self.rank, self.edges);
        (all[2 + k], all[2 + p + k]) = (sigma, conflict);
        for (n, from) in tables.into_iter().enumerate() {
            all[2 + 2 * p + n * p * e + k * e..][..e].copy_from_slice(from);
        }
    }
}

impl<S: Store> Gate<'_, S> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        for (n, bounds) in self.modules.iter().enumerate() {
            let ascending = bounds.first() == Some(&0) && bounds.windows(2).all(|w| w[0] < w[1]);
            ensure("gate", ascending && bounds.len() > 1, || {
                format!("module {n} has bounds {bounds:?}, expected 0 and larger numbers, ascending")
            })?;
        }
        let layouts = || self.modules.iter().map(|bounds| Layout::of(bounds));
        let squares = layouts().fold(0usize, |sum, l| sum.saturating_add(l.rank.saturating_mul(l.rank)));
        holds("gate", "map", &self.map, &[("Σ P²", squares)])?;
        let numbers = layouts().map(|l| l.len()).sum();
        holds("gate", "directions", &self.directions, &[("Σ (2 + 2 P + 3 P E)", numbers)])?;
        holds("gate", "scratch", &self.scratch, &[("Σ P²", squares)])?;
        holds("gate", "b", &self.b, &[("Σ P²", squares)])?;
        holds("gate", "a", &self.a, &[("Σ P²", squares)])
    }
}

/// Fails where the K of a module is NaN.
pub fn finite(directions: &[f64]) -> Result<usize> {
    match directions.first() {
        Some(k) if !k.is_nan() => Ok(*k as usize),
        _ => Err(Error::Numeric(
            "the factors are too large: the eigenvalues of their Gram matrix are not finite".into(),
        )),
    }
}

/// The definition.
pub fn reference(op: Gate<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut map, mut directions, mut b, mut a) = (op.map, op.directions, op.b, op.a);
    for bounds in op.modules {
        let layout = Layout::of(bounds);
        let p = layout.rank;
        one(&mut map[..p * p], &mut directions[..layout.len()], &b[..p * p], &a[..p * p], bounds, op.rule);
        (map, directions) = (&mut map[p * p..], &mut directions[layout.len()..]);
        (b, a) = (&b[p * p..], &a[p * p..]);
    }
    Ok(())
}

fn one(map: &mut [f64], directions: &mut [f64], b: &[f64], a: &[f64], bounds: &[usize], rule: Rule) {
    let layout = Layout::of(bounds);
    let (p, edges) = (layout.rank, layout.edges);
    directions.fill(0.0);
    map.fill(0.0);
    let diagonal = |x: &[f64]| (0..p).map(|j| x[j * p + j]).collect::<Vec<f64>>();
    let d = balance(&diagonal(b), &diagonal(a));
    let balanced: Vec<f64> = (0..p * p).map(|i| b[i] / (d[i / p] * d[i % p])).collect();
    let (lambda, v) = jacobi(&balanced, p);
    if !lambda.iter().chain(a).all(|x| x.is_finite()) {
        directions[0] = f64::NAN;
        return;
    }
    let q = lambda.iter().take_while(|&&l| l > RANK_CUT * lambda[0] && l > 0.0).count();
    let r = |k: usize, j: usize| lambda[k].sqrt() * v[j * p + k];
    let edge: Vec<usize> = (0..p).map(|j| bounds.iter().filter(|&&begin| begin <= j).count() - 1).collect();
    let mut core = vec![0.0; q * q];
    for i in 0..p {
        for j in (0..p).filter(|&j| edge[i] == edge[j]) {
            let g = a[i * p + j] * d[i] * d[j];
            (0..q * q).for_each(|at| core[at] += r(at / q, i) * g * r(at % q, j));
        }
    }
    let (squares, e) = jacobi(&core, q);
    let sigma: Vec<f64> = squares.iter().map(|s| s.max(0.0).sqrt()).collect();
    let energy = squares.iter().map(|s| s.max(0.0)).sum();
    if !f64::is_finite(energy) {
        directions[0] = f64::NAN;
        return;
    }
    let kept = rule.kept(&sigma, energy);
    (directions[0], directions[1]) = (kept as f64, energy);
    for k in 0..kept {
        let coords: Vec<f64> = (0..p).map(|j| d[j] * dot((0..q).map(|l| (e[l * q + k], r(l, j))))).collect();
        let basis: Vec<f64> = (0..p)
            .map(|i| dot((0..q).map(|l| (v[i * p + l] / lambda[l].sqrt(), e[l * q + k]))) / d[i])
            .collect();
        let h = |i: usize, j: usize| -> f64 {
            let row = |l: usize| dot((bounds[j]..bounds[j + 1]).map(|m| (a[l * p + m], coords[m])));
            (bounds[i]..bounds[i + 1]).map(|l| coords[l] * row(l)).sum()
        };
        let h: Vec<f64> = (0..edges * edges).map(|i| h(i / edges, i % edges)).collect();
        let (norm, cos, conflict, gamma) = direction(sigma[k], &h, edges, rule.opposition);
        layout.put(directions, k, sigma[k], conflict, [&norm, &cos, &gamma]);
        (0..p * p).for_each(|at| map[at] += basis[at / p] * gamma[edge[at % p]] * coords[at % p]);
    }
}

/// dⱼ such that column j of B over dⱼ and row j of A times dⱼ have equal norms, from the squares of their norms.
///
/// A column of B whose row of A is zero takes part in no update; it gets the norm of the largest balanced column.
pub fn balance(b: &[f64], a: &[f64]) -> Vec<f64> {
    let norms = || b.iter().zip(a).map(|(b, a)| (b.max(0.0).sqrt(), a.max(0.0).sqrt()));
    let largest = norms().map(|(b, a)| (b * a).sqrt()).fold(0.0, f64::max);
    norms()
        .map(|(b, a)| match (b, a) {
            (b, a) if b > 0.0 && a > 0.0 => (b / a).sqrt(),
            (b, _) if b > 0.0 && largest > 0.0 => b / largest,
            _ => 1.0,
        })
        .collect()
}

/// `‖zᵢ‖`, `cos(zᵢ, z̄)`, `c` and `γᵢ` of one direction from `h[i, j] = ⟨zᵢ, zⱼ⟩`.
fn direction(sigma: f64, h: &[f64], edges: usize, opposed: bool) -> (Vec<f64>, Vec<f64>, f64, Vec<f64>) {
    let h = |i: usize, j: usize| h[i * edges + j];
    let norm: Vec<f64> = (0..edges).map(|i| h(i, i).max(0.0).sqrt()).collect();
    let share = shares(sigma, &norm);
    let along: Vec<f64> = (0..edges).map(|i| (0..edges).map(|j| h(i, j) * share[j]).sum()).collect();
    let (cos, conflict) = agreement(&norm, &share, &along);
    let gamma = if opposed { opposition(&norm, &share, h) } else { paper(&cos, conflict) };
    (norm, cos, conflict, gamma)
}

/// `aᵢ / Σ a` with `aᵢ = ‖zᵢ‖`, 0 for a row that is zero: `z̄ = Σ shareᵢ zᵢ`.
pub fn shares(sigma: f64, norm: &[f64]) -> Vec<f64> {
    let weight = |a: f64| if a > NULL_CUT * sigma { a } else { 0.0 };
    let total: f64 = norm.iter().map(|&a| weight(a)).sum();
    norm.iter().map(|&a| if total > 0.0 { weight(a) / total } else { 0.0 }).collect()
}

/// `cos(zᵢ, z̄)` and `c = Σ a (1 − cos) / (2 Σ a)` from `along[i] = ⟨zᵢ, z̄⟩`.
///
/// The cosine of a row that is zero is 0, and all are where z̄ is.
pub fn agreement(norm: &[f64], share: &[f64], along: &[f64]) -> (Vec<f64>, f64) {
    let consensus = share.iter().zip(along).map(|(s, x)| s * x).sum::<f64>().max(0.0).sqrt();
    let counted = || norm.iter().zip(share).filter(|(_, share)| **share > 0.0);
    let largest = counted().map(|(norm, _)| *norm).fold(0.0, f64::max);
    let agreed = consensus > NULL_CUT * largest;
    let cosine = |i: usize| (along[i] / (norm[i] * consensus)).clamp(-1.0, 1.0);
    let cos: Vec<f64> =
        (0..norm.len()).map(|i| if agreed && share[i] > 0.0 { cosine(i) } else { 0.0 }).collect();
    let conflict = share.iter().zip(&cos).map(|(share, cos)| share * (1.0 - cos)).sum::<f64>() / 2.0;
    (cos, conflict.clamp(0.0, 1.0))
}

/// `(1 − c) max(0, cos(zᵢ, z̄))`.
pub fn paper(cos: &[f64], conflict: f64) -> Vec<f64> {
    cos.iter().map(|c| (1.0 - conflict) * c.max(0.0)).collect()
}

/// `1 − Σ_{j≠i} aⱼ / (Σ_{l≠i} aₗ) max(0, −cos(zᵢ, zⱼ))` from `h(i, j) = ⟨zᵢ, zⱼ⟩`; rows that are zero count 0.
pub fn opposition(norm: &[f64], share: &[f64], h: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let opposed = |i: usize| {
        let others = || (0..norm.len()).filter(move |&j| j != i);
        let total: f64 = others().map(|j| share[j]).sum();
        if total == 0.0 || share[i] == 0.0 {
            return 0.0;
        }
        let against = |j: usize| (-h(i, j) / (norm[i] * norm[j])).clamp(0.0, 1.0);
        others().filter(|&j| share[j] > 0.0).map(|j| share[j] / total * against(j)).sum::<f64>()
    };
    (0..norm.len()).map(|i| 1.0 - opposed(i)).collect()
}
