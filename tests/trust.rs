//! Adapters from strangers: what an attacker may try, what each command says, and that nothing is written.
//!
//! Every attack is played through the binary and ends up in the table of `docs/trust.md`, which this test compares;
//! `ANABRANCH_BLESS=1 cargo test --test trust` writes it anew.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Output;

use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::checkpoint::Checkpoint;
use anabranch::checkpoint::digest::{sha256, sha256_file};
use anabranch::checkpoint::keys::SecretKey;
use anabranch::checkpoint::manifest::{CONTEXT, MANIFEST, SIGNATURE};
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::{Provenance, list_all};
use anabranch::checkpoint::pruning::{BaseModel, KeptLayer, PRUNING, Pruning};
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::tensor::DType;
use assert_cmd::Command;
use tempfile::TempDir;

const MODEL: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const EDGES: [&str; 3] = ["hum", "sc", "fin"];

fn base_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/base")
}

fn base_model() -> BaseModel {
    Checkpoint::open(&base_dir(), OpenOptions::default()).unwrap().base_model().unwrap()
}

/// A plan that keeps one key/value head and every other channel of each layer.
fn plan() -> Pruning {
    let base = base_model();
    let mlp = (0..base.intermediate_size).step_by(2).collect();
    let layer = KeptLayer { kv_heads: vec![1], mlp };
    let layers = vec![layer; base.num_hidden_layers];
    Pruning::new(base, 0.5, 0, layers)
}

/// An edge's adapter on q and down of the first layer, of rank 2 and the given alpha, not signed.
fn adapter(dir: &Path, seed: usize, alpha: f64, plan: &Pruning) {
    std::fs::create_dir(dir).unwrap();
    let modules = [Target::Q, Target::Down].map(|target| Module { layer: 0, target });
    let specs = modules.map(|module| PairSpec {
        module,
        rank: 2,
        dims: plan.pruned_dims(module.target, 0),
        dtypes: (DType::F32, DType::F32),
    });
    let config = AdapterConfig::peft(2, alpha, 0.0, &[Target::Q, Target::Down], Some("base"));
    let mut writer = AdapterWriter::create(dir, config, specs.to_vec()).unwrap();
    for PairSpec { module, dims: (o, i), .. } in specs {
        let numbers =
            |n: usize| (0..n).map(|x| ((x * 7 + seed * 3) % 11) as f32 / 64.0 - 0.08).collect::<Vec<_>>();
        writer.write_f32(module, &numbers(2 * i), &numbers(2 * o)).unwrap();
    }
    let mut provenance = Provenance::new("train");
    provenance.base_fingerprint = Some(plan.base.fingerprint.clone());
    provenance.samples = Some(10);
    writer.finish(Some(plan), provenance).unwrap();
}

/// A folder with keys, trusted keys, and three edges' adapters of run winter, round 3, signed, recovered and signed.
struct Federation {
    dir: TempDir,
}

fn run_in(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.env("CUDA_VISIBLE_DEVICES", "").current_dir(dir).args(args).output().unwrap()
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy_tree(&path, &to) } else { drop(std::fs::copy(&path, to).unwrap()) }
    }
}

impl Federation {
    fn new() -> Federation {
        let f = Federation { dir: tempfile::tempdir().unwrap() };
        for folder in ["keys", "trusted", "trusted/edges", "trusted/recoverers"] {
            std::fs::create_dir(f.at(folder)).unwrap();
        }
        for name in EDGES.into_iter().chain(["cloud", "stranger"]) {
            f.done(&["keys", "new", &format!("keys/{name}.key")]);
        }
        for (name, role) in EDGES.map(|e| (e, "edges")).into_iter().chain([("cloud", "recoverers")]) {
            std::fs::copy(f.at(&format!("keys/{name}.key.pub")), f.at(&format!("trusted/{role}/{name}.pub")))
                .unwrap();
        }
        for (seed, name) in EDGES.into_iter().enumerate() {
            adapter(&f.at(name), seed, 4.0, &plan());
            f.sign(name, name, "3", &[]);
            f.recover(name, &format!("{name}-full"));
        }
        f
    }

    fn copy(&self) -> Federation {
        let dir = tempfile::tempdir().unwrap();
        copy_tree(self.dir.path(), dir.path());
        Federation { dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command that must succeed; gives what it printed.
    fn done(&self, args: &[&str]) -> String {
        let out = run_in(self.dir.path(), args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap() + &String::from_utf8(out.stderr).unwrap()
    }

    fn sign(&self, folder: &str, key: &str, round: &str, more: &[&str]) {
        let key = format!("keys/{key}.key");
        self.done(&[&["sign", folder, "--key", &key, "--run", "winter", "--round", round], more].concat());
    }

    fn recover(&self, edge: &str, out: &str) {
        self.done(&[
            "recover",
            "--adapter",
            edge,
            "--trusted",
            "trusted",
            "--key",
            "keys/cloud.key",
            "--out",
            out,
        ]);
    }

    fn change(&self, file: &str, how: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.at(file)).unwrap();
        how(&mut bytes);
        std::fs::write(self.at(file), bytes).unwrap();
    }

    fn replace(&self, file: &str, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.at(file)).unwrap();
        assert!(text.contains(from), "{file}: {text}");
        std::fs::write(self.at(file), text.replace(from, to)).unwrap();
    }

    /// A trusted edge that lies: its manifest is `text`, whatever that says, with a signature that is right.
    fn sign_text(&self, folder: &str, key: &str, text: &str) {
        let key = SecretKey::read(&self.at(&format!("keys/{key}.key"))).unwrap();
        let message = [CONTEXT, text.as_bytes()].concat();
        let signature: String = key.sign(&message).iter().map(|b| format!("{b:02x}")).collect();
        let file = serde_json::json!({
            "format": "anabranch-signature/1", "public_key": key.public().to_string(), "signature": signature,
        });
        std::fs::write(self.at(folder).join(MANIFEST), text).unwrap();
        std::fs::write(self.at(folder).join(SIGNATURE), file.to_string()).unwrap();
    }

    /// Every file under the folder with its bytes' hash, links by where they point.
    fn snapshot(&self) -> BTreeMap<String, String> {
        let of = |name: String| {
            let path = self.at(&name);
            let hash = match std::fs::symlink_metadata(&path).unwrap() {
                m if m.is_file() => sha256_file(&path).unwrap(),
                _ => "no file".into(),
            };
            (name, hash)
        };
        list_all(self.dir.path()).unwrap().into_iter().map(of).collect()
    }

    /// `text` with what differs from run to run, and what nobody reads, made short.
    fn plain(&self, text: &str) -> String {
        let mut text = text.replace(&base_dir().display().to_string(), "base").trim().to_string();
        for name in EDGES.into_iter().chain(["cloud", "stranger"]) {
            let public = std::fs::read_to_string(self.at(&format!("keys/{name}.key.pub"))).unwrap();
            let key = public.split('"').find(|p| p.len() == 64).unwrap();
            text = text.replace(key, &format!("<{name}'s key>")).replace(&key[..16], &format!("<{name}'s>"));
        }
        let is_hash = |w: &str| w.len() >= 64 && w.bytes().take(64).all(|b| b.is_ascii_hexdigit());
        let words =
            text.split(' ').map(|w| if is_hash(w) { format!("<hash>{}", &w[64..]) } else { w.into() });
        words.collect::<Vec<_>>().join(" ").replace('|', "\\|")
    }
}

/// One attack: what an attacker did, the command that meets it, and what must be said.
struct Attack {
    what: &'static str,
    how: fn(&Federation),
    args: &'static str,
    code: i32,
    parts: &'static [&'static str],
}

const RECOVER: &str =
    "recover --adapter hum --trusted trusted --run winter --round 3 --key keys/cloud.key --out out";
const FUSE: &str = "fuse hum-full sc-full --method mean --trusted trusted --run winter --round 3 --out out";

const ATTACKS: &[Attack] = &[
    Attack {
        what: "one byte of an edge's weights changed",
        how: |f| f.change(&format!("hum/{MODEL}"), |b| *b.last_mut().unwrap() ^= 1),
        args: "recover --adapter hum --out out",
        code: 1,
        parts: &["hum/adapter_model.safetensors", "was changed after signing"],
    },
    Attack {
        what: "`lora_alpha` of a recovered adapter raised",
        how: |f| f.replace(&format!("hum-full/{CONFIG}"), "\"lora_alpha\": 4", "\"lora_alpha\": 9"),
        args: FUSE,
        code: 1,
        parts: &["hum-full/adapter_config.json", "was changed after signing"],
    },
    Attack {
        what: "a round written into the manifest after signing",
        how: |f| f.replace(&format!("hum/{MANIFEST}"), "\"round\": 3", "\"round\": 4"),
        args: "recover --adapter hum --out out",
        code: 1,
        parts: &["hum/manifest.sig", "one of the two was changed"],
    },
    Attack {
        what: "an edge's adapter without a signature",
        how: |f| {
            [MANIFEST, SIGNATURE].iter().for_each(|n| std::fs::remove_file(f.at("hum").join(n)).unwrap())
        },
        args: RECOVER,
        code: 1,
        parts: &["hum", "is not signed"],
    },
    Attack {
        what: "a recovered adapter without a signature",
        how: |f| {
            [MANIFEST, SIGNATURE].iter().for_each(|n| std::fs::remove_file(f.at("sc-full").join(n)).unwrap())
        },
        args: FUSE,
        code: 1,
        parts: &["sc-full", "is not signed"],
    },
    Attack {
        what: "the signature taken away, the manifest left",
        how: |f| std::fs::remove_file(f.at("hum-full").join(SIGNATURE)).unwrap(),
        args: "fuse hum-full sc-full --method mean --out out",
        code: 1,
        parts: &["hum-full", "its signature is lost"],
    },
    Attack {
        what: "an adapter that a stranger signed",
        how: |f| f.sign("hum", "stranger", "3", &["--force"]),
        args: RECOVER,
        code: 1,
        parts: &["is signed by key <stranger's>, which is not in trusted"],
    },
    Attack {
        what: "an adapter that a stranger recovered from a trusted edge's",
        how: |f| f.sign("hum-full", "stranger", "3", &["--force"]),
        args: FUSE,
        code: 1,
        parts: &["hum-full", "is signed by key <stranger's>, which is not in trusted"],
    },
    Attack {
        what: "a stranger's adapter that the trusted recoverer took without asking",
        how: |f| {
            f.sign("hum", "stranger", "3", &["--force"]);
            std::fs::remove_dir_all(f.at("hum-full")).unwrap();
            f.done(&["recover", "--adapter", "hum", "--key", "keys/cloud.key", "--out", "hum-full"]);
        },
        args: FUSE,
        code: 1,
        parts: &["hum-full", "is signed by key <stranger's>, which is not in trusted"],
    },
    Attack {
        what: "a trusted edge that plays the recoverer, with another edge's manifest and weights of its own",
        how: |f| {
            f.change(&format!("sc-full/{MODEL}"), |b| *b.last_mut().unwrap() ^= 1);
            f.sign("sc-full", "hum", "3", &["--force"]);
        },
        args: FUSE,
        code: 1,
        parts: &["sc-full", "is signed by \"hum\", whom trusted does not trust as a recoverer"],
    },
    Attack {
        what: "a trusted edge that recovers its own adapter",
        how: |f| {
            std::fs::remove_dir_all(f.at("hum-full/edge")).unwrap();
            f.sign("hum-full", "hum", "3", &["--force"]);
        },
        args: FUSE,
        code: 1,
        parts: &["hum-full", "keeps no edge's signature"],
    },
    Attack {
        what: "the recoverer that plays an edge",
        how: |f| f.sign("hum", "cloud", "3", &["--force"]),
        args: RECOVER,
        code: 1,
        parts: &["is signed by \"cloud\", whom trusted does not trust as an edge"],
    },
    Attack {
        what: "manifest and signature of another edge's adapter",
        how: |f| {
            for name in [MANIFEST, SIGNATURE] {
                std::fs::copy(f.at("sc").join(name), f.at("hum").join(name)).unwrap();
            }
        },
        args: RECOVER,
        code: 1,
        parts: &["hum/adapter_model.safetensors", "was changed after signing"],
    },
    Attack {
        what: "another edge's manifest kept in a recovered adapter",
        how: |f| {
            for name in [MANIFEST, SIGNATURE] {
                std::fs::copy(f.at("sc").join(name), f.at("hum-full/edge").join(name)).unwrap();
            }
        },
        args: FUSE,
        code: 1,
        parts: &["hum-full/edge/manifest.json", "was changed after signing"],
    },
    Attack {
        what: "an adapter of the round before, sent again",
        how: |f| f.sign("hum", "hum", "2", &["--force"]),
        args: RECOVER,
        code: 1,
        parts: &["is of run \"winter\" round 2, expected run \"winter\" round 3"],
    },
    Attack {
        what: "an adapter of the round before among new ones, no round asked for",
        how: |f| {
            f.sign("sc", "sc", "2", &["--force"]);
            std::fs::remove_dir_all(f.at("sc-full")).unwrap();
            f.recover("sc", "sc-full");
        },
        args: "fuse hum-full sc-full --method mean --trusted trusted --out out",
        code: 1,
        parts: &["sc-full", "round 2", "round 3", "adapters of one round are fused"],
    },
    Attack {
        what: "an old adapter that was signed again by the recoverer for the new round",
        how: |f| {
            f.sign("hum", "hum", "2", &["--force"]);
            std::fs::remove_dir_all(f.at("hum-full")).unwrap();
            f.recover("hum", "hum-full");
            f.sign("hum-full", "cloud", "3", &["--force"]);
        },
        args: FUSE,
        code: 1,
        parts: &["hum-full/edge/manifest.json", "an adapter of one round is none of another"],
    },
    Attack {
        what: "all adapters of another run",
        how: |_| {},
        args: "fuse hum-full sc-full --method mean --trusted trusted --run spring --round 3 --out out",
        code: 1,
        parts: &["is of run \"winter\" round 3, expected run \"spring\" round 3"],
    },
    Attack {
        what: "one edge's adapter twice, under two names",
        how: |f| copy_tree(&f.at("hum-full"), &f.at("more")),
        args: "fuse hum-full more --method mean --trusted trusted --run winter --round 3 --out out",
        code: 1,
        parts: &["comes from edge \"hum\"", "an edge counts once"],
    },
    Attack {
        what: "a file that the manifest does not list",
        how: |f| std::fs::write(f.at("hum/pruning.json.bak"), "x").unwrap(),
        args: RECOVER,
        code: 1,
        parts: &["\"pruning.json.bak\"", "was put there after signing"],
    },
    Attack {
        what: "a hidden file that the manifest does not list",
        how: |f| std::fs::write(f.at("hum-full/edge/.x"), "x").unwrap(),
        args: FUSE,
        code: 1,
        parts: &["\"edge/.x\"", "was put there after signing"],
    },
    Attack {
        what: "a symbolic link in a file's place, to the same bytes",
        how: |f| {
            std::fs::rename(f.at(&format!("hum/{MODEL}")), f.at("elsewhere")).unwrap();
            symlink("../elsewhere", f.at(&format!("hum/{MODEL}"))).unwrap();
        },
        args: RECOVER,
        code: 1,
        parts: &["hum/adapter_model.safetensors", "is a symbolic link"],
    },
    Attack {
        what: "a pipe, which keeps whoever opens it waiting",
        how: |f| rustix::fs::mkfifoat(rustix::fs::CWD, f.at("hum/pipe"), rustix::fs::Mode::RWXU).unwrap(),
        args: RECOVER,
        code: 1,
        parts: &["hum/pipe", "is neither a file nor a folder"],
    },
    Attack {
        what: "a manifest that names a file outside the folder, signed by a trusted edge",
        how: |f| {
            let hash = sha256(b"");
            f.sign_text(
                "hum",
                "hum",
                &format!(r#"{{"format":"anabranch-manifest/1","files":{{"../../etc/passwd":"{hash}"}}}}"#),
            );
        },
        args: RECOVER,
        code: 1,
        parts: &["hum/manifest.json", "\"../../etc/passwd\", which is no path of a file inside the folder"],
    },
    Attack {
        what: "a manifest with one name twice, signed by a trusted edge",
        how: |f| {
            let hash = sha256(b"");
            f.sign_text(
                "hum",
                "hum",
                &format!(r#"{{"format":"anabranch-manifest/1","files":{{"a":"{hash}","a":"{hash}"}}}}"#),
            );
        },
        args: RECOVER,
        code: 1,
        parts: &["hum/manifest.json", "key \"a\" twice"],
    },
    Attack {
        what: "a manifest of 5,000 files, signed by a trusted edge",
        how: |f| {
            let files: BTreeMap<String, String> = (0..5000).map(|n| (n.to_string(), sha256(b""))).collect();
            f.sign_text(
                "hum",
                "hum",
                &serde_json::json!({"format": "anabranch-manifest/1", "files": files}).to_string(),
            );
        },
        args: RECOVER,
        code: 1,
        parts: &["names 5000 files, expected 1 to 4096"],
    },
    Attack {
        what: "a manifest of 64 MB",
        how: |f| std::fs::File::create(f.at(&format!("hum/{MANIFEST}"))).unwrap().set_len(64 << 20).unwrap(),
        args: RECOVER,
        code: 1,
        parts: &["has more than 1048576 bytes"],
    },
    Attack {
        what: "a manifest nested 100,000 deep, signed by a trusted edge",
        how: |f| f.sign_text("hum", "hum", &"[".repeat(100_000)),
        args: RECOVER,
        code: 1,
        parts: &["hum/manifest.json", "recursion limit"],
    },
    Attack {
        what: "weights that announce a header of 2⁶⁰ bytes, signed by a trusted edge",
        how: |f| {
            f.change(&format!("hum/{MODEL}"), |b| b[..8].copy_from_slice(&(1u64 << 60).to_le_bytes()));
            f.sign("hum", "hum", "3", &["--force"]);
        },
        args: RECOVER,
        code: 1,
        parts: &["announces a header of 1152921504606846976 bytes"],
    },
    Attack {
        what: "weights with NaN in them, signed by a trusted edge",
        how: |f| {
            f.change(&format!("hum/{MODEL}"), |b| {
                let n = b.len();
                b[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            });
            f.sign("hum", "hum", "3", &["--force"]);
        },
        args: RECOVER,
        code: 1,
        parts: &["hum/adapter_model.safetensors", "holds NaN or infinity"],
    },
    Attack {
        what: "an update a billion times larger than the others', signed by all in the chain",
        how: |f| f.poison("hum", 4e9),
        args: "fuse hum-full sc-full fin-full --method mean --trusted trusted --run winter --round 3 --max-norm 100 --out out",
        code: 1,
        parts: &["hum-full", "--max-norm is 1e2", "--reject-outliers"],
    },
    Attack {
        what: "such an update of one of two, where nobody can tell which is the outlier",
        how: |f| f.poison("hum", 4e9),
        args: "fuse hum-full sc-full --method mean --trusted trusted --run winter --round 3 --reject-outliers --out out",
        code: 2,
        parts: &["of two nobody can tell which is the outlier"],
    },
    Attack {
        what: "indices of a base with other heads, under the fingerprint of this one",
        how: |f| {
            let mut plan = plan();
            plan.base.num_attention_heads /= 2;
            plan.base.head_dim *= 2;
            plan.write(&f.at("hum").join(PRUNING)).unwrap();
            f.sign("hum", "hum", "3", &["--force"]);
        },
        args: "recover --adapter hum --model BASE --trusted trusted --out out",
        code: 1,
        parts: &["hum/pruning.json", "says that its base has num_attention_heads 8, base has 16"],
    },
    Attack {
        what: "an index that the base does not have",
        how: |f| {
            f.replace(&format!("hum/{PRUNING}"), "\"kv_heads\":[1]", "\"kv_heads\":[99]");
            f.sign("hum", "hum", "3", &["--force"]);
        },
        args: "recover --adapter hum --model BASE --trusted trusted --out out",
        code: 1,
        parts: &["hum/pruning.json", "layers[0].kv_heads has 99, the full model has"],
    },
    Attack {
        what: "an adapter of another base",
        how: |f| {
            let other = "0".repeat(64);
            for name in [PRUNING, "anabranch.json"] {
                f.replace(&format!("hum/{name}"), &base_model().fingerprint, &other);
            }
            f.sign("hum", "hum", "3", &["--force"]);
        },
        args: "recover --adapter hum --model BASE --trusted trusted --out out",
        code: 1,
        parts: &["has fingerprint", "expects <hash>", "pruned copy of another model"],
    },
    Attack {
        what: "a plan in the recovered adapter that is not the edge's",
        how: |f| {
            f.replace(&format!("hum-full/{PRUNING}"), "\"kv_heads\":[1]", "\"kv_heads\":[0]");
            f.sign("hum-full", "cloud", "3", &["--force"]);
        },
        args: FUSE,
        code: 1,
        parts: &["hum-full/pruning.json", "is not the one that the edge signed"],
    },
    Attack {
        what: "a secret key that others may read",
        how: |f| {
            std::fs::set_permissions(f.at("keys/hum.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
            std::fs::remove_file(f.at("hum").join(SIGNATURE)).unwrap();
            std::fs::remove_file(f.at("hum").join(MANIFEST)).unwrap();
        },
        args: "sign hum --key keys/hum.key --run winter --round 3",
        code: 1,
        parts: &["keys/hum.key", "has mode 0644, expected 0600"],
    },
    Attack {
        what: "a new key in the place of an old one",
        how: |_| {},
        args: "keys new keys/hum.key --force",
        code: 2,
        parts: &["keys/hum.key exists", "never replaced"],
    },
    Attack {
        what: "a secret key among the trusted ones",
        how: |f| drop(std::fs::copy(f.at("keys/hum.key"), f.at("trusted/edges/other.pub")).unwrap()),
        args: FUSE,
        code: 1,
        parts: &["trusted/edges/other.pub", "is a secret key"],
    },
];

impl Federation {
    /// An edge's adapter with another alpha, signed and recovered like any other.
    fn poison(&self, edge: &str, alpha: f64) {
        std::fs::remove_dir_all(self.at(edge)).unwrap();
        std::fs::remove_dir_all(self.at(&format!("{edge}-full"))).unwrap();
        adapter(&self.at(edge), 0, alpha, &plan());
        self.sign(edge, edge, "3", &[]);
        self.recover(edge, &format!("{edge}-full"));
    }
}

#[test]
fn every_attack_is_refused_in_a_sentence_and_leaves_nothing() {
    let clean = Federation::new();
    let mut rows = String::new();
    for attack in ATTACKS {
        let f = clean.copy();
        (attack.how)(&f);
        let before = f.snapshot();
        let base = base_dir().display().to_string();
        let args: Vec<&str> = attack.args.split(' ').map(|a| if a == "BASE" { &base } else { a }).collect();
        let out = run_in(f.dir.path(), &args);
        let (stdout, stderr) =
            (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
        let said = f.plain(&stderr);
        assert_eq!(out.status.code(), Some(attack.code), "{}: {said}", attack.what);
        for part in attack.parts {
            assert!(said.contains(part), "{}: no {part:?} in: {said}", attack.what);
        }
        assert!(said.starts_with("anabranch: ") && !said.contains("panicked"), "{}: {said}", attack.what);
        assert_eq!(stdout, "", "{}", attack.what);
        assert_eq!(f.snapshot(), before, "{}", attack.what);
        let said = said.trim_start_matches("anabranch: ").replace('\n', " ");
        rows += &format!(
            "| {} | `{}` | {} | {said} |\n",
            attack.what,
            attack.args.split(' ').next().unwrap(),
            attack.code
        );
    }
    let doc = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/trust.md");
    let text = std::fs::read_to_string(&doc).unwrap();
    let (start, end) =
        ("| tried | met by | exit | said |\n|---|---|---|---|\n", "\n<!-- end of the table -->");
    let from = text.find(start).expect("the head of the table") + start.len();
    let to = text.find(end).expect("the end of the table");
    if std::env::var_os("ANABRANCH_BLESS").is_some() {
        std::fs::write(&doc, format!("{}{}{}", &text[..from], rows, &text[to..])).unwrap();
    } else {
        assert_eq!(
            &text[from..to],
            rows,
            "ANABRANCH_BLESS=1 cargo test --test trust writes docs/trust.md anew"
        );
    }
}

#[test]
fn what_is_signed_by_those_who_are_trusted_is_taken() {
    let f = Federation::new();
    let with = ["--trusted", "trusted", "--run", "winter", "--round", "3"];
    let said = f.done(&[&["verify", "hum"], &with[..]].concat());
    assert!(said.contains("files as signed by hum for run \"winter\" round 3"), "{said}");
    let said = f.done(&[&["verify", "hum-full"], &with[..]].concat());
    assert!(
        said.contains("as signed by cloud") && said.contains("recovered from the adapter of hum"),
        "{said}"
    );
    let said = f.done(&["inspect", "hum-full"]);
    assert!(said.contains("signed         by key"), "{said}");
    let said =
        f.done(&[&["fuse", "hum-full", "sc-full", "--method", "mean", "--out", "fused"], &with[..]].concat());
    assert!(!said.contains("WARN"), "{said}");
    // Without --run and --round it says what that means.
    let said = f.done(&[
        "fuse",
        "hum-full",
        "sc-full",
        "--method",
        "mean",
        "--out",
        "again",
        "--trusted",
        "trusted",
    ]);
    assert!(said.contains("give --run and --round"), "{said}");
    assert_eq!(
        sha256_file(&f.at("fused").join(MODEL)).unwrap(),
        sha256_file(&f.at("again").join(MODEL)).unwrap()
    );
    // A recovered adapter is the same whether it is signed or not.
    f.done(&["recover", "--adapter", "hum", "--model", &base_dir().display().to_string(), "--out", "plain"]);
    for name in [MODEL, CONFIG, PRUNING] {
        assert_eq!(
            std::fs::read(f.at("plain").join(name)).unwrap(),
            std::fs::read(f.at("hum-full").join(name)).unwrap()
        );
    }
    // Metrics stay at home; an output that is signed can be replaced by its command.
    std::fs::write(f.at("hum/metrics.jsonl"), "{}\n").unwrap();
    f.done(&[&["verify", "hum"], &with[..]].concat());
    f.done(&["recover", "--adapter", "hum", "--key", "keys/cloud.key", "--out", "hum-full", "--force"]);
    f.done(&["inspect", "hum-full", "--verify"]);
    // An adapter of the full model needs no recoverer.
    f.sign("fused", "fin", "3", &[]);
    f.done(
        &[&["fuse", "hum-full", "fused", "--method", "mean-svd", "--rank", "2", "--out", "mixed"], &with[..]]
            .concat(),
    );
}

#[test]
fn a_training_run_signs_its_adapter() {
    let f = Federation::new();
    let base = base_dir().display().to_string();
    let data =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/harbour.train.jsonl").display().to_string();
    let train = ["train", "--model", &base, "--data", &data, "--steps", "1", "--seq", "64", "--batch", "1"];
    let sign = ["--key", "keys/hum.key", "--run", "winter", "--round", "4", "--out", "trained"];
    f.done(&[&train[..], &sign].concat());
    let verify = ["verify", "trained", "--trusted", "trusted", "--run", "winter", "--round", "4"];
    assert!(f.done(&verify).contains("by hum for run \"winter\" round 4"));
    let out = run_in(f.dir.path(), &[&train[..], &["--run", "winter", "--out", "x"]].concat());
    assert!(out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("--key"));
    let out = run_in(f.dir.path(), &[&train[..], &["--key", "nowhere", "--out", "x"]].concat());
    assert!(out.status.code() == Some(1) && !f.at("x").exists());
}

#[test]
fn an_outlier_is_named_and_left_out_when_asked() {
    let f = Federation::new();
    f.poison("sc", 4e9);
    let fuse = ["fuse", "hum-full", "sc-full", "fin-full", "--method", "mean", "--weights", "1,2,1"];
    let said = f.done(&[&fuse[..], &["--out", "all"]].concat());
    assert!(
        said.contains("sc-full: its update has norm") && said.contains("--reject-outliers leaves it out"),
        "{said}"
    );
    let said = f.done(&[&fuse[..], &["--reject-outliers", "--out", "kept"]].concat());
    assert!(said.contains("sc-full is left out"), "{said}");
    f.done(&["fuse", "hum-full", "fin-full", "--method", "mean", "--out", "two"]);
    assert_eq!(
        sha256_file(&f.at("kept").join(MODEL)).unwrap(),
        sha256_file(&f.at("two").join(MODEL)).unwrap()
    );
    let json = f.done(
        &[&fuse[..], &["--reject-outliers", "--max-norm", "1e3", "--json", "-q", "--out", "three"]].concat(),
    );
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let candidates = &report["admission"]["adapters"];
    assert!(candidates[1]["rejected"].as_str().unwrap().contains("--max-norm is 1e3"), "{report}");
    assert!(candidates[0]["rejected"].is_null() && candidates[0]["from"]["signer"]["key"].is_string());
    let fedsa = ["--method", "fedsa", "--fedsa", "client:1", "--reject-outliers", "--out", "x"];
    let out = run_in(f.dir.path(), &[&["fuse", "hum-full", "sc-full", "fin-full"], &fedsa[..]].concat());
    assert!(
        out.status.code() == Some(2) && String::from_utf8_lossy(&out.stderr).contains("which is left out")
    );
    let all = ["--method", "mean", "--max-norm", "1e-9", "--reject-outliers", "--out", "x"];
    let out = run_in(f.dir.path(), &[&["fuse", "hum-full", "fin-full"], &all[..]].concat());
    assert!(String::from_utf8_lossy(&out.stderr).contains("nothing is left to fuse") && !f.at("x").exists());
}

/// Adapters hold no file open: a thousand of them are fused with 32 descriptors.
#[test]
fn a_thousand_adapters_do_not_exhaust_the_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("0");
    std::fs::create_dir(&one).unwrap();
    let module = Module { layer: 0, target: Target::Q };
    let spec = PairSpec { module, rank: 1, dims: (4, 4), dtypes: (DType::F32, DType::F32) };
    let mut w = AdapterWriter::create(&one, AdapterConfig::peft(1, 1.0, 0.0, &[Target::Q], None), vec![spec])
        .unwrap();
    w.write_f32(module, &[1.0, 0.0, 2.0, 0.5], &[1.0, -1.0, 0.0, 3.0]).unwrap();
    w.finish(None, Provenance::new("train")).unwrap();
    (1..1000).for_each(|n| copy_tree(&one, &dir.path().join(n.to_string())));
    let names: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
    let out = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 32 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_anabranch"), "fuse"])
        .args(&names)
        .args(["--method", "fedavg", "--out", "fused", "--device", "cpu"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let fused = std::fs::read(dir.path().join("fused").join(MODEL)).unwrap();
    assert_eq!(
        fused,
        std::fs::read(one.join(MODEL)).unwrap(),
        "the mean of a thousand equal ones is one of them"
    );
}
