//! A tokenizer of eleven words for tests, and the real one under `../shared` where that exists.

use std::path::PathBuf;

use serde_json::json;
use tempfile::TempDir;

use super::tokenizer::Tokenizer;

/// Word-level: `<unk> 0, <s> 1, </s> 2, a 3, b 4, c 5, d 6, A 7, B 8, C 9, D 10`; words parted by white space.
pub fn tokenizer_json(adds_bos: bool) -> String {
    let vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "A": 7, "B": 8, "C": 9, "D": 10});
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let body = json!({"Sequence": {"id": "A", "type_id": 0}});
    let post = json!({"type": "TemplateProcessing", "single": [bos, body], "pair": [bos, body],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": if adds_bos { post } else { serde_json::Value::Null }, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}})
    .to_string()
}

/// A model folder with that tokenizer, `<s>` and `</s>` named in its configuration unless `files` say otherwise.
pub fn folder(adds_bos: bool, files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json(adds_bos)).unwrap();
    let config = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

/// The tokenizer of [`folder`].
pub fn tokenizer(adds_bos: bool, files: &[(&str, &str)]) -> Tokenizer {
    Tokenizer::load(folder(adds_bos, files).path(), 11).unwrap()
}

/// A folder under `../shared/data`, if this machine has it.
pub fn shared(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data")).join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not on this machine", path.display());
        return None;
    }
    Some(path)
}

/// The folder and tokenizer of stories260K.
pub fn stories() -> Option<(PathBuf, Tokenizer)> {
    let dir = shared("stories260K-hf")?;
    let tokenizer = Tokenizer::load(&dir, 512).unwrap();
    Some((dir, tokenizer))
}
