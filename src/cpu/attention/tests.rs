use half::bf16;

use crate::cpu::Cpu;
use crate::cpu::tests::on_threads;
use crate::ops::cases::attention::{
    a_cache_changes_nothing, conforms, conforms_backward, conforms_backward_odd, conforms_odd, large_scores,
};

#[test]
fn as_the_reference_in_f32() {
    conforms::<_, f32>(&on_threads());
    conforms_odd::<_, f32>(&on_threads());
}

#[test]
fn as_the_reference_in_bf16() {
    conforms::<_, bf16>(&on_threads());
    conforms_odd::<_, bf16>(&on_threads());
}

#[test]
fn gradients_as_the_reference_in_f32() {
    conforms_backward::<_, f32>(&on_threads());
    conforms_backward_odd::<_, f32>(&on_threads());
}

#[test]
fn gradients_as_the_reference_in_bf16() {
    conforms_backward::<_, bf16>(&on_threads());
    conforms_backward_odd::<_, bf16>(&on_threads());
}

#[test]
fn a_document_in_pieces() {
    a_cache_changes_nothing::<_, f32>(&Cpu::new(2).expect("threads"));
    a_cache_changes_nothing::<_, bf16>(&Cpu::new(2).expect("threads"));
}

#[test]
fn scores_beyond_the_exponential() {
    large_scores::<_, f32>(&Cpu::new(2).expect("threads"));
    large_scores::<_, bf16>(&Cpu::new(2).expect("threads"));
}
