//! Cases of [`crate::ops::gate`].

use super::device::{flat, holding, same_on};
use super::normal64;
use crate::backend::Backend;
use crate::ops::gate::{Gate, Layout, Rule, reference};
use crate::ops::gram::{Gram, Stack, reference as gram};

/// Ranks of a module's adapters, O and I, and the adapter whose B is zero.
type Case<'a> = (&'a [usize], usize, usize, Option<usize>);

const CASES: [Case<'static>; 12] = [
    (&[1], 1, 3, None),
    (&[4, 4], 40, 30, None),
    (&[8, 8], 64, 96, None),
    (&[3, 5, 2], 16, 64, None),
    (&[4, 4], 6, 20, None),
    (&[4, 4], 20, 6, Some(1)),
    (&[2, 2], 9, 9, Some(0)),
    (&[8, 8, 8], 70, 50, None),
    (&[1, 1, 1, 1, 1, 1, 1], 31, 29, None),
    (&[16, 16, 16, 16], 90, 80, None),
    (&[32, 31], 80, 90, None),
    // More than a block's shared memory holds.
    (&[33, 33], 80, 90, None),
];

/// The Gram of columns whose strengths fall off, so that singular values lie apart.
fn grams(seed: u64, (ranks, o, i, zero): Case<'_>) -> [Vec<f64>; 2] {
    let p: usize = ranks.iter().sum();
    let edge = |j: usize| (0..ranks.len()).find(|&e| j < ranks[..=e].iter().sum()).unwrap_or(0);
    let within = |j: usize| j - ranks[..edge(j)].iter().sum::<usize>();
    let strength = |j: usize| match zero {
        Some(e) if e == edge(j) => 0.0,
        _ => 0.85_f64.powi(within(j) as i32) * (1.0 + 0.37 * edge(j) as f64),
    };
    let one = |seed: u64, rows: usize, strength: &dyn Fn(usize) -> f64| {
        let x = normal64(seed, rows * p, 1.0);
        let x: Vec<f64> = x.iter().enumerate().map(|(at, x)| x * strength(at % p)).collect();
        let mut g = vec![0.0; p * p];
        gram(Gram { out: &mut g[..], x: &x[..], stacks: &[Stack { rows, rank: p }] }).expect("gram");
        g
    };
    [one(2 * seed, o, &strength), one(2 * seed + 1, i, &|_| 1.0)]
}

fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let size = want.iter().fold(0.0_f64, |s, x| s.max(x.abs()));
    for (at, (g, w)) in got.iter().zip(want).enumerate() {
        let err = (g - w).abs();
        assert!(err <= tolerance * size, "{what}[{at}] = {g}, expected {w}: off by {err:e} of {size:e}");
    }
}

/// Every case in one launch under every rule, beside a module of zeros.
pub fn conforms<B: Backend>(backends: &[B]) {
    let rules = [(usize::MAX, 0.0), (3, 0.0), (usize::MAX, 0.8), (2, 0.99)]
        .into_iter()
        .flat_map(|(top, share)| [false, true].map(|opposition| Rule { top, share, opposition }));
    let (mut bounds, mut b, mut a) = (vec![vec![0, 2, 4]], vec![0.0; 16], vec![0.0; 16]);
    for (seed, case) in CASES.into_iter().enumerate() {
        let [gb, ga] = grams(seed as u64, case);
        b.extend(gb);
        a.extend(ga);
        let mut list = vec![0];
        list.extend(case.0.iter().scan(0, |sum, r| {
            *sum += r;
            Some(*sum)
        }));
        bounds.push(list);
    }
    let modules: Vec<&[usize]> = bounds.iter().map(Vec::as_slice).collect();
    let numbers: usize = modules.iter().map(|m| Layout::of(m).len()).sum();
    for rule in rules {
        let run = |backend: &B, b: &[f64], a: &[f64]| {
            let room = || holding(backend, &vec![f64::NAN; a.len()], -77.0);
            let (mut map, mut scratch) = (room(), room());
            let mut directions = holding(backend, &vec![f64::NAN; numbers], -77.0);
            let (b, a) = (flat(backend, b), flat(backend, a));
            backend
                .gate(Gate {
                    map: map.view_mut(),
                    directions: directions.view_mut(),
                    scratch: scratch.view_mut(),
                    b: b.view(),
                    a: a.view(),
                    modules: &modules,
                    rule,
                })
                .expect("gate");
            scratch.done(backend);
            (map.done(backend), directions.done(backend))
        };
        let (map, directions) = same_on(backends, |backend| run(backend, &b, &a));
        let (mut want_map, mut want) = (vec![0.0; a.len()], vec![0.0; numbers]);
        let mut scratch = vec![0.0; a.len()];
        let op = Gate {
            map: &mut want_map[..],
            directions: &mut want[..],
            scratch: &mut scratch[..],
            b: &b[..],
            a: &a[..],
            modules: &modules,
            rule,
        };
        reference(op).expect("reference");
        let (mut square, mut number) = (0, 0);
        for (n, layout) in modules.iter().map(|m| Layout::of(m)).enumerate() {
            let (p, len) = (layout.rank, layout.len());
            let (got, want) = (&directions[number..number + len], &want[number..number + len]);
            assert_eq!(got[0], want[0], "directions of module {n} under {rule:?}");
            close("energy", &got[1..2], &want[1..2], 1e-12);
            for k in 0..got[0] as usize {
                let ((s, c, tables), (ws, wc, wanted)) =
                    (layout.direction(got, k), layout.direction(want, k));
                close("sigma", &[s], &[ws], 1e-10);
                assert!((c - wc).abs() <= 1e-9, "module {n} direction {k}: {c} {wc}");
                close("norm", tables[0], wanted[0], 1e-9);
                for (got, want) in tables[1].iter().chain(tables[2]).zip(wanted[1].iter().chain(wanted[2])) {
                    assert!((got - want).abs() <= 1e-9, "module {n} direction {k}: {got} {want}");
                }
            }
            close("map", &map[square..square + p * p], &want_map[square..square + p * p], 1e-9);
            (square, number) = (square + p * p, number + len);
        }
        // One Gram that is not finite is told, and the others do not see it.
        let mut bad = a.clone();
        bad[16] = f64::NAN;
        let told = run(&backends[0], &b, &bad).1;
        assert!(told[Layout::of(modules[0]).len()].is_nan());
        let rest = Layout::of(modules[0]).len() + Layout::of(modules[1]).len();
        assert!(told[rest..] == directions[rest..]);
    }
}
