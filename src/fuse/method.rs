//! From the updates of one module to one update, by the method asked for.

use std::borrow::Cow;
use std::mem::discriminant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fuse::compare::Maps;
use crate::fuse::coverage::covered;
use crate::fuse::elementwise::{Elementwise, Sparse};
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::grams::Grams;
use crate::fuse::options::{Coverage, DensityScope, Fedsa, Method};
use crate::fuse::ties::Trim;
use crate::fuse::truncate::truncate;
use crate::fuse::{
    cat_merging, fedavg, fedex, fedsa, ffa, ffa_lsq, iso_c, knots_ties, lora_lego, low_rank, mean, mean_svd,
    peft_cat, peft_linear, peft_svd, regmean, task_arithmetic, tsv,
};

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
    /// What is done to the entries of each update, by the methods that work on them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sparse: Option<Sparse>,
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
            sparse: Sparse::of(method),
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
        if self.lambda != 1.0 {
            goes_with("--lambda", self.method, Method::scales)?;
        }
        if self.clusters.is_some() {
            goes_with("--clusters", self.method, |m| m == Method::LoraLego)?;
        }
        if self.clusters == Some(0) {
            return usage("--clusters 0: expected at least 1".into());
        }
        if self.method == Method::KnotsTies && self.whole_model().is_some() {
            return usage(
                "--density-scope model goes with --method ties: the shared basis of knots-ties is a module's own"
                    .into(),
            );
        }
        let of = Sparse::of(self.method);
        if of.as_ref().map(discriminant) == self.sparse.as_ref().map(discriminant) {
            return self.sparse.map_or(Ok(()), |sparse| sparse.check());
        }
        usage(format!(
            "--method {}: expected {} to say which entries are kept",
            self.method,
            match of {
                None => "nothing",
                Some(Sparse::Trim(_)) => "a density",
                Some(Sparse::Drop(_)) => "a probability of dropping",
            }
        ))
    }

    /// Whether the result depends on a seed: that of methods that draw, and that of a search for singular vectors.
    pub fn draws(&self) -> bool {
        self.method.draws() || self.method.is_elementwise() && self.rank.is_some()
    }

    /// Whether the result has factors: that of a method on entries has some at a rank that is asked for alone.
    pub fn has_factors(&self) -> bool {
        !self.method.is_elementwise() || self.rank.is_some()
    }

    /// An error where the result has no factors.
    pub fn check_factors(&self) -> Result<()> {
        if self.has_factors() {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "--method {}: the result is of full rank, which no adapter holds: --rank N approximates it, --merged with \
             --model writes it into the base's weights",
            self.method
        )))
    }

    /// How entries are trimmed, where the method does that.
    pub(crate) fn trim(&self) -> Option<&Trim> {
        match &self.sparse {
            Some(Sparse::Trim(trim)) => Some(trim),
            _ => None,
        }
    }

    /// The trimming whose thresholds follow from all modules, where that was asked for.
    pub(crate) fn whole_model(&self) -> Option<&Trim> {
        self.trim().filter(|trim| trim.scope == DensityScope::Model)
    }

    /// The rank of the result for a batch with this frame, without computing it.
    ///
    /// Refuses mixed ranks where the method averages factors, more clusters than there are units, and, if `as_adapter`,
    /// a result without factors and a rank above `min(O, I)`: such an adapter would be larger than the update it stands
    /// for.
    pub fn rank_of(&self, frame: &Frame, as_adapter: bool) -> Result<usize> {
        let ranks = frame.ranks();
        let (p, (o, i)) = (frame.rank(), frame.size);
        if self.method.is_elementwise() {
            if as_adapter {
                self.check_factors()?;
            }
            return Ok(self.rank.unwrap_or(usize::MAX).min(o).min(i));
        }
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
        self.fuse_with(batch, None, None, as_adapter)
    }

    /// Whether the result is a map of the factors that follows from their Grams.
    pub(super) fn by_maps(&self) -> bool {
        matches!(self.method, Method::Tsv | Method::IsoC) && self.coverage == Coverage::Zero
    }

    /// [`Fusion::fuse`] with the Grams of the updates where they are known already; if `resolution` is given, to a method
    /// [`Fusion::by_maps`], the updates are what it makes of the batch.
    pub(super) fn fuse_with(
        &self,
        batch: &Batch,
        grams: Option<&Grams>,
        resolution: Option<&Maps>,
        as_adapter: bool,
    ) -> Result<Fused> {
        debug_assert!(resolution.is_none() || self.by_maps() && grams.is_some());
        let rank = self.rank_of(&batch.frame, as_adapter)?;
        let cover: Cow<'_, Batch> = match self.coverage {
            Coverage::Zero => Cow::Borrowed(batch),
            Coverage::Present => Cow::Owned(covered(batch, self.coverage)),
        };
        let known = grams.filter(|_| matches!(cover, Cow::Borrowed(_)));
        let cover = cover.as_ref();
        let grams = || known.map_or_else(|| Cow::Owned(Grams::of(cover)), Cow::Borrowed);
        let mut variant = self.method.word().to_owned();
        let (mut energy_kept, mut entries, mut maps) = (1.0, None, None);
        let of = |own: &Maps| match resolution {
            Some(before) => before.then(own).of(&cover.stack),
            None => own.of(&cover.stack),
        };
        let factors = match self.method {
            Method::Ties | Method::Dare | Method::DareTies => {
                self.check_factors()?;
                let own = entries.insert(Elementwise::new(self, batch, None)?);
                let (factors, kept) = low_rank::fuse(self, batch, own, rank)?;
                energy_kept = kept;
                factors
            }
            Method::Fedavg => fedavg::fuse(cover)?,
            Method::Mean => {
                maps = known.map(|_| mean::maps(&cover.frame, &cover.frame.weights));
                mean::fuse(cover)?
            }
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
            Method::TaskArithmetic => {
                maps = known.map(|_| task_arithmetic::maps(&cover.frame, self.lambda));
                task_arithmetic::fuse(cover, self.lambda)?
            }
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
            Method::Fedex => {
                maps = known.map(|_| fedex::maps(&cover.frame));
                fedex::fuse(cover)?
            }
            Method::Tsv => {
                let own = tsv::maps(&cover.frame, &grams(), self.lambda)?;
                let factors = of(&own)?;
                maps = known.map(|_| own);
                factors
            }
            Method::IsoC => {
                let own = iso_c::maps(&cover.frame, &grams(), self.lambda)?;
                let factors = of(&own)?;
                maps = known.map(|_| own);
                factors
            }
            Method::KnotsTies => {
                let Some(trim) = self.trim() else {
                    self.check()?;
                    return Err(Error::Usage("--method knots-ties needs a density".into()));
                };
                knots_ties::fuse(cover, &grams(), trim, self.lambda)?
            }
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
            _ if entries.is_some() => (factors, energy_kept),
            (_, Some(q)) => {
                let rank = factors.rank();
                maps = maps.filter(|_| q >= rank);
                truncate(factors, q)?
            }
        };
        Ok(Fused { factors, maps, variant, energy_kept, entries })
    }
}

/// An error that names the methods that `option` goes with, where `method` is none of them.
pub(crate) fn goes_with(option: &str, method: Method, fits: impl Fn(Method) -> bool) -> Result<()> {
    if fits(method) {
        return Ok(());
    }
    let with: Vec<_> = Method::ALL.iter().filter(|m| fits(**m)).map(|m| m.word()).collect();
    Err(Error::Usage(format!("{option} goes with --method {}, not with {method}", with.join(", "))))
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
            Method::TaskArithmetic
                | Method::KnotsTies
                | Method::Tsv
                | Method::IsoC
                | Method::CatMerging
                | Method::Ties
                | Method::Dare
                | Method::DareTies
        )
    }

    /// Whether the result depends on a seed.
    pub fn draws(self) -> bool {
        matches!(self, Method::LoraLego | Method::Dare | Method::DareTies)
    }

    /// Whether it works on the entries of the updates: its result has no factors of its own, and goes into a merged
    /// checkpoint, or into an adapter that approximates it at a rank.
    pub fn is_elementwise(self) -> bool {
        matches!(self, Method::Ties | Method::Dare | Method::DareTies)
    }

    /// Whether it needs the Gram matrix of each adapter's inputs.
    pub fn needs_input_grams(self) -> bool {
        matches!(self, Method::Regmean | Method::CatMerging)
    }
}

/// The fused update of one module, in factors.
#[derive(Clone, Debug)]
pub struct Fused {
    /// Its factors, B carrying every scale.
    pub factors: Factors,
    /// Them as maps of the updates' own, where the method has such and the Grams are known.
    pub maps: Option<Maps>,
    /// What was done, where a method has several forms: `fedavg`, `ffa_ref(0)`, `fedsa_client:1`, …
    pub variant: String,
    /// The share of the energy that truncation kept; 1 without.
    pub energy_kept: f64,
    /// What the factors approximate, of methods that work on entries.
    pub entries: Option<Elementwise>,
}
