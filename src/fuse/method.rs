//! From the updates of one module to one update, by the method asked for.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fuse::coverage::covered;
use crate::fuse::elementwise::Sparse;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::options::{Coverage, DensityScope, Fedsa, Method};
use crate::fuse::ties::Trim;
use crate::fuse::truncate::truncate;
use crate::fuse::{fedavg, fedsa, ffa, ffa_lsq, mean, mean_svd, task_arithmetic};

/// How updates are fused.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fusion {
    /// The method.
    pub method: Method,
    /// The choice that `fedsa` needs.
    pub fedsa: Option<Fedsa>,
    /// λ of `task-arithmetic`, `ties`, `dare` and `dare-ties`.
    pub lambda: f64,
    /// Truncate to this rank by SVD.
    pub rank: Option<usize>,
    /// What an edge says about what its pruning removed.
    pub coverage: Coverage,
    /// What is done to the entries of each update, by the methods that work on them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sparse: Option<Sparse>,
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
        let scaled = [Method::TaskArithmetic, Method::Ties, Method::Dare, Method::DareTies];
        if self.lambda != 1.0 && !scaled.contains(&self.method) {
            let words: Vec<&str> = scaled.iter().map(|m| m.word()).collect();
            return usage(format!(
                "--lambda goes with --method {}, not with {}",
                words.join(", "),
                self.method
            ));
        }
        match (Sparse::of(self.method), &self.sparse) {
            (None, None) => Ok(()),
            (Some(Sparse::Trim(_)), Some(Sparse::Trim(trim))) => trim.check(),
            (Some(Sparse::Drop(_)), Some(Sparse::Drop(drop))) => drop.check(),
            (of, _) => usage(format!(
                "--method {}: expected {} to say which entries are kept",
                self.method,
                match of {
                    None => "nothing",
                    Some(Sparse::Trim(_)) => "a density",
                    Some(Sparse::Drop(_)) => "a probability of dropping",
                }
            )),
        }
    }

    /// Whether the method works on the entries of the updates: its result has no factors of its own.
    pub fn is_elementwise(&self) -> bool {
        Sparse::of(self.method).is_some()
    }

    /// The trimming whose thresholds follow from all modules, where that was asked for.
    pub(crate) fn whole_model(&self) -> Option<&Trim> {
        match &self.sparse {
            Some(Sparse::Trim(trim)) if trim.scope == DensityScope::Model => Some(trim),
            _ => None,
        }
    }

    /// The same with `seed` for what is random.
    pub fn seeded(mut self, seed: u64) -> Fusion {
        if let Some(Sparse::Drop(drop)) = &mut self.sparse {
            drop.seed = seed;
        }
        self
    }

    /// Whether the adapters' ranks must be equal.
    pub fn needs_equal_ranks(&self) -> bool {
        matches!(self.method, Method::Fedavg | Method::Ffa | Method::FfaLsq | Method::Fedsa)
    }

    /// The rank of the result for a batch with this frame, without computing it.
    ///
    /// Refuses mixed ranks where the method averages factors, and, if `as_adapter`, a rank above `min(O, I)`: such an
    /// adapter would be larger than the update it stands for.
    pub fn rank_of(&self, frame: &Frame, as_adapter: bool) -> Result<usize> {
        let ranks = frame.ranks();
        let (o, i) = frame.size;
        let mixed = ranks.windows(2).any(|r| r[0] != r[1]);
        let stacks = match self.method {
            Method::Mean | Method::MeanSvd | Method::TaskArithmetic => true,
            Method::Ffa => frame.columns_differ(),
            Method::Fedavg | Method::FfaLsq | Method::Fedsa => false,
            Method::Ties | Method::Dare | Method::DareTies => {
                return if as_adapter || self.rank.is_some() { Err(self.no_factors()) } else { Ok(o.min(i)) };
            }
        };
        if self.needs_equal_ranks() && mixed {
            return Err(Error::Usage(format!(
                "--method {}: the adapters have ranks {ranks:?} in {}, it needs equal ones; mean and mean-svd take any",
                self.method, frame.module
            )));
        }
        let full = if stacks { frame.rank() } else { ranks[0] };
        let cut = self.rank.or((self.method == Method::MeanSvd).then(|| mean_svd::default_rank(frame)));
        let rank = match cut {
            Some(q) if q < full => q.min(o).min(i),
            _ => full,
        };
        if as_adapter && stacks && rank > o.min(i) {
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

    /// Why a method on entries gives no factors.
    fn no_factors(&self) -> Error {
        Error::Usage(format!(
            "--method {}: the result is of full rank, which no adapter holds, not with --rank either: \
             --merged with --model writes it into the base's weights",
            self.method
        ))
    }

    /// Fuses one module; refuses what [`Fusion::rank_of`] does.
    pub fn fuse(&self, batch: &Batch, as_adapter: bool) -> Result<Fused> {
        self.rank_of(&batch.frame, as_adapter)?;
        let cover: Cow<'_, Batch> = match self.coverage {
            Coverage::Zero => Cow::Borrowed(batch),
            Coverage::Present => Cow::Owned(covered(batch, self.coverage)),
        };
        let cover = cover.as_ref();
        let mut variant = self.method.word().to_owned();
        let (factors, energy_kept) = match self.method {
            Method::Ties | Method::Dare | Method::DareTies => return Err(self.no_factors()),
            Method::Fedavg => (fedavg::fuse(cover)?, 1.0),
            Method::Mean => (mean::fuse(cover)?, 1.0),
            Method::MeanSvd => {
                mean_svd::fuse(cover, self.rank.unwrap_or_else(|| mean_svd::default_rank(&batch.frame)))?
            }
            Method::TaskArithmetic => (task_arithmetic::fuse(cover, self.lambda)?, 1.0),
            Method::FfaLsq => (ffa_lsq::fuse(cover, batch)?, 1.0),
            Method::Ffa => {
                let (factors, which) = ffa::fuse(cover, batch)?;
                variant = which.name().to_owned();
                (factors, 1.0)
            }
            Method::Fedsa => {
                let Some(choice) = self.fedsa else {
                    self.check()?;
                    return Err(Error::Usage("--method fedsa needs --fedsa".into()));
                };
                variant = format!("fedsa_{choice}");
                (fedsa::fuse(cover, batch, choice)?, 1.0)
            }
        };
        let (factors, energy_kept) = match (self.method, self.rank) {
            (Method::MeanSvd, _) | (_, None) => (factors, energy_kept),
            (_, Some(q)) => truncate(factors, q)?,
        };
        Ok(Fused { factors, variant, energy_kept })
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
}
