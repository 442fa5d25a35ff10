//! See [`crate::ops::gate`].

use faer::MatRef;
use rayon::prelude::*;

use crate::algebra::Spread;
use crate::algebra::root::Root;
use crate::algebra::subspace::{Other, Subspace, resolve};
use crate::error::Result;
use crate::host::Host;
use crate::ops::gate::{Gate, Layout, Rule};

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
    let p = Layout::of(bounds).rank;
    map.fill(0.0);
    directions.fill(0.0);
    let a = MatRef::from_column_major_slice(a, p, p);
    let squares: Vec<f64> = (0..p).map(|j| a[(j, j)]).collect();
    let found =
        Root::of(MatRef::from_column_major_slice(b, p, p), &squares, Spread::Thread).and_then(|root| {
            let Some(root) = root else { return Ok(None) };
            let rows = Other::Gram(a);
            let found = resolve(root.r.as_ref(), rows, bounds, rule, Spread::Thread)?;
            Ok(found.map(|found| (root, found)))
        });
    match found {
        Ok(Some((root, found))) => {
            put(directions, bounds, &found);
            let found = root.map(found.resolved(Spread::Thread), Spread::Thread);
            for (i, row) in map.chunks_exact_mut(p).enumerate() {
                row.iter_mut().enumerate().for_each(|(j, out)| *out = found[(i, j)]);
            }
        }
        Ok(None) => {}
        Err(_) => directions[0] = f64::NAN,
    }
}

/// The directions, where [`Layout`] says.
fn put(out: &mut [f64], bounds: &[usize], found: &Subspace) {
    let layout = Layout::of(bounds);
    (out[0], out[1]) = (found.directions.len() as f64, found.energy);
    for (k, d) in found.directions.iter().enumerate() {
        let [norm, cos, gamma] = &d.tables;
        layout.put(out, k, d.sigma, d.conflict, [norm, cos, gamma]);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::gate::conforms(&crate::cpu::tests::on_threads());
    }
}
