//! `ffa`: `ΔW = (Σ wᵢBᵢ) A₀`, A taken from one adapter.
//!
//! Exact where the adapters were trained with one frozen A₀. Where pruning took different columns of it from different
//! edges (o and down), no `B A₀` is the mean, and the factors are stacked instead.

use crate::error::{Error, Result};
use crate::fuse::factors::{Batch, Frame};
use crate::fuse::linear::{Linear, Pair};
use crate::fuse::mean;

/// What stood for A₀.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The frozen A that all adapters share.
    Init,
    /// The A of the first adapter.
    Reference,
    /// Masks differ: the exact mean by stacking.
    Stacked,
}

impl Variant {
    /// The name in reports: `ffa_init`, `ffa_ref(0)`, `stacked`.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Init => "ffa_init",
            Variant::Reference => "ffa_ref(0)",
            Variant::Stacked => "stacked",
        }
    }
}

/// What stands for A₀ where these updates are fused.
pub fn variant(frame: &Frame) -> Variant {
    match frame {
        _ if frame.columns_differ() => Variant::Stacked,
        _ if frame.frozen => Variant::Init,
        _ => Variant::Reference,
    }
}

/// `B[O, R] = Σ wᵢBᵢ` beside A₀, or the stack of rank P; the ranks must be equal.
pub fn pair(frame: &Frame) -> Pair {
    match variant(frame) {
        Variant::Stacked => mean::pair(frame),
        _ => Pair { bt: Linear::sum(frame, &frame.weights), a: Linear::rows(frame.block(0)) },
    }
}

/// Checks that every adapter of a batch that declares a frozen A has the first one's, on the columns that both kept.
///
/// Fails, naming the module and the two adapters by their positions, where one has not.
pub fn check_frozen(batch: &Batch) -> Result<()> {
    for e in 1..batch.frame.edges() {
        let (first, a) = (batch.a(0), batch.a(e));
        let both: Vec<usize> = match (&batch.frame.kept[0].columns, &batch.frame.kept[e].columns) {
            (None, None) => (0..a.ncols()).collect(),
            (Some(x), None) | (None, Some(x)) => x.clone(),
            (Some(x), Some(y)) => x.iter().copied().filter(|i| y.binary_search(i).is_ok()).collect(),
        };
        let same = first.nrows() == a.nrows()
            && both
                .iter()
                .filter(|&&i| i < a.ncols())
                .all(|&i| (0..a.nrows()).all(|r| a[(r, i)] == first[(r, i)]));
        if !same {
            return Err(Error::Op {
                op: "ffa",
                why: format!(
                    "{}: adapters {} and {} both declare a frozen A but hold different ones; --method mean needs none",
                    batch.frame.module, batch.frame.members[0], batch.frame.members[e]
                ),
            });
        }
    }
    Ok(())
}
