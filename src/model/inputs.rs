//! What the linears of a model read, layer by layer over all of the data: one layer's worth is held at a time.

use super::adapters::Stack;
use super::forward::{DropoutKey, Pass};
use super::session::Session;
use super::weights::Model;
use crate::backend::Backend;
use crate::checkpoint::module::Source;
use crate::data::batch::Batch;
use crate::error::Result;
use crate::ops::embed::Embed;
use crate::ops::rms_norm::RmsNorm;
use crate::tensor::{MemoryLayout, Real, Store};

/// Who is shown the inputs.
pub trait Watch {
    /// The rows of one input of a batch, `x[T, width]`.
    fn input(&mut self, layer: usize, source: Source, x: &[f32], width: usize) -> Result<()>;

    /// All batches went through a layer.
    fn layer_done(&mut self, layer: usize) -> Result<()>;
}

/// Runs `batches` through the model, each layer over all of them before the next, and shows `watch` what its linears
/// read. Their hidden states between two layers are held here, `[T, D]` of all batches.
pub fn watch<B: Backend, T: Real>(
    model: &Model<B>,
    session: &mut Session<B, T>,
    backend: &B,
    stack: Stack<'_, B::Store>,
    batches: &[Batch],
    watch: &mut impl Watch,
) -> Result<()> {
    let c = &model.config;
    let d = c.hidden;
    let row = B::Store::row(d);
    let mut hidden: Vec<Vec<T>> = Vec::with_capacity(batches.len());
    for batch in batches {
        let t = batch.tokens();
        backend.embed(Embed::<B::Store, T> {
            y: B::Store::rows_mut(&mut session.room.h[0], 0..t, d),
            table: &model.embed,
            ids: &batch.ids,
        })?;
        let mut host = vec![T::from_f32(0.0); t * row];
        backend.download(&mut host, B::Store::rows(&session.room.h[0], 0..t, d))?;
        hidden.push(host);
    }
    for l in 0..c.layers {
        let sizes = c.layer_sizes(l);
        let heads = sizes.heads * c.head_dim;
        for (batch, host) in batches.iter().zip(&mut hidden) {
            let t = batch.tokens();
            let input = session.documents(backend, batch.ids.clone(), &batch.bounds)?;
            let room = &mut session.room;
            let (in_, out, slot) = (room.stream_of(l), room.stream_of(l + 1), room.slot_of(l, c.layers));
            backend.upload(B::Store::rows_mut(&mut room.h[in_], 0..t, d), host)?;
            let pass = Pass::new(backend, &input, stack, DropoutKey::NONE);
            model.layer_forward(room, &pass, l, false)?;
            for (source, x, width) in [
                (Source::O, &room.slots[slot].o, heads),
                (Source::GateUp, &room.n, d),
                (Source::Down, &room.act, sizes.mlp),
            ] {
                watch.input(l, source, &rows::<B, T>(backend, x, t, width)?, width)?;
            }
            // The first norm's output is gone: the second's was put in its place.
            backend.rms_norm(RmsNorm {
                y: B::Store::rows_mut(&mut room.n, 0..t, d),
                rstd: B::Store::view_mut(&mut room.slots[slot].rstd1, 0..t),
                x: B::Store::rows(&room.h[in_], 0..t, d),
                w: B::Store::view(&model.layers[l].norm1, 0..d),
                tokens: t,
                width: d,
                eps: c.rms_norm_eps as f32,
            })?;
            watch.input(l, Source::Qkv, &rows::<B, T>(backend, &room.n, t, d)?, d)?;
            backend.download(host, B::Store::rows(&room.h[out], 0..t, d))?;
        }
        watch.layer_done(l)?;
    }
    Ok(())
}

/// `x[T, width]` as it is on the device, without what pads its rows.
fn rows<B: Backend, T: Real>(
    backend: &B,
    x: &<B::Store as Store>::Buf<T>,
    tokens: usize,
    width: usize,
) -> Result<Vec<f32>> {
    let row = B::Store::row(width);
    let mut host = vec![T::from_f32(0.0); tokens * row];
    backend.download(&mut host, B::Store::rows(x, 0..tokens, width))?;
    Ok(host.chunks(row).flat_map(|x| &x[..width]).map(|x| x.to_f32()).collect())
}
