//! The sizes of one layer, and what a pruning ratio leaves of them.

use super::module::Target;

/// What pruning can change about a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerSizes {
    /// Query heads H.
    pub heads: usize,
    /// Key/value heads G; divides H.
    pub kv_heads: usize,
    /// MLP channels F.
    pub mlp: usize,
}

impl LayerSizes {
    /// `(O, I)` of a linear at model width `hidden` and head width `head_dim`.
    pub fn dims(&self, target: Target, hidden: usize, head_dim: usize) -> (usize, usize) {
        match target {
            Target::Q => (self.heads * head_dim, hidden),
            Target::K | Target::V => (self.kv_heads * head_dim, hidden),
            Target::O => (hidden, self.heads * head_dim),
            Target::Gate | Target::Up => (self.mlp, hidden),
            Target::Down => (hidden, self.mlp),
        }
    }

    /// The sizes that LLM-Pruner leaves at `ratio`: of `n` rows `n − trunc(n (1 − ratio))` go, in f64; whole groups of
    /// `head_dim` key rows with their query heads, single MLP channels, the kept channels rounded down to a multiple
    /// of `round_mlp`. Sizes may come out as 0, which the caller refuses.
    pub fn at_ratio(&self, ratio: f64, head_dim: usize, round_mlp: usize) -> LayerSizes {
        let kept = |n: usize| (n as f64 * (1.0 - ratio)) as usize;
        let rows = self.kv_heads * head_dim;
        let removed = rows.saturating_sub(kept(rows)) / head_dim.max(1);
        let kv_heads = self.kv_heads.saturating_sub(removed);
        let mlp = kept(self.mlp).min(self.mlp);
        LayerSizes {
            heads: kv_heads * (self.heads / self.kv_heads.max(1)),
            kv_heads,
            mlp: mlp - mlp % round_mlp.max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3_8B: LayerSizes = LayerSizes { heads: 32, kv_heads: 8, mlp: 14336 };

    #[test]
    fn the_papers_table_3() {
        for (ratio, heads, kv_heads, mlp) in
            [(0.2, 28, 7, 11468), (0.4, 20, 5, 8601), (0.6, 16, 4, 5734), (0.8, 8, 2, 2867)]
        {
            assert_eq!(LLAMA3_8B.at_ratio(ratio, 128, 1), LayerSizes { heads, kv_heads, mlp });
        }
        assert_eq!(LLAMA3_8B.at_ratio(0.6, 128, 256).mlp, 5632);
    }

    #[test]
    fn just_below_an_eighth_three_groups_go() {
        // math.md 1.4: ceil((1 − 0.3745) 8) would keep 6.
        assert_eq!(LLAMA3_8B.at_ratio(0.3745, 128, 1).kv_heads, 5);
        assert_eq!(LLAMA3_8B.at_ratio(0.0, 128, 1), LLAMA3_8B);
        assert_eq!(LLAMA3_8B.at_ratio(1.0, 128, 1), LayerSizes { heads: 0, kv_heads: 0, mlp: 0 });
    }
}
