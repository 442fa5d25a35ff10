//! Operations: what each computes, which shapes fit, and a plain reference in f64.
//!
//! An operation is a struct of named views. `check` compares their sizes and is shared by all back ends, so that all
//! give the same error text. `reference` is the definition: plain loops, f64 sums, rounding exactly where the doc
//! says. It is what tests believe; it is not a back end.
//!
//! Outputs come first, then inputs, sizes and scalars. Gradients of activations are written, gradients of adapters are
//! added to. Base weights have no gradient. `T` in a type is the precision of activations (f32 or bf16).

pub mod adamw;
pub mod apply;
pub mod attention;
#[cfg(test)]
pub(crate) mod cases;
pub mod choice;
pub mod cross_entropy;
pub mod eigh;
pub mod embed;
pub mod gate;
pub mod gram;
pub mod importance;
pub mod linear;
pub mod merge;
pub mod rms_norm;
pub mod rope;
pub mod rsvd;
pub mod scatter;
pub mod sum_sq;

use crate::error::{Error, Result};
use crate::tensor::{Length, Real, Store};

/// Fails unless `view` holds exactly the product of `sizes`; a size is a letter and its value.
pub(crate) fn holds(op: &'static str, name: &str, view: &impl Length, sizes: &[(&str, usize)]) -> Result<()> {
    if product(sizes) == Some(view.len()) { Ok(()) } else { Err(holds_other(op, name, view, sizes, "")) }
}

/// Fails unless `view` holds exactly as many rows of activations as the product of `count`, each of as many elements
/// as `S` takes for one as wide as the product of `width`.
pub(crate) fn holds_rows<S: Store>(
    op: &'static str,
    name: &str,
    view: &impl Length,
    count: &[(&str, usize)],
    width: &[(&str, usize)],
) -> Result<()> {
    let row = product(width).map(|w| (w, S::row(w)));
    if let (Some(count), Some((_, row))) = (product(count), row)
        && count.checked_mul(row) == Some(view.len())
    {
        return Ok(());
    }
    let padded = match row {
        Some((width, row)) if row != width => format!(", rows padded to {row}"),
        _ => String::new(),
    };
    Err(holds_other(op, name, view, &[count, width].concat(), &padded))
}

fn product(sizes: &[(&str, usize)]) -> Option<usize> {
    sizes.iter().try_fold(1usize, |p, s| p.checked_mul(s.1))
}

fn holds_other(
    op: &'static str,
    name: &str,
    view: &impl Length,
    sizes: &[(&str, usize)],
    padded: &str,
) -> Error {
    let letters: Vec<&str> = sizes.iter().map(|s| s.0).collect();
    let values: Vec<String> = sizes.iter().map(|s| s.1.to_string()).collect();
    let (letters, values) = (letters.join(" × "), values.join(" × "));
    let why = format!("{name} holds {} elements, expected {letters} = {values}{padded}", view.len());
    Error::Op { op, why }
}

/// Fails with `why` unless `ok`.
pub(crate) fn ensure(op: &'static str, ok: bool, why: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Op { op, why: why() }) }
}

/// The value in f64.
fn exact<T: Real>(x: &T) -> f64 {
    f64::from(x.to_f32())
}

/// `x` in f64, for the references.
fn wide<T: Real>(x: &[T]) -> Vec<f64> {
    x.iter().map(exact).collect()
}

/// `out` = `x`, rounded.
fn narrow<T: Real>(out: &mut [T], x: &[f64]) {
    out.iter_mut().zip(x).for_each(|(out, &x)| *out = T::from_f32(x as f32));
}

/// The sum of the pairs' products.
fn dot(pairs: impl Iterator<Item = (f64, f64)>) -> f64 {
    pairs.map(|(a, b)| a * b).sum()
}
