//! The gated activation of the MLP.

use super::{holds_rows, narrow, wide};
use crate::error::Result;
use crate::host::Host;
use crate::tensor::{Real, Store};

/// `h = silu(gate) ∘ up`, `silu(z) = z / (1 + e^−z)`. Computed in f32, rounded once.
pub struct SwiGlu<'a, S: Store, T: Real> {
    /// `[T, F]`, written.
    pub h: S::ViewMut<'a, T>,
    /// `[T, F]`.
    pub gate: S::View<'a, T>,
    /// `[T, F]`.
    pub up: S::View<'a, T>,
    /// T.
    pub tokens: usize,
    /// F.
    pub width: usize,
}

impl<S: Store, T: Real> SwiGlu<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let (t, f) = ([("T", self.tokens)], [("F", self.width)]);
        holds_rows::<S>("swiglu", "h", &self.h, &t, &f)?;
        holds_rows::<S>("swiglu", "gate", &self.gate, &t, &f)?;
        holds_rows::<S>("swiglu", "up", &self.up, &t, &f)
    }
}

/// `dgate = dh ∘ up ∘ σ(gate)(1 + gate(1 − σ(gate)))`, `dup = dh ∘ silu(gate)`, each in the place of what it is the gradient
/// of; each rounded once.
pub struct SwiGluBwd<'a, S: Store, T: Real> {
    /// `[T, F]`, read, then dgate.
    pub gate: S::ViewMut<'a, T>,
    /// `[T, F]`, read, then dup.
    pub up: S::ViewMut<'a, T>,
    /// `[T, F]`.
    pub dh: S::View<'a, T>,
    /// T.
    pub tokens: usize,
    /// F.
    pub width: usize,
}

impl<S: Store, T: Real> SwiGluBwd<'_, S, T> {
    /// Compares the sizes.
    pub fn check(&self) -> Result<()> {
        let (t, f) = ([("T", self.tokens)], [("F", self.width)]);
        holds_rows::<S>("swiglu_bwd", "dh", &self.dh, &t, &f)?;
        holds_rows::<S>("swiglu_bwd", "gate", &self.gate, &t, &f)?;
        holds_rows::<S>("swiglu_bwd", "up", &self.up, &t, &f)
    }
}

/// The definition in f64.
pub fn reference<T: Real>(op: SwiGlu<'_, Host, T>) -> Result<()> {
    op.check()?;
    let h: Vec<f64> = wide(op.gate).iter().zip(wide(op.up)).map(|(z, up)| silu(*z) * up).collect();
    narrow(op.h, &h);
    Ok(())
}

fn silu(z: f64) -> f64 {
    z / (1.0 + (-z).exp())
}

/// The definition in f64.
pub fn reference_bwd<T: Real>(op: SwiGluBwd<'_, Host, T>) -> Result<()> {
    op.check()?;
    let (dh, gate, up) = (wide(op.dh), wide(&*op.gate), wide(&*op.up));
    let sigma = |z: f64| 1.0 / (1.0 + (-z).exp());
    let slope = |z: f64| sigma(z) * (1.0 + z * (1.0 - sigma(z)));
    let dgate: Vec<f64> = (0..dh.len()).map(|i| dh[i] * up[i] * slope(gate[i])).collect();
    let dup: Vec<f64> = (0..dh.len()).map(|i| dh[i] * silu(gate[i])).collect();
    narrow(op.gate, &dgate);
    narrow(op.up, &dup);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{differences, normal};

    #[test]
    fn backward_is_the_derivative() -> Result<()> {
        let n = 101;
        let [gate, up, dh] = [1, 2, 3].map(|seed| normal::<f32>(seed, n, 3.0));
        let (mut dgate, mut dup) = (gate.clone(), up.clone());
        reference_bwd::<f32>(SwiGluBwd { gate: &mut dgate, up: &mut dup, dh: &dh, tokens: 1, width: n })?;
        let value = |gate: &[f64], up: &[f64]| -> f64 {
            (0..n).map(|i| silu(gate[i]) * up[i] * f64::from(dh[i])).sum()
        };
        let (gate, up) = (wide(&gate), wide(&up));
        let by_gate = differences(&gate, |gate| value(gate, &up));
        let by_up = differences(&up, |up| value(&gate, up));
        for i in 0..n {
            assert!((f64::from(dgate[i]) - by_gate[i]).abs() <= 2e-5, "{i}: {} {}", dgate[i], by_gate[i]);
            assert!((f64::from(dup[i]) - by_up[i]).abs() <= 2e-5, "{i}: {} {}", dup[i], by_up[i]);
        }
        Ok(())
    }
}
