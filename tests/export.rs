//! `export`: the file that llama.cpp reads, byte by byte, and the folder that PEFT reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anabranch::checkpoint::adapter::Adapter;
use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::Provenance;
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::tensor::DType;
use assert_cmd::Command;
use half::{bf16, f16};
use predicates::str::contains;

/// H 16, G 8, K 32, D 192, F 512.
fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/base")
}

fn anabranch(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.env("CUDA_VISIBLE_DEVICES", "").current_dir(dir).args(args);
    command
}

fn dims(target: Target) -> (usize, usize) {
    match target {
        Target::Q => (512, 192),
        Target::K | Target::V => (256, 192),
        Target::O => (192, 512),
        Target::Gate | Target::Up => (512, 192),
        Target::Down => (192, 512),
    }
}

/// An adapter of ranks 3 (on q) and 2, with scales 2 and 3.
fn write(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    let ranks: BTreeMap<Module, usize> = Target::ALL
        .map(|target| (Module { layer: 1, target }, if target == Target::Q { 3 } else { 2 }))
        .into();
    let mut config = AdapterConfig::patterned(&ranks, Some("base")).unwrap().to_json().clone();
    config.insert("lora_alpha".into(), 6.into());
    let alphas = config["alpha_pattern"].as_object_mut().unwrap();
    alphas.values_mut().for_each(|a| *a = 6.into());
    let config = AdapterConfig::from_json(Path::new("c"), config).unwrap();
    let specs = ranks.iter().map(|(&module, &rank)| PairSpec {
        module,
        rank,
        dims: dims(module.target),
        dtypes: (DType::F32, DType::F32),
    });
    let mut writer = AdapterWriter::create(dir, config, specs.collect()).unwrap();
    for (&m, &rank) in &ranks {
        let (o, i) = dims(m.target);
        // Few bits, so that every dtype holds them and their doubles and triples exactly.
        let numbers =
            |n: usize, step: usize| (0..n).map(|x| (x * step % 61) as f32 - 30.0).collect::<Vec<_>>();
        writer.write_f32(m, &numbers(rank * i, 7), &numbers(o * rank, 11)).unwrap();
    }
    writer.finish(None, Provenance::new("train")).unwrap();
}

fn open(dir: &Path) -> Adapter {
    Adapter::open(dir, OpenOptions::default()).unwrap()
}

/// Reads little-endian numbers and strings.
struct Reader<'a>(&'a [u8], usize);

impl Reader<'_> {
    fn take(&mut self, n: usize) -> &[u8] {
        self.1 += n;
        &self.0[self.1 - n..self.1]
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().unwrap())
    }

    fn text(&mut self) -> String {
        let n = self.u64() as usize;
        String::from_utf8(self.take(n).to_vec()).unwrap()
    }
}

/// A GGUF file: its metadata as text, and each tensor's sizes (innermost first) and values.
type Gguf = (BTreeMap<String, String>, BTreeMap<String, (Vec<u64>, Vec<f64>)>);

fn read(path: &Path) -> Gguf {
    let bytes = std::fs::read(path).unwrap();
    let mut r = Reader(&bytes, 0);
    assert_eq!(r.take(4), b"GGUF");
    assert_eq!(r.u32(), 3);
    let (tensors, pairs) = (r.u64(), r.u64());
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let (key, kind) = (r.text(), r.u32());
        let value = match kind {
            4 => r.u32().to_string(),
            6 => f32::from_bits(r.u32()).to_string(),
            8 => r.text(),
            other => panic!("{key} has type {other}"),
        };
        metadata.insert(key, value);
    }
    let infos: Vec<_> = (0..tensors)
        .map(|_| {
            let name = r.text();
            let n = r.u32();
            let sizes: Vec<u64> = (0..n).map(|_| r.u64()).collect();
            (name, sizes, r.u32(), r.u64() as usize)
        })
        .collect();
    let start = r.1.next_multiple_of(32);
    let mut end = start;
    let mut out = BTreeMap::new();
    for (name, sizes, kind, at) in infos {
        assert_eq!(start + at, end, "{name} follows the tensor before it, at a multiple of 32");
        let n = sizes.iter().product::<u64>() as usize;
        let width = if kind == 0 { 4 } else { 2 };
        let data = &bytes[end..end + n * width];
        let values = data.chunks(width).map(|c| match kind {
            0 => f64::from(f32::from_le_bytes(c.try_into().unwrap())),
            1 => f16::from_le_bytes(c.try_into().unwrap()).to_f64(),
            30 => bf16::from_le_bytes(c.try_into().unwrap()).to_f64(),
            other => panic!("{name} has type {other}"),
        });
        let values = values.collect();
        out.insert(name, (sizes, values));
        end = (end + n * width).next_multiple_of(32);
    }
    assert_eq!(end, bytes.len());
    (metadata, out)
}

#[test]
fn a_gguf_holds_the_same_update_in_llama_cpps_order() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("a"));
    let adapter = open(&dir.path().join("a"));
    let base = base().display().to_string();
    for (dtype, kind) in [("f32", "0"), ("f16", "1"), ("bf16", "32")] {
        let out = format!("{dtype}.gguf");
        anabranch(
            dir.path(),
            &["export", "a", "--to", "gguf", "--model", &base, "--dtype", dtype, "--out", &out],
        )
        .assert()
        .success()
        .stdout(contains("7 modules of rank 3"));
        let (metadata, tensors) = read(&dir.path().join(out));
        for (key, value) in [
            ("general.architecture", "llama"),
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
            ("adapter.lora.alpha", "3"),
            ("general.file_type", kind),
        ] {
            assert_eq!(metadata[key], value, "{key}");
        }
        assert_eq!(tensors.len(), 14);
        for (m, pair) in &adapter.modules {
            let name = match m.target {
                Target::Q => "attn_q",
                Target::K => "attn_k",
                Target::V => "attn_v",
                Target::O => "attn_output",
                Target::Gate => "ffn_gate",
                Target::Up => "ffn_up",
                Target::Down => "ffn_down",
            };
            let (sizes_a, a) = &tensors[&format!("blk.1.{name}.weight.lora_a")];
            let (sizes_b, b) = &tensors[&format!("blk.1.{name}.weight.lora_b")];
            let (o, i) = pair.dims();
            assert_eq!((&sizes_a[..], &sizes_b[..]), (&[i as u64, 3][..], &[3, o as u64][..]));
            let (was_a, was_b, r) = (pair.a.to_f64(), pair.b.to_f64(), pair.rank);
            assert_eq!(&a[..r * i], &was_a[..]);
            assert!(a[r * i..].iter().all(|x| *x == 0.0));
            // As the converter of llama.cpp has it: rows of heads [2, K/2] become [K/2, 2].
            let heads = match m.target {
                Target::Q => Some(16),
                Target::K => Some(8),
                _ => None,
            };
            let mut to = (0..o).collect::<Vec<_>>();
            if let Some(heads) = heads {
                let half = o / heads / 2;
                for h in 0..heads {
                    for i in 0..2 {
                        for j in 0..half {
                            to[(h * 2 + i) * half + j] = (h * half + j) * 2 + i;
                        }
                    }
                }
                assert!(to.iter().enumerate().any(|(from, to)| from != *to));
            }
            for row in 0..o {
                for k in 0..3 {
                    let expected = if k < r { pair.scale * was_b[row * r + k] } else { 0.0 };
                    assert_eq!(b[to[row] * 3 + k], expected, "{m} row {row}");
                }
            }
        }
    }
}

#[test]
fn a_peft_folder_has_a_rank_by_module_and_the_same_update() {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("a"));
    let export = ["export", "a", "--to", "peft", "--out", "p"];
    anabranch(dir.path(), &export).assert().success();
    let (was, is) = (open(&dir.path().join("a")), open(&dir.path().join("p")));
    for (m, p) in &was.modules {
        let q = &is.modules[m];
        assert_eq!((q.rank, q.scale, q.a.to_f64()), (p.rank, 1.0, p.a.to_f64()));
        let scaled: Vec<f64> = p.b.to_f64().iter().map(|x| p.scale * x).collect();
        assert_eq!(q.b.to_f64(), scaled);
    }
    assert!(was.modules.values().any(|p| p.scale == 3.0), "the scales are no ones");
    anabranch(dir.path(), &["inspect", "p", "--verify"])
        .assert()
        .success()
        .stdout(contains("PEFT           loads it"));
    anabranch(dir.path(), &export).assert().code(2).stderr(contains("--force"));
}

#[test]
fn what_cannot_be_exported_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    write(&d.join("a"));
    let refused = |args: &[&str], code: i32, part: &str| {
        anabranch(d, &[&["export", "a"], args].concat())
            .assert()
            .code(code)
            .stdout("")
            .stderr(contains(part));
        assert!(!d.join("x").exists());
    };
    refused(&["--to", "gguf", "--out", "x"], 2, "give the model that has them with --model");
    refused(&["--to", "onnx", "--out", "x"], 2, "expected gguf or peft");
    refused(&["--to", "peft", "--dtype", "f64", "--out", "x"], 2, "expected f32, bf16 or f16");
    let base = base().display().to_string();
    anabranch(d, &["export", "a", "--to", "gguf", "--model", &base, "--out", "x", "--dry-run"])
        .assert()
        .success();
    assert!(!d.join("x").exists());
    // Too large for f16.
    let config = std::fs::read_to_string(d.join("a/adapter_config.json")).unwrap();
    std::fs::write(
        d.join("a/adapter_config.json"),
        config.replace("\"lora_alpha\": 6", "\"lora_alpha\": 60000"),
    )
    .unwrap();
    refused(
        &["--to", "gguf", "--model", &base, "--dtype", "f16", "--out", "x"],
        1,
        "NaN or infinity at element",
    );
    let small = d.join("small");
    let prune = ["prune", "--model", &base, "--ratio", "0.3", "--importance", "l1", "--out", "small"];
    anabranch(d, &prune).assert().success();
    refused(&["--to", "gguf", "--model", &small.display().to_string(), "--out", "x"], 1, "needs [");
}
