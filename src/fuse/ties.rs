//! `ties` (Yadav, Tam, Choshen, Raffel, Bansal, *TIES-Merging: resolving interference when merging models*, NeurIPS
//! 2023): trim each update to its largest entries, elect a sign for each place, take the mean of those that agree.
//!
//! As here: the weights count before the election; the sign of a zero sum is +; the mean is divided by the weights of
//! those that agree; every entry of at least the threshold's magnitude is kept, so that ties are kept together.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::cpu::entries::{Entries, Window, count, magnitude};
use crate::error::{Error, Result};
use crate::fuse::elementwise::{each_tile, strips};
use crate::fuse::factors::{Frame, Kept};
use crate::fuse::options::{DensityOf, DensityScope};
use crate::fuse::select::{CLUSTER, Counts, Selection};

/// Numbers of all adapters' samples together, and of all their bins, at most: they are what a search holds.
const ROOM: usize = 1 << 24;
/// Entries of a sample at most.
const SAMPLE: usize = 1 << 18;
/// Bins of a pass at most.
const BINS: usize = 1 << 18;
/// Entries for each of which a sample has at most one.
const SPARSE: u64 = 16;
/// Rows and columns of a tile of a sample.
const TILE: (usize, usize) = (8, CLUSTER / 8);

/// Which entries of an update are kept: the largest by magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trim {
    /// The share of the entries that are kept, in (0, 1].
    pub density: f64,
    /// Which entries the share is of.
    pub of: DensityOf,
    /// Whether each module has its own threshold.
    pub scope: DensityScope,
}

impl Default for Trim {
    fn default() -> Trim {
        Trim { density: 0.2, of: DensityOf::default(), scope: DensityScope::default() }
    }
}

impl Trim {
    /// Whether the density is one.
    pub fn check(&self) -> Result<()> {
        if self.density > 0.0 && self.density <= 1.0 {
            return Ok(());
        }
        Err(Error::Usage(format!("--density {}: expected a number above 0 and at most 1", self.density)))
    }

    /// Of how many entries of the module member `e` of a frame keeps its share.
    fn entries(&self, frame: &Frame, e: usize) -> u64 {
        let (o, i) = frame.size;
        let Kept { rows, columns } = &frame.kept[e];
        self.along(rows, o) * self.along(columns, i)
    }

    /// Of how many places of an axis of `n`, of which pruning left `kept`.
    pub(super) fn along(&self, kept: &Option<Vec<usize>>, n: usize) -> u64 {
        match self.of {
            DensityOf::Support => kept.as_ref().map_or(n, Vec::len) as u64,
            DensityOf::Full => n as u64,
        }
    }

    /// How many of `n` entries are kept: `⌊density · n⌋`, at least 1.
    pub(super) fn rank(&self, n: u64) -> u64 {
        ((self.density * n as f64) as u64).max(1)
    }
}

/// The least magnitude, as bits of an f32, that is kept of each of `edges` adapters over all of `frames`, each of which
/// `pass` shows once a call with its members' updates.
///
/// Passes: a sample, where there is much to look at, then one or two counts.
pub(crate) fn thresholds(
    trim: &Trim,
    frames: &[Frame],
    edges: usize,
    mut pass: impl FnMut(&mut dyn FnMut(&Frame, &[Entries])) -> Result<()>,
) -> Result<Vec<u32>> {
    let (mut totals, mut of) = (vec![0u64; edges], vec![0u64; edges]);
    for frame in frames {
        for (at, &e) in frame.members.iter().enumerate() {
            totals[e] += frame.size.0 as u64 * frame.size.1 as u64;
            of[e] += trim.entries(frame, at);
        }
    }
    let room = ROOM / edges.max(1);
    let (most, bins) = (SAMPLE.min(room) as u64, BINS.min(room).max(1 << 10) as u64);
    let mut samples = vec![Vec::new(); edges];
    if totals.iter().any(|t| *t > most * SPARSE) {
        pass(&mut |frame, updates| {
            for (&e, update) in frame.members.iter().zip(updates) {
                sample(&mut samples[e], update, most as f64 / totals[e].max(most * SPARSE) as f64);
            }
        })?;
    }
    let mut searches: Vec<Selection> = std::iter::zip(&totals, &of)
        .zip(samples)
        .map(|((total, of), sample)| Selection::new(trim.rank(*of), *total, sample, bins))
        .collect();
    while searches.iter().any(|s| s.window().is_some()) {
        pass(&mut |frame, updates| {
            for (&e, update) in frame.members.iter().zip(updates) {
                if let Some(window) = searches[e].window() {
                    searches[e].add(&counts(update, window));
                }
            }
        })?;
        searches.iter_mut().for_each(Selection::advance);
    }
    Ok(searches.iter().filter_map(Selection::found).collect())
}

/// Adds the magnitudes of about `share` of the entries, in tiles that are spread over rows and columns.
fn sample(out: &mut Vec<u32>, update: &Entries, share: f64) {
    let (o, i) = update.size();
    let (rows, columns) = (TILE.0.min(o), TILE.1.min(i));
    let tiles = ((share * o as f64 * i as f64 / CLUSTER as f64) as usize).max(1);
    let mut x = vec![0.0; rows * columns];
    for t in 0..tiles {
        let row = (t as u128 * (o - rows) as u128 / (tiles as u128 - 1).max(1)) as usize;
        // Multiples of the golden ratio cover the columns evenly, whatever their number.
        let place = (t as f64 * 0.618_033_988_749_894_9).fract();
        let column = ((place * (i - columns + 1) as f64) as usize) & !7;
        update.tile(&mut x, row..row + rows, column..column + columns);
        out.extend(x.iter().map(|x| magnitude(*x)));
    }
}

/// What lies in and above `window` among all entries.
fn counts(update: &Entries, window: Window) -> Counts {
    let one = |mut counts: Counts, rows| {
        each_tile(update.size(), rows, |tile, x| {
            update.tile(x, tile.rows.clone(), tile.columns.clone());
            counts.above += count(x, window, &mut counts.bins);
        });
        counts
    };
    strips(update.size().0)
        .fold(|| Counts::new(window), one)
        .reduce(|| Counts { above: 0, bins: vec![] }, |a, b| if a.bins.is_empty() { b } else { a.add(&b) })
}
