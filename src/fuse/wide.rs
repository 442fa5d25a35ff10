//! Modules with more ranks than outputs, or too large for several at once: resolved from the factors themselves.
//!
//! Where P exceeds O, `[B₁ … B_E]` is its own root: the shared subspace is that of the dense `[O, O]` matrix
//! `Σ Bᵢ (Aᵢ Aᵢᵀ) Bᵢᵀ`, and no `[P, P]` matrix is formed. Otherwise the root is that of the Gram. The right side is the
//! same with the factors in each other's place. Temporary matrices are dropped as soon as they can be: of a thousand
//! adapters each has half a gigabyte.

use std::ops::Range;
use std::{iter, mem};

use faer::{Mat, MatMut, MatRef};
use rayon::prelude::*;

use crate::algebra::root::Root;
use crate::algebra::subspace::{self, Other, Subspace};
use crate::algebra::{Spread, inner, product, symmetric_product};
use crate::error::Result;
use crate::fuse::compare::{Compared, Maps, Resolved, Wanted};
use crate::fuse::conflict::Score;
use crate::fuse::direction::Direction;
use crate::fuse::factors::{Batch, Factors, Frame, Rows};
use crate::fuse::lora_cr::{LoraCr, restore_factors};
use crate::fuse::options::{Gate, Side};

/// Ranks whose products with all others are held at once.
const PANEL: usize = 512;

/// Whether a module with this frame is resolved here.
pub(super) fn is_wide(frame: &Frame, side: Side) -> bool {
    let (p, (o, i)) = (frame.rank(), frame.size);
    let more = match side {
        Side::Left => p > o,
        Side::Right => p > i,
        Side::Both => p > o || p > i,
    };
    more || frame.spread() == Spread::Pool
}

/// The updates of `batch` compared as `options` say, on the left side, or the right one under `--side right`.
pub(super) fn compare(batch: &Batch, options: &LoraCr) -> Result<Compared> {
    let of = Module::of(batch);
    let half = of.half(options.side == Side::Right);
    let found = match half.root(of.spread)? {
        Some(base) => half.subspace(base.r(&half), &of, options)?,
        None => None,
    };
    let score = found.map_or_else(Score::default, |found| score(&found));
    Ok(Compared { products: of.products(None), score, resolved: None, grams: None })
}

/// The updates of `batch` after LoRA-CR.
pub(super) fn resolve(batch: &Batch, options: &LoraCr, wanted: Wanted) -> Result<Compared> {
    let mut of = Module::of(batch);
    let products = of.products(None);
    let right = options.side == Side::Right;
    // The second side needs the first one's factor; scores need none.
    let form = matches!(wanted, Wanted::Grams | Wanted::Factors) || options.side == Side::Both;
    let first = of.one_side(right, options, form)?;
    let (directions, subspace_energy, mut root, mut map) = match first {
        Some(side) => (side.directions, side.share, Some(side.root), side.map),
        None => (Vec::new(), 1.0, None, None),
    };
    if options.side == Side::Both {
        of.one_side(true, options, true)?;
    }
    // Where the factor was not formed, its root has the same products.
    let own = |of: &Module<'_>, root: &Option<Mat<f64>>, map: &Option<Mat<f64>>| {
        let root = root.as_ref().filter(|_| map.is_some());
        of.products(root.map(|root| (right, root.as_ref())))
    };
    let mut after = own(&of, &root, &map);
    let restored = restore_factors(options.restore, &products, &after, &batch.frame.weights);
    if let Some(factors) = restored.filter(|_| root.is_some()) {
        let along = batch.frame.along_rank(&factors);
        for x in [&mut root, &mut map].into_iter().flatten() {
            (0..x.ncols()).for_each(|j| x.col_as_slice_mut(j).iter_mut().for_each(|x| *x *= along[j]));
        }
        if map.is_none() {
            of.scale(right, &along);
        }
        after = own(&of, &root, &map);
    }
    // The resolved factor has the root that the first side found: its subspace needs no other.
    let again = match &root {
        Some(root) => of.half(right).subspace(root.as_ref(), &of, options)?,
        None => None,
    };
    drop(root);
    let score_after = again.map_or_else(Score::default, |found| score(&found));
    let maps = map.filter(|_| wanted == Wanted::Maps).map(|map| match right {
        false => Maps { left: Some(map), right: None },
        true => Maps { left: None, right: Some(map.transpose().to_owned()) },
    });
    let resolved = match wanted == Wanted::Scores || maps.is_some() {
        true => None,
        false => {
            let mut out = batch.with_stack(Factors::new(of.bt.clone(), of.a.clone())?);
            out.frame.frozen &= of.a.is(batch.stack.rows_a());
            Some(out)
        }
    };
    Ok(Compared {
        products,
        score: Score::of(&directions),
        resolved: Some(Resolved {
            directions,
            subspace_energy,
            products: after,
            score: score_after,
            batch: resolved,
            grams: None,
            maps,
        }),
        grams: None,
    })
}

fn score(found: &Subspace) -> Score {
    Score::of_pairs(found.directions.iter().map(|d| (d.sigma, d.conflict)))
}

/// The factors of one module as they become.
struct Module<'a> {
    frame: &'a Frame,
    bt: Rows,
    a: Rows,
    spread: Spread,
}

/// One side: the factor whose space the updates are compared in, and the other.
struct Half<'a> {
    own: MatRef<'a, f64>,
    other: MatRef<'a, f64>,
}

/// How the factor of a side is taken apart.
enum Base {
    /// It has more ranks than rows, and is its own root.
    Itself,
    /// The root of its Gram.
    Gram(Root),
}

impl Base {
    fn r<'a>(&'a self, half: &Half<'a>) -> MatRef<'a, f64> {
        match self {
            Base::Itself => half.own.transpose(),
            Base::Gram(root) => root.r.as_ref(),
        }
    }
}

/// What one side made of the updates.
struct OneSide {
    directions: Vec<Direction>,
    /// The share of the energy in them.
    share: f64,
    /// R of the resolved updates.
    root: Mat<f64>,
    /// What makes the resolved factor of the old one, `[P, P]`, where that was not formed.
    map: Option<Mat<f64>>,
}

impl Half<'_> {
    /// None where the factor is zero.
    fn root(&self, spread: Spread) -> Result<Option<Base>> {
        if self.own.nrows() > self.own.ncols() {
            return Ok(Some(Base::Itself));
        }
        let gram = symmetric_product(self.own, self.own.transpose(), spread);
        let squares: Vec<f64> =
            (0..self.other.nrows()).map(|k| self.other.row(k).squared_norm_l2()).collect();
        Ok(Root::of(gram.as_ref(), &squares, spread)?.map(Base::Gram))
    }

    fn subspace(&self, r: MatRef<'_, f64>, of: &Module<'_>, options: &LoraCr) -> Result<Option<Subspace>> {
        let (bounds, rule) = (of.frame.bounds(), options.rule());
        // Pairs of rows need the Gram.
        if options.gate == Gate::Paper && self.other.ncols() <= self.other.nrows() {
            return subspace::resolve(r, Other::Factor(self.other), bounds, rule, of.spread);
        }
        let gram = symmetric_product(self.other, self.other.transpose(), of.spread);
        subspace::resolve(r, Other::Gram(gram.as_ref()), bounds, rule, of.spread)
    }
}

impl<'a> Module<'a> {
    fn of(batch: &'a Batch) -> Module<'a> {
        Module {
            frame: &batch.frame,
            bt: batch.stack.rows_bt().clone(),
            a: batch.stack.rows_a().clone(),
            spread: batch.frame.spread(),
        }
    }

    fn half(&self, right: bool) -> Half<'_> {
        let (bt, a) = (self.bt.get(), self.a.get());
        if right { Half { own: a, other: bt } } else { Half { own: bt, other: a } }
    }

    /// Resolves one side, and puts the resolved factor in the old one's place unless it is a map of that and not to be
    /// formed; none where every update is zero.
    fn one_side(&mut self, right: bool, options: &LoraCr, form: bool) -> Result<Option<OneSide>> {
        let half = self.half(right);
        let Some(base) = half.root(self.spread)? else { return Ok(None) };
        let Some(mut found) = half.subspace(base.r(&half), self, options)? else { return Ok(None) };
        let (energy, directions) = (found.energy, mem::take(&mut found.directions));
        let root = found.resolved(self.spread);
        let map = match &base {
            Base::Itself => None,
            Base::Gram(of) => Some(of.map(root.clone(), self.spread)),
        };
        drop(base);
        if form || map.is_none() {
            let mut factor = vec![0.0; half.own.nrows() * half.own.ncols()];
            let out = MatMut::from_column_major_slice_mut(&mut factor, half.own.nrows(), half.own.ncols());
            match &map {
                None => { out }.copy_from(root.transpose()),
                Some(map) => self.spread.product_into(out, map.transpose(), half.own),
            }
            let factor = Rows::new(factor, half.own.nrows());
            *(if right { &mut self.a } else { &mut self.bt }) = factor;
        }
        let kept: f64 = directions.iter().map(|d| d.sigma * d.sigma).sum();
        Ok(Some(OneSide {
            share: if energy > 0.0 { (kept / energy).min(1.0) } else { 1.0 },
            directions: directions.into_iter().map(Direction::from).collect(),
            root,
            map: map.filter(|_| !form),
        }))
    }

    /// Multiplies the ranks of one factor by these numbers.
    fn scale(&mut self, right: bool, by: &[f64]) {
        let factor = if right { &mut self.a } else { &mut self.bt };
        for column in factor.numbers_mut().chunks_exact_mut(by.len()) {
            column.iter_mut().zip(by).for_each(|(x, c)| *x *= c);
        }
    }

    /// `⟨Dᵢ, Dⱼ⟩`, `[E, E]`, from the products of a few adapters' factors with all others' at a time; of the root `[q, P]`
    /// of the left or right factor in its place, where one is given.
    fn products(&self, root: Option<(bool, MatRef<'_, f64>)>) -> Mat<f64> {
        let (mut bt, mut a) = (self.bt.get(), self.a.get());
        if let Some((right, root)) = root {
            *(if right { &mut a } else { &mut bt }) = root.transpose();
        }
        let edges = self.frame.edges();
        let panels = panels(self.frame);
        let one = |edges: &Range<usize>| -> Vec<Vec<f64>> {
            let (first, end) = (self.frame.block(edges.start).start, self.frame.block(edges.end - 1).end);
            let with =
                |x: MatRef<'_, f64>| product(x.subrows(first, end - first), x.subrows(0, end).transpose());
            let (gb, ga) = (with(bt), with(a));
            let pair = |i: usize, j: usize| {
                let (r, c) = (self.frame.block(i), self.frame.block(j));
                let [b, a] = [&gb, &ga].map(|g| g.submatrix(r.start - first, c.start, r.len(), c.len()));
                inner(b, a)
            };
            edges.clone().map(|i| (0..=i).map(|j| pair(i, j)).collect()).collect()
        };
        let rows: Vec<Vec<f64>> = match self.spread {
            Spread::Thread => panels.iter().flat_map(one).collect(),
            Spread::Pool => panels.par_iter().flat_map_iter(one).collect(),
        };
        Mat::from_fn(edges, edges, |i, j| rows[i.max(j)][i.min(j)])
    }
}

/// Adapters in order, so many that their ranks reach [`PANEL`].
fn panels(frame: &Frame) -> Vec<Range<usize>> {
    let mut bounds = vec![0];
    for e in 0..frame.edges() {
        let first = frame.block(bounds[bounds.len() - 1]).start;
        if frame.block(e).end - first >= PANEL || e + 1 == frame.edges() {
            bounds.push(e + 1);
        }
    }
    iter::zip(&bounds, &bounds[1..]).map(|(a, b)| *a..*b).collect()
}
