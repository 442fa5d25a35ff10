//! Fusion at scale: many adapters of mixed ranks, prunings and scales, more ranks than outputs, parts, and runs that are
//! killed.

mod dense;
#[path = "common/kill.rs"]
mod kill;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anabranch::checkpoint::adapter::Adapter;
use anabranch::checkpoint::adapter_config::AdapterConfig;
use anabranch::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use anabranch::checkpoint::module::{Module, Target};
use anabranch::checkpoint::provenance::{Provenance, Verdict};
use anabranch::checkpoint::weights::OpenOptions;
use anabranch::fuse::LoraCr;
use anabranch::fuse::options::{Gate, Restore, SharedRank, Side};
use anabranch::tensor::DType;
use dense::{adapters, batch, cpu, distance, updates};
use faer::Mat;

const BIN: &str = env!("CARGO_BIN_EXE_anabranch");
const LAYERS: usize = 5;

/// O, I of a model that is 40 wide.
fn size(target: Target) -> (usize, usize) {
    match target {
        Target::Q | Target::O => (40, 40),
        Target::K | Target::V => (10, 40),
        Target::Gate | Target::Up => (112, 40),
        Target::Down => (40, 112),
    }
}

/// An adapter on every linear. Rows and columns that `pruned` names are zero, as `recover` leaves them.
fn write(dir: &Path, seed: u64, rank: usize, alpha: f64, pruned: Option<usize>) -> PathBuf {
    let path = dir.join(format!("adapter-{seed}"));
    std::fs::create_dir(&path).unwrap();
    let modules: Vec<Module> =
        (0..LAYERS).flat_map(|layer| Target::ALL.map(|target| Module { layer, target })).collect();
    let config = AdapterConfig::peft(rank, alpha, 0.0, &Target::ALL, Some("base"));
    let specs = modules.iter().map(|&module| PairSpec {
        module,
        rank,
        dims: size(module.target),
        dtypes: (DType::F32, DType::F32),
    });
    let mut writer = AdapterWriter::create(&path, config, specs.collect()).unwrap();
    for (n, &m) in modules.iter().enumerate() {
        let (o, i) = size(m.target);
        let (b, a) = adapters(seed * 1000 + n as u64, o, i, &[rank]).remove(0);
        let gone = |x: usize| pruned.is_some_and(|p| x % 4 == p);
        let rows = m.target.prunes_rows();
        let a = (0..rank * i).map(|x| if !rows && gone(x % i) { 0.0 } else { a[(x / i, x % i)] as f32 });
        let b =
            (0..rank * o).map(|x| if rows && gone(x / rank) { 0.0 } else { b[(x / rank, x % rank)] as f32 });
        writer.write_f32(m, &a.collect::<Vec<_>>(), &b.collect::<Vec<_>>()).unwrap();
    }
    writer.finish(None, Provenance::new("train")).unwrap();
    path
}

/// Fifty adapters of ranks 1 to 5, of six scales, of five prunings.
fn fifty(dir: &Path) -> Vec<PathBuf> {
    (0..50)
        .map(|e| {
            write(dir, e, 1 + e as usize % 5, 2.0 + (e % 6) as f64, (e % 5 > 0).then_some(e as usize % 4))
        })
        .collect()
}

/// `fuse` with LoRA-CR before it.
fn fuse(adapters: &[PathBuf], out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(BIN);
    command.env("CUDA_VISIBLE_DEVICES", "").args([
        "fuse",
        "--quiet",
        "--device",
        "cpu",
        "--resolve",
        "lora-cr",
    ]);
    command.args(adapters).arg("--out").arg(out).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The exit code and what was said.
fn done(mut command: Command) -> (Option<i32>, String) {
    let out = command.output().unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[track_caller]
fn good(command: Command) {
    let (code, error) = done(command);
    assert_eq!(code, Some(0), "{error}");
}

/// Every file of a folder, by name.
fn bytes(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// Not `assert_eq`: what it would print is the files.
#[track_caller]
fn same(got: &Path, want: &Path) {
    let (got, want) = (bytes(got), bytes(want));
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&got), names(&want));
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        assert!(got == want, "{name} has other bytes");
    }
}

/// The folder that a run leaves if it is killed behind `modules` modules, and the journal in it.
fn stopped(adapters: &[PathBuf], out: &Path, how: &[&str], modules: usize) -> (PathBuf, PathBuf) {
    let partial = out.with_extension("partial");
    let journal = partial.join("modules.jsonl");
    let began = Instant::now();
    // A run that ended before it could be killed counts for nothing.
    while !journal.exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "every run ended before module {modules}");
        for folder in [out, &partial].into_iter().filter(|f| f.exists()) {
            std::fs::remove_dir_all(folder).unwrap();
        }
        let child = fuse(adapters, out, how).spawn().unwrap();
        kill::at_lines(child, &journal, modules, Duration::ZERO);
    }
    (partial, journal)
}

/// More ranks than outputs, than inputs, than both: the dense matrix of the outputs against the dense definition, under
/// every option.
#[test]
fn more_ranks_than_rows_resolve_as_the_dense_definition_says() {
    let transposed = |d: &[Mat<f64>]| d.iter().map(|d| d.transpose().to_owned()).collect::<Vec<_>>();
    let energy = |d: &[Mat<f64>]| d.iter().map(|d| d.squared_norm_l2()).sum::<f64>();
    for (seed, (o, i)) in [(10, 40), (40, 10), (7, 9), (1, 30)].into_iter().enumerate() {
        let x = batch(&adapters(seed as u64, o, i, &[4, 1, 3, 2, 5, 1]));
        let d = updates(&x);
        for (rank, gate) in [
            (SharedRank::All, Gate::Paper),
            (SharedRank::Top(3), Gate::Opposition),
            (SharedRank::Energy(0.9), Gate::Paper),
        ] {
            let options = LoraCr { shared_rank: rank, gate, ..LoraCr::default() };
            let (left, directions) = dense::lora_cr(&d, rank, gate);
            let (got, compared) = dense::resolve(&cpu(), &x, &options);
            let resolved = compared.resolved.unwrap();
            assert_eq!(resolved.directions.len(), directions.len());
            for (got, want) in resolved.directions.iter().zip(&directions) {
                assert!((got.sigma / want.sigma - 1.0).abs() <= 1e-9);
                assert!((got.conflict - want.conflict).abs() <= 1e-8);
            }
            assert!((compared.products[(1, 1)] / d[1].squared_norm_l2() - 1.0).abs() <= 1e-12);
            let kept: f64 = (0..6).map(|e| resolved.products[(e, e)]).sum();
            assert!((kept / energy(&left) - 1.0).abs() <= 1e-9);
            let (right, _) = dense::lora_cr(&transposed(&d), rank, gate);
            let (both, _) = dense::lora_cr(&transposed(&left), rank, gate);
            for (side, want) in
                [(Side::Left, left), (Side::Right, transposed(&right)), (Side::Both, transposed(&both))]
            {
                let (got, _) = dense::resolve(&cpu(), &x, &LoraCr { side, ..options });
                for (got, want) in updates(&got).iter().zip(&want) {
                    let err = (got - want).norm_l2() / energy(&d).sqrt();
                    assert!(err <= 1e-9, "{o} {i} {side} {rank} {gate}: {err:e}");
                }
            }
            // The score afterwards is that of the resolved updates, compared anew.
            let again = dense::resolve(&cpu(), &got, &options).1;
            assert!((again.score.conflict_mean - resolved.score.conflict_mean).abs() <= 1e-7);
            let restored = LoraCr { restore: Restore::Client, ..options };
            for (e, got) in updates(&dense::resolve(&cpu(), &x, &restored).0).iter().enumerate() {
                let (now, was) = (got.norm_l2(), d[e].norm_l2());
                assert!(now <= was * (1.0 + 1e-9), "adapter {e} grew from {was} to {now}");
            }
        }
        let zero = batch(&vec![(Mat::zeros(o, 9), Mat::zeros(9, i)); 5]);
        let (got, compared) = dense::resolve(&cpu(), &zero, &LoraCr::default());
        assert!(compared.resolved.unwrap().directions.is_empty());
        assert!(updates(&got).iter().all(|d| d.norm_l2() == 0.0));
    }
}

#[test]
fn fifty_mixed_adapters_fuse_to_the_mean_of_what_lora_cr_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let paths = fifty(dir.path());
    let out = dir.path().join("out");
    // 150 ranks are more than any module's update can need.
    let (code, error) = done(fuse(&paths, &out, &["--method", "mean"]));
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("--rank"), "{error}");
    good(fuse(&paths, &out, &["--method", "mean", "--rank", "10"]));
    let open = |p: &Path| Adapter::open(p, OpenOptions::default()).unwrap();
    let update = |a: &Adapter, m: Module| {
        let p = &a.modules[&m];
        let ((o, i), r) = (p.dims(), p.rank);
        let (a, b) = (p.a.to_f64(), p.b.to_f64());
        Mat::from_fn(o, r, |x, k| p.scale * b[x * r + k]) * Mat::from_fn(r, i, |k, x| a[k * i + x])
    };
    let inputs: Vec<Adapter> = paths.iter().map(|p| open(p)).collect();
    let fused = open(&out);
    for target in [Target::K, Target::Q, Target::Down] {
        let m = Module { layer: 2, target };
        let d: Vec<Mat<f64>> = inputs.iter().map(|a| update(a, m)).collect();
        let (left, _) = dense::lora_cr(&d, SharedRank::All, Gate::Paper);
        let mean = dense::weighted(&left, &vec![0.02; 50]);
        let svd = mean.thin_svd().unwrap();
        let q = 10.min(svd.S().dim());
        let s = svd.S().column_vector();
        let best =
            Mat::from_fn(mean.nrows(), q, |r, k| svd.U()[(r, k)] * s[k]) * svd.V().subcols(0, q).transpose();
        let err = distance(update(&fused, m).as_ref(), best.as_ref());
        assert!(err <= 1e-5, "{m}: {err:e}");
    }
    // `--threads` changes nothing, an odd number of them neither.
    let again = dir.path().join("again");
    good(fuse(&paths, &again, &["--method", "mean", "--rank", "10", "--threads", "3"]));
    same(&again, &out);
}

#[test]
fn parts_join_to_the_bytes_of_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..4).map(|e| write(dir.path(), e, 2 + e as usize % 2, 4.0, None)).collect();
    let at = |name: &str| dir.path().join(name);
    for (profile, dtype) in [("portable", "f32"), ("peft", "bf16")] {
        let how = |more: &[&'static str]| {
            [&["--method", "mean", "--profile", profile, "--dtype", dtype], more].concat()
        };
        let name = |what: &str| format!("{what}-{profile}");
        good(fuse(&paths, &at(&name("whole")), &how(&[])));
        for layers in ["0..2", "2..3", "3..5"] {
            good(fuse(&paths, &at(&name(layers)), &how(&["--layers", layers])));
        }
        let join = |parts: &[&str], out: &str| {
            let mut command = Command::new(BIN);
            command.arg("join").arg("--quiet").args(parts.iter().map(|p| at(&name(p))));
            command.arg("--out").arg(at(out));
            command
        };
        let (joined, all) = (name("joined"), ["3..5", "0..2", "2..3"]);
        good(join(&all, &joined));
        same(&at(&joined), &at(&name("whole")));
        assert!(Provenance::verify(&at(&joined)).unwrap().values().all(|v| *v == Verdict::Same));

        let refused = |parts: &[&str], what: &str| {
            let (code, error) = done(join(parts, "never"));
            assert!(code == Some(1) || code == Some(2), "{error}");
            assert!(error.contains(what), "{error}");
            assert!(!at("never").exists() && !at("never.partial").exists());
        };
        refused(&["0..2", "3..5"], "layers 2..3 are in no part");
        refused(&["0..2", "2..3"], "layers 3..5 are in no part");
        refused(&["2..3", "3..5"], "layers 0..2 are in no part");
        refused(&["0..2", "0..2", "2..3", "3..5"], "overlap");
        refused(&["whole"], "no part");
        // Of other adapters, and with other options.
        good(fuse(&paths[1..], &at(&name("other")), &how(&["--layers", "2..3"])));
        refused(&["0..2", "other", "3..5"], "another fusion");
        good(fuse(&paths, &at(&name("top")), &how(&["--layers", "2..3", "--shared-rank", "2"])));
        refused(&["0..2", "top", "3..5"], "other options");
        // A part is not an adapter.
        let (code, error) = done(fuse(&[paths[0].clone(), at(&name("0..2"))], &at("never"), &how(&[])));
        assert_eq!(code, Some(1));
        assert!(error.contains("join"), "{error}");
        // A byte of a part that changed.
        let file = at(&name("2..3")).join("part.safetensors");
        let mut tampered = std::fs::read(&file).unwrap();
        *tampered.last_mut().unwrap() ^= 1;
        std::fs::write(&file, tampered).unwrap();
        refused(&all, "SHA-256");
    }
    for (layers, code, what) in [("3..3", 2, "3..3"), ("4..9", 2, "0..5"), ("x", 2, "range")] {
        let (found, error) = done(fuse(&paths, &at("never"), &["--method", "mean", "--layers", layers]));
        assert!(found == Some(code) && error.contains(what), "{found:?} {error}");
    }
}

/// A method on entries, one threshold for all modules of all parts.
#[test]
fn parts_of_an_approximated_update_join_and_a_stopped_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> =
        (0..3).map(|e| write(dir.path(), e, 2 + e as usize, 4.0, (e > 0).then_some(e as usize))).collect();
    let at = |name: &str| dir.path().join(name);
    let how = |more: &[&'static str]| {
        [&["--method", "ties", "--density-scope", "model", "--rank", "7", "--profile", "peft"], more].concat()
    };
    let (whole, joined) = (at("whole"), at("joined"));
    good(fuse(&paths, &whole, &how(&["--threads", "1"])));
    let parts = ["0..1", "1..4", "4..5"];
    for layers in parts {
        good(fuse(&paths, &at(layers), &how(&["--layers", layers])));
    }
    let mut join = Command::new(BIN);
    join.arg("join").arg("--quiet").args(parts.map(at)).arg("--out").arg(&joined);
    good(join);
    same(&joined, &whole);
    let out = at("stopped");
    stopped(&paths, &out, &how(&[]), 2);
    good(fuse(&paths, &out, &how(&["--resume"])));
    same(&out, &whole);
}

#[test]
fn killed_at_any_moment_and_resumed_it_has_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let paths = fifty(dir.path());
    let how = ["--method", "mean-svd", "--rank", "9"];
    let with = |more: &[&'static str]| [&how[..], more].concat();
    let whole = dir.path().join("whole");
    good(fuse(&paths, &whole, &how));
    let part = dir.path().join("part");
    good(fuse(&paths, &part, &with(&["--layers", "1..4"])));
    let (mut kills, mut went_on, mut run, mut starts) = (0, 0, 0, 0);
    let began = Instant::now();
    while kills < 24 || went_on < 3 {
        assert!(
            began.elapsed() < Duration::from_secs(300),
            "{kills} kills, {went_on} of them with finished modules"
        );
        run += 1;
        let layers: &[&str] = if run % 3 == 0 { &["--layers", "1..4"] } else { &[] };
        let out = dir.path().join(format!("killed-{run}"));
        let partial = dir.path().join(format!("killed-{run}.partial"));
        let journal = partial.join("modules.jsonl");
        // One that is killed while it tidies up has left its marker, which the next start removes.
        while !out.exists() || out.join(".anabranch-partial").exists() {
            let resume: &[&str] = if partial.exists() || out.exists() { &["--resume"] } else { &[] };
            let finished = kill::lines(&journal);
            went_on += i32::from(finished > 0);
            let child = fuse(&paths, &out, &with([layers, resume].concat().leak())).spawn().unwrap();
            starts += 1;
            let (until, after) = (finished + starts % 6, Duration::from_millis(starts as u64 % 4));
            kills += i32::from(kill::at_lines(child, &journal, until, after));
        }
        same(&out, if layers.is_empty() { &whole } else { &part });
        assert!(!partial.exists());
    }

    // What was written and is not what was written counts for nothing.
    let out = dir.path().join("torn");
    let (partial, journal) = stopped(&paths, &out, &how, 4);
    let file = partial.join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let length = bytes.len();
    bytes[length - 5] ^= 16;
    bytes.truncate(length - 1);
    std::fs::write(&file, bytes).unwrap();
    let mut lines = std::fs::read(&journal).unwrap();
    lines.extend(b"{\"sha256\":\"");
    std::fs::write(&journal, lines).unwrap();
    let (code, error) = done(fuse(&paths, &out, &["--method", "mean-svd", "--rank", "8", "--resume"]));
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("another command"), "{error}");
    good(fuse(&paths, &out, &with(&["--resume"])));
    same(&out, &whole);
}
