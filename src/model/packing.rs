//! Whether frozen weights are packed once for all products, or anew in each: results are the same, packed ones take
//! memory and save time.

use super::memory::{Part, Plan, human_bytes, sum};
use crate::backend::{Pass, Scratch};
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::module::Module;
use crate::error::{Error, Result};
use crate::tensor::Real;

/// Passes of a run that trains, that first which gains most: its products would turn the weights.
pub const TRAINING: &[Pass] = &[Pass::Forward, Pass::Backward];
/// Passes of a run that only looks.
pub const INFERENCE: &[Pass] = &[Pass::Forward];

/// Which weights are packed once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PackWeights {
    /// Those of as many passes as fit the memory.
    #[default]
    Auto,
    /// Those of all passes; an error where they do not fit.
    On,
    /// None.
    Off,
}

impl PackWeights {
    /// The plan with what is packed, and the passes whose weights are: the first of `passes`.
    ///
    /// None are where products read weights as they are kept. `limit` is what the plan may take; that it takes no more without
    /// them is checked elsewhere. Fails where all are asked for and do not fit.
    pub fn choose<T: Real>(
        self,
        scratch: &impl Scratch,
        config: &ModelConfig,
        passes: &'static [Pass],
        limit: Option<u64>,
        plan: Plan,
    ) -> Result<(Plan, &'static [Pass])> {
        let with = |count: usize| {
            let mut plan = plan.clone();
            for pass in &passes[..count] {
                let name = match pass {
                    Pass::Forward => "weights packed, forward",
                    Pass::Backward => "weights packed, backward",
                };
                plan.add(Part::Weights, name, packed_bytes::<T>(scratch, config, *pass));
            }
            (plan, &passes[..count])
        };
        let fits = |plan: &Plan| limit.is_none_or(|limit| plan.total() <= limit);
        let all = with(passes.len());
        match self {
            _ if all.0 == plan => Ok(with(0)),
            PackWeights::Off => Ok(with(0)),
            PackWeights::On if fits(&all.0) => Ok(all),
            PackWeights::On => Err(Error::Memory(format!(
                "--pack-weights on: the plan takes {} and packed weights {} more, the limit is {}; use auto, or raise \
                 --memory-limit",
                human_bytes(plan.total()),
                human_bytes(all.0.total().saturating_sub(plan.total())),
                human_bytes(limit.unwrap_or(u64::MAX))
            ))),
            PackWeights::Auto => {
                let fitting = (1..=passes.len()).rev().map(with).find(|(plan, _)| fits(plan));
                Ok(fitting.unwrap_or_else(|| with(0)))
            }
        }
    }
}

/// Bytes of all packed weights of a pass.
fn packed_bytes<T: Real>(scratch: &impl Scratch, config: &ModelConfig, pass: Pass) -> u64 {
    let one = |size: (usize, usize)| scratch.packed_bytes::<T>(size, pass) as u64;
    let of_layer = |layer: usize| {
        let modules = config.modules_of(layer).into_iter();
        sum(modules.map(|Module { target, .. }| one(config.dims(target, layer))))
    };
    sum((0..config.layers).map(of_layer).chain([one((config.vocab, config.hidden))]))
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
        let [forward, backward] =
            [Pass::Forward, Pass::Backward].map(|p| packed_bytes::<f32>(&cpu, &config, p));
        assert!(forward > 0 && backward > 0);
        let mut rest = Plan::default();
        rest.add(Part::Data, "the rest", 100);
        let choose =
            |asked: PackWeights, limit| asked.choose::<f32>(&cpu, &config, TRAINING, limit, rest.clone());
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
            assert_eq!(passes, &TRAINING[..expected], "{asked:?} {limit:?}");
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
        let (plan, passes) =
            asked.choose::<f32>(&CudaSizes, &config(), TRAINING, Some(0), Plan::default()).unwrap();
        assert_eq!((plan, passes.len()), (Plan::default(), 0));
    }
}
