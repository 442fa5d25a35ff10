//! `grams`: the Gram matrix `XᵀX / T` of what each linear of a model reads, over T tokens of data.
//!
//! It is what RegMean and CAT Merging need of a client, and all that leaves it: a matrix of the inputs' second moments.

use std::path::PathBuf;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use serde::Serialize;

use super::adapters::load_adapters;
use super::common::{Common, blame};
use super::evaluate::text;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::config::ModelConfig;
use crate::checkpoint::digest;
use crate::checkpoint::input_grams::{FORMAT, INPUT_GRAMS, packed_len, tensor_name};
use crate::checkpoint::module::Source;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::pruning::PRUNING;
use crate::checkpoint::writer::{SafetensorsWriter, TensorSpec};
use crate::data::batch::Batch;
use crate::data::documents::{self, Document};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::adapters::Stack;
use crate::model::inputs::{Watch, watch};
use crate::model::memory::{Part, Plan};
use crate::model::packing::PackedWeights;
use crate::model::room::{Head, Keep, RoomSize};
use crate::model::rope::Tables;
use crate::model::session::{self, Adapters, Session};
use crate::random::{Philox, Purpose};
use crate::tensor::{DType, Real};

/// Rows of a Gram that one thread adds to at a time.
const ROWS: usize = 128;

/// Whose inputs, and over which data.
#[derive(Clone, Debug)]
pub struct GramsOptions {
    /// The model's folder, pruned or not.
    pub model: PathBuf,
    /// An adapter that is part of the model.
    pub adapter: Option<PathBuf>,
    /// JSON lines or text, as for training.
    pub data: Vec<PathBuf>,
    /// Where to write.
    pub out: PathBuf,
    /// The most tokens that are used, in whole documents drawn by seed.
    pub tokens: usize,
    /// Tokens of a document.
    pub seq: usize,
    /// The most tokens that go through a layer together.
    pub batch_tokens: usize,
    /// Count and leave out bad lines.
    pub skip_bad: bool,
}

/// What was collected.
#[derive(Clone, Debug, Serialize)]
pub struct GramsReport {
    /// The folder.
    pub out: PathBuf,
    /// T.
    pub tokens: usize,
    /// Documents that they are of.
    pub documents: usize,
    /// Bad lines that were left out.
    pub skipped: usize,
    /// Inputs, each of them a matrix.
    pub inputs: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// The run's memory plan.
    pub plan: Plan,
    /// The output was there already.
    pub already_finished: bool,
}

/// A run that is ready: model, adapter and data read, memory planned, nothing written yet.
pub struct Prepared<B: Backend> {
    options: GramsOptions,
    checkpoint: Checkpoint,
    adapters: Adapters<B>,
    batches: Vec<Batch>,
    documents: usize,
    skipped: usize,
    tables: Tables,
    size: RoomSize,
    /// All buffers.
    pub plan: Plan,
    packed: PackedWeights,
}

impl<B: Backend> Prepared<B> {
    /// Reads the model's config, the adapter and the data, and plans the memory on `backend`'s terms.
    pub fn new<T: Real>(backend: &B, options: GramsOptions, common: &Common) -> Result<Prepared<B>> {
        let most = u32::MAX as usize / 2;
        for (name, n) in [("--tokens", options.tokens), ("--batch-tokens", options.batch_tokens)] {
            if !(1..=most).contains(&n) {
                return Err(Error::Usage(format!("{name} is {n}, expected 1 to {most}")));
            }
        }
        let checkpoint = Checkpoint::open(&options.model, common.open_options())?;
        let config = checkpoint.config();
        config.check_length(options.seq)?;
        let tokenizer = Tokenizer::load(checkpoint.dir(), config.vocab)?;
        let data = documents::load(&options.data, &tokenizer, options.seq, options.skip_bad)?;
        let taken = draw(&data.documents, options.tokens, common.seed);
        let batches = text::batches(&taken, 1, options.batch_tokens);
        let extent = text::extent(&batches, 1);
        let adapters = load_adapters(backend, &checkpoint, options.adapter.as_slice(), false, common)?;
        let tables = Tables::new(config, extent.longest);
        let size = RoomSize {
            tokens: extent.tokens,
            copies: 1,
            keep: Keep::Output,
            table_rows: tables.rows(extent.tokens),
            ranks: adapters.ranks(),
            dropout: false,
            dtype: checkpoint.scratch_dtype()?,
            head: Head::Loss(0),
        };
        let mut plan = session::plan::<B, T>(backend, &checkpoint, &adapters.layouts, &tables, size)?;
        let tokens: usize = taken.iter().map(|d| d.ids.len()).sum();
        let states = tokens as u64 * config.hidden as u64 * size_of::<T>() as u64;
        plan.add(Part::Data, "hidden states of all tokens", states);
        let layer = |l: usize| Source::ALL.map(|s| width(config, l, s));
        let grams = |l: usize| layer(l).map(Gram::bytes).iter().sum::<u64>();
        plan.add(Part::Data, "Grams of one layer", (0..config.layers).map(grams).max().unwrap_or(0));
        let widest = (0..config.layers).flat_map(layer).max().unwrap_or(0) as u64;
        // As it comes from the device, and in f32.
        let row = widest * (4 + size_of::<T>() as u64);
        plan.add(Part::Data, "an input of a batch", extent.tokens as u64 * row);
        let (plan, packed) = common.packing::<T>(backend, config, PackedWeights::LAYERS, plan)?;
        let (documents, skipped) = (taken.len(), data.skipped.len());
        Ok(Prepared {
            adapters,
            batches,
            documents,
            skipped,
            tables,
            size,
            plan,
            packed,
            checkpoint,
            options,
        })
    }

    /// Tokens of all documents that are used.
    pub fn tokens(&self) -> usize {
        self.batches.iter().map(Batch::tokens).sum()
    }

    /// The tensors of the file, in the order in which they come.
    fn specs(&self) -> Result<Vec<TensorSpec>> {
        let config = self.checkpoint.config();
        let inputs = (0..config.layers).flat_map(|l| Source::ALL.map(|s| (l, s)));
        inputs
            .map(|(l, source)| {
                let width = width(config, l, source);
                let len = packed_len(width).ok_or_else(|| {
                    Error::Memory(format!("a Gram of width {width} is larger than any memory"))
                })?;
                Ok(TensorSpec::new(tensor_name(l, source), DType::F32, [len]))
            })
            .collect()
    }

    /// Bytes of the file's tensors.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.specs()?.iter().filter_map(TensorSpec::bytes).fold(0, u64::saturating_add))
    }

    /// Collects and writes the Grams.
    pub fn run<T: Real>(self, backend: &B, common: &Common) -> Result<GramsReport> {
        let tokens = self.tokens();
        let specs = self.specs()?;
        let mut report = GramsReport {
            out: self.options.out.clone(),
            tokens,
            documents: self.documents,
            skipped: self.skipped,
            inputs: specs.len(),
            bytes: self.bytes()?,
            plan: self.plan.clone(),
            already_finished: false,
        };
        let output = match Output::begin(
            &self.options.out,
            "grams",
            &self.fingerprint(T::DTYPE, common)?,
            common.output(),
        )? {
            Begun::Work(output) => output,
            Begun::Finished => {
                report.already_finished = true;
                return Ok(report);
            }
        };
        let config = self.checkpoint.config();
        let model = common.model::<B, T>(backend, &self.checkpoint, self.packed)?;
        let mut session = Session::<B, T>::new(backend, &model, self.tables.clone(), self.size)?;
        let count = tokens.to_string();
        let path = output.dir().join(INPUT_GRAMS);
        let metadata = [("made_by", "anabranch"), ("format", FORMAT), ("tokens", count.as_str())];
        let mut collect = Collect {
            file: SafetensorsWriter::create(&path, specs, &metadata)?,
            grams: Collect::fresh(config, 0),
            config,
            tokens: tokens as f64,
            bar: common.progress.bar("grams", config.layers as u64),
            common,
        };
        let layouts = self.adapters.layouts();
        let stack = Stack { params: &self.adapters.params, layouts: &layouts };
        watch(&model, &mut session, backend, stack, &self.batches, &mut collect)
            .map_err(blame(&self.checkpoint))?;
        collect.bar.finish_and_clear();
        let mut known = std::collections::BTreeMap::from([(INPUT_GRAMS.to_string(), collect.file.finish()?)]);
        if let Some(pruning) = self.checkpoint.pruning() {
            known.insert(PRUNING.into(), pruning.write(&output.dir().join(PRUNING))?);
        }
        self.provenance(common)?.seal(output.dir(), known)?;
        output.finish()?;
        Ok(report)
    }

    fn provenance(&self, common: &Common) -> Result<Provenance> {
        let mut p = Provenance::new("grams");
        p.base_fingerprint = Some(self.checkpoint.base_fingerprint()?.to_owned());
        p.model_fingerprint = Some(self.checkpoint.fingerprint()?.to_owned());
        p.seed = Some(common.seed);
        p.samples = Some(self.documents as u64);
        p.options.insert("tokens".into(), self.tokens().into());
        p.options.insert("seq".into(), self.options.seq.into());
        p.options.insert("adapter".into(), self.options.adapter.is_some().into());
        Ok(p)
    }

    /// What the result follows from.
    fn fingerprint(&self, precision: DType, common: &Common) -> Result<String> {
        let mut hasher = digest::Hasher::default();
        let o = &self.options;
        hasher.update(self.checkpoint.fingerprint()?.as_bytes());
        for file in
            o.adapter.iter().map(|a| a.join(crate::checkpoint::adapter::ADAPTER_MODEL)).chain(o.data.clone())
        {
            hasher.update(digest::sha256_file(&file)?.as_bytes());
        }
        let asked = (precision.name(), o.tokens, o.seq, o.batch_tokens, o.skip_bad, common.seed);
        hasher.update(serde_json::json!(asked).to_string().as_bytes());
        Ok(hasher.finish())
    }
}

/// Documents in a random order while they are together at most `tokens` long; at least the first.
fn draw(documents: &[Document], tokens: usize, seed: u64) -> Vec<Document> {
    let random = Philox::new(seed, Purpose::Calibration.stream(0));
    let mut taken = random.permutation(documents.len());
    let mut held = 0usize;
    let fits = |d: &&usize| {
        held = held.saturating_add(documents[**d].ids.len());
        held <= tokens
    };
    let count = taken.iter().take_while(fits).count().max(1);
    taken.truncate(count);
    taken.sort_unstable();
    taken.into_iter().map(|d| documents[d].clone()).collect()
}

/// I of the linears that read `source` in layer `l`.
fn width(config: &ModelConfig, l: usize, source: Source) -> usize {
    config.dims(source.target(), l).1
}

/// The upper triangle of `XᵀX`, in blocks of rows from the diagonal on.
struct Gram {
    width: usize,
    /// `[rows, width − first row]`, row by row.
    blocks: Vec<Vec<f32>>,
}

impl Gram {
    fn new(width: usize) -> Gram {
        let block = |b: usize| vec![0.0; (width - b * ROWS).min(ROWS) * (width - b * ROWS)];
        Gram { width, blocks: (0..width.div_ceil(ROWS)).map(block).collect() }
    }

    /// Bytes of one of this width.
    fn bytes(width: usize) -> u64 {
        let block = |b: usize| (width - b * ROWS).min(ROWS) as u64 * (width - b * ROWS) as u64;
        4 * (0..width.div_ceil(ROWS)).map(block).sum::<u64>()
    }

    /// Adds `XᵀX` of `x[T, width]`; every block by one thread, in the order of the tokens.
    fn add(&mut self, x: &[f32]) {
        let width = self.width;
        let x = MatRef::from_row_major_slice(x, x.len() / width, width);
        self.blocks.par_iter_mut().enumerate().for_each(|(b, block)| {
            let (first, n) = (b * ROWS, width - b * ROWS);
            let rows = n.min(ROWS);
            let out = MatMut::from_row_major_slice_mut(block, rows, n);
            matmul(out, Accum::Add, x.subcols(first, rows).transpose(), x.subcols(first, n), 1.0, Par::Seq);
        });
    }

    /// Rows of the triangle, times `by`, as a file's bytes, a block at a time.
    fn packed(&self, by: f64) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.blocks.iter().enumerate().map(move |(b, block)| {
            let n = self.width - b * ROWS;
            let rows = block.chunks(n).enumerate().flat_map(|(k, row)| &row[k..]);
            rows.flat_map(|x| ((f64::from(*x) * by) as f32).to_le_bytes()).collect()
        })
    }
}

/// Adds up the Grams of a layer and writes them.
struct Collect<'a> {
    file: SafetensorsWriter,
    grams: Vec<Gram>,
    config: &'a ModelConfig,
    tokens: f64,
    bar: indicatif::ProgressBar,
    common: &'a Common,
}

impl Collect<'_> {
    /// Zeros for each input of layer `l`; none past the last.
    fn fresh(config: &ModelConfig, l: usize) -> Vec<Gram> {
        if l >= config.layers {
            return Vec::new();
        }
        Source::ALL.map(|s| Gram::new(width(config, l, s))).into()
    }
}

impl Watch for Collect<'_> {
    fn input(&mut self, layer: usize, source: Source, x: &[f32], _: usize) -> Result<()> {
        self.common.check_stop("nothing was written")?;
        if let Some(at) = x.iter().position(|x| !x.is_finite()) {
            return Err(Error::Numeric(format!(
                "layer {layer}: the input {} holds {}, expected finite numbers",
                source.name(),
                x[at]
            )));
        }
        self.grams[source as usize].add(x);
        Ok(())
    }

    fn layer_done(&mut self, layer: usize) -> Result<()> {
        for (source, gram) in Source::ALL.into_iter().zip(&self.grams) {
            self.file.write_parts(&tensor_name(layer, source), gram.packed(1.0 / self.tokens))?;
        }
        self.grams.clear();
        self.grams = Collect::fresh(self.config, layer + 1);
        self.bar.inc(1);
        Ok(())
    }
}
