//! Counter-based random numbers: the value at a place is a function of (seed, stream, step, place) and nothing else.
//!
//! Nothing is drawn in sequence, so results depend neither on the number of threads nor on where a run was
//! interrupted. The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as
//! 1, 2, 3*, SC 2011): ten rounds of 32-bit multiplications over a 128-bit counter under a 64-bit key.

const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Philox4x32-10 of `counter` under `key`: four words that look random.
#[inline]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// What a stream of random numbers is for; the same seed gives unrelated numbers to each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Purpose {
    /// The order of the training rows; the index is the epoch.
    Shuffle,
    /// The initial A of a module; the index is the module's number.
    Init,
    /// Dropout masks; the index is the tensor's number, the step the optimizer step.
    Dropout,
    /// Scores of `--importance random`; the index is the group's number.
    Importance,
    /// Which calibration samples are taken.
    Calibration,
    /// Sampling of generated tokens.
    Generate,
    /// The tensors of a seeded test model or adapter.
    Test,
    /// The first centres of LoRA-LEGO's clusters; the index is the module's number, the step the run.
    Clusters,
    /// Which entries of an adapter's update DARE drops; the index is the adapter's place among those fused, the step the
    /// module's number.
    Drop,
    /// Where the search for a tensor's largest singular values starts; the index is the tensor's number.
    Sketch,
    /// Which questions of a domain an edge trains on; the index is a hash of the domain's name.
    Cut,
    /// In which order the questions of two domains are paired; the index is of the domains' names, the step the side.
    Pairing,
    /// In which order a written question's options stand; the index is of the domains' names.
    Options,
    /// How long after a refusal a request is sent again; the index is the request's.
    Backoff,
    /// Which items are reviewed.
    Review,
}

impl Purpose {
    /// The stream's number: the purpose in the top byte, `index` (below 2^56) under it.
    pub fn stream(self, index: u64) -> u64 {
        (self as u64) << 56 | (index & ((1 << 56) - 1))
    }
}

/// The random numbers of one (seed, stream, step), by place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    step: u64,
}

impl Philox {
    /// The numbers of (`seed`, `stream`) at step 0. The key is the first half of the block at counter
    /// (lo `stream`, hi 2^64 − 1) under the key `seed`, so streams are unrelated even where seeds are neighbours.
    pub fn new(seed: u64, stream: u64) -> Philox {
        let [k0, k1, ..] = philox(words(stream, u64::MAX), [seed as u32, (seed >> 32) as u32]);
        Philox { key: [k0, k1], step: 0 }
    }

    /// The numbers of the same stream at `step`.
    pub fn at_step(self, step: u64) -> Philox {
        Philox { step, ..self }
    }

    /// The key that [`philox`] is called with, for a kernel that computes the same numbers.
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// The four words at counter (lo `place`, hi step).
    #[inline]
    pub fn block(&self, place: u64) -> [u32; 4] {
        philox(words(place, self.step), self.key)
    }

    /// Word `i mod 4` of block `i / 4`.
    #[inline]
    pub fn word(&self, i: u64) -> u32 {
        self.block(i / 4)[(i % 4) as usize]
    }

    /// `(word i >> 8) · 2^-24`: uniform in [0, 1), each value exact in f32.
    #[inline]
    pub fn uniform(&self, i: u64) -> f32 {
        unit(self.word(i))
    }

    /// Uniform in [0, 1) with 53 bits, from words 2i (high) and 2i + 1 (low).
    pub fn uniform_f64(&self, i: u64) -> f64 {
        let block = self.block(i / 2);
        let at = 2 * (i % 2) as usize;
        let bits = u64::from(block[at]) << 32 | u64::from(block[at + 1]);
        (bits >> 11) as f64 * 2f64.powi(-53)
    }

    /// Uniform in 0..n, n at least 1: the high half of (64 random bits) · n, whose bias is below n · 2^-64.
    pub fn below(&self, i: u64, n: usize) -> usize {
        let block = self.block(i / 2);
        let at = 2 * (i % 2) as usize;
        let bits = u64::from(block[at]) << 32 | u64::from(block[at + 1]);
        ((u128::from(bits) * n as u128) >> 64) as usize
    }

    /// A permutation of 0..n by Fisher–Yates, drawing place i for position i.
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i + 1));
        }
        order
    }
}

/// `(word >> 8) · 2^-24`: a word as a number in [0, 1).
#[inline]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

fn words(lo: u64, hi: u64) -> [u32; 4] {
    [lo as u32, (lo >> 32) as u32, hi as u32, (hi >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors of Random123 1.14 (`kat_vectors`, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn seed_stream_step_and_place_each_matter() {
        let base = Philox::new(1, 2).at_step(3);
        let same = base.block(4);
        assert_eq!(same, Philox::new(1, 2).at_step(3).block(4));
        assert_ne!(same, Philox::new(2, 2).at_step(3).block(4));
        assert_ne!(same, Philox::new(1, 3).at_step(3).block(4));
        assert_ne!(same, base.at_step(4).block(4));
        assert_ne!(same, base.block(5));
        assert_eq!(base.word(18), base.block(4)[2]);
        assert_ne!(Purpose::Init.stream(0), Purpose::Shuffle.stream(0));
        assert_eq!(Purpose::Init.stream(7) & 0xff, 7);
    }

    #[test]
    fn uniform_is_in_range_and_has_the_right_moments() {
        let p = Philox::new(0, 0);
        let n = 40_000u64;
        for draw in [|p: &Philox, i| f64::from(p.uniform(i)), |p: &Philox, i| p.uniform_f64(i)] {
            let xs: Vec<f64> = (0..n).map(|i| draw(&p, i)).collect();
            assert!(xs.iter().all(|x| (0.0..1.0).contains(x)));
            let mean = xs.iter().sum::<f64>() / n as f64;
            let variance = xs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
            // Five standard errors: sd(mean) = sqrt(1/12n), sd(variance) = sqrt(1/180n).
            assert!((mean - 0.5).abs() <= 5.0 * (1.0 / (12.0 * n as f64)).sqrt());
            assert!((variance - 1.0 / 12.0).abs() <= 5.0 * (1.0 / (180.0 * n as f64)).sqrt());
        }
        assert!(unit(u32::MAX) < 1.0);
        assert_eq!(unit(0), 0.0);
    }

    #[test]
    fn permutations_are_permutations_and_fair() {
        for n in [0, 1, 2, 17, 1000] {
            let mut order = Philox::new(5, 6).permutation(n);
            order.sort_unstable();
            assert!(order.into_iter().eq(0..n));
        }
        let mut counts = [[0u32; 4]; 4];
        for seed in 0..4000 {
            for (i, j) in Philox::new(seed, 0).permutation(4).into_iter().enumerate() {
                counts[i][j] += 1;
            }
        }
        // 1,000 expected in each cell, standard deviation 27.4.
        assert!(counts.iter().flatten().all(|&c| c.abs_diff(1000) <= 137));
        assert!((0..1000).all(|i| Philox::new(0, 0).below(i, 3) < 3));
    }
}
