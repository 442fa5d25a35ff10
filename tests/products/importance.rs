//! `importance`.

use anabranch::backend::{Backend, Scratch};
use anabranch::cpu::Cpu;
use anabranch::host::{Host, HostMatrix};
use anabranch::ops::importance::{Importance, Sample, Score, reference};
use anabranch::tensor::{DType, Real};
use half::bf16;

use super::views::*;

#[derive(Clone, Debug)]
struct Case {
    out: usize,
    inner: usize,
    samples: Vec<Sample>,
    scores: Vec<Score>,
}

fn samples(lengths: &[(usize, usize)]) -> Vec<Sample> {
    let mut end = 0;
    let one = |&(rows, supervised): &(usize, usize)| {
        end += rows;
        Sample { rows: end - rows..end, supervised }
    };
    lengths.iter().map(one).collect()
}

fn run<T: Real>(case: &Case, dy: &[T], x: &[T], w: &HostMatrix, cpu: Option<&Cpu>) -> (Vec<u8>, Vec<u8>) {
    let sums = |n: usize| Guarded::new(vec![f64::NAN; n * case.scores.len()], -77.0);
    let (mut rows, mut cols) = (sums(case.out), sums(case.inner));
    let need = cpu.map_or(0, |cpu| cpu.importance_scratch::<T>(case.out, case.inner, &case.scores));
    let mut room = scratch(need);
    let op: Importance<'_, Host, T> = Importance {
        row_sums: rows.inside(),
        col_sums: cols.inside(),
        scratch: room.inside(),
        dy,
        x,
        w,
        samples: &case.samples,
        scores: &case.scores,
        tokens: x.len() / case.inner,
    };
    match cpu {
        Some(cpu) => cpu.importance(op).unwrap(),
        None => reference(op).unwrap(),
    }
    room.take();
    (bytes(&rows.take()), bytes(&cols.take()))
}

fn check<T: Real>(case: &Case, dtype: DType) {
    let tokens = case.samples.last().map_or(0, |s| s.rows.end);
    let (dy, x) = (reals::<T>(1, tokens * case.out), reals::<T>(2, tokens * case.inner));
    let w = numbers(3, case.out * case.inner);
    let weight = matrix(&w, (case.out, case.inner), dtype);
    let got = on_all_threads(|cpu| run(case, &dy, &x, &weight, Some(cpu)));
    let want = run(case, &dy, &x, &weight, None);
    // On absolute values every score is at most twice what AbsFirst and Second give together.
    let both = Case { scores: vec![Score::AbsFirst, Score::Second], ..case.clone() };
    let most = run(&both, &sizes(&dy), &sizes(&x), &matrix(&sizes(&w), (case.out, case.inner), dtype), None);
    let tol = (tokens + 16) as f64 * 2f64.powi(-22);
    for (what, got, want, most, len) in
        [("rows", &got.0, &want.0, &most.0, case.out), ("columns", &got.1, &want.1, &most.1, case.inner)]
    {
        let [got, want, most] = [got, want, most].map(|b| elements::<f64>(b));
        let name = format!("{case:?} {dtype} under {}: {what}", T::DTYPE);
        close(&name, &got, &want, |i| tol * (most[i % len] + most[len + i % len]));
    }
}

#[test]
fn scores_of_rows_and_columns() {
    use Score::*;
    let all = vec![AbsFirst, First, Second, AbsMix];
    let case = |out, inner, samples, scores: &[Score]| Case { out, inner, samples, scores: scores.to_vec() };
    let ragged = samples(&[(5, 4), (1, 1), (0, 0), (13, 7), (2, 0), (9, 9)]);
    let cases = [
        case(1, 1, samples(&[(1, 1)]), &all),
        case(7, 13, ragged.clone(), &all),
        case(7, 13, ragged.clone(), &[First]),
        case(65, 300, ragged.clone(), &[AbsFirst]),
        case(257, 66, ragged, &[AbsMix, First]),
        case(530, 270, samples(&[(40, 39), (33, 2)]), &all),
        case(96, 40, samples(&[(600, 500), (7, 7)]), &[Second]),
    ];
    for case in &cases {
        check::<f32>(case, DType::F32);
        check::<f32>(case, DType::BF16);
        check::<bf16>(case, DType::BF16);
        check::<bf16>(case, DType::F32);
    }
}
