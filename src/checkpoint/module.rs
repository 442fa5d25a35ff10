//! The seven linears of a transformer layer, and their names in Hugging Face and PEFT files.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// One of the linears that a LoRA adapter can sit on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Query projection, `[H·K, D]`.
    Q,
    /// Key projection, `[G·K, D]`.
    K,
    /// Value projection, `[G·K, D]`.
    V,
    /// Output projection, `[D, H·K]`.
    O,
    /// Gate of the MLP, `[F, D]`.
    Gate,
    /// Up projection of the MLP, `[F, D]`.
    Up,
    /// Down projection of the MLP, `[D, F]`.
    Down,
}

impl Target {
    /// All seven, in the order of the forward pass.
    pub const ALL: [Target; 7] =
        [Target::Q, Target::K, Target::V, Target::O, Target::Gate, Target::Up, Target::Down];

    /// The short name of the command line: `q`, `k`, `v`, `o`, `gate`, `up`, `down`.
    pub fn short(self) -> &'static str {
        match self {
            Target::Q => "q",
            Target::K => "k",
            Target::V => "v",
            Target::O => "o",
            Target::Gate => "gate",
            Target::Up => "up",
            Target::Down => "down",
        }
    }

    /// The module's name in Hugging Face files: `q_proj`, …
    pub fn proj(self) -> &'static str {
        match self {
            Target::Q => "q_proj",
            Target::K => "k_proj",
            Target::V => "v_proj",
            Target::O => "o_proj",
            Target::Gate => "gate_proj",
            Target::Up => "up_proj",
            Target::Down => "down_proj",
        }
    }

    /// The block that holds it: `self_attn` or `mlp`.
    pub fn block(self) -> &'static str {
        match self {
            Target::Q | Target::K | Target::V | Target::O => "self_attn",
            Target::Gate | Target::Up | Target::Down => "mlp",
        }
    }

    /// The input that it reads.
    pub fn source(self) -> Source {
        match self {
            Target::Q | Target::K | Target::V => Source::Qkv,
            Target::O => Source::O,
            Target::Gate | Target::Up => Source::GateUp,
            Target::Down => Source::Down,
        }
    }

    /// Whether pruning removes output rows (q, k, v, gate, up) rather than input columns (o, down).
    pub fn prunes_rows(self) -> bool {
        !matches!(self, Target::O | Target::Down)
    }
}

impl FromStr for Target {
    type Err = Error;

    /// Reads the short name or the Hugging Face name.
    fn from_str(s: &str) -> Result<Target> {
        Target::ALL.into_iter().find(|t| t.short() == s || t.proj() == s).ok_or_else(|| {
            Error::Usage(format!("unknown linear {s:?}: expected one of q, k, v, o, gate, up, down"))
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

/// The inputs of a layer's linears: q, k and v share one, gate and up another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The first norm's output, `[T, D]`.
    Qkv,
    /// Attention's output, `[T, H·K]`.
    O,
    /// The second norm's output, `[T, D]`.
    GateUp,
    /// The MLP's inner activation, `[T, F]`.
    Down,
}

impl Source {
    /// All four, in the order of the forward pass.
    pub const ALL: [Source; 4] = [Source::Qkv, Source::O, Source::GateUp, Source::Down];

    /// The first linear that reads it: its I is the input's width.
    pub fn target(self) -> Target {
        match self {
            Source::Qkv => Target::Q,
            Source::O => Target::O,
            Source::GateUp => Target::Gate,
            Source::Down => Target::Down,
        }
    }

    /// The name in files: `qkv`, `o`, `gate_up`, `down`.
    pub fn name(self) -> &'static str {
        match self {
            Source::Qkv => "qkv",
            Source::O => "o",
            Source::GateUp => "gate_up",
            Source::Down => "down",
        }
    }
}

/// One linear of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Module {
    /// Counted from 0.
    pub layer: usize,
    /// Which of the seven.
    pub target: Target,
}

impl Module {
    /// Its place among the modules of all layers, by layer and in the order of the forward pass: random numbers of a
    /// module are drawn by it.
    pub fn number(self) -> u64 {
        (self.layer * Target::ALL.len() + self.target as usize) as u64
    }

    /// `model.layers.3.self_attn.q_proj`: the name that PEFT's patterns are matched against.
    pub fn path(self) -> String {
        format!("model.layers.{}.{}.{}", self.layer, self.target.block(), self.target.proj())
    }

    /// `model.layers.3.self_attn.q_proj.weight`: the tensor's name in a checkpoint.
    pub fn weight(self) -> String {
        format!("{}.weight", self.path())
    }

    /// `model.layers.3.self_attn.q_proj.bias`.
    pub fn bias(self) -> String {
        format!("{}.bias", self.path())
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} {}", self.layer, self.target)
    }
}
