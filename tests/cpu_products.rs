//! The CPU's matrix-product operations against their definitions.
//!
//! Outputs are NaN before each call and lie between guard zones; the same bytes must come from one, two and three
//! threads. Tolerances follow from the rounding that the definitions state: f32 sums of K products err by at most
//! K · 2^-24 of the sum of the products' sizes (computed by the definition on absolute values); a value that is
//! rounded to bf16 may land on the other side of a rounding boundary, which is 2^-7 of it.

mod products {
    pub mod head;
    pub mod views;
}
