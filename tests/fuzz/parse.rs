//! What each fuzz target does with its bytes: reads them as a user's files are read. Any error is fine, a panic is not.

use std::path::Path;
use std::sync::OnceLock;

use anabranch::checkpoint::adapter::Adapter;
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::module::Target;
use anabranch::checkpoint::provenance::Provenance;
use anabranch::checkpoint::pruning::Pruning;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::data::tokenizer::Tokenizer;
use anabranch::data::{documents, tasks};
use tempfile::TempDir;

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
    let _ = tasks::load(&files[0]);
    let _ = tasks::load(&files[1]);
    for skip_bad in [false, true] {
        let _ = documents::load(&files[..1], tokenizer, 16, skip_bad);
    }
    let _ = documents::load(&files[2..], tokenizer, 16, false);
}
