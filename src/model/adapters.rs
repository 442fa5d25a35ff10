//! LoRA pairs in one flat arena of f32: where each lies, how it starts, how it is read and written.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::{Module, Target};
use crate::ops::linear::{Lora, LoraRows};
use crate::random::{Philox, Purpose};
use crate::tensor::Store;

/// Where an adapter's matrices lie in an arena.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layout {
    modules: BTreeMap<Module, Lora>,
    /// Of [`Layout::uniform`]: the place after the last B.
    end_b: usize,
    end: usize,
}

impl Layout {
    /// A layout whose first matrix will lie at `start`.
    pub fn starting_at(start: usize) -> Layout {
        Layout { end: start, ..Layout::default() }
    }

    /// One rank and scale for all `targets` of all layers of `config`, from place 0: every B first, then every A, so
    /// that what is trained is one range from place 0 on, even where A is frozen.
    pub fn uniform(config: &ModelConfig, targets: &[Target], rank: usize, scale: f32) -> Layout {
        let modules: Vec<Module> = config.modules().filter(|m| targets.contains(&m.target)).collect();
        let dims = |m: &Module| config.dims(m.target, m.layer);
        let mut b = 0;
        let mut a: usize = modules.iter().map(|m| rank * dims(m).0).sum();
        let mut layout = Layout { end_b: a, ..Layout::default() };
        for module in modules {
            let (o, i) = dims(&module);
            layout.modules.insert(module, Lora { a, b, rank, scale });
            a += rank * i;
            b += o * rank;
        }
        layout.end = a;
        layout
    }

    /// Where A and B, or with `freeze_a` the B alone, of [`Layout::uniform`] lie.
    pub fn trained(&self, freeze_a: bool) -> Range<usize> {
        0..if freeze_a { self.end_b } else { self.end }
    }

    /// Adds a pair of `size` `(O, I)`; A comes first, B after it.
    pub fn push(&mut self, module: Module, size: (usize, usize), rank: usize, scale: f32) -> Lora {
        let lora = Lora { a: self.end, b: self.end + rank * size.1, rank, scale };
        self.end = lora.b + size.0 * rank;
        self.modules.insert(module, lora);
        lora
    }

    /// The pair on `module`.
    pub fn get(&self, module: Module) -> Option<Lora> {
        self.modules.get(&module).copied()
    }

    /// All pairs, layer by layer.
    pub fn iter(&self) -> impl Iterator<Item = (Module, Lora)> + '_ {
        self.modules.iter().map(|(m, l)| (*m, *l))
    }

    /// The place after the last matrix.
    pub fn end(&self) -> usize {
        self.end
    }

    /// The largest rank of each target, in the order of [`Target::ALL`].
    pub fn ranks(&self) -> [usize; 7] {
        let mut ranks = [0; 7];
        for (module, lora) in &self.modules {
            let rank = &mut ranks[module.target as usize];
            *rank = lora.rank.max(*rank);
        }
        ranks
    }
}

/// Adapters stacked below one another: copy c of the batch carries `layouts[c]`, or the base alone.
pub struct Stack<'a, S: Store> {
    /// The arena that all layouts lie in.
    pub params: &'a S::Buf<f32>,
    /// One for each copy.
    pub layouts: &'a [Option<&'a Layout>],
}

impl<S: Store> Clone for Stack<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Store> Copy for Stack<'_, S> {}

impl<S: Store> Stack<'_, S> {
    /// C.
    pub fn copies(&self) -> usize {
        self.layouts.len()
    }

    /// The groups of `module` when each copy has `tokens` rows.
    pub(crate) fn groups(&self, module: Module, tokens: usize) -> Vec<LoraRows> {
        self.layouts
            .iter()
            .enumerate()
            .filter_map(|(c, layout)| {
                let lora = layout.and_then(|l| l.get(module))?;
                Some(LoraRows { rows: c * tokens..(c + 1) * tokens, lora })
            })
            .collect()
    }
}

/// Writes the common A₀ of a module into `a` `[R, I]`: `U(−1/√I₀, 1/√I₀)` by place in the full model's `[R, I₀]`, so
/// that models pruned differently start from slices of one matrix (PEFT's distribution; math of Kaiming with a = √5).
///
/// `columns` are the kept columns of a pruned input, ascending, or none for all I₀.
pub fn init_a(a: &mut [f32], module: Module, full_inner: usize, columns: Option<&[usize]>, init_seed: u64) {
    let numbers = Philox::new(init_seed, Purpose::Init.stream(module.number()));
    let inner = columns.map_or(full_inner, <[usize]>::len);
    let bound = 1.0 / (full_inner as f64).sqrt();
    for (r, row) in a.chunks_exact_mut(inner.max(1)).enumerate() {
        for (i, x) in row.iter_mut().enumerate() {
            let column = columns.map_or(i, |c| c[i]);
            let u = numbers.uniform_f64((r * full_inner + column) as u64);
            *x = ((2.0 * u - 1.0) * bound) as f32;
        }
    }
}
