//! See [`crate::ops::gram`].

use faer::MatRef;
use rayon::prelude::*;

use crate::algebra::gram as product;
use crate::error::Result;
use crate::host::Host;
use crate::ops::gram::Gram;

pub fn gram(op: Gram<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut out, mut x) = (op.out, op.x);
    let mut work = Vec::with_capacity(op.stacks.len());
    for stack in op.stacks {
        let (own, rest) = out.split_at_mut(stack.rank * stack.rank);
        let (from, after) = x.split_at(stack.rows * stack.rank);
        work.push((own, from, stack));
        (out, x) = (rest, after);
    }
    work.into_par_iter().for_each(|(out, x, stack)| {
        let g = product(MatRef::from_column_major_slice(x, stack.rank, stack.rows));
        for (j, out) in out.chunks_exact_mut(stack.rank).enumerate() {
            out.copy_from_slice(g.col_as_slice(j));
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        crate::ops::cases::gram::conforms(&crate::cpu::tests::on_threads());
    }
}
