//! `demo`: the flow on the miniature that is built into the program.

use std::path::{Path, PathBuf};

use super::flow::LEDGER;
use super::flow::results::RESULTS;
use crate::checkpoint::digest;
use crate::error::{Error, Result};

/// The folder in the output that the miniature is unpacked into.
const INPUTS: &str = "inputs";
/// The flow's file in it.
const FLOW: &str = "flow.toml";

/// Names and bytes of the files, all of `assets/demo` but its notes.
macro_rules! assets {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo/", $name)).as_slice())),*]
    };
}

static ASSETS: [(&str, &[u8]); 21] = assets![
    "flow.toml",
    "base/config.json",
    "base/generation_config.json",
    "base/model.safetensors",
    "base/special_tokens_map.json",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "calibration.jsonl",
    "general.jsonl",
    "harbour.jsonl",
    "harbour.train.jsonl",
    "harbour.true.jsonl",
    "orchard.jsonl",
    "orchard.train.jsonl",
    "orchard.true.jsonl",
    "workshop.jsonl",
    "workshop.train.jsonl",
    "workshop.true.jsonl",
    "harbour_orchard.jsonl",
    "harbour_workshop.jsonl",
    "orchard_workshop.jsonl",
];

/// Unpacks the miniature into `out`, or into the first of `anabranch-demo`, `anabranch-demo-2`, … that is not there;
/// returns the flow's file.
///
/// A folder that holds something else than an earlier demo is refused.
pub fn unpack(out: Option<&Path>) -> Result<PathBuf> {
    let out = match out {
        Some(out) => {
            let own = out.join(INPUTS).join(FLOW).exists() || out.join(LEDGER).exists();
            let empty = !out.exists() || std::fs::read_dir(out).map_err(Error::io(out))?.next().is_none();
            if !own && !empty {
                return Err(Error::Usage(format!(
                    "{} exists and holds something else than a demo: name another folder",
                    out.display()
                )));
            }
            out.to_path_buf()
        }
        None => free_name()?,
    };
    let inputs = out.join(INPUTS);
    for (name, bytes) in ASSETS {
        let path = inputs.join(name);
        let folder = path.parent().unwrap_or(&inputs);
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        if digest::sha256_file(&path).is_ok_and(|hash| hash == digest::sha256(bytes)) {
            continue;
        }
        std::fs::write(&path, bytes).map_err(Error::io(&path))?;
    }
    Ok(inputs.join(FLOW))
}

/// `anabranch-demo`, or the first numbered name that is not there; an unfinished demo is gone on with.
fn free_name() -> Result<PathBuf> {
    for n in 1..10_000 {
        let name = if n == 1 { "anabranch-demo".to_string() } else { format!("anabranch-demo-{n}") };
        let path = PathBuf::from(name);
        let unfinished = path.join(INPUTS).join(FLOW).exists() && !path.join(RESULTS).exists();
        if !path.exists() || unfinished {
            return Ok(path);
        }
    }
    Err(Error::Usage("anabranch-demo and 9,999 numbered names are taken: name a folder with --out".into()))
}
