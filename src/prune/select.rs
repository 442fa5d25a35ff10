//! What a ratio leaves of each layer, and which heads and channels those are.

use std::cmp::Ordering;
use std::ops::Range;

use super::groups::GroupScores;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::pruning::KeptLayer;
use crate::checkpoint::sizes::LayerSizes;
use crate::error::{Error, Result};

/// How much goes, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// The share that goes, between 0 and 1, neither of them.
    pub ratio: f64,
    /// The layers that are pruned, all if none; end exclusive.
    pub layers: Option<Range<usize>>,
    /// Kept channels are rounded down to a multiple of this.
    pub round_mlp: usize,
}

impl Cut {
    /// All layers at `ratio`, channels not rounded.
    pub fn new(ratio: f64) -> Cut {
        Cut { ratio, layers: None, round_mlp: 1 }
    }

    /// Whether layer `l` is pruned.
    pub fn prunes(&self, l: usize) -> bool {
        self.layers.as_ref().is_none_or(|r| r.contains(&l))
    }

    /// It is an error if the ratio is no number between 0 and 1, or the layers are not the model's.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        if !(self.ratio > 0.0 && self.ratio < 1.0) {
            let why = format!("ratio {}: expected a number above 0 and below 1", self.ratio);
            return Err(Error::Usage(why));
        }
        if self.round_mlp == 0 {
            return Err(Error::Usage("--round-mlp 0: expected at least 1".into()));
        }
        if let Some(r) = self.layers.as_ref().filter(|r| r.is_empty() || r.end > config.layers) {
            let why = format!(
                "--layers {}..{}: expected a range that is not empty within 0..{}",
                r.start, r.end, config.layers
            );
            return Err(Error::Usage(why));
        }
        Ok(())
    }

    /// The architecture that is left of `config`.
    ///
    /// It is an error where [`Cut::check`] finds one, or a layer would keep no head or no channel.
    pub fn apply(&self, config: &ModelConfig) -> Result<ModelConfig> {
        self.check(config)?;
        let sizes: Vec<LayerSizes> = (0..config.layers)
            .map(|l| match config.layer_sizes(l) {
                whole if self.prunes(l) => whole.at_ratio(self.ratio, config.head_dim, self.round_mlp),
                whole => whole,
            })
            .collect();
        config.pruned(&sizes)
    }
}

/// The `kept` best of `scores` by (score, index), in ascending order of index: of equal scores the lower index goes.
pub fn best(scores: &[f64], kept: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Scores are finite; a sum of nothing may be −0.
    order.sort_by(|&a, &b| {
        scores[a].partial_cmp(&scores[b]).unwrap_or(Ordering::Equal).then_with(|| a.cmp(&b))
    });
    let mut best = order.split_off(scores.len().saturating_sub(kept));
    best.sort_unstable();
    best
}

/// What layer `layer` keeps to have `sizes`. Fails where a score is not finite.
pub fn select(scores: &GroupScores, sizes: LayerSizes, layer: usize) -> Result<KeptLayer> {
    scores.check_finite(layer)?;
    Ok(KeptLayer { kv_heads: best(&scores.kv_heads, sizes.kv_heads), mlp: best(&scores.mlp, sizes.mlp) })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::path::Path;

    /// A `llama` configuration without any file.
    pub(crate) fn config(d: usize, heads: usize, kv: usize, f: usize, l: usize, v: usize) -> ModelConfig {
        let value = json!({"model_type": "llama", "hidden_size": d, "num_attention_heads": heads,
            "num_key_value_heads": kv, "intermediate_size": f, "num_hidden_layers": l, "vocab_size": v,
            "max_position_embeddings": 8192});
        let Value::Object(map) = value else { unreachable!() };
        ModelConfig::from_json(Path::new("config.json"), map).unwrap()
    }

    pub(crate) fn llama3_8b() -> ModelConfig {
        config(4096, 32, 8, 14336, 32, 128256)
    }

    fn parameters(config: &ModelConfig, ratio: f64, layers: Option<Range<usize>>) -> u64 {
        Cut { layers, ..Cut::new(ratio) }.apply(config).unwrap().parameters()
    }

    #[test]
    fn table_3_of_the_paper() {
        let c = llama3_8b();
        assert_eq!(c.parameters(), 8_030_261_248);
        for (ratio, expected) in
            [(0.2, 6_734_745_600), (0.4, 5_271_851_008), (0.6, 3_976_728_576), (0.8, 2_513_833_984)]
        {
            assert_eq!(parameters(&c, ratio, None), expected);
        }
    }

    #[test]
    fn llm_pruners_own_numbers() {
        assert_eq!(parameters(&llama3_8b(), 0.25, Some(4..30)), 6_612_586_496);
        let tiny = config(2048, 32, 4, 5632, 22, 32000);
        assert_eq!(tiny.parameters(), 1_100_048_384);
        assert_eq!(parameters(&tiny, 0.25, Some(4..18)), 945_907_712);
    }

    #[test]
    fn lorams_tables() {
        let three = config(8192, 64, 8, 28672, 80, 128256);
        assert_eq!(parameters(&three, 0.85, Some(4..78)), 17_849_982_976);
        let two = config(8192, 64, 8, 28672, 80, 32000);
        for (ratio, expected) in
            [(0.65, 28_099_436_544), (0.75, 21_488_738_304), (0.85, 16_272_924_672), (0.95, 9_662_226_432)]
        {
            assert_eq!(parameters(&two, ratio, Some(4..78)), expected, "{ratio}");
        }
        let thirteen = config(5120, 40, 40, 13824, 40, 32000);
        assert_eq!(parameters(&thirteen, 0.65, Some(3..37)), 6_005_662_720);
    }

    #[test]
    fn channels_are_rounded_down() {
        let cut = Cut { round_mlp: 256, ..Cut::new(0.6) };
        assert_eq!(cut.apply(&llama3_8b()).unwrap().mlp, 5632);
        assert_eq!(Cut::new(0.3745).apply(&llama3_8b()).unwrap().kv_heads, 5);
    }

    #[test]
    fn what_has_no_meaning_is_refused() {
        let c = llama3_8b();
        let refused = |cut: Cut, expected: &str| {
            let err = cut.apply(&c).unwrap_err();
            assert_eq!(err.exit_code(), 2);
            assert!(err.to_string().contains(expected), "{err}");
        };
        for ratio in [0.0, 1.0, f64::NAN, -0.5, 1.5, f64::INFINITY] {
            refused(Cut::new(ratio), "expected a number above 0 and below 1");
        }
        refused(Cut::new(0.99999), "layer 0 would keep 0 of 32 heads");
        refused(Cut { round_mlp: 20000, ..Cut::new(0.2) }, "0 of 14336 MLP channels");
        refused(Cut { round_mlp: 0, ..Cut::new(0.2) }, "--round-mlp 0");
        for layers in [0..33, 5..5, Range { start: 6, end: 5 }] {
            refused(Cut { layers: Some(layers), ..Cut::new(0.2) }, "within 0..32");
        }
    }

    #[test]
    fn of_equal_scores_the_lower_index_goes() {
        assert_eq!(best(&[1.0, 1.0, 2.0, 1.0], 2), [2, 3]);
        assert_eq!(best(&[0.0, -0.0, 0.0], 1), [2]);
        assert_eq!(best(&[3.0, 1.0], 5), [0, 1]);
        assert!(best(&[], 0).is_empty());
    }

    #[test]
    fn nan_is_refused() {
        let scores = GroupScores { kv_heads: vec![1.0, f64::NAN], mlp: vec![1.0] };
        let sizes = LayerSizes { heads: 1, kv_heads: 1, mlp: 1 };
        assert!(select(&scores, sizes, 3).unwrap_err().to_string().contains("layer 3"));
    }

    proptest! {
        /// Indices ascend, are as many as asked for, and nothing that goes beats anything that stays.
        #[test]
        fn the_best_are_kept(scores in proptest::collection::vec(prop_oneof![0.0..1.0f64, Just(0.5)], 0..40), n in 0usize..45) {
            let kept = best(&scores, n);
            prop_assert_eq!(kept.len(), n.min(scores.len()));
            prop_assert!(kept.windows(2).all(|w| w[0] < w[1]));
            for gone in (0..scores.len()).filter(|i| !kept.contains(i)) {
                for &stays in &kept {
                    prop_assert!((scores[gone], gone) < (scores[stays], stays));
                }
            }
        }

        /// Where one more is kept, the others stay: smaller ratios keep supersets.
        #[test]
        fn kept_sets_are_nested(scores in proptest::collection::vec(0.0..1.0f64, 1..40), n in 0usize..40) {
            let (fewer, more) = (best(&scores, n), best(&scores, n + 1));
            prop_assert!(fewer.iter().all(|i| more.contains(i)));
        }

        /// Any ratio between 0 and 1 is refused, or leaves at least one and never more than a smaller one.
        #[test]
        fn larger_ratios_leave_less(a in 0.001..0.999f64, b in 0.001..0.999f64, round in 1usize..9) {
            let c = config(64, 8, 4, 60, 2, 32);
            let (low, high) = (a.min(b), a.max(b));
            let at = |ratio| Cut { round_mlp: round, ..Cut::new(ratio) }.apply(&c);
            if let (Ok(l), Ok(h)) = (at(low), at(high)) {
                let (l, h) = (l.layer_sizes(0), h.layer_sizes(0));
                prop_assert!(h.kv_heads <= l.kv_heads && h.mlp <= l.mlp && h.kv_heads > 0 && h.mlp > 0);
                prop_assert_eq!(h.mlp % round, 0);
                prop_assert_eq!(h.heads, 2 * h.kv_heads);
            }
        }
    }
}
