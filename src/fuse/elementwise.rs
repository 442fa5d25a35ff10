//! Methods that work on the entries of the updates: `ties`, `dare`, `dare-ties`. The entries are made from the factors
//! a tile at a time, as often as they are needed, and never all stored. The result goes into a weight row by row, or is
//! approximated at a rank ([`super::low_rank`]).

use std::ops::Range;

use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde::{Deserialize, Serialize};

use crate::cpu::entries::{Entries, Join, Keep, dot, finite, join};
use crate::error::{Error, Result};
use crate::fuse::coverage::covered;
use crate::fuse::dare::Drop;
use crate::fuse::factors::{Batch, Factors, Frame};
use crate::fuse::measure::ratio;
use crate::fuse::method::Fusion;
use crate::fuse::options::Method;
use crate::fuse::ties::{self, Trim};

/// Rows that are worked on by one thread at once.
const STRIP: usize = 64;
/// Rows and columns of a tile at most: a few of them lie in the first-level cache.
const TILE: (usize, usize) = (8, 512);

/// What is done to the entries of each update before they become one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sparse {
    /// The largest stay.
    Trim(Trim),
    /// A random choice stays, scaled up.
    Drop(Drop),
}

impl Sparse {
    /// What `method` does by default; none where it keeps all entries.
    pub fn of(method: Method) -> Option<Sparse> {
        match method {
            Method::Ties | Method::KnotsTies => Some(Sparse::Trim(Trim::default())),
            Method::Dare | Method::DareTies => Some(Sparse::Drop(Drop::default())),
            _ => None,
        }
    }

    /// Whether the numbers are in range.
    pub fn check(&self) -> Result<()> {
        match self {
            Sparse::Trim(trim) => trim.check(),
            Sparse::Drop(drop) => drop.check(),
        }
    }
}

/// What was kept of one update of a module.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeptEntries {
    /// Entries that were kept and are not zero.
    pub kept: u64,
    /// The least magnitude that was kept, where one decides.
    pub threshold: Option<f32>,
}

/// One module's updates, ready to be fused.
#[derive(Clone, Debug)]
pub struct Elementwise {
    frame: Frame,
    /// As they are fused.
    updates: Vec<Entries>,
    /// As they were read, where they are no longer that.
    read: Option<Vec<Entries>>,
    keeps: Vec<Keep>,
    weights: Vec<f32>,
    lambda: f32,
    join: Join,
}

/// Sums over entries of the fused update δ.
#[derive(Clone, Debug, Default)]
pub struct Sums {
    /// `‖δ‖²`.
    pub size: f64,
    /// `⟨δ, Dₑ⟩` of the updates as they are fused.
    pub along: Vec<f64>,
    /// `⟨δ, Dₑ⟩` of the updates as they were read.
    pub along_read: Vec<f64>,
    /// Entries of each update that were kept and are not zero.
    pub kept: Vec<u64>,
}

impl Sums {
    fn new(edges: usize) -> Sums {
        Sums { size: 0.0, along: vec![0.0; edges], along_read: vec![0.0; edges], kept: vec![0; edges] }
    }

    /// The sums over several parts, added in their order.
    pub fn total(parts: &[Sums], edges: usize) -> Sums {
        let mut out = Sums::new(edges);
        for part in parts {
            out.size += part.size;
            for e in 0..edges {
                out.along[e] += part.along[e];
                out.along_read[e] += part.along_read[e];
                out.kept[e] += part.kept[e];
            }
        }
        out
    }
}

/// The updates of a batch, entry by entry.
pub(crate) fn entries(batch: &Batch) -> Vec<Entries> {
    (0..batch.frame.edges()).into_par_iter().map(|e| Entries::new(batch.bt(e), batch.a(e))).collect()
}

impl Elementwise {
    /// Of the updates in `batch`, which were `read` before their conflicts were resolved; thresholds that the frame does
    /// not give are looked for.
    pub fn new(fusion: &Fusion, batch: &Batch, read: Option<&Batch>) -> Result<Elementwise> {
        let frame = batch.frame.clone();
        // An entry that pruning removed never agrees, so that an election divides by those who kept it as it is.
        let (join, cover) = match fusion.method {
            Method::Dare => (Join::Sum, Some(covered(batch, fusion.coverage))),
            _ => (Join::Elect, None),
        };
        let changed = cover.is_some() || read.is_some();
        let updates = entries(cover.as_ref().unwrap_or(batch));
        let keeps = match fusion.sparse {
            Some(Sparse::Trim(trim)) => match &frame.least {
                Some(least) => least.iter().map(|&least| Keep::Least(least)).collect(),
                None => {
                    let mut own = frame.clone();
                    own.members = (0..frame.edges()).collect();
                    let pass = |visit: &mut dyn FnMut(&Frame, &[Entries])| {
                        visit(&own, &updates);
                        Ok(())
                    };
                    let least = ties::thresholds(&trim, std::slice::from_ref(&own), frame.edges(), pass)?;
                    least.into_iter().map(Keep::Least).collect()
                }
            },
            Some(Sparse::Drop(drop)) => {
                frame.members.iter().map(|&e| drop.keep(fusion.seed, e, frame.module)).collect()
            }
            None => {
                return Err(Error::Usage(format!("--method {}: nothing says what is kept", fusion.method)));
            }
        };
        // An election knows ratios of weights only; equal ones as 1 let updates cancel exactly.
        let unit = match join {
            Join::Elect => frame.weights.iter().copied().fold(0.0, f64::max),
            Join::Sum => 1.0,
        };
        let unit = if unit > 0.0 { unit } else { 1.0 };
        Ok(Elementwise {
            weights: frame.weights.iter().map(|w| (w / unit) as f32).collect(),
            read: changed.then(|| entries(read.unwrap_or(batch))),
            frame,
            updates,
            keeps,
            lambda: fusion.lambda as f32,
            join,
        })
    }

    /// `(O, I)`.
    pub fn size(&self) -> (usize, usize) {
        self.frame.size
    }

    /// Puts the rows `rows` of the fused update δ into `out`; gives what they add to the sums, of which all but the kept
    /// entries are left out without `measure`.
    ///
    /// An error where an entry of an update is not finite.
    pub fn rows(&self, rows: Range<usize>, out: &mut [f32], measure: bool) -> Result<Sums> {
        let (edges, i) = (self.frame.edges(), self.frame.size.1);
        let mut sums = Sums::new(edges);
        let most = TILE.0 * TILE.1;
        let (mut kept, mut x, mut delta) =
            (vec![0.0; edges * most], vec![0.0; edges * most], vec![0.0; most]);
        let (first, mut sound) = (rows.start, true);
        each_tile(self.frame.size, rows, |tile, read| {
            let (n, width) = (read.len(), tile.columns.len());
            for e in 0..edges {
                let (x, kept) = (&mut x[e * n..][..n], &mut kept[e * n..][..n]);
                self.updates[e].tile(x, tile.rows.clone(), tile.columns.clone());
                // Whether it is kept or not: what is no number would be no part of an election, and never be seen.
                sound &= finite(x);
                for (row, (x, kept)) in tile.rows.clone().zip(x.chunks(width).zip(kept.chunks_mut(width))) {
                    let at = row as u64 * i as u64 + tile.columns.start as u64;
                    sums.kept[e] += self.keeps[e].apply(kept, x, at);
                }
            }
            let delta = &mut delta[..n];
            join(delta, &kept[..edges * n], &self.weights, self.lambda, self.join);
            for (row, delta) in tile.rows.clone().zip(delta.chunks(width)) {
                out[(row - first) * i..][tile.columns.clone()].copy_from_slice(delta);
            }
            if measure {
                sums.size += dot(delta, delta);
                for e in 0..edges {
                    sums.along[e] += dot(delta, &x[e * n..][..n]);
                    if let Some(updates) = &self.read {
                        updates[e].tile(read, tile.rows.clone(), tile.columns.clone());
                        sums.along_read[e] += dot(delta, read);
                    }
                }
            }
        });
        if self.read.is_none() {
            sums.along_read.clone_from(&sums.along);
        }
        if sound && sums.size.is_finite() && sums.along_read.iter().all(|s| s.is_finite()) {
            return Ok(sums);
        }
        Err(self.too_large())
    }

    pub(super) fn too_large(&self) -> Error {
        Error::Numeric(format!(
            "{}: an entry of an update is larger than f32 holds: is the scale of an adapter right?",
            self.frame.module
        ))
    }

    /// `‖x − δ‖ / ‖δ‖`, or `‖x‖` where δ is 0, of an x that is known by its rows: `lost` gives `‖x − δ‖²` of those it is
    /// told, whose numbers in δ it gets. Also what was kept of each update.
    pub fn distance(
        &self,
        lost: impl Fn(Range<usize>, &[f32]) -> f64 + Sync,
    ) -> Result<(f64, Vec<KeptEntries>)> {
        let ((o, i), edges) = (self.frame.size, self.frame.edges());
        // Gathered before the first error is looked for, so that it is always the same one.
        let strips: Vec<Result<(f64, f64, Sums)>> = strips(o)
            .map_init(Vec::new, |delta, rows| {
                delta.resize(rows.len() * i, 0.0);
                let sums = self.rows(rows.clone(), delta, false)?;
                Ok((lost(rows, delta), dot(delta, delta), sums))
            })
            .collect();
        let strips = strips.into_iter().collect::<Result<Vec<_>>>()?;
        let (lost, size) = strips.iter().fold((0.0, 0.0), |s, strip| (s.0 + strip.0, s.1 + strip.1));
        let sums: Vec<Sums> = strips.into_iter().map(|strip| strip.2).collect();
        Ok((ratio(lost, size, lost), self.kept(&Sums::total(&sums, edges))))
    }

    /// [`Elementwise::distance`] of the update `B A`.
    pub fn distance_to(&self, got: &Factors) -> Result<(f64, Vec<KeptEntries>)> {
        let (size, got) = (self.frame.size, Entries::new(got.bt(), got.a()));
        self.distance(|rows, delta| {
            let (first, mut lost) = (rows.start, 0.0);
            each_tile(size, rows, |tile, x| {
                got.tile(x, tile.rows.clone(), tile.columns.clone());
                for (row, x) in tile.rows.zip(x.chunks_mut(tile.columns.len())) {
                    let delta = &delta[(row - first) * size.1..][tile.columns.clone()];
                    x.iter_mut().zip(delta).for_each(|(x, d)| *x -= d);
                }
                lost += dot(x, x);
            });
            lost
        })
    }

    /// What was kept of each update.
    pub fn kept(&self, sums: &Sums) -> Vec<KeptEntries> {
        let threshold = |keep: &Keep| match keep {
            Keep::Least(least) => Some(f32::from_bits(*least)),
            Keep::Drawn(_) => None,
        };
        let one = |(kept, keep): (&u64, &Keep)| KeptEntries { kept: *kept, threshold: threshold(keep) };
        sums.kept.iter().zip(&self.keeps).map(one).collect()
    }
}

/// Rows and columns of a matrix.
pub(super) struct Tile {
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
}

/// The rows of a matrix of `o` rows, in strips.
pub(super) fn strips(o: usize) -> impl ParallelIterator<Item = Range<usize>> {
    (0..o.div_ceil(STRIP)).into_par_iter().map(move |s| s * STRIP..((s + 1) * STRIP).min(o))
}

/// Calls `f` for each tile of the rows `rows` of a matrix of size `(O, I)`, with room for its numbers.
pub(super) fn each_tile((_, i): (usize, usize), rows: Range<usize>, mut f: impl FnMut(Tile, &mut [f32])) {
    let mut room = vec![0.0; TILE.0 * TILE.1];
    for first in (0..i).step_by(TILE.1) {
        let columns = first..(first + TILE.1).min(i);
        for row in rows.clone().step_by(TILE.0) {
            let rows = row..(row + TILE.0).min(rows.end);
            let n = rows.len() * columns.len();
            f(Tile { rows, columns: columns.clone() }, &mut room[..n]);
        }
    }
}
