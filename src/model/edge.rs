//! The memory plan of a training run on an edge: bf16 on CUDA, weights resident. It describes the edge, whatever
//! machine makes it.

use half::bf16;

use super::memory::{Part, Plan};
use super::paper::{Noted, Paper};
use super::recompute::{self, Choice};
use super::shape::TrainingShape;
use super::trainer::Buffers;
use crate::checkpoint::config::ModelConfig;
use crate::cuda_sizes::CudaSizes;
use crate::error::Result;
use crate::tensor::DType;

/// What the driver takes before the first buffer. The largest part of a context is the local memory of all threads that
/// can be resident, 1 KiB each: 132 multiprocessors × 2,048 threads are 264 MiB on the largest device we build for, a
/// third of that on an edge's. The rest, 120 MiB, is for the driver's own tables and our modules. An upper estimate
/// until it is measured.
const DRIVER: u64 = 384 << 20;

/// The plan of training `shape` on `config`, with its first `recomputed` layers computed again.
pub fn plan(config: &ModelConfig, shape: &TrainingShape, recomputed: usize) -> Result<Plan> {
    let mut paper = Paper::<CudaSizes>::new(Plan::default());
    paper.weights(config);
    let size = shape.room(config, DType::BF16, recomputed);
    let layout = shape.layout(config);
    Buffers::<Noted<CudaSizes>, bf16>::new(&mut paper, &CudaSizes, config, &layout, shape.freeze_a, size)?;
    // Ids, rope rows, document bounds, supervised rows and their targets.
    paper.plan.add(Part::Data, "a batch's tokens", 5 * 4 * size.tokens as u64);
    paper.plan.add(Part::Driver, "context and modules", DRIVER);
    Ok(paper.plan)
}

/// [`plan`] with as few recomputed layers as fit `limit`, or as many as the shape asks for.
pub fn choose(config: &ModelConfig, shape: &TrainingShape, limit: Option<u64>) -> Result<Choice> {
    shape.check(config)?;
    recompute::choose(config.layers, shape.recompute, limit, |n| plan(config, shape, n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::memory::Part;
    use crate::prune::select::Cut;
    use crate::prune::select::tests::{config, llama3_8b};

    #[test]
    fn weights_are_the_parameters_and_their_padding() {
        let shape = TrainingShape::default();
        let full = plan(&llama3_8b(), &shape, 0).unwrap();
        // Norms are f32: 65 × 4,096 elements of 2 bytes more.
        assert_eq!(full.part(Part::Weights), 2 * 8_030_261_248 + 65 * 4096 * 2);
        let pruned = Cut::new(0.6).apply(&llama3_8b()).unwrap();
        let got = plan(&pruned, &shape, 0).unwrap().part(Part::Weights);
        // Rows of down: 5,734 padded to 5,760.
        assert_eq!(got, 2 * (3_976_728_576 + 32 * 4096 * 26) + 65 * 4096 * 2);
    }

    #[test]
    fn adapter_gradients_and_moments() {
        let p = plan(&llama3_8b(), &TrainingShape::default(), 0).unwrap();
        assert_eq!(p.part(Part::Adapter), 4 * 20_971_520);
        assert_eq!(p.part(Part::Gradients), 4 * 20_971_520 + 256);
        assert_eq!(p.part(Part::Optimizer), 8 * 20_971_520);
        for (ratio, parameters) in
            [(0.2, 18_441_216), (0.4, 15_584_000), (0.6, 13_054_464), (0.8, 10_197_248)]
        {
            let pruned = Cut::new(ratio).apply(&llama3_8b()).unwrap();
            let p = plan(&pruned, &TrainingShape::default(), 0).unwrap();
            assert_eq!(p.part(Part::Adapter), 4 * parameters);
        }
    }

    #[test]
    fn more_recomputed_layers_take_no_more() {
        let c = config(256, 8, 4, 600, 6, 1000);
        let totals: Vec<u64> =
            (0..=6).map(|n| plan(&c, &TrainingShape::default(), n).unwrap().total()).collect();
        assert!(totals.windows(2).all(|w| w[1] <= w[0]), "{totals:?}");
        assert!(totals[6] < totals[0]);
        let limit = totals[4];
        let choice = choose(&c, &TrainingShape::default(), Some(limit)).unwrap();
        assert!(choice.fits && choice.recomputed <= 4 && choice.plan.total() <= limit);
        assert!(!choose(&c, &TrainingShape::default(), Some(1)).unwrap().fits);
    }
}
