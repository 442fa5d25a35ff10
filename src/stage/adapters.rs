//! Adapters from folders onto a device.

use std::path::Path;

use super::common::Common;
use crate::backend::Backend;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::adapters::Layout;
use crate::model::session::Adapters;
use crate::tensor::Store;

/// Reads the adapters in `dirs` for `checkpoint` into one arena; with `base` the base is the first column, and it is
/// the only one if there is no adapter.
///
/// Fails where an adapter is another model's or holds NaN.
pub fn load_adapters<B: Backend, P: AsRef<Path>>(
    backend: &B,
    checkpoint: &Checkpoint,
    dirs: &[P],
    base: bool,
    common: &Common,
) -> Result<Adapters<B>> {
    let mut host: Vec<f32> = Vec::new();
    let mut layouts = Vec::with_capacity(dirs.len() + 1);
    if base || dirs.is_empty() {
        layouts.push(None);
    }
    for dir in dirs {
        let adapter = Adapter::open(dir.as_ref(), common.open_options())?;
        check_model(&adapter, checkpoint)?;
        adapter.check_finite()?;
        layouts.push(Some(append(&mut host, &adapter)));
    }
    let mut params = backend.alloc("adapters", host.len())?;
    backend.upload(B::Store::view_mut(&mut params, 0..host.len()), &host)?;
    Ok(Adapters { params, layouts })
}

/// Puts all factors of `adapter` at the end of `host`; says where they lie.
pub(super) fn append(host: &mut Vec<f32>, adapter: &Adapter) -> Layout {
    let layout = layout(adapter, host.len());
    for pair in adapter.modules.values() {
        host.extend_from_slice(&pair.a.to_f32());
        host.extend_from_slice(&pair.b.to_f32());
    }
    layout
}

/// Where the factors of `adapter` lie, A and B of each module in turn, the first of them at `start`.
pub(super) fn layout(adapter: &Adapter, start: usize) -> Layout {
    let mut layout = Layout::starting_at(start);
    for (&module, pair) in &adapter.modules {
        layout.push(module, pair.dims(), pair.rank, pair.scale as f32);
    }
    layout
}

/// Fails where an adapter's shapes or its recorded model are not those of `checkpoint`.
pub(super) fn check_model(adapter: &Adapter, checkpoint: &Checkpoint) -> Result<()> {
    adapter.check_base(checkpoint.config())?;
    let trained_on = adapter.provenance.as_ref().and_then(|p| p.model_fingerprint.as_deref());
    let Some(trained_on) = trained_on else { return Ok(()) };
    let own = checkpoint.fingerprint()?;
    if trained_on == own {
        return Ok(());
    }
    Err(Error::file(
        &adapter.path,
        format!(
            "is of the model with fingerprint {trained_on}, and {} has {own}: recover it first, or name the model that it was trained on",
            checkpoint.dir().display()
        ),
    ))
}
