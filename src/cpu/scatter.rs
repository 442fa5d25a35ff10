//! See [`crate::ops::scatter`].

use rayon::prelude::*;

use crate::error::Result;
use crate::host::Host;
use crate::ops::scatter::{NONE, Scatter};

/// One x of a part.
struct Row<'a> {
    dst: &'a mut [u8],
    src: &'a [u8],
    from: &'a [u32],
    item: usize,
}

pub fn scatter(op: Scatter<'_, Host>) -> Result<()> {
    op.check()?;
    let (mut rest, mut at) = (op.dst, 0);
    let mut rows = Vec::new();
    for part in op.parts {
        let (to, of) = (part.places * part.item, part.kept * part.item);
        if part.outer * to == 0 {
            continue;
        }
        let (own, after) = rest.split_at_mut(part.dst - at).1.split_at_mut(part.outer * to);
        (rest, at) = (after, part.dst + part.outer * to);
        let from = &op.from[part.from..part.from + part.places];
        for (x, dst) in own.chunks_exact_mut(to).enumerate() {
            let begin = part.src + x * of;
            rows.push(Row { dst, src: &op.src[begin..begin + of], from, item: part.item });
        }
    }
    rows.into_par_iter().for_each(|Row { dst, src, from, item }| match item {
        2 => elements::<2>(dst, src, from),
        4 => elements::<4>(dst, src, from),
        _ => {
            for (to, &from) in dst.chunks_exact_mut(item).zip(from) {
                match from {
                    NONE => to.fill(0),
                    k => to.copy_from_slice(&src[k as usize * item..(k as usize + 1) * item]),
                }
            }
        }
    });
    Ok(())
}

/// A row of items of `N` bytes, one element each.
fn elements<const N: usize>(dst: &mut [u8], src: &[u8], from: &[u32]) {
    let (to, src) = (dst.as_chunks_mut::<N>().0, src.as_chunks::<N>().0);
    for (to, &from) in to.iter_mut().zip(from) {
        *to = if from == NONE { [0; N] } else { src[from as usize] };
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::tests::on_threads;
    use crate::ops::cases::scatter::{conforms, refuses};

    #[test]
    fn as_the_reference() {
        conforms(&on_threads());
        refuses(&on_threads()[0]);
    }
}
