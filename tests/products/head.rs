//! `cross_entropy` and `choice`.

use anabranch::backend::{Backend, Scratch};
use anabranch::cpu::Cpu;
use anabranch::host::{Host, HostMatrix};
use anabranch::ops::choice::{self, Choice};
use anabranch::ops::cross_entropy::{self, CrossEntropy};
use anabranch::random::{Philox, Purpose};
use anabranch::tensor::{DType, Real};
use half::bf16;

use super::views::*;

#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    /// Every how manieth row is supervised.
    every: usize,
    vocab: usize,
    width: usize,
    /// What the logits are multiplied by.
    sharp: f32,
}

struct Inputs<T> {
    x: Vec<T>,
    head: HostMatrix,
    rows: Vec<u32>,
    ids: Vec<u32>,
}

fn inputs<T: Real>(case: &Case, dtype: DType, absolute: bool) -> Inputs<T> {
    let x = reals::<T>(1, case.tokens * case.width);
    let w: Vec<f32> = numbers(2, case.vocab * case.width).into_iter().map(|w| w * case.sharp).collect();
    let rows: Vec<u32> = (0..case.tokens as u32).step_by(case.every).collect();
    let p = Philox::new(3, Purpose::Test.stream(0));
    Inputs {
        x: if absolute { sizes(&x) } else { x },
        head: matrix(&if absolute { sizes(&w) } else { w }, (case.vocab, case.width), dtype),
        ids: (0..rows.len() as u64).map(|i| p.below(i, case.vocab) as u32).collect(),
        rows,
    }
}

const WEIGHT: f32 = 0.37;

fn loss<T: Real>(
    case: &Case,
    dtype: DType,
    input: &Inputs<T>,
    cpu: Option<&Cpu>,
    dx: bool,
) -> (Vec<u8>, Vec<u8>) {
    let mut nll = unwritten::<f32>(input.rows.len());
    let mut grad = unwritten::<T>(if dx { case.tokens * case.width } else { 0 });
    let need =
        cpu.map_or(0, |cpu| cpu.cross_entropy_scratch::<T>(input.rows.len(), case.vocab, case.width, dtype));
    let mut room = scratch(need);
    let op: CrossEntropy<'_, Host, T> = CrossEntropy {
        nll: nll.inside(),
        dx: dx.then(|| grad.inside()),
        scratch: room.inside(),
        x: &input.x,
        head: &input.head,
        rows: &input.rows,
        targets: &input.ids,
        tokens: case.tokens,
        weight: WEIGHT,
    };
    match cpu {
        Some(cpu) => cpu.cross_entropy(op).unwrap(),
        None => cross_entropy::reference(op).unwrap(),
    }
    room.take();
    (bytes(&nll.take()), bytes(&grad.take()))
}

fn chosen<T: Real>(case: &Case, dtype: DType, input: &Inputs<T>, cpu: Option<&Cpu>) -> Vec<u8> {
    let mut out = unwritten::<f32>(input.rows.len());
    let mut room = scratch(
        cpu.map_or(0, |cpu| cpu.choice_scratch::<T>(input.rows.len(), case.vocab, case.width, dtype)),
    );
    let op: Choice<'_, Host, T> = Choice {
        out: out.inside(),
        scratch: room.inside(),
        x: &input.x,
        head: &input.head,
        rows: &input.rows,
        ids: &input.ids,
        tokens: case.tokens,
    };
    match cpu {
        Some(cpu) => cpu.choice(op).unwrap(),
        None => choice::reference(op).unwrap(),
    }
    room.take();
    bytes(&out.take())
}

/// How far a logit of f32 sums may be off: K roundings of the sum of sizes, which is at most K · largest.
fn logit_error(case: &Case) -> f64 {
    let k = case.width as f64;
    (k + 16.0) * 2f64.powi(-24) * k * f64::from(case.sharp) + 16.0 * 2f64.powi(-23)
}

fn check<T: Real>(case: &Case, dtype: DType) {
    let input = inputs::<T>(case, dtype, false);
    let name = format!("{case:?} {dtype} under {}: ", T::DTYPE);
    let single = |b: &[u8]| wide(&elements::<f32>(b));
    let real = |b: &[u8]| wide(&elements::<T>(b));
    let slack = logit_error(case);
    let (nll, dx) = on_all_threads(|cpu| loss(case, dtype, &input, Some(cpu), true));
    let (want_nll, want_dx) = loss(case, dtype, &input, None, true);
    let want = single(&want_nll);
    close(&format!("{name}nll"), &single(&nll), &want, |i| 2.0 * slack + 2e-7 * want[i].abs());
    // Each |gradient of a logit| is at most weight and together at most 2 weight; each is off by a relative 4 slack,
    // and may round to a neighbour.
    let (want, ulp) = (real(&want_dx), unit::<T>());
    let parts = f64::from(WEIGHT * 2.0 * case.sharp);
    let sums = (case.vocab as f64).sqrt() * 2f64.powi(-22);
    close(&format!("{name}dx"), &real(&dx), &want, |i| {
        ulp * want[i].abs() + (4.0 * slack + ulp / 2.0 + sums) * parts
    });
    let (alone, none) = on_all_threads(|cpu| loss(case, dtype, &input, Some(cpu), false));
    assert!(none.is_empty());
    let want = single(&want_nll);
    close(&format!("{name}nll alone"), &single(&alone), &want, |i| 2.0 * slack + 2e-7 * want[i].abs());
}

fn check_choice<T: Real>(case: &Case, dtype: DType) {
    let mut input = inputs::<T>(case, dtype, false);
    // Several tokens of one row.
    for i in 1..input.rows.len() {
        if i % 3 != 0 {
            input.rows[i] = input.rows[i - 1];
        }
    }
    let got = on_all_threads(|cpu| chosen(case, dtype, &input, Some(cpu)));
    let want = wide(&elements::<f32>(&chosen(case, dtype, &input, None)));
    let slack = 2.0 * logit_error(case);
    close(&format!("{case:?} {dtype}"), &wide(&elements::<f32>(&got)), &want, |i| {
        slack + 2e-7 * want[i].abs()
    });
}

fn cases() -> Vec<Case> {
    let case = |tokens, every, vocab, width, sharp| Case { tokens, every, vocab, width, sharp };
    vec![
        case(1, 1, 1, 1, 1.0),
        case(1, 1, 257, 33, 1.0),
        case(7, 2, 13, 5, 3.0),
        case(70, 3, 511, 65, 1.0),
        case(33, 1, 1031, 129, 0.2),
        // Logits around ±100: the largest must be taken off before the exponential.
        case(9, 1, 300, 64, 20.0),
        case(530, 1, 255, 16, 1.0),
    ]
}

#[test]
fn loss_and_its_gradient() {
    for case in cases() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            check::<f32>(&case, dtype);
            check::<bf16>(&case, dtype);
        }
    }
    // A head so large that chunks have fewer rows than there are.
    check::<f32>(&Case { tokens: 67, every: 1, vocab: 131_077, width: 3, sharp: 1.0 }, DType::F32);
}

#[test]
fn log_probabilities() {
    for case in cases() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            check_choice::<f32>(&case, dtype);
            check_choice::<bf16>(&case, dtype);
        }
    }
    // More different rows than a chunk has, several pairs each.
    check_choice::<f32>(&Case { tokens: 1700, every: 1, vocab: 19, width: 8, sharp: 1.0 }, DType::F32);
}

/// dx of the definition is the derivative of its loss.
#[test]
fn gradient_of_the_definition() {
    let case = Case { tokens: 5, every: 2, vocab: 11, width: 4, sharp: 1.0 };
    let mut input = inputs::<f32>(&case, DType::F32, false);
    let dx = wide(&elements::<f32>(&loss(&case, DType::F32, &input, None, true).1));
    let mut total = |i: usize, by: f32| {
        let before = input.x[i];
        input.x[i] = before + by;
        let step = f64::from(input.x[i]) - f64::from(before);
        let (nll, _) = loss(&case, DType::F32, &input, None, false);
        input.x[i] = before;
        (f64::from(WEIGHT) * wide(&elements::<f32>(&nll)).iter().sum::<f64>(), step)
    };
    for (i, &dx) in dx.iter().enumerate() {
        let ((up, over), (down, under)) = (total(i, 1e-2), total(i, -1e-2));
        let slope = (up - down) / (over - under);
        let err = (slope - dx).abs();
        // The loss is an f32 of about 3, so its difference over 2e-2 is good to 2e-5; the third derivative adds 1e-5.
        assert!(err <= 4e-5, "x {i}: {dx}, slope {slope}");
    }
}
