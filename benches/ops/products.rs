//! Operations that multiply by a frozen weight.

use anabranch::Result;
use anabranch::backend::{Backend, LinearSize, Pass};
use anabranch::ops::choice::Choice;
use anabranch::ops::cross_entropy::CrossEntropy;
use anabranch::ops::importance::{Importance, Sample, Score};
use anabranch::ops::linear::{
    Below, Dropout, Epilogue, Linear, LinearBwd, LinearBwdOut, LinearOut, Lora, LoraRows,
};
use anabranch::tensor::{DType, MemoryLayout, Real, Store};

use super::bench::{Bench, Timed, Work};
use super::data;
use super::sizes::{Layer, Model, RANK};

const DROPOUT: Dropout = Dropout { p: 0.1, seed: 1, tensor: 2, step: 3 };

/// Linears that read one x.
struct Group {
    tokens: usize,
    inner: usize,
    outs: Vec<usize>,
    swiglu: SwiGlu,
}

/// Where the gated activation lies.
#[derive(Clone, Copy, PartialEq)]
enum SwiGlu {
    Nowhere,
    /// The outputs are gate and up.
    Above,
    /// x was made of gate and up.
    Below,
}

impl Group {
    /// `8192×4096→14336+14336`, `8192×14336→4096 through swiglu`.
    fn name(&self) -> String {
        let outs: Vec<String> = self.outs.iter().map(usize::to_string).collect();
        let below = if self.swiglu == SwiGlu::Below { " through swiglu" } else { "" };
        format!("{}×{}→{}{below}", self.tokens, self.inner, outs.join("+"))
    }

    fn work(&self) -> Work {
        Work::Flops(2 * self.tokens * self.inner * self.outs.iter().sum::<usize>())
    }

    /// Adapters of rank `rank` one after another in an arena; its length.
    fn adapters(&self, rank: usize) -> (Vec<Lora>, usize) {
        let mut end = 0;
        let one = |&o: &usize| {
            let lora = Lora { a: end, b: end + rank * self.inner, rank, scale: 2.0 };
            end += rank * (self.inner + o);
            lora
        };
        (self.outs.iter().map(one).collect(), end)
    }

    fn size(&self, rank: usize, dropout: bool) -> LinearSize {
        LinearSize {
            tokens: self.tokens,
            copies: 1,
            out: self.outs.iter().sum(),
            inner: self.inner,
            rank: rank * self.outs.len(),
            adapters: 1,
            dtype: DType::BF16,
            dropout,
        }
    }
}

/// The linears of a model, each width that pruning makes alone, and those that share an x together.
pub fn linears<B: Timed, T: Real>(bench: &mut Bench<'_, B>, model: &Model) {
    let Model { tokens, width: d, head_dim: k, .. } = *model;
    let group =
        |inner: usize, outs: &[usize]| Group { tokens, inner, outs: outs.to_vec(), swiglu: SwiGlu::Nowhere };
    let mut groups = vec![group(d, &[d])];
    for Layer { mlp, .. } in &model.layers {
        groups.extend([group(d, &[*mlp]), group(*mlp, &[d])]);
    }
    for layer in [Some(model.layers[0]), model.pruned()].into_iter().flatten() {
        let Layer { heads, kv_heads, mlp } = layer;
        groups.push(group(d, &[heads * k, kv_heads * k, kv_heads * k]));
        groups.push(Group { swiglu: SwiGlu::Above, ..group(d, &[mlp, mlp]) });
        groups.push(Group { swiglu: SwiGlu::Below, ..group(mlp, &[d]) });
    }
    for (n, group) in groups.iter().enumerate() {
        for (rank, packed) in [(0, false), (0, true), (RANK, false), (RANK, true)] {
            case::<B, T>(bench, group, Adapters { rank, dropout: false }, packed);
        }
        // What dropout costs, once.
        if n == 0 {
            case::<B, T>(bench, group, Adapters { rank: RANK, dropout: true }, false);
        }
    }
}

/// The adapters of a group's outputs.
#[derive(Clone, Copy)]
struct Adapters {
    rank: usize,
    dropout: bool,
}

/// `packed` where weights are packed once for all products; left out where products read them as they are kept.
fn case<B: Timed, T: Real>(bench: &mut Bench<'_, B>, group: &Group, of: Adapters, packed: bool) {
    let b = bench.backend;
    if packed && b.packed_bytes::<T>((group.outs[0], group.inner), Pass::Forward) == 0 {
        return;
    }
    let with = if of.rank == 0 { "frozen".into() } else { format!("rank {}", of.rank) };
    let more = [(of.dropout, ", dropout"), (packed, ", packed")].map(|(on, what)| if on { what } else { "" });
    let name = format!("{}, {with}{}, {}", group.name(), more.concat(), T::DTYPE);
    if group.swiglu != SwiGlu::Below {
        bench.case("linear", &name, group.work(), || forward::<B, T>(b, group, of, packed));
    }
    bench.case("linear_bwd", &name, group.work(), || backward::<B, T>(b, group, of, packed));
}

/// The weights of a group, packed for `pass` if they are to be.
fn weights<B: Backend, T: Real>(
    backend: &B,
    group: &Group,
    packed: bool,
    pass: Pass,
) -> Result<Vec<<B::Store as Store>::Matrix>> {
    let one = |&o: &usize| {
        let mut w = data::matrix(backend, (o, group.inner))?;
        if packed {
            backend.pack::<T>(&mut w, pass)?;
        }
        Ok(w)
    };
    group.outs.iter().map(one).collect()
}

fn forward<'a, B: Backend, T: Real>(
    backend: &'a B,
    group: &'a Group,
    Adapters { rank, dropout }: Adapters,
    packed: bool,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    let (tokens, inner, outs) = (group.tokens, group.inner, &group.outs);
    let (loras, end) = group.adapters(rank);
    let rows = |&lora: &Lora| vec![LoraRows { rows: 0..tokens, lora }; usize::from(rank > 0)];
    let carried: Vec<Vec<LoraRows>> = loras.iter().map(rows).collect();
    let (x, params) = (data::rows::<B, T>(backend, 1, tokens, inner)?, data::vector(backend, 2, end)?);
    let ws = weights::<B, T>(backend, group, packed, Pass::Forward)?;
    let written = |&o: &usize| {
        Ok((data::rows::<B, T>(backend, 3, tokens, o)?, data::rows::<B, T>(backend, 4, tokens, rank)?))
    };
    let mut ys = outs.iter().map(written).collect::<Result<Vec<_>>>()?;
    let above = group.swiglu == SwiGlu::Above;
    let mut h = data::rows::<B, T>(backend, 5, if above { tokens } else { 0 }, outs[0])?;
    let room = backend.linear_scratch::<T>(group.size(rank, dropout));
    let mut scratch = backend.alloc("scratch", room)?;
    Ok(move || {
        let outs = ys.iter_mut().zip(&ws).zip(&carried).zip(outs).map(|((((y, t), w), groups), &o)| {
            let y = Some(B::Store::rows_mut(y, 0..tokens, o));
            LinearOut { y, t: B::Store::rows_mut(t, 0..tokens, rank), w, bias: None, groups }
        });
        backend.linear(Linear {
            outs: outs.collect(),
            epilogue: match above {
                true => Epilogue::SwiGlu(B::Store::rows_mut(&mut h, 0..tokens, group.outs[0])),
                false => Epilogue::None,
            },
            scratch: B::Store::view_mut(&mut scratch, 0..room),
            x: B::Store::rows(&x, 0..tokens, inner),
            params: B::Store::view(&params, 0..end),
            tokens,
            copies: 1,
            dropout: dropout.then_some(DROPOUT),
        })
    })
}

fn backward<'a, B: Backend, T: Real>(
    backend: &'a B,
    group: &'a Group,
    Adapters { rank, dropout }: Adapters,
    packed: bool,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    let (tokens, inner, outs) = (group.tokens, group.inner, &group.outs);
    let (loras, end) = group.adapters(rank);
    let params = data::vector(backend, 2, end)?;
    let [x, mut dx] =
        [data::rows::<B, T>(backend, 1, tokens, inner)?, data::rows(backend, 3, tokens, inner)?];
    let below = group.swiglu == SwiGlu::Below;
    // Their gradients take their places and are the next run's gate and up: zeros, which stay.
    let len = if below { tokens * B::Store::row(inner) } else { 0 };
    let [mut gate, mut up] = [backend.alloc::<T>("gate", len)?, backend.alloc::<T>("up", len)?];
    let mut grads = backend.alloc::<f32>("gradients", end)?;
    let ws = weights::<B, T>(backend, group, packed, Pass::Backward)?;
    let read = |&o: &usize| {
        Ok((data::rows::<B, T>(backend, 4, tokens, o)?, data::rows::<B, T>(backend, 5, tokens, rank)?))
    };
    let dys = outs.iter().map(read).collect::<Result<Vec<_>>>()?;
    let room = backend.linear_bwd_scratch::<T>(group.size(rank, dropout));
    let mut scratch = backend.alloc("scratch", room)?;
    Ok(move || {
        let outs = dys.iter().zip(&ws).zip(&loras).zip(outs).map(|((((dy, t), w), &lora), &o)| {
            let dy = B::Store::rows(dy, 0..tokens, o);
            LinearBwdOut { dy, t: B::Store::rows(t, 0..tokens, rank), w, lora: (rank > 0).then_some(lora) }
        });
        backend.linear_bwd(LinearBwd {
            below: match below {
                true => Below::SwiGlu {
                    x: B::Store::rows_mut(&mut dx, 0..tokens, inner),
                    gate: B::Store::rows_mut(&mut gate, 0..tokens, inner),
                    up: B::Store::rows_mut(&mut up, 0..tokens, inner),
                },
                false => Below::Kept {
                    x: B::Store::rows(&x, 0..tokens, inner),
                    dx: Some(B::Store::rows_mut(&mut dx, 0..tokens, inner)),
                },
            },
            grads: B::Store::view_mut(&mut grads, 0..end),
            scratch: B::Store::view_mut(&mut scratch, 0..room),
            outs: outs.collect(),
            params: B::Store::view(&params, 0..end),
            tokens,
            dropout: dropout.then_some(DROPOUT),
            freeze_a: false,
        })
    })
}

/// `[n, n]` by a frozen `[n, n]`, which is in bf16.
pub fn square<B: Backend, T: Real>(backend: &B, n: usize) -> Result<impl FnMut() -> Result<()> + '_> {
    let x = data::rows::<B, T>(backend, 1, n, n)?;
    let mut y = data::rows::<B, T>(backend, 2, n, n)?;
    let w = data::matrix(backend, (n, n))?;
    let (mut t, params) = (backend.alloc::<T>("no adapter", 0)?, backend.alloc::<f32>("no adapter", 0)?);
    let group = Group { tokens: n, inner: n, outs: vec![n], swiglu: SwiGlu::Nowhere };
    let room = backend.linear_scratch::<T>(group.size(0, false));
    let mut scratch = backend.alloc("scratch", room)?;
    Ok(move || {
        let out = LinearOut {
            y: Some(B::Store::rows_mut(&mut y, 0..n, n)),
            t: B::Store::view_mut(&mut t, 0..0),
            w: &w,
            bias: None,
            groups: &[],
        };
        backend.linear(Linear {
            outs: vec![out],
            epilogue: Epilogue::None,
            scratch: B::Store::view_mut(&mut scratch, 0..room),
            x: B::Store::rows(&x, 0..n, n),
            params: B::Store::view(&params, 0..0),
            tokens: n,
            copies: 1,
            dropout: None,
        })
    })
}

/// cross_entropy with and without its gradient, every token supervised; choice of four tokens in each of 64 rows.
pub fn head<B: Timed, T: Real>(bench: &mut Bench<'_, B>, model: &Model) {
    let Model { tokens, width, vocab, .. } = *model;
    let b = bench.backend;
    let name = format!("{tokens}×{width}→{vocab}, {}", T::DTYPE);
    let product = 2 * tokens * width * vocab;
    bench.case("cross_entropy", &name, Work::Flops(product), || loss::<B, T>(b, model, false));
    let name = format!("{name}, gradient");
    bench.case("cross_entropy", &name, Work::Flops(2 * product), || loss::<B, T>(b, model, true));
    let rows = tokens.min(64);
    let name = format!("{rows}×{width}→{vocab}, {}", T::DTYPE);
    bench.case("choice", &name, Work::Flops(2 * rows * width * vocab), || choice::<B, T>(b, model, rows));
}

fn loss<'a, B: Backend, T: Real>(
    backend: &'a B,
    model: &Model,
    gradient: bool,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    let Model { tokens, width, vocab, .. } = *model;
    let x = data::rows::<B, T>(backend, 1, tokens, width)?;
    let head = data::matrix(backend, (vocab, width))?;
    let rows: Vec<u32> = (0..tokens as u32).collect();
    let targets: Vec<u32> = rows.iter().map(|r| r * 7919 % vocab as u32).collect();
    let mut nll = backend.alloc::<f32>("nll", tokens)?;
    let mut dx = data::rows::<B, T>(backend, 2, tokens, width)?;
    let room = backend.cross_entropy_scratch::<T>(tokens, vocab, width, DType::BF16);
    let mut scratch = backend.alloc("scratch", room)?;
    Ok(move || {
        backend.cross_entropy(CrossEntropy {
            nll: B::Store::view_mut(&mut nll, 0..tokens),
            dx: gradient.then_some(B::Store::rows_mut(&mut dx, 0..tokens, width)),
            scratch: B::Store::view_mut(&mut scratch, 0..room),
            x: B::Store::rows(&x, 0..tokens, width),
            head: &head,
            rows: &rows,
            targets: &targets,
            tokens,
            weight: 0.1,
        })
    })
}

fn choice<'a, B: Backend, T: Real>(
    backend: &'a B,
    model: &Model,
    tokens: usize,
) -> Result<impl FnMut() -> Result<()> + 'a> {
    let Model { width, vocab, .. } = *model;
    let x = data::rows::<B, T>(backend, 1, tokens, width)?;
    let head = data::matrix(backend, (vocab, width))?;
    let rows: Vec<u32> = (0..4 * tokens as u32).map(|i| i / 4).collect();
    let ids: Vec<u32> = (0..4 * tokens as u32).map(|i| i % 4).collect();
    let mut out = backend.alloc::<f32>("out", rows.len())?;
    let room = backend.choice_scratch::<T>(rows.len(), vocab, width, DType::BF16);
    let mut scratch = backend.alloc("scratch", room)?;
    Ok(move || {
        backend.choice(Choice {
            out: B::Store::view_mut(&mut out, 0..rows.len()),
            scratch: B::Store::view_mut(&mut scratch, 0..room),
            x: B::Store::rows(&x, 0..tokens, width),
            head: &head,
            rows: &rows,
            ids: &ids,
            tokens,
        })
    })
}

/// Eight samples, first order and second, on the largest weight of a layer.
pub fn importance<B: Timed, T: Real>(bench: &mut Bench<'_, B>, model: &Model) {
    let b = bench.backend;
    let (tokens, i, o) = (model.tokens, model.width, model.layers[0].mlp);
    let cases: [(&str, &'static [Score]); 2] = [
        ("first order", &[Score::AbsFirst]),
        ("second order", &[Score::First, Score::Second, Score::AbsMix]),
    ];
    for (what, scores) in cases {
        let name = format!("{tokens}×{i}→{o}, {what}, {}", T::DTYPE);
        bench.case("importance", &name, Work::Flops(2 * tokens * i * o), || {
            scored::<B, T>(b, [tokens, o, i], scores)
        });
    }
}

fn scored<'a, B: Backend, T: Real>(
    backend: &'a B,
    [tokens, o, i]: [usize; 3],
    scores: &'static [Score],
) -> Result<impl FnMut() -> Result<()> + 'a> {
    let (dy, x) = (data::rows::<B, T>(backend, 1, tokens, o)?, data::rows::<B, T>(backend, 2, tokens, i)?);
    let w = data::matrix(backend, (o, i))?;
    let bound = |s: usize| s * tokens / 8;
    let sample = |s| Sample { rows: bound(s)..bound(s + 1), supervised: bound(s + 1) - bound(s) };
    let samples: Vec<Sample> = (0..8).map(sample).collect();
    let room = backend.importance_scratch::<T>(o, i, scores);
    let mut scratch = backend.alloc("scratch", room)?;
    let n = scores.len();
    let mut row_sums = backend.alloc::<f64>("sums", n * o)?;
    let mut col_sums = backend.alloc::<f64>("sums", n * i)?;
    Ok(move || {
        backend.importance(Importance {
            row_sums: B::Store::view_mut(&mut row_sums, 0..n * o),
            col_sums: B::Store::view_mut(&mut col_sums, 0..n * i),
            scratch: B::Store::view_mut(&mut scratch, 0..room),
            dy: B::Store::rows(&dy, 0..tokens, o),
            x: B::Store::rows(&x, 0..tokens, i),
            w: &w,
            samples: &samples,
            scores,
            tokens,
        })
    })
}
