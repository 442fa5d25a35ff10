//! `search`: many fusions of the same adapters scored on tasks, and the best of them written, if it is good enough.
//!
//! The base is loaded once. Each candidate is fused as `fuse` does it, and its factors go to the device as its file would
//! hold them. A journal in the folder of unfinished work keeps every candidate's answers, so that a killed search goes on
//! behind those that it scored.

mod candidates;
mod ready;
mod scorer;
mod table;
mod work;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::candidates::{Candidate, WeightChoice};
use self::ready::Ready;
pub use self::table::{Kind, Rival, Row, Search, Table};
use super::admit::Admission;
use super::common::Common;
use super::evaluate::check_prompts;
use super::fuse::FuseOptions;
use crate::backend::Backend;
use crate::checkpoint::json;
use crate::checkpoint::output::{Begun, Output};
use crate::error::{Error, Result};
use crate::fuse::certificate::Certificate;
use crate::fuse::{Fusion, LoraCr};
use crate::model::memory::Plan;
use crate::tensor::Real;

/// The file in the output that holds the [`Search`].
pub const SEARCH: &str = "search.json";

/// What `search` is asked.
#[derive(Clone, Debug)]
pub struct SearchOptions {
    /// The adapters and all that fusions have in common; recipe, weights and outputs are the search's.
    pub fuse: FuseOptions,
    /// The methods.
    pub fusions: Vec<Fusion>,
    /// The resolutions before them.
    pub resolves: Vec<Option<LoraCr>>,
    /// The weights.
    pub weights: Vec<WeightChoice>,
    /// The most candidates that these may make.
    pub max_candidates: usize,
    /// The base's folder.
    pub model: PathBuf,
    /// The tasks that choose.
    pub tasks: Vec<PathBuf>,
    /// Held-out tasks.
    pub test: Vec<PathBuf>,
    /// Worked examples before each question.
    pub shots: usize,
    /// The folder of their `<subject>_dev.csv`.
    pub shots_from: Option<PathBuf>,
    /// The most tokens that go through the model together.
    pub batch_tokens: usize,
    /// What the best must be better than.
    pub required: Vec<Rival>,
    /// Up to which p of McNemar's test more right answers are better.
    pub level: f64,
    /// Where to write the best.
    pub out: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct SearchReport {
    /// The adapter's folder, where it was good enough.
    pub out: PathBuf,
    /// OUT was there already, under `--resume`: this is what its `search.json` says.
    pub already_finished: bool,
    /// The rows, and the best of them.
    #[serde(flatten)]
    pub search: Search,
    /// Whose adapters were given, how large they are, and which were left out.
    pub admission: Option<Admission>,
    /// Of the adapter, where one was written now.
    pub certificate: Option<Certificate>,
    /// What a user should know and what is no error.
    pub warnings: Vec<String>,
}

impl SearchReport {
    /// An error where nothing was good enough to be written.
    pub fn check(&self) -> Result<()> {
        match &self.search.refused[..] {
            [] => Ok(()),
            why => Err(Error::NotGoodEnough(format!("nothing was written: {}", why.join("; ")))),
        }
    }
}

/// Scores all candidates and writes the best. Where it is not good enough nothing is written, and the report says why.
pub fn run<B: Backend, T: Real>(
    backend: &B,
    options: &SearchOptions,
    common: &Common,
) -> Result<SearchReport> {
    let ready = Ready::new(options, common)?;
    let plan = ready.memory::<B, T>(backend)?;
    let (_, packed) = ready.packing::<B, T>(backend, plan, common)?;
    let fingerprint = ready.fingerprint::<T>(common)?;
    let mut output = match Output::begin(&options.out, "search", &fingerprint, common.output())? {
        Begun::Finished => return finished(&options.out),
        Begun::Work(output) => output,
    };
    let done = ready.search::<B, T>(backend, packed, output.dir(), common).and_then(|(search, journal)| {
        let chosen = match search.refused.is_empty() {
            true => Some(ready.write(backend, output.dir(), &search, common)?),
            false => None,
        };
        journal.remove()?;
        Ok((search, chosen))
    });
    if done.as_ref().is_err_and(Error::passes) {
        output.keep();
    }
    let (search, certificate) = done?;
    match certificate {
        Some(_) => output.finish()?,
        None => output.discard(),
    }
    Ok(SearchReport {
        out: options.out.clone(),
        already_finished: false,
        search,
        certificate,
        warnings: ready.inputs.warnings.clone(),
        admission: Some(ready.admission),
    })
}

/// What the finished output `out` says.
fn finished(out: &Path) -> Result<SearchReport> {
    let path = out.join(SEARCH);
    let search = json::typed(&path, json::parse_format(&path, &json::read_bounded(&path)?, table::FORMAT)?)?;
    Ok(SearchReport {
        out: out.to_path_buf(),
        already_finished: true,
        search,
        admission: None,
        certificate: None,
        warnings: Vec::new(),
    })
}

/// What a search would do: how many candidates, and every buffer.
pub fn plan<B: Backend, T: Real>(
    backend: &B,
    options: &SearchOptions,
    common: &Common,
) -> Result<(String, Plan)> {
    let ready = Ready::new(options, common)?;
    let mut does = format!(
        "score the base, {} adapters and {} candidates ({} methods, {} resolutions) on {} items",
        ready.edges.len(),
        ready.candidates.len(),
        options.fusions.len(),
        options.resolves.len(),
        ready.questions.len()
    );
    if let Some(test) = &ready.test {
        does += &format!(", then the base, the adapters and the best candidate on {} others", test.len());
    }
    let plan = ready.memory::<B, T>(backend)?;
    Ok((does, ready.packing::<B, T>(backend, plan, common)?.0))
}

/// What has no meaning, before anything is read.
fn check(options: &SearchOptions) -> Result<()> {
    let usage = |why: String| Err(Error::Usage(why));
    if options.tasks.is_empty() {
        return usage("search needs --task, what the candidates are scored on".into());
    }
    if options.fusions.is_empty() || options.resolves.is_empty() || options.weights.is_empty() {
        return usage("search needs at least one of --methods, --resolve and --weights each".into());
    }
    if let Some(n) = (1..options.fusions.len()).find(|&n| options.fusions[..n].contains(&options.fusions[n]))
    {
        return usage(format!("--methods names {} twice", options.fusions[n].method));
    }
    if let Some(n) =
        (1..options.resolves.len()).find(|&n| options.resolves[..n].contains(&options.resolves[n]))
    {
        let word = options.resolves[n].map_or("none", |_| "lora-cr");
        return usage(format!("--resolve names {word} twice"));
    }
    if !(options.level > 0.0 && options.level <= 1.0) {
        return usage(format!("--level is {}, expected above 0 and at most 1", options.level));
    }
    check_prompts(options.shots, options.shots_from.as_deref(), options.batch_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::adapter_config::AdapterConfig;
    use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
    use crate::checkpoint::checkpoint::tests::write;
    use crate::checkpoint::module::{Module, Target};
    use crate::checkpoint::provenance::Provenance;
    use crate::cpu::Cpu;
    use crate::data::fixture;
    use crate::fuse::Recipe;
    use crate::fuse::options::Method;
    use crate::fuse::weights::Weights;
    use crate::stage::admit::Screen;
    use crate::stage::fuse::Profile;
    use crate::stage::trust::TrustOptions;
    use crate::tensor::DType;

    /// A miniature model in `dir`, two adapters of it, a task of two items, and how to search on them.
    fn miniature(dir: &Path) -> SearchOptions {
        let config = write(dir, serde_json::json!({"vocab_size": 11}), DType::F32, 1 << 30, "");
        std::fs::write(dir.join("tokenizer.json"), fixture::tokenizer_json(true)).unwrap();
        let adapters = [0.5f32, -0.25].map(|size| {
            let folder = dir.join(format!("adapter {size}"));
            std::fs::create_dir(&folder).unwrap();
            let spec = |module: Module| PairSpec {
                module,
                rank: 1,
                dims: config.dims(module.target, module.layer),
                dtypes: (DType::F32, DType::F32),
            };
            let specs: Vec<PairSpec> = config.modules().map(spec).collect();
            let portable = AdapterConfig::portable(1, &Target::ALL, None);
            let mut writer = AdapterWriter::create(&folder, portable, specs.clone()).unwrap();
            for PairSpec { module, dims, .. } in specs {
                writer.write_f32(module, &vec![size; dims.1], &vec![0.5; dims.0]).unwrap();
            }
            writer.finish(None, Provenance::new("test")).unwrap();
            folder
        });
        let task = dir.join("t.jsonl");
        let item = |n: usize| format!(r#"{{"prompt": "a b", "continuations": [" c", " d"], "answer": {n}}}"#);
        std::fs::write(&task, [item(0), item(1)].join("\n")).unwrap();
        let mean = Fusion::new(Method::Mean, None).unwrap();
        SearchOptions {
            fuse: FuseOptions {
                adapters: adapters.to_vec(),
                recipe: Recipe { resolve: None, fusion: mean },
                weights: Weights::Uniform,
                grams: Vec::new(),
                allow_missing: false,
                dtype: DType::F32,
                profile: Profile::default(),
                out: None,
                model: None,
                merged: None,
                layers: None,
                screen: Screen::default(),
                trust: TrustOptions::default(),
            },
            fusions: vec![mean, Fusion::new(Method::TaskArithmetic, None).unwrap()],
            resolves: vec![None],
            weights: Vec::new(),
            max_candidates: 100,
            model: dir.to_path_buf(),
            tasks: vec![task],
            test: Vec::new(),
            shots: 0,
            shots_from: None,
            batch_tokens: 64,
            required: Vec::new(),
            level: 0.05,
            out: dir.join("out"),
        }
    }

    #[test]
    fn a_fusion_that_fails_is_told_and_the_others_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let (backend, common) = (Cpu::new(1).unwrap(), Common::default());
        let run = |options: &SearchOptions, common: &Common| run::<Cpu, f32>(&backend, options, common);
        // Task arithmetic takes weights as they are: its factors are beyond f32.
        let huge = WeightChoice::One(Weights::List(vec![1e60, 1e60]));
        let options = SearchOptions {
            weights: vec![huge.clone(), WeightChoice::One(Weights::Uniform)],
            ..miniature(dir.path())
        };
        let search = run(&options, &common).unwrap().search;
        let failed: Vec<(&str, &str)> = search.failed().collect();
        let [(name, why)] = failed[..] else { panic!("{failed:?}") };
        assert!(name.starts_with("task-arithmetic 1000"), "{name}");
        assert!(why.contains("is no number, or too large for F32"), "{why}");
        let rows = &search.table.rows;
        let row = rows.iter().position(|row| row.failed.is_some()).unwrap();
        assert_eq!((search.candidates(), rows.len(), rows[row].to_best), (2, 6, None));
        assert!(search.best != row && search.refused.is_empty(), "{search:?}");
        assert!(rows.iter().all(|r| r.failed.is_some() || r.tasks.len() == 1));

        // The journal keeps it: what is read there is not tried again.
        let resume = Common { resume: true, ..Common::default() };
        let again = SearchOptions { out: dir.path().join("again"), ..options.clone() };
        let ready = Ready::new(&again, &common).unwrap();
        let print = ready.fingerprint::<f32>(&common).unwrap();
        let Begun::Work(mut output) = Output::begin(&again.out, "search", &print, common.output()).unwrap()
        else {
            panic!("it was not begun");
        };
        let (_, journal) = ready
            .search::<Cpu, f32>(&backend, crate::model::packing::PackedWeights::NONE, output.dir(), &common)
            .unwrap();
        drop(journal);
        let file = output.dir().join(".scores.jsonl");
        output.keep();
        drop(output);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(r#""failed":""#), "{text}");
        std::fs::write(&file, text.replace("too large for F32", "told by the journal")).unwrap();
        let resumed = run(&again, &resume).unwrap().search;
        assert!(resumed.failed().all(|(_, why)| why.contains("told by the journal")));
        assert_eq!((resumed.best, resumed.failed().count()), (search.best, 1));

        let alone = SearchOptions {
            fusions: options.fusions[1..].to_vec(),
            weights: vec![huge],
            out: dir.path().join("alone"),
            ..options
        };
        let err = run(&alone, &common).unwrap_err();
        assert!(matches!(err, Error::Numeric(_)), "{err}");
        assert!(err.to_string().contains("all 1 fusions failed; task-arithmetic 1000"), "{err}");
        assert!(!alone.out.exists());
    }
}
