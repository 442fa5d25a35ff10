//! Cases of [`crate::ops::scatter`].

use super::device::{flat, holding, same_on};
use crate::backend::Backend;
use crate::ops::scatter::{NONE, Part, Scatter, places, reference};
use crate::random::{Philox, Purpose};

/// Tensors as (x, places, kept, bytes of an item).
const TENSORS: [(usize, usize, usize, usize); 12] = [
    (1, 1, 1, 2),
    (1, 7, 0, 4),
    (1, 300, 180, 32),
    (8, 33, 20, 2),
    (3, 64, 63, 4),
    (1, 5, 5, 12),
    (2, 9, 4, 24),
    (1, 2049, 1025, 8),
    (16, 1433, 573, 2),
    (1, 1, 1, 1),
    (0, 5, 5, 2),
    (5, 2047, 2047, 3),
];

fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let random = Philox::new(seed, Purpose::Test.stream(0));
    (0..n as u64).map(|i| (random.uniform_f64(i) * 256.0) as u8).collect()
}

/// `kept` of `full` positions, ascending.
fn some(seed: u64, kept: usize, full: usize) -> Vec<usize> {
    let random = Philox::new(seed, Purpose::Test.stream(1));
    let mut order: Vec<usize> = (0..full).collect();
    order.sort_by(|&a, &b| random.uniform_f64(a as u64).total_cmp(&random.uniform_f64(b as u64)));
    order.truncate(kept);
    order.sort_unstable();
    order
}

/// A whole adapter scattered in one launch, and gathered back.
pub fn conforms<B: Backend>(backends: &[B]) {
    // Offsets that are aligned as a file's are, and ones that are not.
    for gap in [0, 16, 6, 1] {
        let (mut full, mut pruned) = (Vec::new(), Vec::new());
        let (mut from, mut back) = (Vec::new(), Vec::new());
        let (mut large, mut small) = (gap, 0);
        for (n, (outer, all, kept, item)) in TENSORS.into_iter().enumerate() {
            let list = some(n as u64, kept, all);
            let part = Part { dst: large, src: small, from: from.len(), outer, places: all, kept, item };
            full.push(part);
            pruned.push(Part {
                dst: small,
                src: large,
                from: back.len(),
                outer,
                places: kept,
                kept: all,
                item,
            });
            from.extend(places(&list, all));
            back.extend(list.iter().map(|&k| k as u32));
            large += outer * all * item + gap;
            small += outer * kept * item;
        }
        let src = bytes(gap as u64, small);
        let before = bytes(7, large);
        let mut want = before.clone();
        let op = Scatter { dst: &mut want[..], src: &src[..], from: &from, parts: &full };
        reference(op).expect("reference");
        let got = same_on(backends, |b| {
            let (mut dst, src) = (holding(b, &before, 77), flat(b, &src));
            b.scatter(Scatter { dst: dst.view_mut(), src: src.view(), from: &from, parts: &full })
                .expect("scatter");
            dst.done(b)
        });
        assert!(got == want, "scatter with gaps of {gap}");
        let again = same_on(backends, |b| {
            let (mut dst, src) = (holding(b, &vec![0xff; small], 77), flat(b, &want));
            b.scatter(Scatter { dst: dst.view_mut(), src: src.view(), from: &back, parts: &pruned })
                .expect("gather");
            dst.done(b)
        });
        assert!(again == src, "gather with gaps of {gap}");
    }
}

/// Lists and parts that lie outside.
pub fn refuses<B: Backend>(b: &B) {
    let part = Part { dst: 0, src: 0, from: 0, outer: 2, places: 3, kept: 2, item: 4 };
    let run = |parts: &[Part], from: &[u32]| {
        let (mut dst, src) = (holding(b, &[0u8; 48], 77), flat(b, &[1u8; 16]));
        let op = Scatter { dst: dst.view_mut(), src: src.view(), from, parts };
        b.scatter(op).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(run(&[part, Part { dst: 24, ..part }], &[1, NONE, 0]), "");
    assert!(run(&[part], &[0, 2, 1]).contains("part 0 takes item 2 of 2"));
    for (other, which) in [
        (Part { dst: 20, ..part }, "overlap"),
        (Part { dst: 25, ..part }, "past the end"),
        (Part { dst: 24, src: 1, ..part }, "past the operand"),
        (Part { dst: 24, from: 1, ..part }, "past the lists"),
        (Part { dst: 24, item: 0, ..part }, "no bytes"),
        (Part { dst: 24, outer: usize::MAX, ..part }, "too large"),
    ] {
        assert!(run(&[part, other], &[1, NONE, 0]).contains("part 1, Part"), "{which}");
    }
}
