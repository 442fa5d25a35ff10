//! What each fuzz target does with its bytes: reads them as a user's files are read. Any error is fine, a panic is not.

use std::path::{Component, Path};
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

use anabranch::checkpoint::adapter::Adapter;
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::config::ModelConfig;
use anabranch::checkpoint::keys::{PublicKey, SecretKey};
use anabranch::checkpoint::manifest::{MAX_FILES, Manifest, Signed};
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::provenance::Provenance;
use anabranch::checkpoint::pruning::Pruning;
use anabranch::checkpoint::weights::{OpenOptions, Weights};
use anabranch::checkpoint::{header, json};
use anabranch::cli::flow as flow_file;
use anabranch::data::chat::ChatTemplate;
use anabranch::data::cross::{answer, leak, ledger::Ledger, sources};
use anabranch::data::prefix_tree::PrefixTree;
use anabranch::data::review::decisions;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::data::{documents, tasks, template};
use anabranch::model::shape::TrainingShape;
use anabranch::stage::budget::{BudgetOptions, budget};
use anabranch::stage::data::review;
use anabranch::stage::report as report_page;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A target, by its name.
pub type Named = (&'static str, fn(&[u8]));

/// All targets; a name is also its corpus's folder.
#[allow(dead_code)]
pub const ALL: [Named; 12] = [
    ("adapter", adapter),
    ("chat_template", chat_template),
    ("checkpoint", checkpoint),
    ("config", config),
    ("cross", cross),
    ("flow", flow),
    ("jsonl", jsonl),
    ("pruning", pruning),
    ("report", report),
    ("signature", signature),
    ("tokenizer", tokenizer),
    ("weights", weights),
];

/// Files read rather than mapped: they are rewritten meanwhile.
const OPTIONS: OpenOptions = OpenOptions { no_mmap: true };

/// One folder a process, in which files are rewritten.
fn folder() -> &'static Path {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    DIR.get_or_init(|| TempDir::new().expect("a temporary folder")).path()
}

fn write(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(dir.join(name), bytes).expect("the temporary folder can be written");
}

/// The bytes before the first NUL, and those after it.
fn part(data: &[u8]) -> (&[u8], &[u8]) {
    let end = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    (&data[..end], data.get(end + 1..).unwrap_or_default())
}

/// `config.json`, NUL, the index of the shards (none if empty), NUL, the one safetensors file or first shard.
pub fn checkpoint(data: &[u8]) {
    let dir = folder().join("checkpoint");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).expect("the temporary folder can be written");
    let (config, rest) = part(data);
    let (index, weights) = part(rest);
    write(&dir, "config.json", config);
    if index.is_empty() {
        write(&dir, "model.safetensors", weights);
    } else {
        write(&dir, "model.safetensors.index.json", index);
        write(&dir, "s1", weights);
    }
    if let Ok(c) = Checkpoint::open(&dir, OPTIONS) {
        c.fingerprint().expect("an open checkpoint has a fingerprint");
        let _ = c.check_finite();
        let _ = c.config().to_json(c.dtype().expect("an open checkpoint has a dtype"));
        for m in c.config().modules() {
            c.matrix(&m.weight()).expect("an open checkpoint has its linears");
        }
    }
}

/// `adapter_config.json`, NUL, `pruning.json` (none if empty), NUL, `adapter_model.safetensors`.
pub fn adapter(data: &[u8]) {
    let dir = folder().join("adapter");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).expect("the temporary folder can be written");
    let (config, rest) = part(data);
    let (pruning, weights) = part(rest);
    write(&dir, "adapter_config.json", config);
    if !pruning.is_empty() {
        write(&dir, "pruning.json", pruning);
    }
    write(&dir, "adapter_model.safetensors", weights);
    if let Ok(a) = Adapter::open(&dir, OPTIONS) {
        let _ = a.check_finite();
        for p in a.modules.values() {
            assert_eq!((p.a.to_f32().len(), p.b.to_f64().len()), (p.rank * p.dims().1, p.dims().0 * p.rank));
        }
    }
}

/// `pruning.json`, or `anabranch.json`.
pub fn pruning(data: &[u8]) {
    let _ = Provenance::parse(Path::new("anabranch.json"), data);
    if let Ok(p) = Pruning::parse(Path::new("pruning.json"), data) {
        for l in 0..p.layers.len() {
            for t in Target::ALL {
                let (full, pruned) = (p.full_dims(t), p.pruned_dims(t, l));
                let (n, kept) = if t.prunes_rows() { (full.0, pruned.0) } else { (full.1, pruned.1) };
                let indices = p.kept(t, l);
                assert!(indices.len() == kept && indices.iter().all(|&i| i < n));
            }
        }
    }
}

/// A task or training data, as JSON lines, as CSV and as plain text.
pub fn jsonl(data: &[u8]) {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    let tokenizer = TOKENIZER.get_or_init(|| {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tokenizer");
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/tokenizer");
        let dir = if Path::new(dir).exists() { dir } else { here };
        Tokenizer::load(Path::new(dir), 11).expect("the tokenizer beside the targets")
    });
    let files = ["f.jsonl", "f.csv", "f.txt"].map(|name| {
        write(folder(), name, data);
        folder().join(name)
    });
    for task in files[..2].iter().flat_map(|f| tasks::load(f)) {
        for item in &task.items {
            let prompt = template::prompt(item, &[]);
            if let Ok(Ok(tree)) = PrefixTree::encode(tokenizer, &prompt, 64) {
                assert_eq!(tree.options.len(), item.form.options());
                assert!(tree.needs <= 64 && tree.asked.iter().all(|a| (a.0 as usize) < tree.ids.len()));
            }
        }
    }
    for skip_bad in [false, true] {
        for (files, seq) in [(&files[..1], 16), (&files[..1], 2), (&files[2..], 16)] {
            if let Ok(data) = documents::load(files, tokenizer, seq, skip_bad) {
                let fine =
                    |d: &documents::Document| d.ids.len() <= seq && d.targets() > 0 && !d.supervised[0];
                assert!(data.documents.iter().all(fine));
            }
        }
    }
}

/// `config.json`, read, written again and budgeted.
pub fn config(data: &[u8]) {
    let path = Path::new("config.json");
    let Ok(Value::Object(map)) = json::parse(path, data) else { return };
    let Ok(config) = ModelConfig::from_json(path, map) else { return };
    let written = config.to_json(anabranch::tensor::DType::BF16);
    let again = ModelConfig::from_json(path, written).expect("what is written can be read");
    assert_eq!((config.parameters(), config.longest()), (again.parameters(), again.longest()));
    // Planning goes through the layers one by one; what is large is as good as what is larger.
    if config.layers <= 64 {
        let shape = TrainingShape { seq: config.longest().min(512), ..TrainingShape::default() };
        let options =
            BudgetOptions { ratios: vec![0.5], memory: Some(1 << 30), layers: None, round_mlp: 1, shape };
        let _ = budget(&config, &options).map(|report| report.to_string());
    }
}

/// A chat template, with a conversation.
pub fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let special = [("bos_token".to_string(), "<s>".to_string())];
    if let Ok(template) = ChatTemplate::compile(Path::new("t.jinja"), source, &special, UNIX_EPOCH) {
        let turn = |role: &str| json!({"role": role, "content": " é <s> "});
        if let Ok(talk) = template.conversation(&[turn("user"), turn("assistant"), turn("user")], None) {
            for range in talk.assistant {
                assert!(talk.text.get(range).is_some_and(|turn| !turn.is_empty()));
            }
        }
    }
}

/// `FLOW.toml`.
pub fn flow(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = flow_file::parse(Path::new("flow.toml"), Path::new("."), text, 0);
    }
}

/// `results.json`, made into a page.
pub fn report(data: &[u8]) {
    let path = Path::new("results.json");
    if let Ok(results) = json::parse(path, data).and_then(|value| json::typed(path, value)) {
        let _ = report_page::render(&results);
    }
}

/// `manifest.json`, NUL, `manifest.sig`; a public key, a secret key.
pub fn signature(data: &[u8]) {
    let (manifest, signature) = part(data);
    let path = Path::new("f");
    if let Ok(m) = Manifest::parse(path, manifest) {
        assert!(!m.files.is_empty() && m.files.len() <= MAX_FILES);
        let normal = |n: &String| Path::new(n).components().all(|c| matches!(c, Component::Normal(_)));
        assert!(m.files.keys().all(normal));
    }
    let _ = Signed::parse(path, manifest, signature);
    if let Ok(key) = PublicKey::parse(path, manifest) {
        assert!(!key.verifies(b"", &[0; 64]));
    }
    if let Ok(key) = SecretKey::parse(path, manifest) {
        assert!(key.public().verifies(data, &key.sign(data)));
    }
}

/// `tokenizer.json` of a model with 64 tokens.
pub fn tokenizer(data: &[u8]) {
    let dir = folder().join("tokenizer");
    let _ = std::fs::create_dir(&dir);
    write(&dir, "tokenizer.json", data);
    let Ok(tokenizer) = Tokenizer::load(&dir, 64) else { return };
    for text in ["", "a b", "<s> é\n a", "<s><s>"] {
        if let Ok(ids) = tokenizer.encode(text) {
            assert!(ids.iter().all(|&id| id < 64), "{ids:?}");
            let _ = tokenizer.decode(&ids, true);
        }
        if let Ok(tokens) = tokenizer.encode_offsets(text) {
            assert!(tokens.iter().all(|(id, at)| *id < 64 && at.start <= at.end), "{tokens:?}");
        }
    }
    if let Ok(pair) = tokenizer.encode_pair("a ", "b") {
        let _ = pair.rest();
    }
}

/// A safetensors file.
pub fn weights(data: &[u8]) {
    let _ = header::parse(Path::new("model.safetensors"), data);
    write(folder(), "model.safetensors", data);
    let Ok(weights) = Weights::open(&folder().join("model.safetensors"), OPTIONS) else { return };
    for name in weights.names() {
        if let Ok(tensor) = weights.tensor(name) {
            assert_eq!(tensor.to_f32().len(), tensor.len());
            let _ = tensor.check_finite();
        }
    }
}

/// What a model says, NUL, a ledger, NUL, items as `data cross` writes them, NUL, a reviewer's decisions about them.
pub fn cross(data: &[u8]) {
    let dir = folder().join("cross");
    std::fs::create_dir_all(&dir).expect("the temporary folder can be written");
    let (said, rest) = part(data);
    let (ledger, rest) = part(rest);
    let (items, decided) = part(rest);
    let said = String::from_utf8_lossy(said);
    let _ = answer::read(&said, answer::mergeability);
    let _ = answer::read(&said, answer::knowledge);
    let _ = answer::read(&said, answer::question);
    let _ = answer::read(&said, answer::alone);
    for (name, bytes) in [("ledger.jsonl", ledger), ("items.jsonl", items), ("decided.jsonl", decided)] {
        write(&dir, name, bytes);
    }
    if let Ok(ledger) = Ledger::open(&dir.join("ledger.jsonl")) {
        drop(ledger);
        Ledger::open(&dir.join("ledger.jsonl")).expect("what was opened once is a ledger");
    }
    if let Ok(items) = review::items(&dir) {
        let _ = decisions::read(&dir.join("decided.jsonl"), &items);
    }
    if let Ok(pools) = sources::load(&[dir.join("items.jsonl")]) {
        let _ = leak::leaked(&pools, &[dir.join("decided.jsonl")]);
    }
}
