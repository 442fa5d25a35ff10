//! Whether frozen weights are packed once for all products, or anew in each: results are the same, packed ones take
//! memory and save time.

use std::str::FromStr;

use super::memory::{Part, Plan, human_bytes, sum};
use crate::backend::{Pass, Scratch};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::{Module, Target};
use crate::error::{Error, Result};
use crate::tensor::Real;

/// What is packed of a model: the weights that the products of some passes read, with the head or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedWeights {
    passes: &'static [Pass],
    head: bool,
}

impl PackedWeights {
    /// Nothing.
    pub const NONE: PackedWeights = PackedWeights { passes: &[], head: false };
    /// A run that trains. First the pass that gains most: its products would turn the weights.
    pub const TRAINING: PackedWeights =
        PackedWeights { passes: &[Pass::Forward, Pass::Backward], head: true };
    /// A run that only looks.
    pub const INFERENCE: PackedWeights = PackedWeights { passes: &[Pass::Forward], head: true };
    /// A run that looks at the layers, and makes no logits.
    pub const LAYERS: PackedWeights = PackedWeights { passes: &[Pass::Forward], head: false };

    /// The first passes alone.
    pub fn first(self, passes: usize) -> PackedWeights {
        PackedWeights { passes: &self.passes[..passes.min(self.passes.len())], ..self }
    }

    /// How many passes there are.
    pub fn passes(self) -> usize {
        self.passes.len()
    }

    /// The products whose weights are packed: of a linear, or of the head.
    pub fn products(self, config: &ModelConfig) -> impl Iterator<Item = (Option<Module>, Pass)> {
        let linears: Vec<Module> = (0..config.layers).flat_map(|layer| config.modules_of(layer)).collect();
        let head = self.head.then_some(None);
        self.passes.iter().flat_map(move |&pass| {
            // Nothing is trained below the first layer, so nobody asks for the gradient of its input.
            let read = move |module: &Module| {
                let of_input = matches!(module.target, Target::Q | Target::K | Target::V);
                pass == Pass::Forward || module.layer > 0 || !of_input
            };
            let modules: Vec<Option<Module>> =
                linears.iter().copied().filter(read).map(Some).chain(head).collect();
            modules.into_iter().map(move |module| (module, pass))
        })
    }

    /// Bytes of the weights that are packed for a pass.
    fn bytes<T: Real>(self, scratch: &impl Scratch, config: &ModelConfig, pass: Pass) -> u64 {
        sum(self.products(config).filter(|product| product.1 == pass).map(|(module, pass)| {
            let size = match module {
                Some(Module { layer, target }) => config.dims(target, layer),
                None => (config.vocab, config.hidden),
            };
            scratch.packed_bytes::<T>(size, pass) as u64
        }))
    }
}

/// Which weights are packed once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PackWeights {
    /// Those of as many passes as fit the memory, with room left.
    #[default]
    Auto,
    /// Those of all passes; an error where they do not fit.
    On,
    /// None.
    Off,
}

impl FromStr for PackWeights {
    type Err = Error;

    fn from_str(s: &str) -> Result<PackWeights> {
        match s {
            "auto" => Ok(PackWeights::Auto),
            "on" => Ok(PackWeights::On),
            "off" => Ok(PackWeights::Off),
            _ => Err(Error::Usage(format!("unknown packing of weights {s:?}: expected auto, on or off"))),
        }
    }
}

impl PackWeights {
    /// What a plan with packed weights may take, by the memory limit and what is free: all of the smaller one where that is
    /// asked for. By itself it leaves an eighth for what no plan counts, half where nobody set a limit, and all where neither
    /// is known.
    pub fn limit(self, limit: Option<u64>, free: Option<u64>) -> Option<u64> {
        let least = limit.into_iter().chain(free).min();
        match self {
            PackWeights::On | PackWeights::Off => least,
            PackWeights::Auto => {
                Some(least.map_or(0, |least| if limit.is_some() { least - least / 8 } else { least / 2 }))
            }
        }
    }

    /// The plan with what is packed, and what that is: the first passes of `packing`.
    ///
    /// None are where products read weights as they are kept. `limit` is what the plan may take; that it takes no more without
    /// them is checked elsewhere. Fails where all are asked for and do not fit.
    pub fn choose<T: Real>(
        self,
        scratch: &impl Scratch,
        config: &ModelConfig,
        packing: PackedWeights,
        limit: Option<u64>,
        plan: Plan,
    ) -> Result<(Plan, PackedWeights)> {
        let with = |count: usize| {
            let mut plan = plan.clone();
            for pass in packing.first(count).passes {
                let name = match pass {
                    Pass::Forward => "weights packed, forward",
                    Pass::Backward => "weights packed, backward",
                };
                plan.add(Part::Weights, name, packing.bytes::<T>(scratch, config, *pass));
            }
            (plan, packing.first(count))
        };
        let fits = |plan: &Plan| limit.is_none_or(|limit| plan.total() <= limit);
        let all = with(packing.passes());
        match self {
            _ if all.0 == plan => Ok(with(0)),
            PackWeights::Off => Ok(with(0)),
            PackWeights::On if fits(&all.0) => Ok(all),
            PackWeights::On => Err(Error::Memory(format!(
                "--pack-weights on: the plan takes {} and packed weights {} more, there are {}; use auto, or give it more \
                 memory",
                human_bytes(plan.total()),
                human_bytes(all.0.total().saturating_sub(plan.total())),
                human_bytes(limit.unwrap_or(u64::MAX))
            ))),
            PackWeights::Auto => {
                let fitting = (1..=packing.passes()).rev().map(with).find(|(plan, _)| fits(plan));
                Ok(fitting.unwrap_or_else(|| with(0)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::cuda_sizes::CudaSizes;

    fn config() -> ModelConfig {
        crate::prune::select::tests::config(64, 4, 2, 96, 2, 100)
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.rows.iter().map(|row| row.name.as_str()).collect()
    }

    #[test]
    fn as_many_passes_as_fit() {
        let (cpu, config) = (Cpu::new(1).unwrap(), config());
        let packed = PackedWeights::TRAINING;
        let [forward, backward] =
            [Pass::Forward, Pass::Backward].map(|pass| packed.bytes::<f32>(&cpu, &config, pass));
        assert!(forward > backward && backward > 0);
        assert!(PackedWeights::LAYERS.bytes::<f32>(&cpu, &config, Pass::Forward) < forward);
        let mut rest = Plan::default();
        rest.add(Part::Data, "the rest", 100);
        let choose =
            |asked: PackWeights, limit| asked.choose::<f32>(&cpu, &config, packed, limit, rest.clone());
        let (one, both) = (100 + forward, 100 + forward + backward);
        for (asked, limit, expected) in [
            (PackWeights::Auto, None, 2),
            (PackWeights::Auto, Some(both), 2),
            (PackWeights::Auto, Some(both - 1), 1),
            (PackWeights::Auto, Some(one), 1),
            (PackWeights::Auto, Some(one - 1), 0),
            (PackWeights::On, Some(both), 2),
            (PackWeights::On, None, 2),
            (PackWeights::Off, None, 0),
        ] {
            let (plan, passes) = choose(asked, limit).unwrap();
            assert_eq!(passes, packed.first(expected), "{asked:?} {limit:?}");
            let all = ["the rest", "weights packed, forward", "weights packed, backward"];
            assert_eq!(names(&plan), all[..=expected]);
            assert_eq!(plan.total(), [100, one, both][expected]);
        }
        let refused = choose(PackWeights::On, Some(both - 1)).unwrap_err().to_string();
        assert!(
            refused.starts_with("--pack-weights on: the plan takes 100 B and packed weights "),
            "{refused}"
        );
    }

    #[test]
    fn nothing_is_packed_where_weights_are_read_as_they_are_kept() {
        let asked = PackWeights::On;
        let (plan, passes) = asked
            .choose::<f32>(&CudaSizes, &config(), PackedWeights::TRAINING, Some(0), Plan::default())
            .unwrap();
        assert_eq!((plan, passes.passes()), (Plan::default(), 0));
    }

    #[test]
    fn some_memory_is_left_unless_all_is_asked_for() {
        for (limit, free, auto, on) in [
            (None, None, Some(0), None),
            (None, Some(800), Some(400), Some(800)),
            (Some(80), Some(800), Some(70), Some(80)),
            (Some(800), Some(80), Some(70), Some(80)),
            (Some(80), None, Some(70), Some(80)),
        ] {
            assert_eq!(PackWeights::Auto.limit(limit, free), auto);
            assert_eq!(PackWeights::On.limit(limit, free), on);
        }
    }
}
