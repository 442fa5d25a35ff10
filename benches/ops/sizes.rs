//! What is measured: models, and how large.

/// Real sizes, or such as an emulated device manages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Full,
    Toy,
}

impl Scale {
    /// What `ANABRANCH_BENCH_SIZES` says.
    pub fn asked() -> Scale {
        match std::env::var("ANABRANCH_BENCH_SIZES").as_deref() {
            Err(_) | Ok("full") => Scale::Full,
            Ok("toy") => Scale::Toy,
            Ok(other) => panic!("ANABRANCH_BENCH_SIZES is {other:?}, expected full or toy"),
        }
    }
}

/// A layer as pruning leaves it.
#[derive(Clone, Copy)]
pub struct Layer {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// MLP channels.
    pub mlp: usize,
}

/// A model's sizes.
#[derive(Clone)]
pub struct Model {
    /// T.
    pub tokens: usize,
    /// D.
    pub width: usize,
    /// K.
    pub head_dim: usize,
    /// V.
    pub vocab: usize,
    /// Full, then pruned more and more.
    pub layers: Vec<Layer>,
    /// Lengths of packed documents, which are T tokens together.
    pub documents: Vec<Vec<usize>>,
}

/// LoRA's.
pub const RANK: usize = 8;
/// Layers of LLaMA-3-8B.
pub const DEPTH: usize = 32;
/// Parameters of its adapter.
pub const ADAPTER: usize = 20_971_520;

/// Pruned by 0, 0.2, 0.4, 0.6 and 0.8.
fn llama_layers() -> Vec<Layer> {
    [(32, 8, 14336), (28, 7, 11468), (20, 5, 8601), (16, 4, 5734), (8, 2, 2867)]
        .map(|(heads, kv_heads, mlp)| Layer { heads, kv_heads, mlp })
        .to_vec()
}

impl Model {
    /// LLaMA-3-8B with batches of `tokens`.
    fn llama(tokens: usize) -> Model {
        let long = tokens.min(2048);
        Model {
            tokens,
            width: 4096,
            head_dim: 128,
            vocab: 128_256,
            layers: llama_layers(),
            documents: vec![vec![long; tokens / long], vec![256; tokens / 256]],
        }
    }

    /// Its proportions, in miniature.
    fn toy() -> Model {
        let layers = [(4, 2, 224), (2, 1, 89)].map(|(heads, kv_heads, mlp)| Layer { heads, kv_heads, mlp });
        Model {
            tokens: 40,
            width: 64,
            head_dim: 16,
            vocab: 300,
            layers: layers.to_vec(),
            documents: vec![vec![40], vec![10; 4]],
        }
    }

    /// What a GPU is measured with.
    pub fn on_gpu(scale: Scale) -> Vec<Model> {
        match scale {
            Scale::Full => vec![Model::llama(8192)],
            Scale::Toy => vec![Model::toy()],
        }
    }

    /// What the CPU is measured with: also a 157 M-parameter model, and the demo's.
    pub fn on_cpu(scale: Scale) -> Vec<Model> {
        if scale == Scale::Toy {
            return vec![Model::toy()];
        }
        let small = Model {
            tokens: 1024,
            width: 1024,
            head_dim: 64,
            vocab: 32_000,
            layers: vec![
                Layer { heads: 16, kv_heads: 4, mlp: 2816 },
                Layer { heads: 8, kv_heads: 2, mlp: 1127 },
            ],
            documents: vec![vec![256; 4]],
        };
        let sentences: Vec<usize> = (0..43).map(|i| 30 + i * 7 % 11).collect();
        let demo = Model {
            tokens: sentences.iter().sum(),
            width: 192,
            head_dim: 32,
            vocab: 208,
            layers: vec![Layer { heads: 16, kv_heads: 8, mlp: 512 }],
            documents: vec![sentences],
        };
        vec![Model::llama(512), small, demo]
    }

    /// The layer that whole-layer cases take besides the full one: the last but one, 0.6 of LLaMA-3-8B.
    pub fn pruned(&self) -> Option<Layer> {
        let at = self.layers.len().checked_sub(2).filter(|&n| n > 0).unwrap_or(self.layers.len() - 1);
        (at > 0).then(|| self.layers[at])
    }
}
