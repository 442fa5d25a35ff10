//! `certificate.json`: what a fusion did, module by module and in all.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fuse::compare::Compared;
use crate::fuse::conflict::{Score, trace};
use crate::fuse::elementwise::KeptEntries;
use crate::fuse::factors::Frame;
use crate::fuse::measure::Measured;
use crate::fuse::pipeline::Recipe;

/// The file's name.
pub const CERTIFICATE: &str = "certificate.json";
/// What the file calls itself.
const FORMAT: &str = "anabranch-certificate/1";

/// The certificate of one module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModuleCertificate {
    /// Counted from 0.
    pub layer: usize,
    /// `q`, `k`, `v`, `o`, `gate`, `up` or `down`.
    pub target: String,
    /// The adapters that have the module, by position.
    pub adapters: Vec<usize>,
    /// What was done: `fedavg`, `ffa_ref(0)`, `fedsa_client:1`, …
    pub variant: String,
    /// The rank of the result before padding.
    pub rank: usize,
    /// `‖got − expected‖ / ‖expected‖` of the method's definition, got as written (factors, or the change of
    /// a merged weight); `‖got‖` where expected is 0. Expected is the truncated result where the method has factors of
    /// its own, and the result before it is truncated where it works on entries.
    pub error: f64,
    /// `‖got − Σ wᵢDᵢ‖ / ‖Σ wᵢDᵢ‖` of the (resolved) updates; `‖got‖` where their mean is 0.
    pub distance_to_mean: f64,
    /// The share of the energy that truncation kept.
    pub energy_kept: f64,
    /// The cₑ for which `Σ cₑ Dₑ` of the updates as read is closest to the result.
    pub effective_scale: Vec<f64>,
    /// c̄ of the updates as read.
    pub before: Score,
    /// c̄ of the updates after `--resolve`, computed anew from them, where it was asked for.
    pub after: Option<Score>,
    /// `Σ ‖D_i^CR‖² / Σ ‖Dᵢ‖²`, where `--resolve` was asked for.
    pub energy_resolved: Option<f64>,
    /// What was kept of each update, by methods that work on entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<KeptEntries>>,
}

/// Least, mean and largest of a number over the modules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The mean.
    pub mean: f64,
    /// The largest.
    pub max: f64,
}

/// The certificate of a fusion.
#[derive(Clone, Debug, Serialize)]
pub struct Certificate {
    /// `anabranch-certificate/1`.
    pub format: &'static str,
    /// What was asked for.
    pub recipe: Recipe,
    /// The weight of each adapter, before any was missing.
    pub weights: Vec<f64>,
    /// The base's fingerprint, where an adapter knows it.
    pub base_fingerprint: Option<String>,
    /// The dtype of the factors or weights that were written.
    pub dtype: String,
    /// How many modules took which form of the method.
    pub variants: BTreeMap<String, usize>,
    /// `‖got − expected‖ / ‖expected‖`.
    pub error: Spread,
    /// `‖got − Σ wᵢDᵢ‖ / ‖Σ wᵢDᵢ‖`.
    pub distance_to_mean: Spread,
    /// The share of the energy that truncation kept.
    pub energy_kept: Spread,
    /// The mean effective scale of each adapter over the modules that it has.
    pub effective_scale: Vec<f64>,
    /// How many entries of each adapter were kept in all modules, by methods that work on entries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Vec<u64>>,
    /// c̄ of the updates as read, mean over modules.
    pub before: Score,
    /// c̄ of the resolved updates, mean over modules.
    pub after: Option<Score>,
    /// Every module, by layer and in the order of the forward pass.
    pub modules: Vec<ModuleCertificate>,
}

impl ModuleCertificate {
    /// Of a result of rank `rank` that was `measured`, made by `variant` without truncation.
    pub fn of(
        frame: &Frame,
        compared: &Compared,
        variant: &str,
        rank: usize,
        measured: Measured,
    ) -> ModuleCertificate {
        let energy_resolved = compared.resolved.as_ref().map(|r| {
            let total = trace(&compared.products);
            if total > 0.0 { trace(&r.products) / total } else { 1.0 }
        });
        ModuleCertificate {
            layer: frame.module.layer,
            target: frame.module.target.short().to_owned(),
            adapters: frame.members.clone(),
            variant: variant.to_owned(),
            rank,
            error: measured.error,
            distance_to_mean: measured.distance_to_mean,
            energy_kept: 1.0,
            effective_scale: measured.effective_scale,
            before: compared.score,
            after: compared.resolved.as_ref().map(|r| r.score),
            energy_resolved,
            kept: None,
        }
    }
}

impl Spread {
    /// Of these numbers; zeros of none.
    pub fn of(x: impl Iterator<Item = f64> + Clone) -> Spread {
        let n = x.clone().count();
        if n == 0 {
            return Spread::default();
        }
        Spread {
            min: x.clone().fold(f64::INFINITY, f64::min),
            mean: x.clone().sum::<f64>() / n as f64,
            max: x.fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

impl Certificate {
    /// Sums up the modules of a fusion of adapters with these `weights`, written in `dtype`.
    pub fn new(
        recipe: Recipe,
        weights: &[f64],
        base_fingerprint: Option<&str>,
        dtype: &str,
        modules: Vec<ModuleCertificate>,
    ) -> Certificate {
        let mut variants = BTreeMap::new();
        let mut scales = vec![(0.0, 0usize); weights.len()];
        let mut kept: Option<Vec<u64>> = None;
        for m in &modules {
            for (&e, k) in m.adapters.iter().zip(m.kept.iter().flatten()) {
                kept.get_or_insert_with(|| vec![0; weights.len()])[e] += k.kept;
            }
            *variants.entry(m.variant.clone()).or_insert(0) += 1;
            for (&e, c) in m.adapters.iter().zip(&m.effective_scale) {
                scales[e].0 += c;
                scales[e].1 += 1;
            }
        }
        let after = modules.iter().map(|m| m.after).collect::<Option<Vec<_>>>();
        Certificate {
            format: FORMAT,
            recipe,
            weights: weights.to_vec(),
            base_fingerprint: base_fingerprint.map(str::to_owned),
            dtype: dtype.to_owned(),
            variants,
            error: Spread::of(modules.iter().map(|m| m.error)),
            distance_to_mean: Spread::of(modules.iter().map(|m| m.distance_to_mean)),
            energy_kept: Spread::of(modules.iter().map(|m| m.energy_kept)),
            effective_scale: scales.into_iter().map(|(sum, n)| sum / n.max(1) as f64).collect(),
            kept,
            before: Score::mean(modules.iter().map(|m| &m.before)),
            after: after.map(|scores| Score::mean(scores.iter())),
            modules,
        }
    }
}
