//! See [`crate::ops::apply`].

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use crate::algebra::Spread;
use crate::error::Result;
use crate::host::Host;
use crate::ops::apply::Apply;

pub fn apply(op: Apply<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut out, mut x, mut w) = (op.out, op.x, op.w);
    let mut work = Vec::with_capacity(op.stacks.len());
    for stack in op.stacks {
        let (own, rest) = out.split_at_mut(stack.rows * stack.rank);
        let (from, after) = x.split_at(stack.rows * stack.rank);
        let (by, maps) = w.split_at(stack.rank * stack.rank);
        work.push((own, from, by, stack));
        (out, x, w) = (rest, after, maps);
    }
    work.into_par_iter().for_each(|(out, x, w, stack)| {
        let (p, n) = (stack.rank, stack.rows);
        // Rows of P numbers are the columns of a [P, n] matrix.
        Spread::Thread.product_into(
            MatMut::from_column_major_slice_mut(out, p, n),
            MatRef::from_column_major_slice(w, p, p),
            MatRef::from_column_major_slice(x, p, n),
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::apply::conforms(&crate::cpu::tests::on_threads());
    }
}
