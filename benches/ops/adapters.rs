//! Recovery of a whole adapter, and LoRA-CR of two: rank 8 on the seven linears of every layer of LLaMA-3-8B.

use anabranch::Result;
use anabranch::backend::Backend;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::sizes::LayerSizes;
use anabranch::ops::apply::Apply;
use anabranch::ops::eigh::Eigh;
use anabranch::ops::gate::{Gate, Layout, Rule};
use anabranch::ops::gram::{Gram, Stack};
use anabranch::ops::scatter::{Part, Scatter, places};
use anabranch::tensor::Store;

use super::bench::{Bench, Timed, Work};
use super::data;
use super::sizes::{DEPTH, Layer, Model, RANK, Scale};

/// Adapters that are resolved together.
const EDGES: usize = 2;

/// A model's linears.
struct Linears {
    depth: usize,
    width: usize,
    head_dim: usize,
}

impl Linears {
    /// `(O, I)` of all linears where each layer is `layer`.
    fn dims(&self, layer: Layer) -> Vec<(usize, usize)> {
        let Layer { heads, kv_heads, mlp } = layer;
        let sizes = LayerSizes { heads, kv_heads, mlp };
        let of = |target: Target| sizes.dims(target, self.width, self.head_dim);
        (0..self.depth).flat_map(|_| Target::ALL.map(of)).collect()
    }
}

pub fn all<B: Timed>(bench: &mut Bench<'_, B>, scale: Scale) {
    let model = Model::on_gpu(scale).remove(0);
    let depth = if scale == Scale::Full { DEPTH } else { 2 };
    let linears = Linears { depth, width: model.width, head_dim: model.head_dim };
    let (full, pruned) = (model.layers[0], model.pruned().unwrap_or(model.layers[0]));
    recovery(bench, &linears.dims(full), &linears.dims(pruned));
    resolution(bench, &linears.dims(full));
}

/// Kept positions spread over all of them.
fn spread(kept: usize, full: usize) -> Vec<usize> {
    (0..kept).map(|k| k * full / kept).collect()
}

/// f32 factors of a pruned model back to the full one's sizes.
fn recovery<B: Timed>(bench: &mut Bench<'_, B>, full: &[(usize, usize)], pruned: &[(usize, usize)]) {
    let (mut parts, mut from) = (Vec::new(), Vec::<u32>::new());
    let (mut dst, mut src) = (0, 0);
    for ((o, i), (kept_o, kept_i)) in full.iter().zip(pruned) {
        // A's columns, then B's rows.
        for (outer, all, kept, item) in [(RANK, *i, *kept_i, 4), (1, *o, *kept_o, 4 * RANK)] {
            parts.push(Part { dst, src, from: from.len(), outer, places: all, kept, item });
            from.extend(places(&spread(kept, all), all));
            (dst, src) = (dst + outer * all * item, src + outer * kept * item);
        }
    }
    let b = bench.backend;
    let name = format!("an adapter of rank {RANK}, {} modules", full.len());
    bench.case("scatter", &name, Work::Bytes(dst + src), || {
        let operand = data::buffer(b, &vec![3u8; src])?;
        let mut result = b.alloc::<u8>("recovered", dst)?;
        Ok(move || {
            b.scatter(Scatter {
                dst: B::Store::view_mut(&mut result, 0..dst),
                src: B::Store::view(&operand, 0..src),
                from: &from,
                parts: &parts,
            })
        })
    });
}

type Buf<B, T> = <<B as Backend>::Store as Store>::Buf<T>;

/// Stacked factors of all modules and what is made of them.
struct Resolving<'a, B: Backend> {
    backend: &'a B,
    /// `[B₁ … B_E]` and `[A₁; …; A_E]ᵀ`.
    stacks: [Vec<Stack>; 2],
    x: [Buf<B, f64>; 2],
    grams: [Buf<B, f64>; 2],
    map: Buf<B, f64>,
    scratch: Buf<B, f64>,
    directions: Buf<B, f64>,
    values: Buf<B, f64>,
    resolved: Buf<B, f64>,
    bounds: Vec<usize>,
}

impl<'a, B: Backend> Resolving<'a, B> {
    fn new(backend: &'a B, modules: &[(usize, usize)]) -> Result<Resolving<'a, B>> {
        let rank = EDGES * RANK;
        let stack = |rows| Stack { rows, rank };
        let stacks = [
            modules.iter().map(|(o, _)| stack(*o)).collect::<Vec<_>>(),
            modules.iter().map(|(_, i)| stack(*i)).collect(),
        ];
        let (b, a) = (Stack::numbers(&stacks[0]), Stack::numbers(&stacks[1]));
        let squares = Stack::squares(&stacks[0]);
        let alloc = |n| backend.alloc::<f64>("LoRA-CR", n);
        let mut new = Resolving {
            backend,
            x: [data::doubles(backend, 1, b)?, data::doubles(backend, 2, a)?],
            grams: [alloc(squares)?, alloc(squares)?],
            map: alloc(squares)?,
            scratch: alloc(squares)?,
            directions: alloc(modules.len() * Layout { rank, edges: EDGES }.len())?,
            values: alloc(modules.len() * rank)?,
            resolved: alloc(b)?,
            bounds: (0..=EDGES).map(|e| e * RANK).collect(),
            stacks,
        };
        new.gram()?;
        new.gate()?;
        Ok(new)
    }

    fn modules(&self) -> usize {
        self.stacks[0].len()
    }

    fn gram(&mut self) -> Result<()> {
        for ((x, out), stacks) in self.x.iter().zip(&mut self.grams).zip(&self.stacks) {
            self.backend.gram(Gram {
                out: B::Store::view_mut(out, 0..Stack::squares(stacks)),
                x: B::Store::view(x, 0..Stack::numbers(stacks)),
                stacks,
            })?;
        }
        Ok(())
    }

    fn eigh(&mut self) -> Result<()> {
        let sizes = vec![EDGES * RANK; self.modules()];
        let (values, squares) = (B::Store::len(&self.values), B::Store::len(&self.scratch));
        self.backend.eigh(Eigh {
            values: B::Store::view_mut(&mut self.values, 0..values),
            vectors: B::Store::view_mut(&mut self.scratch, 0..squares),
            a: B::Store::view(&self.grams[0], 0..squares),
            sizes: &sizes,
        })
    }

    fn gate(&mut self) -> Result<()> {
        let (squares, numbers) = (B::Store::len(&self.map), B::Store::len(&self.directions));
        self.backend.gate(Gate {
            map: B::Store::view_mut(&mut self.map, 0..squares),
            directions: B::Store::view_mut(&mut self.directions, 0..numbers),
            scratch: B::Store::view_mut(&mut self.scratch, 0..squares),
            b: B::Store::view(&self.grams[0], 0..squares),
            a: B::Store::view(&self.grams[1], 0..squares),
            modules: &vec![&self.bounds[..]; self.stacks[0].len()],
            rule: Rule { top: usize::MAX, share: 0.0, opposition: false },
        })
    }

    fn apply(&mut self) -> Result<()> {
        let n = Stack::numbers(&self.stacks[0]);
        let squares = B::Store::len(&self.map);
        self.backend.apply(Apply {
            out: B::Store::view_mut(&mut self.resolved, 0..n),
            x: B::Store::view(&self.x[0], 0..n),
            w: B::Store::view(&self.map, 0..squares),
            stacks: &self.stacks[0],
        })
    }

    /// From factors to resolved factors.
    fn chain(&mut self) -> Result<()> {
        self.gram()?;
        self.gate()?;
        self.apply()
    }
}

/// Each operation of LoRA-CR over all modules, and all of them after one another.
fn resolution<B: Timed>(bench: &mut Bench<'_, B>, modules: &[(usize, usize)]) {
    let numbers: [usize; 2] = [
        modules.iter().map(|(o, _)| EDGES * RANK * o).sum(),
        modules.iter().map(|(_, i)| EDGES * RANK * i).sum(),
    ];
    let squares = modules.len() * (EDGES * RANK).pow(2);
    let (b, both) = (bench.backend, numbers[0] + numbers[1]);
    let name = format!("{EDGES} adapters of rank {RANK}, {} modules", modules.len());
    type Step<'a, B> = fn(&mut Resolving<'a, B>) -> Result<()>;
    let steps: [(&str, usize, Step<'_, B>); 5] = [
        ("gram", both + 2 * squares, Resolving::gram),
        ("eigh", 2 * squares, Resolving::eigh),
        ("gate", 3 * squares, Resolving::gate),
        ("apply", 2 * numbers[0] + squares, Resolving::apply),
        ("lora_cr", both + 2 * numbers[0] + 6 * squares, Resolving::chain),
    ];
    for (op, doubles, step) in steps {
        bench.case(op, &name, Work::Bytes(8 * doubles), || {
            let mut resolving = Resolving::new(b, modules)?;
            Ok(move || step(&mut resolving))
        });
    }
}
