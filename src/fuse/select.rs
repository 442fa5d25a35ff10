//! The magnitude of a given rank among more entries than are ever stored: exact, by counting passes.
//!
//! A pass counts how many entries lie above a window of magnitudes and how many in each bin of it; the next window is
//! the bin with the rank in it. A sample says where to look first: where it is right, and a bin holds one magnitude,
//! one pass is enough; where it is wrong, that costs a pass.

use crate::cpu::entries::Window;

/// The largest magnitude.
const LARGEST: u32 = 0x7fff_ffff;
/// Bins of a window that is too wide for one magnitude a bin: two passes over all magnitudes, 16 bits and 15.
const COARSE_BINS: u64 = 1 << 16;
/// Standard errors of a sample's rank that the first window reaches to both sides.
const ERRORS: f64 = 6.0;
/// Neighbouring numbers of a sample that are taken to depend on one another.
pub(super) const CLUSTER: usize = 512;

/// The search for the entry of one rank, counted from 1 at the largest.
pub(super) struct Selection {
    rank: u64,
    bins: u64,
    window: Window,
    counts: Counts,
    found: Option<u32>,
}

/// What a pass found.
#[derive(Clone)]
pub(super) struct Counts {
    /// Entries above the window.
    pub(super) above: u64,
    /// Entries in each bin of it.
    pub(super) bins: Vec<u64>,
}

impl Counts {
    /// Of nothing yet.
    pub(super) fn new(window: Window) -> Counts {
        Counts { above: 0, bins: vec![0; window.bins] }
    }

    /// The counts of both.
    pub(super) fn add(mut self, other: &Counts) -> Counts {
        self.above += other.above;
        self.bins.iter_mut().zip(&other.bins).for_each(|(n, more)| *n += more);
        self
    }
}

/// The magnitudes from `least` to `most`, one a bin where there are at most `bins` of them.
fn window(least: u32, most: u32, bins: u64) -> Window {
    let width = u64::from(most - least) + 1;
    let bins = if width <= bins { bins } else { bins.min(COARSE_BINS) };
    let shift = (0..32).find(|s| (width - 1) >> s < bins).unwrap_or(0);
    Window { least, shift, bins: ((width - 1) >> shift) as usize + 1 }
}

impl Selection {
    /// Looks for `rank` among `total` entries, of which `sample` is a part in clusters of [`CLUSTER`]; at most `bins`
    /// bins are counted at once.
    pub(super) fn new(rank: u64, total: u64, sample: Vec<u32>, bins: u64) -> Selection {
        let (least, most) = guess(rank as f64 / total.max(1) as f64, sample);
        let window = window(least, most, bins);
        Selection { rank, bins, window, counts: Counts::new(window), found: None }
    }

    /// What the next pass has to count; none where the search is over.
    pub(super) fn window(&self) -> Option<Window> {
        self.found.is_none().then_some(self.window)
    }

    /// Adds what was counted in a part of the entries.
    pub(super) fn add(&mut self, counts: &Counts) {
        self.counts = std::mem::replace(&mut self.counts, Counts { above: 0, bins: vec![] }).add(counts);
    }

    /// Ends a pass over all entries.
    pub(super) fn advance(&mut self) {
        if self.found.is_some() {
            return;
        }
        let Window { least, shift, bins } = self.window;
        let end = u64::from(least) + ((bins as u64) << shift);
        let mut seen = self.counts.above;
        if seen >= self.rank && end <= u64::from(LARGEST) {
            return self.look(end as u32, LARGEST);
        }
        for (bin, n) in self.counts.bins.iter().enumerate().rev() {
            seen += n;
            if seen >= self.rank {
                let first = least + ((bin as u32) << shift);
                match shift {
                    0 => self.found = Some(first),
                    _ => {
                        self.look(first, (u64::from(first) + (1 << shift) - 1).min(u64::from(LARGEST)) as u32)
                    }
                }
                return;
            }
        }
        match least {
            // Fewer are not zero than are asked for.
            1 => self.found = Some(1),
            _ => self.look(1, least - 1),
        }
    }

    fn look(&mut self, least: u32, most: u32) {
        self.window = window(least, most, self.bins);
        self.counts = Counts::new(self.window);
    }

    /// The magnitude, as bits of an f32, where the search is over; at least 1, so that a zero is never kept.
    pub(super) fn found(&self) -> Option<u32> {
        self.found
    }
}

/// The magnitudes between which the entry that has the share `q` above it almost surely lies.
fn guess(q: f64, mut sample: Vec<u32>) -> (u32, u32) {
    let clusters = sample.len() / CLUSTER;
    if clusters < 16 {
        return (1, LARGEST);
    }
    let n = sample.len() as f64;
    let at = |sample: &mut [u32], share: f64| {
        // From the largest down.
        let i = (n * (1.0 - share)).clamp(0.0, n - 1.0) as usize;
        *sample.select_nth_unstable(i).1
    };
    let middle = at(&mut sample.clone(), q);
    let shares = sample
        .chunks_exact(CLUSTER)
        .map(|c| c.iter().filter(|&&x| x >= middle).count() as f64 / CLUSTER as f64);
    let mean = shares.clone().sum::<f64>() / clusters as f64;
    let variance = shares.map(|s| (s - mean).powi(2)).sum::<f64>() / clusters as f64;
    let margin = ERRORS * (variance / clusters as f64).sqrt() + 2.0 / n;
    let most = if q <= margin { LARGEST } else { at(&mut sample, q - margin).max(1) };
    let least = if q + margin >= 1.0 { 1 } else { at(&mut sample, q + margin).max(1) };
    (least.min(most), most)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::entries::count;

    /// The search over numbers at hand, and its passes.
    fn search(x: &[f32], rank: u64, sample: Vec<u32>, bins: u64) -> (u32, usize) {
        let mut selection = Selection::new(rank, x.len() as u64, sample, bins);
        // One to see that the sample was wrong, then as many bits of 31 a pass as the bins tell apart.
        let most = 1 + 31usize.div_ceil(bins.min(COARSE_BINS).ilog2() as usize);
        let mut passes = 0;
        while let Some(window) = selection.window() {
            let mut counts = Counts::new(window);
            counts.above = count(x, window, &mut counts.bins);
            selection.add(&counts);
            selection.advance();
            passes += 1;
            assert!(passes <= most, "{passes} passes of {bins} bins, the last over {window:?}");
        }
        (selection.found().unwrap(), passes)
    }

    /// By sorting.
    fn plain(x: &[f32], rank: u64) -> u32 {
        let mut keys: Vec<u32> = x.iter().map(|x| x.abs().to_bits()).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        keys.get(rank as usize - 1).map_or(1, |&k| k.max(1))
    }

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        let random = crate::random::Philox::new(seed, 0);
        (0..n as u64).map(|i| (random.uniform(i) - 0.5) * 2f32.powi(random.word(i) as i32 % 30)).collect()
    }

    #[test]
    fn a_good_sample_leaves_one_pass_a_bad_one_the_same_result() {
        let random = crate::random::Philox::new(3, 0);
        let x: Vec<f32> = (0..1 << 17).map(|i| 1.0 + random.uniform(i)).collect();
        let keys: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
        for rank in [1, 77, 1 << 13, 1 << 15, 1 << 16, 1 << 17] {
            let want = plain(&x, rank);
            let (got, passes) = search(&x, rank, keys.clone(), 1 << 24);
            assert_eq!(got, want, "rank {rank}");
            // At the ends the window reaches to the end of all magnitudes.
            assert!(passes == 1 || !(1 << 13..=1 << 16).contains(&rank), "rank {rank}: {passes} passes");
            assert_eq!(search(&x, rank, vec![], 1 << 10).0, want);
            assert_eq!(search(&x, rank, vec![1; 1 << 14], 1 << 10).0, want, "all below");
            assert_eq!(search(&x, rank, vec![LARGEST; 1 << 14], 1 << 10).0, want, "all above");
        }
    }

    #[test]
    fn ties_zeros_and_the_ends() {
        let equal = [0.5f32, -0.5, 0.5, 0.5];
        assert_eq!(search(&equal, 2, vec![], 64).0, 0.5f32.to_bits());
        assert_eq!(search(&[0.0, -0.0, 2.0], 3, vec![], 64).0, 1);
        assert_eq!(search(&[0.0; 5], 2, vec![], 64).0, 1);
        let tiny = f32::from_bits(1);
        assert_eq!(search(&[tiny, 0.0], 1, vec![], 64).0, 1);
        let large = [f32::MAX, f32::MIN, 1.0];
        assert_eq!(search(&large, 2, vec![], 64).0, f32::MAX.to_bits());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

        #[test]
        fn as_by_sorting(seed in any::<u64>(), n in 1usize..3000, share in 0.0f64..1.0, bins in 1u64..5000) {
            let x = numbers(seed, n);
            let rank = ((share * n as f64) as u64).max(1);
            let sample = x.iter().cycle().take(20 * CLUSTER).map(|x| x.abs().to_bits()).collect();
            // A window of one bin would never end.
            let bins = bins.max(2);
            prop_assert_eq!(search(&x, rank, sample, bins).0, plain(&x, rank));
        }
    }
}
