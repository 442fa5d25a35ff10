//! What `config.json` says about rotary positions, in the spelling of transformers 4 and in that of 5.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::error::{Error, Result};

/// Rotary position embedding: the base and how positions are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies: `inv_freq[j] = theta^(−2j/K)` before scaling.
    pub theta: f64,
    /// How positions past the original length are treated.
    pub kind: RopeKind,
}

/// The scaling kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeKind {
    /// No scaling.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The base grows with the sequence once it is longer than the model's positions.
    Dynamic {
        /// At least 1; sequences may be `factor` × positions long.
        factor: f64,
    },
    /// LLaMA 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are scaled whole.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The length that the model was trained at first.
        original_positions: usize,
    },
    /// YaRN.
    Yarn(Yarn),
}

/// The parameters of YaRN, named as in transformers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// At least 1.
    pub factor: f64,
    /// The length that the model was trained at first (`original_max_position_embeddings`).
    pub original_positions: usize,
    /// Rotations above which a frequency is kept; 32 by default.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`; 1 by default.
    pub beta_slow: f64,
    /// The factor on cos and sin, where it is given rather than derived from `factor` and the two below.
    pub attention_factor: Option<f64>,
    /// Multiplies `ln factor` in the numerator of the derived factor; used only with `mscale_all_dim`.
    pub mscale: Option<f64>,
    /// Multiplies `ln factor` in the denominator of the derived factor; used only with `mscale`.
    pub mscale_all_dim: Option<f64>,
    /// Whether the bounds of the ramp are rounded to whole dimensions; true by default.
    pub truncate: bool,
}

const MAX_POSITIONS: usize = 1 << 31;

impl Rope {
    /// Reads `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5), or both if they agree.
    pub fn read(config: &Fields<'_>, positions: usize) -> Result<Rope> {
        let v4 = config.object("rope_scaling")?.filter(|m| !m.is_empty());
        let v5 = config.object("rope_parameters")?.filter(|m| !m.is_empty());
        let v4 = v4.map(|m| Fields::new(config.path(), "rope_scaling.", m));
        let v5 = v5.map(|m| Fields::new(config.path(), "rope_parameters.", m));
        let mut theta: Option<(&str, f64)> = None;
        for (name, fields) in [
            ("rope_theta", Some(*config)),
            ("rope_scaling.rope_theta", v4),
            ("rope_parameters.rope_theta", v5),
        ] {
            let Some(x) = fields.map(|f| f.positive("rope_theta")).transpose()?.flatten() else { continue };
            match theta {
                Some((other, y)) if x != y => return Err(disagree(config, other, y, name, x)),
                _ => theta = Some((name, x)),
            }
        }
        let kind = match (v4, v5) {
            (None, None) => RopeKind::Default,
            (Some(one), None) | (None, Some(one)) => RopeKind::read(config, &one, positions)?,
            (Some(one), Some(other)) => {
                let (a, b) =
                    (RopeKind::read(config, &one, positions)?, RopeKind::read(config, &other, positions)?);
                if a != b {
                    let (a, b) = (a.to_json(), b.to_json());
                    return Err(disagree(
                        config,
                        "rope_scaling",
                        Value::from(a),
                        "rope_parameters",
                        Value::from(b),
                    ));
                }
                a
            }
        };
        Ok(Rope { theta: theta.map_or(10_000.0, |(_, x)| x), kind })
    }

    /// Writes both spellings into `config`.
    pub fn write(&self, config: &mut Map<String, Value>) {
        let scaling = self.kind.to_json();
        let mut parameters = scaling.clone();
        parameters.insert("rope_theta".into(), self.theta.into());
        let scaling = if self.kind == RopeKind::Default { Value::Null } else { scaling.into() };
        config.insert("rope_theta".into(), self.theta.into());
        config.insert("rope_scaling".into(), scaling);
        config.insert("rope_parameters".into(), parameters.into());
    }
}

impl RopeKind {
    /// The name in `config.json`.
    pub fn name(&self) -> &'static str {
        match self {
            RopeKind::Default => "default",
            RopeKind::Linear { .. } => "linear",
            RopeKind::Dynamic { .. } => "dynamic",
            RopeKind::Llama3 { .. } => "llama3",
            RopeKind::Yarn(_) => "yarn",
        }
    }

    fn read(config: &Fields<'_>, scaling: &Fields<'_>, positions: usize) -> Result<RopeKind> {
        let name = match (scaling.text("rope_type")?, scaling.text("type")?) {
            (Some(a), Some(b)) if a != b => {
                return Err(scaling
                    .error("rope_type", format!("is {a:?} and type is {b:?}: two spellings that disagree")));
            }
            (a, b) => a.or(b).unwrap_or("default"),
        };
        for fields in [config, scaling] {
            if let Some(x) = fields.number("partial_rotary_factor")?.filter(|x| *x != 1.0) {
                return Err(fields.error("partial_rotary_factor", format!("is {x}, only 1 is read")));
            }
        }
        let factor = |missing: Option<f64>| match scaling.number("factor")?.or(missing) {
            Some(x) if x >= 1.0 => Ok(x),
            Some(x) => Err(scaling.error("factor", format!("is {x}, expected at least 1"))),
            None => Err(scaling.error("factor", format!("is missing, rope kind {name:?} needs it"))),
        };
        match name {
            "default" => Ok(RopeKind::Default),
            "linear" => Ok(RopeKind::Linear { factor: factor(None)? }),
            "dynamic" => Ok(RopeKind::Dynamic { factor: factor(None)? }),
            "llama3" => {
                let of = |key: &str| {
                    scaling
                        .positive(key)?
                        .ok_or_else(|| scaling.error(key, "is missing, rope kind \"llama3\" needs it"))
                };
                let (low, high) = (of("low_freq_factor")?, of("high_freq_factor")?);
                if high <= low {
                    let why = format!("is {high}, expected more than low_freq_factor, which is {low}");
                    return Err(scaling.error("high_freq_factor", why));
                }
                Ok(RopeKind::Llama3 {
                    factor: factor(None)?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_positions: original(config, scaling)?.unwrap_or(positions),
                })
            }
            "yarn" => {
                let given = original(config, scaling)?;
                let truthy = |key: &str| Ok::<_, Error>(scaling.number(key)?.filter(|x| *x != 0.0));
                Ok(RopeKind::Yarn(Yarn {
                    // As transformers: a factor left out is the ratio of the two lengths.
                    factor: factor(given.map(|n| positions as f64 / n as f64))?,
                    original_positions: given.unwrap_or(positions),
                    beta_fast: truthy("beta_fast")?.unwrap_or(32.0),
                    beta_slow: truthy("beta_slow")?.unwrap_or(1.0),
                    attention_factor: scaling.positive("attention_factor")?,
                    mscale: truthy("mscale")?,
                    mscale_all_dim: truthy("mscale_all_dim")?,
                    truncate: scaling.flag("truncate")?.unwrap_or(true),
                }))
            }
            other => Err(scaling.error(
                "rope_type",
                format!("is {other:?}, expected one of default, linear, dynamic, llama3, yarn"),
            )),
        }
    }

    fn to_json(self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("rope_type".into(), self.name().into());
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        match self {
            RopeKind::Default => {}
            RopeKind::Linear { factor } | RopeKind::Dynamic { factor } => {
                put("factor", json!(factor));
            }
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                put("factor", json!(factor));
                put("low_freq_factor", json!(low_freq_factor));
                put("high_freq_factor", json!(high_freq_factor));
                put("original_max_position_embeddings", json!(original_positions));
            }
            RopeKind::Yarn(y) => {
                put("factor", json!(y.factor));
                put("original_max_position_embeddings", json!(y.original_positions));
                put("beta_fast", json!(y.beta_fast));
                put("beta_slow", json!(y.beta_slow));
                put("truncate", json!(y.truncate));
                for (key, value) in [
                    ("attention_factor", y.attention_factor),
                    ("mscale", y.mscale),
                    ("mscale_all_dim", y.mscale_all_dim),
                ] {
                    if let Some(x) = value {
                        put(key, json!(x));
                    }
                }
            }
        }
        map
    }
}

/// `original_max_position_embeddings` inside the scaling or beside it.
fn original(config: &Fields<'_>, scaling: &Fields<'_>) -> Result<Option<usize>> {
    let key = "original_max_position_embeddings";
    match (scaling.count(key, MAX_POSITIONS)?, config.count(key, MAX_POSITIONS)?) {
        (Some(a), Some(b)) if a != b => {
            Err(scaling.error(key, format!("is {a} and {key} beside it is {b}: two spellings that disagree")))
        }
        (a, b) => Ok(a.or(b)),
    }
}

fn disagree(
    config: &Fields<'_>,
    one: &str,
    a: impl std::fmt::Display,
    other: &str,
    b: impl std::fmt::Display,
) -> Error {
    Error::file(config.path(), format!("{one} is {a} and {other} is {b}: two spellings that disagree"))
}
