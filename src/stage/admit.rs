//! Which of the adapters given are fused: those whose signatures hold, and whose updates are as large as they may be.

use std::path::PathBuf;

use serde::Serialize;

use super::common::Common;
use super::fuse::FuseOptions;
use super::trust::{Admitted, Gate};
use crate::error::{Error, Result};
use crate::fuse::inputs::Inputs;
use crate::fuse::options::Fedsa;
use crate::fuse::outliers::{Norms, Outlier};
use crate::fuse::weights::Weights;

/// How many times larger than the other one of two updates is, when it is worth a word.
const TWO: f64 = 9.0;

/// How large an update may be.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Screen {
    /// The most that `‖ΔW‖` over all modules may be.
    pub max_norm: Option<f64>,
    /// Leave out what is too large or far from the others, rather than fail or only name it.
    pub reject_outliers: bool,
}

impl Screen {
    /// An error for a bound that no update could meet.
    pub fn check(&self) -> Result<()> {
        match self.max_norm {
            Some(x) if !(x.is_finite() && x > 0.0) => {
                Err(Error::Usage(format!("--max-norm is {x}, expected a number above 0")))
            }
            _ => Ok(()),
        }
    }
}

/// What was looked at before anything was fused; nothing, where the adapters were not measured. Positions are those of
/// the command line.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Admission {
    /// Every adapter given, in the order of the command line.
    pub adapters: Vec<Candidate>,
    /// Those whose update is far from the others'.
    pub outliers: Vec<Outlier>,
}

/// One adapter that was given.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// Its folder.
    pub path: PathBuf,
    /// `‖ΔW‖` over all modules.
    pub norm: f64,
    /// Whose it is, where it is signed.
    pub from: Admitted,
    /// Why it was left out, where it was.
    pub rejected: Option<String>,
}

impl Admission {
    /// How many adapters were left out.
    pub fn left_out(&self) -> usize {
        self.adapters.iter().filter(|a| a.rejected.is_some()).count()
    }
}

/// Adapters whose signatures hold, opened; no value was read.
#[derive(Debug)]
pub struct Candidates {
    inputs: Inputs,
    from: Vec<Admitted>,
    /// What a user should know of the signatures.
    warnings: Vec<String>,
}

impl Candidates {
    /// Checks the signatures, then opens the adapters.
    pub fn open(options: &FuseOptions, common: &Common) -> Result<Candidates> {
        options.screen.check()?;
        let (from, warnings) = Gate::new(&options.trust)?.fusion(&options.adapters)?;
        let inputs = Inputs::open(&options.adapters, options.allow_missing, common.open_options())?;
        Ok(Candidates { inputs, from, warnings })
    }

    /// All of them, with their warnings.
    pub fn all(self) -> Inputs {
        let Candidates { mut inputs, mut warnings, .. } = self;
        warnings.append(&mut inputs.warnings);
        inputs.warnings = warnings;
        inputs
    }
}

/// Measures the adapters, every value of them; gives those that are fused. `options` then name these alone. Warnings are
/// in the inputs.
pub fn admit(
    Candidates { mut inputs, from, mut warnings }: Candidates,
    options: &mut FuseOptions,
    common: &Common,
) -> Result<(Inputs, Admission)> {
    let norms = Norms::of(&inputs)?;
    common.check_stop("nothing was written")?;
    let mut adapters: Vec<Candidate> = options
        .adapters
        .iter()
        .zip(from)
        .zip(&norms.total)
        .map(|((path, from), &norm)| Candidate { path: path.clone(), norm, from, rejected: None })
        .collect();
    if let Some(most) = options.screen.max_norm {
        for a in adapters.iter_mut().filter(|a| a.norm > most) {
            let why = format!("its update has norm {:.3e}, --max-norm is {most:e}", a.norm);
            if !options.screen.reject_outliers {
                return Err(Error::file(
                    &a.path,
                    format!("{why}; --reject-outliers leaves such adapters out"),
                ));
            }
            a.rejected = Some(why);
        }
    }
    let left = |adapters: &[Candidate]| -> Vec<usize> {
        (0..adapters.len()).filter(|&e| adapters[e].rejected.is_none()).collect()
    };
    let within = left(&adapters);
    let outliers = norms.outliers(&inputs, &within);
    if let [x, y] = within[..] {
        warnings.extend(two(&adapters[x], &adapters[y], options.screen.reject_outliers)?);
    }
    for o in &outliers {
        let a = &mut adapters[o.adapter];
        let why = told(o);
        match options.screen.reject_outliers {
            true => a.rejected = Some(why),
            false => warnings.push(format!(
                "{}: {why}, far from the others; --reject-outliers leaves it out",
                a.path.display()
            )),
        }
    }
    let kept = left(&adapters);
    if kept.len() < adapters.len() {
        warnings.extend(adapters.iter().filter_map(|a| {
            a.rejected.as_ref().map(|why| format!("{} is left out: {why}", a.path.display()))
        }));
        reduce(options, &kept, &adapters)?;
        inputs = Inputs::open(&options.adapters, options.allow_missing, common.open_options())?;
    }
    let inputs = Candidates { inputs, from: Vec::new(), warnings }.all();
    Ok((inputs, Admission { adapters, outliers }))
}

/// What an outlier is, as a part of a sentence.
fn told(o: &Outlier) -> String {
    let place = o.module.as_ref().map(|m| format!(" in {m}")).unwrap_or_default();
    format!("its update{place} has norm {:.3e}, the median is {:.3e}", o.norm, o.median)
}

/// What to say of two adapters, of which nobody can tell who is far from the other.
fn two(x: &Candidate, y: &Candidate, reject: bool) -> Result<Option<String>> {
    let (small, large) = if x.norm <= y.norm { (x, y) } else { (y, x) };
    if large.norm <= TWO * small.norm {
        return Ok(None);
    }
    let why = format!(
        "{} has an update of norm {:.3e}, {} one of {:.3e}: of two nobody can tell which is the outlier",
        large.path.display(),
        large.norm,
        small.path.display(),
        small.norm
    );
    match reject {
        true => Err(Error::Usage(format!("--reject-outliers: {why}; --max-norm can"))),
        false => Ok(Some(why)),
    }
}

/// Keeps of `options` what is about the adapters in `kept`.
fn reduce(options: &mut FuseOptions, kept: &[usize], adapters: &[Candidate]) -> Result<()> {
    if kept.is_empty() {
        return Err(Error::Usage("every adapter was left out: nothing is left to fuse".into()));
    }
    if let Weights::List(w) = &mut options.weights
        && w.len() == adapters.len()
    {
        *w = kept.iter().map(|&e| w[e]).collect();
    }
    if let Some(Fedsa::Client(j)) = &mut options.recipe.fusion.fedsa
        && *j < adapters.len()
    {
        *j = kept.iter().position(|e| e == j).ok_or_else(|| {
            Error::Usage(format!(
                "--fedsa client:{j} names {}, which is left out",
                adapters[*j].path.display()
            ))
        })?;
    }
    if options.grams.len() == adapters.len() {
        options.grams = kept.iter().map(|&e| options.grams[e].clone()).collect();
    }
    options.adapters = kept.iter().map(|&e| adapters[e].path.clone()).collect();
    Ok(())
}
