//! `recover`: a pruned model's adapter at the full model's dimensions.
//!
//! Rows of B (q, k, v, gate, up) and columns of A (o, down) go to the places that pruning kept, the others are zero, so
//! that the update is zero wherever nothing was trained. r, `lora_alpha`, dtypes and every kept value stay as they are.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::common::Common;
use super::sign::{SignOptions, Signer};
use super::trust::{Admitted, Gate, TrustOptions};
use crate::checkpoint::adapter::{Adapter, Coordinates};
use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::digest::{self, Hasher};
use crate::checkpoint::factor::{Factor, Pair};
use crate::checkpoint::json;
use crate::checkpoint::keys::PublicKey;
use crate::checkpoint::manifest::{EDGE, MANIFEST, SIGNATURE};
use crate::checkpoint::module::Module;
use crate::checkpoint::output::{Begun, Output};
use crate::checkpoint::provenance::Provenance;
use crate::checkpoint::pruning::{PRUNING, Pruning};
use crate::error::{Error, Result};

/// What is recovered.
#[derive(Clone, Debug, Default)]
pub struct RecoverOptions {
    /// The pruned model's adapter, with its `pruning.json`.
    pub adapter: PathBuf,
    /// The full model, to check the adapter against.
    pub model: Option<PathBuf>,
    /// Where to write.
    pub out: PathBuf,
    /// The key that signs the result.
    pub key: Option<PathBuf>,
    /// Whose adapters are taken.
    pub trust: TrustOptions,
}

/// What was recovered.
#[derive(Clone, Debug, Serialize)]
pub struct RecoverReport {
    /// The adapter's folder.
    pub out: PathBuf,
    /// Modules that carry an update.
    pub modules: usize,
    /// The largest rank.
    pub rank: usize,
    /// Numbers of both factors, before.
    pub parameters_pruned: u64,
    /// Numbers of both factors, after.
    pub parameters_full: u64,
    /// The full model.
    pub base_fingerprint: String,
    /// Whether that model was there to be compared with.
    pub base_checked: bool,
    /// Whose adapter it is, where it is signed, and for which run and round.
    pub from: Admitted,
    /// Who signed the result.
    pub signed: Option<PublicKey>,
    /// OUT was there already, under `--resume`.
    pub already_finished: bool,
}

/// Reads the adapter, checks it, and writes it at the full model's dimensions.
pub fn run(options: &RecoverOptions, common: &Common) -> Result<RecoverReport> {
    let ready = check(options, common)?;
    let adapter = &ready.adapter;
    let pruning = plan(adapter)?;
    let full = |m: &Module| pruning.full_dims(m.target);
    let report = RecoverReport {
        out: options.out.clone(),
        modules: adapter.modules.len(),
        rank: adapter.max_rank(),
        parameters_pruned: adapter.parameters(),
        parameters_full: adapter
            .modules
            .iter()
            .map(|(m, p)| p.rank as u64 * (full(m).0 as u64 + full(m).1 as u64))
            .sum(),
        base_fingerprint: pruning.base.fingerprint.clone(),
        base_checked: options.model.is_some(),
        from: ready.from.clone(),
        signed: ready.signer.as_ref().map(Signer::key),
        already_finished: false,
    };
    let output = match Output::begin(&options.out, "recover", &ready.fingerprint()?, common.output())? {
        Begun::Finished => return Ok(RecoverReport { already_finished: true, ..report }),
        Begun::Work(output) => output,
    };
    write(&ready, pruning, output.dir())?;
    if let Some(signer) = &ready.signer {
        signer.sign(output.dir(), true)?;
    }
    output.finish()?;
    Ok(report)
}

/// An adapter that can be recovered.
#[derive(Debug)]
pub struct Ready {
    adapter: Adapter,
    from: Admitted,
    signer: Option<Signer>,
}

/// Opens the adapter, if it is from whom it should be, one that can be recovered, and to that base.
pub fn check(options: &RecoverOptions, common: &Common) -> Result<Ready> {
    let from = Gate::new(&options.trust)?.edge(&options.adapter)?;
    let signer = match &options.key {
        Some(key) => Some(Signer::new(&SignOptions { key: key.clone(), occasion: from.occasion.clone() })?),
        None => None,
    };
    let adapter = Adapter::open(&options.adapter, common.open_options())?;
    let pruning = plan(&adapter)?;
    if let Some(model) = &options.model {
        check_base(&Checkpoint::open(model, common.open_options())?, &adapter, pruning)?;
    }
    adapter.check_finite()?;
    Ok(Ready { adapter, from, signer })
}

/// The plan to undo; an error where there is none, or where it is undone already.
fn plan(adapter: &Adapter) -> Result<&Pruning> {
    let Some(pruning) = &adapter.pruning else {
        return Err(Error::file(
            &adapter.path,
            format!("has no {PRUNING}: it was trained on a full model, or the file was lost"),
        ));
    };
    let base = &pruning.base.fingerprint;
    let trained_on = adapter.provenance.as_ref().and_then(|p| p.model_fingerprint.as_ref());
    let cut =
        adapter.modules.keys().any(|m| pruning.pruned_dims(m.target, m.layer) != pruning.full_dims(m.target));
    if adapter.coordinates()? == Coordinates::Full && (cut || trained_on == Some(base)) {
        return Err(Error::Usage(format!(
            "{} is at the full model's dimensions already: there is nothing to recover",
            adapter.path.display()
        )));
    }
    match adapter.provenance.as_ref().and_then(|p| p.base_fingerprint.as_ref()) {
        Some(said) if said != base => Err(Error::file(
            &adapter.path,
            format!("its anabranch.json is of base {said}, its {PRUNING} of base {base}"),
        )),
        _ => Ok(pruning),
    }
}

/// The model given is the full one of the plan.
fn check_base(model: &Checkpoint, adapter: &Adapter, pruning: &Pruning) -> Result<()> {
    let (found, expected) = (model.fingerprint()?, &pruning.base.fingerprint);
    if found != expected {
        let hint = match model.pruning() {
            Some(p) if p.base.fingerprint == *expected => {
                ": this is the pruned model, the full one is needed"
            }
            _ => ": the adapter was trained on a pruned copy of another model",
        };
        return Err(Error::file(
            model.dir(),
            format!(
                "has fingerprint {found}, {} expects {expected}{hint}",
                adapter.path.join(PRUNING).display()
            ),
        ));
    }
    // The plan's own sizes bound its indices: were they others, an index would mean another head or channel.
    for ((name, expected), (_, found)) in pruning.base.named().into_iter().zip(model.base_model()?.named()) {
        if expected != found {
            let why =
                format!("says that its base has {name} {expected}, {} has {found}", model.dir().display());
            return Err(Error::file(adapter.path.join(PRUNING), why));
        }
    }
    for m in adapter.modules.keys() {
        let (found, expected) = (model.config().dims(m.target, m.layer), pruning.full_dims(m.target));
        if m.layer >= model.config().layers || found != expected {
            let why = format!(
                "has {found:?} in {m}, {} expects {expected:?}",
                adapter.path.join(PRUNING).display()
            );
            return Err(Error::file(model.dir(), why));
        }
    }
    Ok(())
}

impl Ready {
    /// What the result follows from.
    fn fingerprint(&self) -> Result<String> {
        let mut hasher = Hasher::default();
        hasher.update(digest::sha256_file(&self.adapter.file())?.as_bytes());
        hasher.update(digest::sha256_file(&self.adapter.config.path)?.as_bytes());
        hasher.update(digest::sha256_file(&self.adapter.path.join(PRUNING))?.as_bytes());
        let signer = self.signer.as_ref().map(Signer::fingerprint);
        hasher.update(serde_json::json!([self.from, signer]).to_string().as_bytes());
        Ok(hasher.finish())
    }
}

fn write(ready: &Ready, pruning: &Pruning, dir: &Path) -> Result<()> {
    let adapter = &ready.adapter;
    let specs = adapter
        .modules
        .iter()
        .map(|(&module, p)| PairSpec {
            module,
            rank: p.rank,
            dims: pruning.full_dims(module.target),
            dtypes: (p.a.dtype(), p.b.dtype()),
        })
        .collect();
    let mut writer = AdapterWriter::create(dir, adapter.config.clone(), specs)?;
    let mut full = Vec::new();
    for (&module, pair) in &adapter.modules {
        recover(&mut full, module, pair, pruning)?;
        match module.target.prunes_rows() {
            true => writer.write_bytes(module, pair.a.bytes(), &full)?,
            false => writer.write_bytes(module, &full, pair.b.bytes())?,
        }
    }
    let mut provenance = adapter.provenance.clone().unwrap_or_else(|| Provenance::new("recover"));
    provenance.command = "recover".into();
    provenance.version = env!("CARGO_PKG_VERSION").into();
    provenance.base_fingerprint = Some(pruning.base.fingerprint.clone());
    provenance.model_fingerprint = Some(pruning.base.fingerprint.clone());
    // As its bytes lie: the edge's manifest names them.
    let mut kept = vec![(PRUNING.to_string(), adapter.path.join(PRUNING))];
    if ready.from.signer.is_some() {
        std::fs::create_dir_all(dir.join(EDGE)).map_err(Error::io(dir))?;
        kept.extend([MANIFEST, SIGNATURE].map(|name| (format!("{EDGE}/{name}"), adapter.path.join(name))));
    }
    for (name, from) in kept {
        digest::write_file(&dir.join(name), &json::read_bounded(&from)?)?;
    }
    writer.finish(None, provenance)
}

/// `out` = the factor of `pair` that pruning cut, at full size: B with its rows where they were, or A with its columns.
fn recover(out: &mut Vec<u8>, module: Module, pair: &Pair, pruning: &Pruning) -> Result<()> {
    let kept = pruning.kept(module.target, module.layer);
    let (o, i) = pruning.full_dims(module.target);
    if module.target.prunes_rows() {
        let row = pair.b.cols() * pair.b.dtype().size();
        zeros(out, o, row, &pair.b)?;
        scatter(out, pair.b.bytes(), &kept, row);
    } else {
        let item = pair.a.dtype().size();
        zeros(out, pair.a.rows(), i * item, &pair.a)?;
        for (to, from) in out.chunks_exact_mut(i * item).zip(pair.a.bytes().chunks_exact(kept.len() * item)) {
            scatter(to, from, &kept, item);
        }
    }
    Ok(())
}

/// `out` = `rows × row` bytes of zero; an error where there is no memory for them.
fn zeros(out: &mut Vec<u8>, rows: usize, row: usize, of: &Factor) -> Result<()> {
    out.clear();
    let n = rows.checked_mul(row).filter(|n| out.try_reserve_exact(*n).is_ok());
    out.resize(
        n.ok_or_else(|| of.error(format!("would have {rows} × {row} bytes, for which there is no memory")))?,
        0,
    );
    Ok(())
}

/// `out[kept[j]] = from[j]`, items of `item` bytes.
fn scatter(out: &mut [u8], from: &[u8], kept: &[usize], item: usize) {
    for (from, &k) in from.chunks_exact(item).zip(kept) {
        out[k * item..(k + 1) * item].copy_from_slice(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::adapter_config::AdapterConfig;
    use crate::checkpoint::module::Target;
    use crate::checkpoint::provenance::Verdict;
    use crate::checkpoint::weights::OpenOptions;
    use crate::checkpoint::{checkpoint, pruning};
    use crate::tensor::DType;
    use serde_json::json;

    /// A pruned adapter on all linears with rank 2; numbers are never zero. Layer 1 of the plan keeps everything.
    fn pruned(dir: &Path, plan: &Pruning) {
        let modules: Vec<_> =
            (0..2).flat_map(|l| Target::ALL.map(|target| Module { layer: l, target })).collect();
        let dtypes = |m: &Module| {
            if m.target == Target::Down { (DType::BF16, DType::F16) } else { (DType::F32, DType::F32) }
        };
        let specs = modules
            .iter()
            .map(|m| PairSpec {
                module: *m,
                rank: 2,
                dims: plan.pruned_dims(m.target, m.layer),
                dtypes: dtypes(m),
            })
            .collect();
        let config = AdapterConfig::peft(2, 3.0, 0.1, &Target::ALL, Some("org/base"));
        let mut w = AdapterWriter::create(dir, config, specs).unwrap();
        for (k, m) in modules.iter().enumerate() {
            let (o, i) = plan.pruned_dims(m.target, m.layer);
            let numbers = |n: usize| (0..n).map(|x| (x + k + 1) as f32 / 8.0).collect::<Vec<_>>();
            w.write_f32(*m, &numbers(2 * i), &numbers(o * 2)).unwrap();
        }
        let mut p = Provenance::new("train");
        p.base_fingerprint = Some(plan.base.fingerprint.clone());
        p.model_fingerprint = Some("pruned".into());
        p.init_seed = Some(7);
        w.finish(Some(plan), p).unwrap();
    }

    fn options(dir: &Path) -> RecoverOptions {
        RecoverOptions { adapter: dir.join("pruned"), out: dir.join("full"), ..RecoverOptions::default() }
    }

    #[test]
    fn every_kept_value_is_in_its_place_and_the_rest_is_zero() {
        let dir = tempfile::tempdir().unwrap();
        let plan = pruning::tests::example();
        std::fs::create_dir(dir.path().join("pruned")).unwrap();
        pruned(&dir.path().join("pruned"), &plan);
        let report = run(&options(dir.path()), &Common::default()).unwrap();
        assert_eq!((report.modules, report.rank, report.base_checked), (14, 2, false));
        let open = |n: &str| Adapter::open(&dir.path().join(n), OpenOptions::default()).unwrap();
        let (before, after) = (open("pruned"), open("full"));
        assert_eq!(report.parameters_full, after.parameters());
        assert_eq!(after.config.to_json(), before.config.to_json());
        for (m, p) in &before.modules {
            let q = &after.modules[m];
            assert_eq!(
                (q.dims(), q.scale, q.a.dtype(), q.b.dtype()),
                (plan.full_dims(m.target), 1.5, p.a.dtype(), p.b.dtype())
            );
            let kept = plan.kept(m.target, m.layer);
            // ΔW in full is ΔW of the pruned model at the kept places and zero elsewhere: from both factors.
            let (small, large) = (p.b.to_f64(), q.b.to_f64());
            let (small_a, large_a) = (p.a.to_f64(), q.a.to_f64());
            let at = |k: usize| kept.iter().position(|&x| x == k);
            for row in 0..q.b.rows() {
                let from = if m.target.prunes_rows() { at(row) } else { Some(row) };
                for r in 0..2 {
                    assert_eq!(large[row * 2 + r], from.map_or(0.0, |f| small[f * 2 + r]), "{m}");
                }
            }
            for r in 0..2 {
                for col in 0..q.a.cols() {
                    let from = if m.target.prunes_rows() { Some(col) } else { at(col) };
                    let expected = from.map_or(0.0, |f| small_a[r * p.a.cols() + f]);
                    assert_eq!(large_a[r * q.a.cols() + col], expected, "{m}");
                }
            }
        }
        let provenance = after.provenance.as_ref().unwrap();
        assert_eq!(provenance.model_fingerprint, provenance.base_fingerprint);
        assert_eq!((provenance.init_seed, provenance.command.as_str()), (Some(7), "recover"));
        assert_eq!(after.pruning, before.pruning);
        let verdicts = Provenance::verify(&dir.path().join("full")).unwrap();
        assert!(verdicts.len() == 3 && verdicts.values().all(|v| *v == Verdict::Same));
        let again = RecoverOptions {
            adapter: dir.path().join("full"),
            out: dir.path().join("x"),
            ..options(dir.path())
        };
        let err = run(&again, &Common::default()).unwrap_err().to_string();
        assert!(err.contains("at the full model's dimensions already"), "{err}");
    }

    #[test]
    fn checked_against_the_base() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        for name in ["base", "other", "pruned"] {
            std::fs::create_dir(d.join(name)).unwrap();
        }
        checkpoint::tests::write(&d.join("base"), json!({}), DType::F32, 1 << 30, "");
        checkpoint::tests::write(&d.join("other"), json!({}), DType::BF16, 1 << 30, "");
        let mut plan = pruning::tests::example();
        let base = Checkpoint::open(&d.join("base"), OpenOptions::default()).unwrap();
        plan.base = base.base_model().unwrap();
        pruned(&d.join("pruned"), &plan);
        let with = |model: &str| RecoverOptions { model: Some(d.join(model)), ..options(d) };
        let err = run(&with("other"), &Common::default()).unwrap_err().to_string();
        assert!(
            err.contains("trained on a pruned copy of another model") && !d.join("full").exists(),
            "{err}"
        );
        assert!(run(&with("base"), &Common::default()).unwrap().base_checked);
    }

    #[test]
    fn what_cannot_be_recovered() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path().join("pruned");
        std::fs::create_dir(&d).unwrap();
        let plan = pruning::tests::example();
        pruned(&d, &plan);
        let mut other = plan.clone();
        other.base.fingerprint = "0".repeat(64);
        other.write(&d.join(PRUNING)).unwrap();
        let err = run(&options(dir.path()), &Common::default()).unwrap_err().to_string();
        assert!(err.contains("its anabranch.json is of base fff"), "{err}");
        std::fs::remove_file(d.join(PRUNING)).unwrap();
        let err = run(&options(dir.path()), &Common::default()).unwrap_err().to_string();
        assert!(err.contains("has no pruning.json"), "{err}");
        let bytes = std::fs::read(d.join("adapter_model.safetensors")).unwrap();
        let mut bad = bytes.clone();
        let n = bad.len();
        bad[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        plan.write(&d.join(PRUNING)).unwrap();
        std::fs::write(d.join("adapter_model.safetensors"), bad).unwrap();
        let err = run(&options(dir.path()), &Common::default()).unwrap_err().to_string();
        assert!(err.contains("holds NaN or infinity") && !dir.path().join("full").exists(), "{err}");
    }
}
