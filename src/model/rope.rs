//! Rope tables, made on the host in f32 as transformers makes them: `inv_freq`, then position × `inv_freq`, each
//! rounded, then cos and sin times the attention factor.

use std::f64::consts::PI;
use std::ops::Range;

use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::rope::{RopeKind, Yarn};

/// `inv_freq[j]` for `j` below K/2, and the factor on cos and sin, for a sequence of `tokens` tokens.
///
/// Only the dynamic kind depends on the length.
pub fn inv_freq(config: &ModelConfig, tokens: usize) -> (Vec<f32>, f32) {
    let dim = config.head_dim;
    let theta = config.rope.theta;
    let plain = |theta: f64| -> Vec<f32> {
        (0..dim / 2)
            .map(|j| {
                let exponent = (2 * j) as f32 / dim as f32;
                (1.0 / f64::from((theta.powf(f64::from(exponent))) as f32)) as f32
            })
            .collect()
    };
    match config.rope.kind {
        RopeKind::Default => (plain(theta), 1.0),
        RopeKind::Linear { factor } => (plain(theta).into_iter().map(|f| f / factor as f32).collect(), 1.0),
        RopeKind::Dynamic { factor } => {
            let positions = config.positions as f64;
            let length = (tokens as f64).max(positions);
            let grown = factor * length / positions - (factor - 1.0);
            (plain(theta * grown.powf(dim as f64 / (dim as f64 - 2.0))), 1.0)
        }
        RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
            // In f32, step by step: transformers' own rounding is what a model was trained with.
            let [factor, low, high] = [factor, low_freq_factor, high_freq_factor].map(|x| x as f32);
            let original = original_positions as f32;
            let scaled = plain(theta).into_iter().map(|f| {
                let wavelength = (2.0 * PI) as f32 / f;
                if wavelength < original / high {
                    f
                } else if wavelength > original / low {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            });
            (scaled.collect(), 1.0)
        }
        RopeKind::Yarn(yarn) => (yarn_freq(&plain(theta), theta, yarn), yarn_factor(yarn)),
    }
}

/// Frequencies that turn more than `beta_fast` times within the original length are kept, those below `beta_slow` are
/// divided by the factor, with a linear ramp between (Peng et al., as transformers computes it).
fn yarn_freq(plain: &[f32], theta: f64, yarn: Yarn) -> Vec<f32> {
    let dim = (2 * plain.len()) as f64;
    let place = |rotations: f64| {
        dim * (yarn.original_positions as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (place(yarn.beta_fast), place(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    low = low.max(0.0);
    high = high.min(dim - 1.0);
    if low == high {
        high += 0.001;
    }
    plain
        .iter()
        .enumerate()
        .map(|(j, &f)| {
            let ramp = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let f = f64::from(f);
            (f / yarn.factor * ramp + f * (1.0 - ramp)) as f32
        })
        .collect()
}

fn yarn_factor(yarn: Yarn) -> f32 {
    let scale = |m: f64| if yarn.factor <= 1.0 { 1.0 } else { 0.1 * m * yarn.factor.ln() + 1.0 };
    let derived = match (yarn.mscale, yarn.mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
        _ => scale(1.0),
    };
    yarn.attention_factor.unwrap_or(derived) as f32
}

/// A run of tokens of one document: their positions, and how long the document is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Positions in the document.
    pub positions: Range<usize>,
    /// Tokens of the document as far as it is known: what the dynamic kind scales by.
    pub length: usize,
}

/// Rows of cos and sin, and who uses which.
///
/// Rows `0..base` are the positions of documents that need no scaling of their own; where the kind is dynamic, each
/// document longer than the model's positions has rows of its own behind them, made batch by batch.
#[derive(Clone, Debug)]
pub struct Tables {
    config: ModelConfig,
    base: usize,
}

/// Rows to put into the device's tables, from row `first`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableRows {
    /// Where they go.
    pub first: usize,
    /// `[rows, K/2]`.
    pub cos: Vec<f32>,
    /// `[rows, K/2]`.
    pub sin: Vec<f32>,
}

impl Tables {
    /// Tables for documents of at most `longest` tokens.
    pub fn new(config: &ModelConfig, longest: usize) -> Tables {
        let base = if dynamic(config) { longest.min(config.positions) } else { longest };
        Tables { config: config.clone(), base }
    }

    /// K/2: numbers in a row.
    pub fn half(&self) -> usize {
        self.config.head_dim / 2
    }

    /// Rows that the device must have for batches of at most `tokens` tokens.
    pub fn rows(&self, tokens: usize) -> usize {
        self.base + if dynamic(&self.config) { tokens } else { 0 }
    }

    /// The rows that are the same for every batch.
    pub fn fixed(&self) -> TableRows {
        let mut rows = TableRows::default();
        self.extend(&mut rows, 0..self.base, self.base);
        rows
    }

    /// The row of each token of `runs`, and the rows that this batch needs besides the fixed ones.
    pub fn place(&self, runs: &[Run]) -> (Vec<u32>, TableRows) {
        let mut own = TableRows { first: self.base, ..TableRows::default() };
        let mut places = Vec::with_capacity(runs.iter().map(|r| r.positions.len()).sum());
        let mut next = self.base;
        for run in runs {
            let first = if dynamic(&self.config) && run.length > self.config.positions {
                self.extend(&mut own, run.positions.clone(), run.length);
                let first = next;
                next += run.positions.len();
                first
            } else {
                run.positions.start
            };
            places.extend((first..first + run.positions.len()).map(|r| r as u32));
        }
        (places, own)
    }

    fn extend(&self, rows: &mut TableRows, positions: Range<usize>, length: usize) {
        let (freq, factor) = inv_freq(&self.config, length);
        for p in positions {
            for &f in &freq {
                let angle = f64::from(p as f32 * f);
                rows.cos.push(angle.cos() as f32 * factor);
                rows.sin.push(angle.sin() as f32 * factor);
            }
        }
    }
}

fn dynamic(config: &ModelConfig) -> bool {
    matches!(config.rope.kind, RopeKind::Dynamic { .. })
}
