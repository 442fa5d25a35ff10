//! From the updates of one module to one update, by the method asked for.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fuse::coverage::covered;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::grams::Grams;
use crate::fuse::options::{Coverage, Fedsa, Method};
use crate::fuse::truncate::truncate;
use crate::fuse::{
    cat_merging, fedavg, fedex, fedsa, ffa, ffa_lsq, iso_c, knots_ties, lora_lego, mean, mean_svd, peft_cat,
    peft_linear, peft_svd, regmean, task_arithmetic, tsv,
};

/// `--density` where none is asked for.
pub const DENSITY: f64 = 0.2;

/// How updates are fused.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fusion {
    /// The method.
    pub method: Method,
    /// The choice that `fedsa` needs.
    pub fedsa: Option<Fedsa>,
    /// λ, the factor of the result, of methods that have one.
    pub lambda: f64,
    /// Truncate to this rank by SVD.
    pub rank: Option<usize>,
    /// What an edge says about what its pruning removed.
    pub coverage: Coverage,
    /// The share of entries that `knots-ties` keeps of each update.
    pub density: f64,
    /// The clusters of `lora-lego`; by default the largest rank.
    pub clusters: Option<usize>,
    /// The seed of methods that draw.
    pub seed: u64,
}

impl Fusion {
    /// The method with its defaults; fails for `fedsa` without its choice.
    pub fn new(method: Method, fedsa: Option<Fedsa>) -> Result<Fusion> {
        let fusion = Fusion {
            method,
            fedsa,
            lambda: 1.0,
            rank: None,
            coverage: Coverage::Zero,
            density: DENSITY,
            clusters: None,
            seed: 0,
        };
        fusion.check()?;
        Ok(fusion)
    }

    /// Whether the options go together.
    pub fn check(&self) -> Result<()> {
        let usage = |why: String| Err(Error::Usage(why));
        match (self.method, self.fedsa) {
            (Method::Fedsa, None) => {
                return usage(format!("--method fedsa needs --fedsa, one of\n{}", Fedsa::CHOICES));
            }
            (m, Some(choice)) if m != Method::Fedsa => {
                return usage(format!("--fedsa {choice} goes with --method fedsa, not with {m}"));
            }
            _ => {}
        }
        if self.rank == Some(0) {
            return usage("--rank 0: expected at least 1".into());
        }
        if !self.lambda.is_finite() {
            return usage(format!("--lambda {}: expected a finite number", self.lambda));
        }
        if self.lambda != 1.0 && !self.method.scales() {
            let with: Vec<_> = Method::ALL.iter().filter(|m| m.scales()).map(|m| m.word()).collect();
            return usage(format!(
                "--lambda goes with --method {}, not with {}",
                with.join(", "),
                self.method
            ));
        }
        if !(self.density > 0.0 && self.density <= 1.0) {
            return usage(format!("--density {}: expected more than 0 and at most 1", self.density));
        }
        if self.density != DENSITY && self.method != Method::KnotsTies {
            return usage(format!("--density goes with --method knots-ties, not with {}", self.method));
        }
        match self.clusters {
            Some(0) => usage("--clusters 0: expected at least 1".into()),
            Some(_) if self.method != Method::LoraLego => {
                usage(format!("--clusters goes with --method lora-lego, not with {}", self.method))
            }
            _ => Ok(()),
        }
    }

    /// The rank of the result for a batch with this frame, without computing it.
    ///
    /// Refuses mixed ranks where the method averages factors, more clusters than there are units, and, if `as_adapter`, a
    /// rank above `min(O, I)`: such an adapter would be larger than the update it stands for.
    pub fn rank_of(&self, frame: &Frame, as_adapter: bool) -> Result<usize> {
        let ranks = frame.ranks();
        let (p, (o, i)) = (frame.rank(), frame.size);
        if self.method.needs_equal_ranks() && ranks.windows(2).any(|r| r[0] != r[1]) {
            return Err(Error::Usage(format!(
                "--method {}: the adapters have ranks {ranks:?} in {}, it needs equal ones; mean and mean-svd take any",
                self.method, frame.module
            )));
        }
        let largest = ranks.iter().copied().max().unwrap_or(0);
        let clusters = self.clusters.unwrap_or(largest);
        if self.method == Method::LoraLego && clusters > p {
            return Err(Error::Usage(format!(
                "--clusters {clusters}: the adapters have {p} units, their ranks {ranks:?}, in {}, expected at most \
                 as many",
                frame.module
            )));
        }
        let stacked = match self.method {
            Method::Fedavg | Method::FfaLsq | Method::Fedsa | Method::PeftLinear => false,
            Method::Ffa => frame.columns_differ(),
            _ => true,
        };
        let full = match self.method {
            Method::LoraLego => clusters,
            Method::KnotsTies => p.min(o),
            Method::IsoC => p.min(o).min(i),
            Method::PeftSvd => self.rank.unwrap_or(largest).min(p).min(o).min(i),
            _ if stacked => p,
            _ => ranks[0],
        };
        let cut = self.rank.or((self.method == Method::MeanSvd).then_some(largest));
        let rank = match cut {
            Some(q) if q < full => q.min(o).min(i),
            _ => full,
        };
        if as_adapter && stacked && rank > o.min(i) {
            return Err(Error::Usage(format!(
                "--method {}: the exact result has rank {rank} in {}, more than the {} of a {o} x {i} update; \
                 --rank N truncates it, --merged writes it into the base's weights",
                self.method,
                frame.module,
                o.min(i)
            )));
        }
        Ok(rank)
    }

    /// Fuses one module; refuses what [`Fusion::rank_of`] does.
    pub fn fuse(&self, batch: &Batch, as_adapter: bool) -> Result<Fused> {
        self.fuse_with(batch, None, as_adapter)
    }

    /// [`Fusion::fuse`] with the batch's Grams where they are known already.
    pub fn fuse_with(&self, batch: &Batch, grams: Option<&Grams>, as_adapter: bool) -> Result<Fused> {
        let rank = self.rank_of(&batch.frame, as_adapter)?;
        let cover: Cow<'_, Batch> = match self.coverage {
            Coverage::Zero => Cow::Borrowed(batch),
            Coverage::Present => Cow::Owned(covered(batch, self.coverage)),
        };
        let known = grams.filter(|_| matches!(cover, Cow::Borrowed(_)));
        let cover = cover.as_ref();
        let grams = || known.map_or_else(|| Cow::Owned(Grams::of(cover)), Cow::Borrowed);
        let mut variant = self.method.word().to_owned();
        let mut energy_kept = 1.0;
        let factors = match self.method {
            Method::Fedavg => fedavg::fuse(cover)?,
            Method::Mean => mean::fuse(cover)?,
            Method::MeanSvd => {
                let q = self.rank.unwrap_or_else(|| mean_svd::default_rank(&batch.frame));
                let (factors, kept) = mean_svd::fuse(cover, q)?;
                energy_kept = kept;
                factors
            }
            Method::PeftSvd => {
                let (factors, kept) = peft_svd::fuse(cover, rank)?;
                energy_kept = kept;
                factors
            }
            Method::TaskArithmetic => task_arithmetic::fuse(cover, self.lambda)?,
            Method::FfaLsq => ffa_lsq::fuse(cover, batch)?,
            Method::Ffa => {
                let (factors, which) = ffa::fuse(cover, batch)?;
                variant = which.name().to_owned();
                factors
            }
            Method::Fedsa => {
                let Some(choice) = self.fedsa else {
                    self.check()?;
                    return Err(Error::Usage("--method fedsa needs --fedsa".into()));
                };
                variant = format!("fedsa_{choice}");
                fedsa::fuse(cover, batch, choice)?
            }
            Method::Fedex => fedex::fuse(cover)?,
            Method::Tsv => tsv::fuse(cover, &grams(), self.lambda)?,
            Method::IsoC => iso_c::fuse(cover, &grams(), self.lambda)?,
            Method::KnotsTies => knots_ties::fuse(cover, &grams(), self.density, self.lambda)?,
            Method::LoraLego => {
                let clusters = self.clusters.unwrap_or_else(|| mean_svd::default_rank(&batch.frame));
                lora_lego::fuse(cover, &grams(), clusters, self.seed)?
            }
            Method::Regmean => regmean::fuse(cover)?,
            Method::CatMerging => cat_merging::fuse(cover, &grams(), self.lambda)?,
            Method::PeftLinear => peft_linear::fuse(cover)?,
            Method::PeftCat => peft_cat::fuse(cover)?,
        };
        let (factors, energy_kept) = match (self.method, self.rank) {
            (Method::MeanSvd | Method::PeftSvd, _) | (_, None) => (factors, energy_kept),
            (_, Some(q)) => truncate(factors, q)?,
        };
        Ok(Fused { factors, variant, energy_kept })
    }
}

impl Method {
    /// Whether the adapters' ranks must be equal.
    pub fn needs_equal_ranks(self) -> bool {
        matches!(self, Method::Fedavg | Method::Ffa | Method::FfaLsq | Method::Fedsa | Method::PeftLinear)
    }

    /// Whether `--lambda` is a factor of the result.
    pub fn scales(self) -> bool {
        matches!(
            self,
            Method::TaskArithmetic | Method::KnotsTies | Method::Tsv | Method::IsoC | Method::CatMerging
        )
    }

    /// Whether the result depends on a seed.
    pub fn draws(self) -> bool {
        self == Method::LoraLego
    }

    /// Whether it needs the Gram matrix of each adapter's inputs.
    pub fn needs_input_grams(self) -> bool {
        matches!(self, Method::Regmean | Method::CatMerging)
    }
}

/// The fused update of one module.
#[derive(Clone, Debug)]
pub struct Fused {
    /// Its factors, B carrying every scale.
    pub factors: Factors,
    /// What was done, where a method has several forms: `fedavg`, `ffa_ref(0)`, `fedsa_client:1`, …
    pub variant: String,
    /// The share of the energy that truncation kept; 1 without.
    pub energy_kept: f64,
}
