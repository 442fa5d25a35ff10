//! See [`crate::ops::gate`].

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::algebra::{eigen, product, scale_columns};
use crate::error::Result;
use crate::host::Host;
use crate::ops::gate::{Gate, Layout, RANK_CUT, Rule, balance, direction};

pub fn gate(op: Gate<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut map, mut directions, mut b, mut a) = (op.map, op.directions, op.b, op.a);
    let mut work = Vec::with_capacity(op.modules.len());
    for bounds in op.modules {
        let layout = Layout::of(bounds);
        let squares = layout.rank * layout.rank;
        let (own, maps) = map.split_at_mut(squares);
        let (numbers, rest) = directions.split_at_mut(layout.len());
        let ((gb, bs), (ga, others)) = (b.split_at(squares), a.split_at(squares));
        work.push((own, numbers, gb, ga, *bounds));
        (map, directions, b, a) = (maps, rest, bs, others);
    }
    let rule = op.rule;
    work.into_par_iter().for_each(|(map, directions, b, a, bounds)| one(map, directions, b, a, bounds, rule));
    Ok(())
}

/// One module.
pub(crate) fn one(
    map: &mut [f64],
    directions: &mut [f64],
    b: &[f64],
    a: &[f64],
    bounds: &[usize],
    rule: Rule,
) {
    let layout = Layout::of(bounds);
    map.fill(0.0);
    directions.fill(0.0);
    match Subspace::of(b, a, bounds, rule) {
        Ok(Some(subspace)) => subspace.gate(map, directions, a, bounds, rule, layout),
        Ok(None) => {}
        Err(_) => directions[0] = f64::NAN,
    }
}

/// Left singular pairs `(σₖ, uₖ)` of `[D₁ … D_E]`, with U known by its coordinates only.
struct Subspace {
    /// `σₖ`, descending.
    sigma: Vec<f64>,
    /// `Σ σₖ²` over all directions, kept or not: `Σ ‖Dᵢ‖²`.
    energy: f64,
    /// `[P, K]`: `U = [B₁ … B_E] basis`.
    basis: Mat<f64>,
    /// `[K, P]`: `Uᵀ [B₁ … B_E]`, so that `zᵢₖ = coordsᵢ[k, :] Aᵢ`.
    coords: Mat<f64>,
}

impl Subspace {
    /// The directions that are kept; none where every update is zero.
    fn of(b: &[f64], a: &[f64], bounds: &[usize], rule: Rule) -> Result<Option<Subspace>> {
        let p = Layout::of(bounds).rank;
        let (gram_b, gram_a) =
            (MatRef::from_column_major_slice(b, p, p), MatRef::from_column_major_slice(a, p, p));
        let d = balance(b, a, p);
        let back: Vec<f64> = d.iter().map(|d| 1.0 / d).collect();
        let gb = Mat::from_fn(p, p, |i, j| gram_b[(i, j)] * back[i] * back[j]);
        let (lambda, v) = eigen(gb.as_ref())?;
        let cut = RANK_CUT * lambda[0];
        let q = lambda.iter().take_while(|&&l| l > cut && l > 0.0).count();
        if q == 0 {
            return Ok(None);
        }
        let root: Vec<f64> = lambda[..q].iter().map(|l| l.sqrt()).collect();
        let r = Mat::from_fn(q, p, |k, j| root[k] * v[(j, k)]);
        let mut core = Mat::zeros(q, q);
        for at in bounds.windows(2).map(|w| w[0]..w[1]) {
            let ga = Mat::from_fn(at.len(), at.len(), |i, j| {
                gram_a[(at.start + i, at.start + j)] * d[at.start + i] * d[at.start + j]
            });
            let re = r.subcols(at.start, at.len());
            core += product(product(re, ga.as_ref()).as_ref(), re.transpose());
        }
        let (squares, e) = eigen(core.as_ref())?;
        let sigma: Vec<f64> = squares.iter().map(|s| s.max(0.0).sqrt()).collect();
        let energy: f64 = squares.iter().map(|s| s.max(0.0)).sum();
        let k = rule.kept(&sigma, energy);
        if k == 0 {
            return Ok(None);
        }
        let e = e.subcols(0, k);
        let inverse: Vec<f64> = root.iter().map(|x| 1.0 / x).collect();
        let basis = product(scale_columns(v.subcols(0, q), &inverse).as_ref(), e);
        let coords = product(e.transpose(), r.as_ref());
        Ok(Some(Subspace {
            sigma: sigma[..k].to_vec(),
            energy,
            basis: Mat::from_fn(p, k, |i, j| basis[(i, j)] * back[i]),
            coords: scale_columns(coords.as_ref(), &d),
        }))
    }

    /// The directions, and the map.
    fn gate(
        &self,
        map: &mut [f64],
        directions: &mut [f64],
        a: &[f64],
        bounds: &[usize],
        rule: Rule,
        layout: Layout,
    ) {
        let (p, edges) = (layout.rank, layout.edges);
        let gram_a = MatRef::from_column_major_slice(a, p, p);
        let blocks: Vec<_> = bounds.windows(2).map(|w| w[0]..w[1]).collect();
        // Column block j of `towards[j]` is G_A[:, j] coordsⱼᵀ: [P, K].
        let towards: Vec<Mat<f64>> = blocks
            .iter()
            .map(|at| {
                product(
                    gram_a.subcols(at.start, at.len()),
                    self.coords.subcols(at.start, at.len()).transpose(),
                )
            })
            .collect();
        (directions[0], directions[1]) = (self.sigma.len() as f64, self.energy);
        let mut gated = self.coords.clone();
        for (k, &sigma) in self.sigma.iter().enumerate() {
            let h: Vec<f64> = (0..edges * edges)
                .map(|at| {
                    let (i, j) = (at / edges, at % edges);
                    blocks[i].clone().map(|l| self.coords[(k, l)] * towards[j][(l, k)]).sum()
                })
                .collect();
            let (norm, cos, conflict, gamma) = direction(sigma, &h, edges, rule.opposition);
            layout.put(directions, k, sigma, conflict, [&norm, &cos, &gamma]);
            for (at, gamma) in blocks.iter().zip(&gamma) {
                at.clone().for_each(|l| gated[(k, l)] *= gamma);
            }
        }
        let found = product(self.basis.as_ref(), gated.as_ref());
        for (i, row) in map.chunks_exact_mut(p).enumerate() {
            row.iter_mut().enumerate().for_each(|(j, out)| *out = found[(i, j)]);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::gate::conforms(&crate::cpu::tests::on_threads());
    }
}
