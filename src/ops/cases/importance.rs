//! Cases of [`crate::ops::importance`].

use super::device::{holding, rows, same_on, unwritten};
use super::linear::{close, numbers, reals, source};
use crate::backend::Backend;
use crate::host::HostMatrix;
use crate::ops::importance::{Importance, Sample, Score, reference};
use crate::tensor::{DType, Real};

#[derive(Clone, Debug)]
struct Case {
    out: usize,
    inner: usize,
    samples: Vec<Sample>,
    scores: Vec<Score>,
}

impl Case {
    fn tokens(&self) -> usize {
        self.samples.last().map_or(0, |s| s.rows.end)
    }
}

/// Sums over rows and over columns.
type Sums = (Vec<f64>, Vec<f64>);

fn samples(lengths: &[(usize, usize)]) -> Vec<Sample> {
    let mut end = 0;
    let one = |&(rows, supervised): &(usize, usize)| {
        end += rows;
        Sample { rows: end - rows..end, supervised }
    };
    lengths.iter().map(one).collect()
}

/// With `sizes`, of absolute values.
fn defined<T: Real>(case: &Case, dtype: DType, sizes: bool) -> Sums {
    let (o, i) = (case.out, case.inner);
    let (dy, x) = (reals::<T>(1, case.tokens() * o, sizes), reals::<T>(2, case.tokens() * i, sizes));
    let w = HostMatrix::new(source(&reals(3, o * i, sizes), (o, i), dtype)).expect("w");
    let (mut rows, mut cols) = (vec![0.0; case.scores.len() * o], vec![0.0; case.scores.len() * i]);
    let op: Importance<'_, crate::host::Host, T> = Importance {
        row_sums: &mut rows,
        col_sums: &mut cols,
        scratch: &mut [],
        dy: &dy,
        x: &x,
        w: &w,
        samples: &case.samples,
        scores: &case.scores,
        tokens: case.tokens(),
    };
    reference(op).expect("reference");
    (rows, cols)
}

fn run<B: Backend, T: Real>(b: &B, case: &Case, dtype: DType) -> Sums {
    let (o, i) = (case.out, case.inner);
    let dy = rows(b, &reals::<T>(1, case.tokens() * o, false), o);
    let x = rows(b, &reals::<T>(2, case.tokens() * i, false), i);
    let w = b.matrix(source(&numbers(3, o * i), (o, i), dtype)).expect("w");
    let sums = |n: usize| holding(b, &vec![f64::NAN; n * case.scores.len()], -77.0);
    let (mut row_sums, mut col_sums) = (sums(o), sums(i));
    let mut room = unwritten(b, b.importance_scratch::<T>(o, i, &case.scores));
    b.importance(Importance::<B::Store, T> {
        row_sums: row_sums.view_mut(),
        col_sums: col_sums.view_mut(),
        scratch: room.view_mut(),
        dy: dy.view(),
        x: x.view(),
        w: &w,
        samples: &case.samples,
        scores: &case.scores,
        tokens: case.tokens(),
    })
    .expect("importance");
    room.done(b);
    (row_sums.done(b), col_sums.done(b))
}

fn check<B: Backend, T: Real>(backends: &[B], case: &Case, dtype: DType) {
    let got = same_on(backends, |b| run::<B, T>(b, case, dtype));
    let want = defined::<T>(case, dtype, false);
    // On absolute values every score is at most twice what AbsFirst and Second give together.
    let both = Case { scores: vec![Score::AbsFirst, Score::Second], ..case.clone() };
    let most = defined::<T>(&both, dtype, true);
    let tol = (case.tokens() + 16) as f64 * 2f64.powi(-22);
    for (what, got, want, most, len) in
        [("rows", &got.0, &want.0, &most.0, case.out), ("columns", &got.1, &want.1, &most.1, case.inner)]
    {
        let name = format!("{case:?} {dtype} under {}: {what}", T::DTYPE);
        close(&name, got, want, |i| tol * (most[i % len] + most[len + i % len]));
    }
}

/// Against the reference on each of `backends`, which must agree to the byte, for weights of each of `dtypes`.
pub fn conforms<B: Backend, T: Real>(backends: &[B], dtypes: &[DType]) {
    use Score::*;
    let all = vec![AbsFirst, First, Second, AbsMix];
    let case = |out, inner, samples, scores: &[Score]| Case { out, inner, samples, scores: scores.to_vec() };
    let ragged = samples(&[(5, 4), (1, 1), (0, 0), (13, 7), (2, 0), (9, 9)]);
    let cases = [
        case(1, 1, samples(&[(1, 1)]), &all),
        case(7, 13, ragged.clone(), &all),
        case(7, 13, ragged.clone(), &[First]),
        case(65, 300, ragged.clone(), &[AbsFirst]),
        case(129, 63, ragged.clone(), &[First, AbsFirst]),
        case(257, 66, ragged, &[AbsMix, First]),
        case(530, 270, samples(&[(40, 39), (33, 2)]), &all),
        case(96, 40, samples(&[(600, 500), (7, 7)]), &[Second]),
    ];
    for case in &cases {
        dtypes.iter().for_each(|&dtype| check::<B, T>(backends, case, dtype));
    }
}
