//! See [`crate::ops::attention`].
//!
//! What a kernel has to know of the segments goes to the device as one list: tiles of pairs of a query and a head of a
//! group, tiles of keys for the gradients, and the runs of the pasts. It is the same for every layer and for both
//! directions, so that it is sent once a batch.

use super::Cuda;
use super::launch::{Grid, Kernel, Pointer, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use super::tensor_map::{MatrixAt, TensorMap};
use crate::error::{Error, Result};
use crate::ops::attention::{Attention, AttentionBwd, Heads, Segment};
use crate::ops::ensure;
use crate::tensor::{Length, MemoryLayout, Real};

const FILE: &str = "attention";
const FILE_BWD: &str = "attention_bwd";
const FILE_HOPPER: &str = "attention_sm90";
const THREADS: usize = 128;
const THREADS_HOPPER: usize = 384;
/// Rows of the boxes that Hopper's kernel copies keys by where they lie together, and where they do not.
const BOX: u32 = 8;
const LINE: u32 = 1;
/// Words of a tile.
const TILE: usize = 6;
/// Keys, or pairs, of a block of the gradients' kernels.
const ROWS: usize = 64;

/// The kernels for head widths up to one.
#[derive(Debug)]
struct Width {
    most: usize,
    /// Pairs of a block of the forward kernel.
    pairs: usize,
    /// Blocks of a tile of keys: each a part of the columns.
    parts: usize,
    forward: &'static str,
    dq: &'static str,
    dkv: &'static str,
}

macro_rules! width {
    ($most:literal, $pairs:literal, $parts:literal) => {
        Width {
            most: $most,
            pairs: $pairs,
            parts: $parts,
            forward: concat!("attention_", $most),
            dq: concat!("attention_dq_", $most),
            dkv: concat!("attention_dkv_", $most),
        }
    };
}

const WIDTHS: [Width; 6] = [
    width!(32, 128, 1),
    width!(64, 128, 1),
    width!(80, 128, 1),
    width!(96, 128, 1),
    width!(128, 128, 1),
    width!(256, 64, 2),
];

/// The kernels for heads of width K.
fn width(op: &'static str, heads: Heads) -> Result<&'static Width> {
    let found = WIDTHS.iter().find(|w| heads.dim <= w.most && heads.dim.is_multiple_of(2));
    let found = found.ok_or_else(|| Error::Op {
        op,
        why: format!("head width K is {}, expected an even number up to 256 on CUDA", heads.dim),
    })?;
    ensure(op, heads.scale > 0.0, || {
        format!("scale is {}, expected a positive number on CUDA", heads.scale)
    })?;
    Ok(found)
}

/// Tiles of pairs, tiles of keys, and the runs of the pasts, as words.
struct Tiles {
    words: Vec<u32>,
    /// Tiles of up to as many pairs as asked for.
    pairs: usize,
    /// Tiles of up to 64 keys.
    keys: usize,
}

/// Cuts the segments of heads with `group` heads a key/value head. Tiles with more work come first, so that the short ones
/// fill the device at the end.
fn tiles(segments: &[Segment], group: usize, rows: usize) -> Result<Tiles> {
    let word = |n: usize| {
        u32::try_from(n).map_err(|_| Error::Device(format!("attention: {n} does not fit 32 bits")))
    };
    let (mut of_pairs, mut of_keys, mut runs) = (Vec::new(), Vec::new(), Vec::new());
    for (n, s) in segments.iter().enumerate() {
        let pairs = s.q.len() * group;
        let past: usize = s.past.iter().map(|run| run.len()).sum();
        for first in (0..pairs).step_by(rows) {
            let last = (first + rows).min(pairs) - 1;
            of_pairs.push((past + last / group + 1, n, first, runs.len()));
        }
        for first in (0..s.q.len()).step_by(ROWS) {
            of_keys.push((pairs - first * group, n, first, runs.len()));
        }
        for run in &s.past {
            runs.extend([word(run.start)?, word(run.len())?]);
        }
    }
    of_pairs.sort_by_key(|tile| std::cmp::Reverse(tile.0));
    of_keys.sort_by_key(|tile| std::cmp::Reverse(tile.0));
    let (pairs, keys) = (of_pairs.len(), of_keys.len());
    let first_run = TILE * (pairs + keys);
    let mut words = Vec::with_capacity(first_run + runs.len());
    for (_, n, first, run) in of_pairs.into_iter().chain(of_keys) {
        let s = &segments[n];
        let past = s.past.iter().map(|run| run.len()).sum();
        let numbers = [first, s.q.len() * group, s.q.start, s.own, past, first_run + run];
        for number in numbers {
            words.push(word(number)?);
        }
    }
    words.extend(runs);
    Ok(Tiles { words, pairs, keys })
}

/// H, H/G, K and the rows of q and k, as the kernels take them.
fn shape(heads: Heads) -> Result<(i32, i32, i32, i32, i32)> {
    Ok((
        int("H", heads.q)?,
        int("H/G", heads.q / heads.kv)?,
        int("K", heads.dim)?,
        int("the row of H·K", DeviceMemory::row(heads.q * heads.dim))?,
        int("the row of G·K", DeviceMemory::row(heads.kv * heads.dim))?,
    ))
}

/// Hopper's kernel for heads of width K, of tiles of as many pairs as the others'.
fn hopper(heads: Heads) -> Option<Kernel> {
    let name = match heads.dim {
        64 => "attention_64_sm90",
        128 => "attention_128_sm90",
        _ => return None,
    };
    Some(Kernel { file: FILE_HOPPER, name })
}

fn grid(blocks: usize, heads: Heads, parts: usize) -> Grid {
    Grid { blocks: [blocks, heads.kv, parts], threads: THREADS, more_shared: 0 }
}

fn sizes(tokens: usize, heads: Heads) -> [(&'static str, usize); 4] {
    [("T", tokens), ("H", heads.q), ("G", heads.kv), ("K", heads.dim)]
}

pub fn attention<T: Real>(cuda: &Cuda, op: Attention<'_, DeviceMemory, T>) -> Result<()> {
    let (tokens, keys) = op.check()?;
    let heads = op.heads;
    let width = width("attention", heads)?;
    let tiles = tiles(op.segments, heads.q / heads.kv, width.pairs)?;
    let list = cuda.list(Kind::Segments, &tiles.words)?;
    let (h, group, k, ld_q, ld_k) = shape(heads)?;
    if let Some(kernel) = hopper(heads).filter(|_| cuda.driver.hopper) {
        let (columns, ld) = (heads.kv * heads.dim, ld_k as usize);
        let map = |data, rows| TensorMap::new(&cuda.driver, MatrixAt { data, rows: keys, columns, ld }, rows);
        let (of_k, of_v) = (op.k.pointer(), op.v.pointer());
        let maps = (map(of_k, BOX)?, map(of_k, LINE)?, map(of_v, BOX)?, map(of_v, LINE)?);
        let args =
            (op.o, op.lse, op.q, maps.0, maps.1, maps.2, maps.3, list.view(), h, group, ld_q, heads.scale);
        let grid = Grid { threads: THREADS_HOPPER, ..grid(tiles.pairs, heads, 1) };
        // SAFETY: as below.
        return unsafe { cuda.launch(kernel, grid, &sizes(tokens, heads), args) };
    }
    let args = (op.o, op.lse, op.q, op.k, op.v, list.view(), h, group, k, ld_q, ld_k, heads.scale);
    let kernel = Kernel { file: FILE, name: width.forward };
    // SAFETY: `check` compared the views with T and U rows, and the segments with both; tiles lie within their segments.
    unsafe { cuda.launch(kernel, grid(tiles.pairs, heads, 1), &sizes(tokens, heads), args) }
}

pub fn attention_bwd<T: Real>(cuda: &Cuda, op: AttentionBwd<'_, DeviceMemory, T>) -> Result<()> {
    const OP: &str = "attention_bwd";
    let tokens = op.check()?;
    let heads = op.heads;
    let width = width(OP, heads)?;
    let need = tokens * heads.q;
    ensure(OP, op.scratch.len() >= need, || {
        format!("scratch holds {} elements, expected {need}", op.scratch.len())
    })?;
    let tiles = tiles(op.segments, heads.q / heads.kv, width.pairs)?;
    let list = cuda.list(Kind::Segments, &tiles.words)?;
    let (h, group, k, ld_q, ld_k) = shape(heads)?;
    let delta = op.scratch.pointer();
    let (q, keys, v, scale) = (op.q, op.k, op.v, heads.scale);
    let parts = width.pairs / ROWS;
    let args = (
        op.dq,
        delta,
        op.do_,
        op.o,
        op.lse,
        q,
        keys,
        v,
        list.view(),
        int("parts", parts)?,
        h,
        group,
        k,
        ld_q,
        ld_k,
        scale,
    );
    let kernel = Kernel { file: FILE_BWD, name: width.dq };
    // SAFETY: `check` compared the views with T rows, and the segments with T; delta has T · H elements.
    unsafe { cuda.launch(kernel, grid(tiles.pairs * parts, heads, 1), &sizes(tokens, heads), args)? };

    let of_keys = Pointer(list.view().pointer().0 + (4 * TILE * tiles.pairs) as u64);
    let args = (op.dk, op.dv, op.do_, op.lse, delta, q, keys, v, of_keys, h, group, k, ld_q, ld_k, scale);
    let kernel = Kernel { file: FILE_BWD, name: width.dkv };
    // SAFETY: as above; the list's tiles of keys follow those of pairs.
    unsafe { cuda.launch(kernel, grid(tiles.keys, heads, width.parts), &sizes(tokens, heads), args) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cuda::tests::device;
    use crate::ops::cases::attention::{a_cache_changes_nothing, conforms, conforms_backward, large_scores};

    #[test]
    fn as_the_reference() {
        if let Some(cuda) = device() {
            conforms::<_, bf16>(&[cuda]);
        }
    }

    #[test]
    fn gradients_as_the_reference() {
        if let Some(cuda) = device() {
            conforms_backward::<_, bf16>(&[cuda]);
        }
    }

    #[test]
    fn a_document_in_pieces() {
        if let Some(cuda) = device() {
            a_cache_changes_nothing::<_, bf16>(&cuda);
            large_scores::<_, bf16>(&cuda);
        }
    }

    #[test]
    fn hopper_has_kernels_of_two_widths() {
        for (dim, name) in [(64, Some("attention_64_sm90")), (128, Some("attention_128_sm90")), (96, None)] {
            assert_eq!(hopper(Heads { q: 4, kv: 1, dim, scale: 1.0 }).map(|k| k.name), name);
            assert!(WIDTHS.iter().all(|w| w.most != dim || w.pairs == 128));
        }
    }

    #[test]
    fn kernels_by_head_width() {
        let of = |dim| width("attention", Heads { q: 1, kv: 1, dim, scale: 1.0 });
        let names =
            [2, 32, 64, 66, 80, 96, 128, 130, 256].map(|dim| of(dim).map(|w| w.forward).unwrap_or("none"));
        let most = [32, 32, 64, 80, 80, 96, 128, 256, 256].map(|w| format!("attention_{w}"));
        assert_eq!(names, most.each_ref().map(|s| s.as_str()));
        assert!(of(31).is_err() && of(258).is_err());
        let err = width("attention", Heads { q: 1, kv: 1, dim: 8, scale: 0.0 }).unwrap_err().to_string();
        assert!(err.contains("scale is 0, expected a positive number"), "{err}");
    }

    #[test]
    fn long_tiles_first() {
        let segments = [
            Segment { q: 0..40, own: 0, past: vec![] },
            Segment { q: 40..41, own: 99, past: vec![0..7, 9..99] },
        ];
        let t = tiles(&segments, 4, 128).unwrap();
        assert_eq!((t.pairs, t.keys), (3, 2));
        let tile = |i: usize| &t.words[TILE * i..TILE * (i + 1)];
        assert_eq!(tile(0), [0, 4, 40, 99, 97, 30]);
        assert_eq!(tile(1), [128, 160, 0, 0, 0, 30]);
        assert_eq!(tile(2), [0, 160, 0, 0, 0, 30]);
        assert_eq!((tile(3)[1], tile(4)[1]), (160, 4));
        assert_eq!(t.words[30..], [0, 7, 9, 90]);
    }
}
