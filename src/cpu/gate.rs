//! See [`crate::ops::gate`].

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::algebra::product;
use crate::error::Result;
use crate::host::Host;
use crate::ops::gate::{Gate, Layout, Rule, direction};
use crate::subspace::Subspace;

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
        Ok(Some(subspace)) => gated(&subspace, map, directions, a, bounds, rule, layout),
        Ok(None) => {}
        Err(_) => directions[0] = f64::NAN,
    }
}

/// The directions, and the map.
fn gated(
    subspace: &Subspace,
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
                subspace.coords.subcols(at.start, at.len()).transpose(),
            )
        })
        .collect();
    (directions[0], directions[1]) = (subspace.sigma.len() as f64, subspace.energy);
    let mut gated = subspace.coords.clone();
    for (k, &sigma) in subspace.sigma.iter().enumerate() {
        let h: Vec<f64> = (0..edges * edges)
            .map(|at| {
                let (i, j) = (at / edges, at % edges);
                blocks[i].clone().map(|l| subspace.coords[(k, l)] * towards[j][(l, k)]).sum()
            })
            .collect();
        let (norm, cos, conflict, gamma) = direction(sigma, &h, edges, rule.opposition);
        layout.put(directions, k, sigma, conflict, [&norm, &cos, &gamma]);
        for (at, gamma) in blocks.iter().zip(&gamma) {
            at.clone().for_each(|l| gated[(k, l)] *= gamma);
        }
    }
    let found = product(subspace.basis.as_ref(), gated.as_ref());
    for (i, row) in map.chunks_exact_mut(p).enumerate() {
        row.iter_mut().enumerate().for_each(|(j, out)| *out = found[(i, j)]);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::gate::conforms(&crate::cpu::tests::on_threads());
    }
}
