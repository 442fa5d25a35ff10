//! `logits`: all logits of one sequence, for comparison with other software.

use std::path::PathBuf;

use serde::Serialize;

use super::adapters::load_adapters;
use super::common::{Common, blame};
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::writer::{SafetensorsWriter, TensorSpec};
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::memory::{Part, Plan};
use crate::model::room::{Head, Keep, RoomSize};
use crate::model::rope::Tables;
use crate::model::session::{self, Adapters, Session};
use crate::model::weights::Model;
use crate::tensor::{DType, Real};

/// Which sequence of which model.
#[derive(Clone, Debug)]
pub struct LogitsOptions {
    /// The model's folder.
    pub model: PathBuf,
    /// An adapter.
    pub adapter: Option<PathBuf>,
    /// The sequence, as it stands.
    pub ids: Vec<u32>,
    /// Where to write.
    pub out: PathBuf,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogitsReport {
    /// The file.
    pub out: PathBuf,
    /// T.
    pub tokens: usize,
    /// V.
    pub vocab: usize,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// Computes the logits `[T, V]`.
pub fn compute<B: Backend, T: Real>(
    backend: &B,
    options: &LogitsOptions,
    common: &Common,
) -> Result<Vec<f32>> {
    let read = Read::new(backend, options, common)?;
    read.plan::<T>(backend, common)?;
    let Read { checkpoint, adapters, tables, size } = read;
    let (config, tokens) = (checkpoint.config(), size.tokens);
    let model = Model::new(backend, &checkpoint)?;
    let mut session: Session<B, T> = Session::new(backend, &model, tables, size)?;
    let input = session.documents(backend, options.ids.clone(), &[0, tokens as u32])?;
    let layouts = adapters.layouts();
    session.forward(&model, backend, &input, Stack { params: &adapters.params, layouts: &layouts })?;
    let mut logits = vec![0.0; tokens * config.vocab];
    model.logits(&mut logits, &mut session.room, backend, 0, tokens)?;
    if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
        let (row, id) = (at / config.vocab, at % config.vocab);
        let why = format!("the logit of id {id} after token {row} is {}", logits[at]);
        return Err(blame(&checkpoint)(Error::Numeric(why)));
    }
    Ok(logits)
}

/// What computing them would hold in memory.
pub fn plan<B: Backend, T: Real>(backend: &B, options: &LogitsOptions, common: &Common) -> Result<Plan> {
    Read::new(backend, options, common)?.plan::<T>(backend, common)
}

/// All that is read before the weights, and the room that the sequence needs.
struct Read<B: Backend> {
    checkpoint: Checkpoint,
    adapters: Adapters<B>,
    tables: Tables,
    size: RoomSize,
}

impl<B: Backend> Read<B> {
    fn new(backend: &B, options: &LogitsOptions, common: &Common) -> Result<Read<B>> {
        if options.ids.is_empty() {
            return Err(Error::Usage("--ids names no token".into()));
        }
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let config = checkpoint.config();
        let tokens = options.ids.len();
        config.check_length(tokens)?;
        let adapters = load_adapters(backend, &checkpoint, options.adapter.as_slice(), false, common)?;
        let tables = Tables::new(config, tokens);
        let size = RoomSize {
            tokens,
            copies: 1,
            keep: Keep::Output,
            table_rows: tables.rows(tokens),
            ranks: adapters.ranks(),
            dropout: false,
            dtype: checkpoint.scratch_dtype()?,
            head: Head::Logits(tokens),
        };
        Ok(Read { checkpoint, adapters, tables, size })
    }

    /// What computing them holds in memory, within the limit.
    fn plan<T: Real>(&self, backend: &B, common: &Common) -> Result<Plan> {
        let (layouts, vocab) = (&self.adapters.layouts, self.checkpoint.config().vocab);
        let mut plan = session::plan::<B, T>(backend, &self.checkpoint, layouts, &self.tables, self.size)?;
        if backend.shares_memory() {
            plan.add(Part::Data, "logits in f32", 4 * self.size.tokens as u64 * vocab as u64);
        }
        common.fit(&plan)?;
        Ok(plan)
    }
}

/// Computes the logits and writes them as the tensor `logits` `[T, V]`, F32.
pub fn run<B: Backend, T: Real>(
    backend: &B,
    options: &LogitsOptions,
    common: &Common,
) -> Result<LogitsReport> {
    let logits = compute::<B, T>(backend, options, common)?;
    let tokens = options.ids.len();
    let vocab = logits.len() / tokens;
    let work = crate::checkpoint::output_file::OutputFile::begin(&options.out, common.force)?;
    let spec = TensorSpec::new("logits", DType::F32, [tokens, vocab]);
    let mut file = SafetensorsWriter::create(work.path(), vec![spec], &[("made_by", "anabranch")])?;
    file.write("logits", bytemuck::cast_slice(&logits))?;
    let sha256 = file.finish()?;
    work.finish()?;
    Ok(LogitsReport { out: options.out.clone(), tokens, vocab, sha256 })
}
