//! One module from the updates as read to the fused update: Grams, conflict resolution, method.

use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::fuse::factors::Batch;
use crate::fuse::ffa::check_frozen;
use crate::fuse::grams::Grams;
use crate::fuse::lora_cr::{LoraCr, Resolution};
use crate::fuse::method::{Fused, Fusion};
use crate::fuse::options::Method;

/// What is done to every module.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// `--resolve lora-cr` and its options, where it was asked for.
    pub resolve: Option<LoraCr>,
    /// The method and its options.
    #[serde(flatten)]
    pub fusion: Fusion,
}

/// One module's way through a recipe.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of the updates as read.
    pub grams: Grams,
    /// What resolution made of them.
    pub resolution: Option<Resolution>,
    /// The result.
    pub fused: Fused,
}

impl Recipe {
    /// Resolves and fuses a batch.
    ///
    /// Refuses what [`Fusion::rank_of`] does and, where the method would use it, a declared frozen A that is not common.
    pub fn run(&self, batch: &Batch, as_adapter: bool) -> Result<Outcome> {
        self.fusion.rank_of(&batch.frame, as_adapter)?;
        if batch.frame.frozen && matches!(self.fusion.method, Method::Ffa | Method::FfaLsq) {
            check_frozen(batch)?;
        }
        let grams = Grams::of(batch);
        let resolution = match &self.resolve {
            None => None,
            Some(options) => Some(options.resolve(&grams, &batch.frame.weights)?),
        };
        let fused = match &resolution {
            None => self.fusion.fuse(batch, as_adapter)?,
            Some(r) => self.fusion.fuse(&resolved(batch, r), as_adapter)?,
        };
        Ok(Outcome { grams, resolution, fused })
    }
}

/// The batch after resolution; an A that was changed is no longer the frozen one.
fn resolved(batch: &Batch, resolution: &Resolution) -> Batch {
    let (left, right) =
        (resolution.left.as_ref().map(Mat::as_ref), resolution.right.as_ref().map(Mat::as_ref));
    let mut out = batch.with_stack(batch.stack.mapped(left, right));
    out.frame.frozen &= right.is_none();
    out
}
