//! One direction of the shared subspace.

use serde::{Deserialize, Serialize};

use crate::ops::gate::Layout;

/// One direction uₖ of the shared subspace and what every adapter has along it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// `σₖ`.
    pub sigma: f64,
    /// `aᵢₖ = ‖uₖᵀ Dᵢ‖`.
    pub norm: Vec<f64>,
    /// `cos(zᵢₖ, z̄ₖ)` to the consensus `z̄ₖ = Σ a z / Σ a`; 0 for a row that is zero.
    pub cos: Vec<f64>,
    /// `cₖ = Σ a (1 − cos) / (2 Σ a)`, in `[0, 1]`.
    pub conflict: f64,
    /// `γᵢₖ`: the factor on `zᵢₖ`.
    pub gamma: Vec<f64>,
}

impl Direction {
    /// Direction `k` of the numbers of a module, see [`Layout`].
    pub fn of(layout: Layout, numbers: &[f64], k: usize) -> Direction {
        let (sigma, conflict, tables) = layout.direction(numbers, k);
        let [norm, cos, gamma] = tables.map(<[f64]>::to_vec);
        Direction { sigma, norm, cos, conflict, gamma }
    }
}
