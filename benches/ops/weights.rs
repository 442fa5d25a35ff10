//! What is done to whole weights: the search for singular values, and merging.

use anabranch::Result;
use anabranch::ops::merge::{Merge, ROWS, Update};
use anabranch::ops::rsvd::{Rsvd, Sketch};
use anabranch::tensor::{Real, Store};

use super::bench::{Bench, Timed, Work};
use super::data;
use super::sizes::{Model, RANK};

/// 16 values in three passes, each of which has two products of 24 directions.
pub fn rsvd<B: Timed>(bench: &mut Bench<'_, B>, model: &Model) {
    let b = bench.backend;
    let sketch = Sketch::new(16, 0);
    let (width, mlp) = (model.width, model.layers[0].mlp);
    for size in [(width, width), (mlp, width), (width, mlp)] {
        let (k, l) = (sketch.values(size), sketch.width(size));
        let flops = 4 * (sketch.iterations + 1) * size.0 * size.1 * l;
        bench.case("rsvd", &format!("{}×{}, {k} values", size.0, size.1), Work::Flops(flops), || {
            let w = data::matrix(b, size)?;
            let (mut values, mut residuals) = (b.alloc::<f64>("values", k)?, b.alloc::<f64>("residuals", k)?);
            let mut energy = b.alloc::<f64>("energy", 1)?;
            let len = b.rsvd_scratch(1, size, &sketch);
            let mut scratch = b.alloc::<f32>("scratch", len)?;
            Ok(move || {
                b.rsvd(Rsvd {
                    values: B::Store::view_mut(&mut values, 0..k),
                    residuals: B::Store::view_mut(&mut residuals, 0..k),
                    energy: B::Store::view_mut(&mut energy, 0..1),
                    vectors: None,
                    scratch: B::Store::view_mut(&mut scratch, 0..len),
                    a: &[&w],
                    tensors: &[0],
                    sketch,
                })
            })
        });
    }
}

/// One adapter, and four.
pub fn merge<B: Timed, T: Real>(bench: &mut Bench<'_, B>, model: &Model) {
    let b = bench.backend;
    let (o, i) = (model.layers[0].mlp, model.width);
    for adapters in [1, 4] {
        let name = format!("{o}×{i}, {}, rank {RANK} of {adapters}", T::DTYPE);
        bench.case("merge", &name, Work::Bytes(2 * o * i * size_of::<T>()), || {
            // Small factors: the weight is added to again and again.
            let (up, down) = (data::vector(b, 2, RANK * i)?, data::vector(b, 3, o * RANK)?);
            let mut w = data::buffer(b, &vec![T::from_f32(1.0); o * i])?;
            let count = 2 * o.div_ceil(ROWS);
            let mut sums = b.alloc::<f64>("what rounding does", count)?;
            Ok(move || -> Result<()> {
                let update = |_| Update {
                    a: B::Store::view(&up, 0..RANK * i),
                    b: B::Store::view(&down, 0..o * RANK),
                    rank: RANK,
                    scale: 1e-6,
                };
                b.merge::<T>(Merge {
                    w: B::Store::view_mut(&mut w, 0..o * i),
                    sums: B::Store::view_mut(&mut sums, 0..count),
                    updates: (0..adapters).map(update).collect(),
                    out: o,
                    inner: i,
                })
            })
        });
    }
}
