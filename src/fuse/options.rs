//! What a user can choose: the options of conflict resolution and of fusion, as they are typed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// An option whose values are a fixed list of words.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $option:literal, $default:ident { $($(#[$vdoc:meta])* $value:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub enum $name {
            $($(#[$vdoc])* $value,)*
        }

        impl $name {
            /// Every value.
            pub const ALL: &'static [$name] = &[$($name::$value),*];

            /// The word on the command line.
            pub fn word(self) -> &'static str {
                match self { $($name::$value => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(s: &str) -> Result<$name> {
                $name::ALL.iter().copied().find(|v| v.word() == s).ok_or_else(|| {
                    let words: Vec<_> = $name::ALL.iter().map(|v| v.word()).collect();
                    Error::Usage(format!("{} {s:?}: expected one of {}", $option, words.join(", ")))
                })
            }
        }

        string_form!($name);
    };
}

/// serde through `Display` and `FromStr`.
macro_rules! string_form {
    ($name:ident) => {
        impl From<$name> for String {
            fn from(v: $name) -> String {
                v.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(s: String) -> Result<$name> {
                s.parse()
            }
        }
    };
}

words! {
    /// `--side`: which singular subspace the updates are compared in.
    Side, "--side", Left {
        /// Output space, the paper's: B changes, A stays.
        #[default]
        Left = "left",
        /// Input space: A changes, B stays.
        Right = "right",
        /// Left, then right.
        Both = "both",
    }
}

words! {
    /// `--gate`: how much of a direction an update keeps.
    Gate, "--gate", Paper {
        /// `(1 − cₖ) max(0, cos(zᵢₖ, z̄ₖ))`.
        #[default]
        Paper = "paper",
        /// `1 − Σ_{j≠i} aⱼₖ / (Σ_{l≠i} aₗₖ) max(0, −cos(zᵢₖ, zⱼₖ))`: orthogonal updates are left alone.
        Opposition = "opposition",
    }
}

words! {
    /// `--restore`: whether what the gate took from the norm is given back.
    Restore, "--restore", None {
        /// Not at all, the paper's.
        #[default]
        None = "none",
        /// Each update gets its norm back.
        Client = "client",
        /// The weighted sum of the updates gets its norm back, by one factor for all.
        Global = "global",
    }
}

words! {
    /// `--coverage`: what an edge says about rows and columns that its pruning removed.
    Coverage, "--coverage", Zero {
        /// Zero: they count as an update of nothing.
        #[default]
        Zero = "zero",
        /// Nothing: the mean is over the edges that kept them.
        Present = "present",
    }
}

words! {
    /// `--method`: how the updates become one.
    Method, "--method", Fedavg {
        /// `(Σ wᵢBᵢ)(Σ wᵢAᵢ)`, the paper's Eq. 20.
        #[default]
        Fedavg = "fedavg",
        /// `Σ wᵢBᵢAᵢ`, exact, by stacking.
        Mean = "mean",
        /// The best approximation of `Σ wᵢBᵢAᵢ` at a given rank.
        MeanSvd = "mean-svd",
        /// `(Σ wᵢBᵢ) A₀`.
        Ffa = "ffa",
        /// `(Σ wᵢBᵢAᵢ) A₀⁺ A₀`.
        FfaLsq = "ffa-lsq",
        /// A is averaged, B as `--fedsa` says.
        Fedsa = "fedsa",
        /// `λ Σ wᵢBᵢAᵢ`, the weights as they are given.
        TaskArithmetic = "task-arithmetic",
        /// `Σ wᵢBᵢAᵢ` as FedAvg's factors and the residual that they miss.
        Fedex = "fedex",
        /// TIES on the updates as they look in their shared singular basis.
        KnotsTies = "knots-ties",
        /// Singular vectors of all updates made orthonormal together.
        Tsv = "tsv",
        /// The sum with all its singular values equal.
        IsoC = "iso-c",
        /// Rank-one units clustered, a unit of the result for each cluster.
        LoraLego = "lora-lego",
        /// The update whose outputs on the inputs of all are closest to each one's own.
        Regmean = "regmean",
        /// What an update does to another's inputs is projected out.
        CatMerging = "cat-merging",
        /// `(Σ √wᵢ Bᵢ)(Σ √wᵢ Aᵢ)`, as PEFT.
        PeftLinear = "peft-linear",
        /// `Σ wᵢBᵢAᵢ` by stacking, as PEFT.
        PeftCat = "peft-cat",
        /// The best approximation of `Σ wᵢBᵢAᵢ` at a given rank, as PEFT.
        PeftSvd = "peft-svd",
    }
}

/// `--shared-rank`: how many directions the shared subspace has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum SharedRank {
    /// All with a singular value that is not zero.
    #[default]
    All,
    /// The N largest.
    Top(usize),
    /// As few as hold this share of the energy.
    Energy(f64),
}

impl fmt::Display for SharedRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SharedRank::All => f.write_str("all"),
            SharedRank::Top(n) => write!(f, "{n}"),
            SharedRank::Energy(e) => write!(f, "energy:{e}"),
        }
    }
}

impl FromStr for SharedRank {
    type Err = Error;

    fn from_str(s: &str) -> Result<SharedRank> {
        let value = match s.strip_prefix("energy:") {
            _ if s == "all" => Some(SharedRank::All),
            Some(e) => e.parse().ok().filter(|e| *e > 0.0 && *e <= 1.0).map(SharedRank::Energy),
            None => s.parse().ok().filter(|n| *n > 0).map(SharedRank::Top),
        };
        value.ok_or_else(|| {
            Error::Usage(format!(
                "--shared-rank {s:?}: expected all, a number of directions from 1, or energy:E with 0 < E <= 1"
            ))
        })
    }
}

string_form!(SharedRank);

/// `--fedsa`: what stands for B beside the averaged `Ā = Σ wᵢAᵢ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Fedsa {
    /// `Σ wᵢBᵢ`: the same as `fedavg`.
    Mean,
    /// `B_J`: the personal model of adapter J, counted from 0.
    Client(usize),
    /// `Σ Bᵢ`.
    Sum,
    /// `(Σ wᵢBᵢAᵢ) Ā⁺`: the best B for this A.
    Lsq,
}

impl Fedsa {
    /// What the four values mean, a line each.
    pub const CHOICES: &'static str = "  mean      mean of the B times mean of the A: the same as fedavg\n  \
        client:J  B of adapter J (from 0) times mean of the A: FedSA's own personal model\n  \
        sum       sum of the B times mean of the A\n  \
        lsq       the B that, times mean of the A, is closest to the exact mean of the products";
}

impl fmt::Display for Fedsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fedsa::Mean => f.write_str("mean"),
            Fedsa::Client(j) => write!(f, "client:{j}"),
            Fedsa::Sum => f.write_str("sum"),
            Fedsa::Lsq => f.write_str("lsq"),
        }
    }
}

impl FromStr for Fedsa {
    type Err = Error;

    fn from_str(s: &str) -> Result<Fedsa> {
        let client = s.strip_prefix("client:").and_then(|j| j.parse().ok()).map(Fedsa::Client);
        match s {
            "mean" => Ok(Fedsa::Mean),
            "sum" => Ok(Fedsa::Sum),
            "lsq" => Ok(Fedsa::Lsq),
            _ => client
                .ok_or_else(|| Error::Usage(format!("--fedsa {s:?}: expected one of\n{}", Fedsa::CHOICES))),
        }
    }
}

string_form!(Fedsa);
