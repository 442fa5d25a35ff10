//! From the updates of one module to one update, by the method asked for.

use std::borrow::Cow;
use std::mem::discriminant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fuse::coverage::covered;
use crate::fuse::elementwise::{Elementwise, Sparse};
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::grams::Grams;
use crate::fuse::linear::Made;
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

    /// Whether [`Fusion::make`] gives a [`Made::Pair`], which is the result.
    pub(super) fn is_linear(&self) -> bool {
        let linear = match self.method {
            Method::Fedsa => self.fedsa != Some(Fedsa::Lsq),
            Method::Fedavg | Method::Ffa | Method::Mean | Method::Fedex | Method::TaskArithmetic => true,
            Method::Tsv | Method::IsoC | Method::PeftLinear | Method::PeftCat => true,
            _ => false,
        };
        linear && self.coverage == Coverage::Zero && self.rank.is_none()
    }

    /// Whether what makes the result follows from the updates' Grams.
    pub(super) fn needs_grams(&self) -> bool {
        matches!(self.method, Method::Tsv | Method::IsoC)
    }

    /// Fuses one module; refuses what [`Fusion::rank_of`] does.
    pub fn fuse(&self, batch: &Batch, as_adapter: bool) -> Result<Fused> {
        self.fuse_with(batch, None, as_adapter)
    }

    /// [`Fusion::fuse`] with the Grams of the updates where they are known already.
    pub(super) fn fuse_with(&self, batch: &Batch, grams: Option<&Grams>, as_adapter: bool) -> Result<Fused> {
        let rank = self.rank_of(&batch.frame, as_adapter)?;
        let cover: Cow<'_, Batch> = match self.coverage {
            Coverage::Zero => Cow::Borrowed(batch),
            Coverage::Present => Cow::Owned(covered(batch, self.coverage)),
        };
        let known = grams.filter(|_| matches!(cover, Cow::Borrowed(_)));
        let cover = cover.as_ref();
        let (made, mut energy_kept, entries) = self.make(cover, batch, known, rank)?;
        let mut factors = match made {
            Made::Factors(factors) => factors,
            Made::Pair(pair) => {
                // A₀ and the B of clients are their own, whatever others lack.
                let (of_b, of_a) = match (self.method, self.fedsa) {
                    (Method::Ffa, _) if !cover.frame.columns_differ() => (cover, batch),
                    (_, Some(Fedsa::Client(_) | Fedsa::Sum)) => (batch, cover),
                    _ => (cover, cover),
                };
                pair.factors(of_b, of_a)?
            }
        };
        // The others were asked for their best of this rank.
        let truncates = !matches!(self.method, Method::MeanSvd | Method::PeftSvd) && entries.is_none();
        if let Some(q) = self.rank.filter(|_| truncates) {
            (factors, energy_kept) = truncate(factors, q)?;
        }
        Ok(Fused { factors, variant: self.variant(&batch.frame)?, energy_kept, entries })
    }

    /// The result, the share of the energy that it keeps, and what it approximates where that is made of entries. `cover`
    /// has its coverage applied, `raw` not; `known` are `cover`'s Grams, where they are known.
    pub(super) fn make(
        &self,
        cover: &Batch,
        raw: &Batch,
        known: Option<&Grams>,
        rank: usize,
    ) -> Result<(Made, f64, Option<Elementwise>)> {
        let frame = &cover.frame;
        let grams = || known.map_or_else(|| Cow::Owned(Grams::of(cover)), Cow::Borrowed);
        let whole = |(factors, kept): (Factors, f64)| Ok((Made::Factors(factors), kept, None));
        let pair = match self.method {
            Method::Fedavg => fedavg::pair(frame),
            Method::Mean => mean::pair(frame),
            Method::TaskArithmetic => task_arithmetic::pair(frame, self.lambda),
            Method::Ffa => ffa::pair(frame),
            Method::Fedsa => match fedsa::pair(frame, self.choice()?)? {
                Some(pair) => pair,
                None => return whole((fedsa::lsq(cover)?, 1.0)),
            },
            Method::Fedex => fedex::pair(frame),
            Method::Tsv => match known {
                Some(grams) => tsv::pair(frame, grams, self.lambda)?,
                None => return whole((tsv::fuse(cover, self.lambda)?, 1.0)),
            },
            Method::IsoC => iso_c::pair(frame, &grams(), self.lambda)?,
            Method::PeftLinear => peft_linear::pair(frame),
            Method::PeftCat => peft_cat::pair(frame),
            Method::Ties | Method::Dare | Method::DareTies => {
                self.check_factors()?;
                let entries = Elementwise::new(self, raw, None)?;
                let (factors, kept) = low_rank::fuse(self, raw, &entries, rank)?;
                return Ok((Made::Factors(factors), kept, Some(entries)));
            }
            Method::MeanSvd => {
                let q = self.rank.unwrap_or_else(|| mean_svd::default_rank(frame));
                return whole(mean_svd::fuse(cover, q)?);
            }
            Method::PeftSvd => return whole(peft_svd::fuse(cover, rank)?),
            Method::FfaLsq => return whole((ffa_lsq::fuse(cover, raw)?, 1.0)),
            Method::KnotsTies => {
                let Some(trim) = self.trim() else {
                    self.check()?;
                    return Err(Error::Usage("--method knots-ties needs a density".into()));
                };
                return whole((knots_ties::fuse(cover, &grams(), trim, self.lambda)?, 1.0));
            }
            Method::LoraLego => {
                let clusters = self.clusters.unwrap_or_else(|| mean_svd::default_rank(frame));
                return whole((lora_lego::fuse(cover, &grams(), clusters, self.seed)?, 1.0));
            }
            Method::Regmean => return whole((regmean::fuse(cover)?, 1.0)),
            Method::CatMerging => return whole((cat_merging::fuse(cover, &grams(), self.lambda)?, 1.0)),
        };
        Ok((Made::Pair(pair), 1.0, None))
    }

    /// What is done to updates of this frame, where the method has several forms.
    pub(super) fn variant(&self, frame: &Frame) -> Result<String> {
        Ok(match self.method {
            Method::Ffa => ffa::variant(frame).name().to_owned(),
            Method::Fedsa => format!("fedsa_{}", self.choice()?),
            method => method.word().to_owned(),
        })
    }

    fn choice(&self) -> Result<Fedsa> {
        self.check()?;
        self.fedsa.ok_or_else(|| Error::Usage("--method fedsa needs --fedsa".into()))
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
    /// What was done, where a method has several forms: `fedavg`, `ffa_ref(0)`, `fedsa_client:1`, …
    pub variant: String,
    /// The share of the energy that truncation kept; 1 without.
    pub energy_kept: f64,
    /// What the factors approximate, of methods that work on entries.
    pub entries: Option<Elementwise>,
}
