//! `inspect --spectrum`: the largest singular values of each weight, or of each update of an adapter.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::backend::Backend;
use crate::checkpoint::adapter::Adapter;
use crate::checkpoint::adapter_config::ADAPTER_CONFIG;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::checkpoint::factor::Pair;
use crate::checkpoint::module::Module;
use crate::error::Result;
use crate::fuse::Factors;
use crate::fuse::truncate::singular_values;
use crate::ops::rsvd::{Rsvd, Sketch};
use crate::stage::common::Common;
use crate::tensor::{MemoryLayout, Store};

/// Multiplications by `AᵀA`: base weights have flat spectra, whose single values converge slowly.
const ITERATIONS: usize = 6;
/// Bytes of weights and of what their search needs that are worked on at a time, unless one alone needs more.
const AT_ONCE: u64 = 512 << 20;

/// The largest singular values of one weight `W[O, I]`, or of an update `s B A`.
#[derive(Clone, Debug, Serialize)]
pub struct Spectrum {
    /// The tensor, or the module of an update.
    pub name: String,
    /// `(O, I)`.
    pub size: (usize, usize),
    /// Descending.
    pub values: Vec<f64>,
    /// How far each value may be from a singular value of W; 0 for an update, whose values are exact.
    pub residuals: Vec<f64>,
    /// `‖W‖`.
    pub norm: f64,
    /// `‖W − W_N‖² / ‖W‖²`, the share of the energy beyond the values; 0 of a weight of zeros.
    pub beyond: f64,
}

impl Spectrum {
    fn new(
        name: String,
        size: (usize, usize),
        values: Vec<f64>,
        residuals: Vec<f64>,
        energy: f64,
    ) -> Spectrum {
        let kept: f64 = values.iter().map(|x| x * x).sum();
        let beyond = if energy > 0.0 { (1.0 - kept / energy).max(0.0) } else { 0.0 };
        Spectrum { name, size, values, residuals, norm: energy.sqrt(), beyond }
    }
}

/// The `count` largest singular values of each matrix of the model, or of each update of the adapter, at `path`.
///
/// Of a model by randomized search, the weights read where the files have them; on a device that holds weights in bf16
/// they are those of the rounded weights. Fails where a weight holds NaN or infinity, naming it.
pub fn spectra<B: Backend>(backend: &B, path: &Path, count: usize, common: &Common) -> Result<Vec<Spectrum>> {
    if path.join(ADAPTER_CONFIG).exists() {
        return of_adapter(&Adapter::open(path, common.open_options())?, count);
    }
    let checkpoint = Checkpoint::open(path, common.open_options())?;
    let matrices: Vec<(String, (usize, usize))> = checkpoint
        .expected()
        .into_iter()
        .filter_map(|(name, shape)| <[usize; 2]>::try_from(shape).ok().map(|[o, i]| (name, (o, i))))
        .collect();
    let sketch = Sketch { iterations: ITERATIONS, ..Sketch::new(count, common.seed) };
    let mut sizes: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    for (at, (_, size)) in matrices.iter().enumerate() {
        sizes.entry(*size).or_default().push(at);
    }
    let bar = common.progress.bar("spectrum", matrices.len() as u64);
    let mut found: Vec<Option<Spectrum>> = matrices.iter().map(|_| None).collect();
    for (size, all) in sizes {
        for some in all.chunks(at_once(backend, size, &sketch)) {
            common.check_stop("nothing was written")?;
            let names: Vec<&str> = some.iter().map(|&at| matrices[at].0.as_str()).collect();
            for (spectrum, &at) in
                search(backend, &checkpoint, &names, size, some, sketch)?.into_iter().zip(some)
            {
                found[at] = Some(spectrum);
            }
            bar.inc(some.len() as u64);
        }
    }
    bar.finish_and_clear();
    Ok(found.into_iter().flatten().collect())
}

/// Weights of `size` that fit [`AT_ONCE`].
fn at_once<B: Backend>(backend: &B, size: (usize, usize), sketch: &Sketch) -> usize {
    let bytes = |n: usize| {
        let scratch = 4 * backend.rsvd_scratch(n, size, sketch) as u64;
        n as u64 * <B::Store as MemoryLayout>::matrix_bytes(size) + scratch
    };
    (2..=64).take_while(|&n| bytes(n) <= AT_ONCE).last().unwrap_or(1)
}

/// The spectra of the weights `names`, all of one size; `tensors` are their numbers.
fn search<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    names: &[&str],
    size: (usize, usize),
    tensors: &[usize],
    sketch: Sketch,
) -> Result<Vec<Spectrum>> {
    let (n, k) = (names.len(), sketch.values(size));
    let weights =
        names.iter().map(|name| backend.matrix(checkpoint.matrix(name)?)).collect::<Result<Vec<_>>>()?;
    let weights: Vec<_> = weights.iter().collect();
    let tensors: Vec<u64> = tensors.iter().map(|&t| t as u64).collect();
    let mut values = backend.alloc::<f64>("singular values", n * k)?;
    let mut residuals = backend.alloc::<f64>("their residuals", n * k)?;
    let mut energy = backend.alloc::<f64>("the weights' energies", n)?;
    let len = backend.rsvd_scratch(n, size, &sketch);
    let mut scratch = backend.alloc::<f32>("the search for singular values", len)?;
    backend.rsvd(Rsvd {
        values: B::Store::view_mut(&mut values, 0..n * k),
        residuals: B::Store::view_mut(&mut residuals, 0..n * k),
        energy: B::Store::view_mut(&mut energy, 0..n),
        vectors: None,
        scratch: B::Store::view_mut(&mut scratch, 0..len),
        a: &weights,
        tensors: &tensors,
        sketch,
    })?;
    let read = |buf: &<B::Store as Store>::Buf<f64>, len: usize| -> Result<Vec<f64>> {
        let mut host = vec![0.0; len];
        backend.download(&mut host, B::Store::view(buf, 0..len))?;
        Ok(host)
    };
    let (values, residuals, energy) = (read(&values, n * k)?, read(&residuals, n * k)?, read(&energy, n)?);
    let one = |(at, name): (usize, &&str)| {
        let own = at * k..(at + 1) * k;
        let (values, residuals) = (values[own.clone()].to_vec(), residuals[own].to_vec());
        if values.iter().chain(&residuals).any(|x| !x.is_finite()) {
            let tensor = checkpoint.weights().tensor(name)?;
            tensor.check_finite()?;
            return Err(tensor.error("holds numbers whose products are beyond f32".into()));
        }
        Ok(Spectrum::new(name.to_string(), size, values, residuals, energy[at]))
    };
    names.iter().enumerate().map(one).collect()
}

/// The spectra of the updates, exactly, from their factors.
fn of_adapter(adapter: &Adapter, count: usize) -> Result<Vec<Spectrum>> {
    adapter.check_finite()?;
    let one = |(module, pair): (&Module, &Pair)| {
        let mut factors = Factors::zeros(pair.rank, pair.dims());
        factors.place(0..pair.rank, &pair.b.to_f64(), &pair.a.to_f64(), pair.scale);
        let mut values = singular_values(&factors)?;
        let energy = values.iter().map(|x| x * x).sum();
        let (o, i) = pair.dims();
        values.resize(count.min(o).min(i), 0.0);
        let residuals = vec![0.0; values.len()];
        Ok(Spectrum::new(module.to_string(), (o, i), values, residuals, energy))
    };
    adapter.modules.iter().map(one).collect()
}

/// Five digits.
fn number(x: f64) -> String {
    let digits = if x > 0.0 { 4 - x.log10().floor() as i32 } else { 0 };
    if (0..=8).contains(&digits) { format!("{x:.*}", digits as usize) } else { format!("{x:.4e}") }
}

impl fmt::Display for Spectrum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (o, i) = self.size;
        writeln!(
            f,
            "  {} [{o}, {i}]: norm {}, {:.1} % of the energy beyond",
            self.name,
            number(self.norm),
            100.0 * self.beyond
        )?;
        for (values, residuals) in self.values.chunks(8).zip(self.residuals.chunks(8)) {
            let one = |(value, residual): (&f64, &f64)| match residual {
                0.0 => number(*value),
                _ => format!("{} ± {residual:.0e}", number(*value)),
            };
            let line: Vec<String> = values.iter().zip(residuals).map(one).collect();
            writeln!(f, "      {}", line.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use serde_json::json;

    use super::*;
    use crate::checkpoint::adapter_config::AdapterConfig;
    use crate::checkpoint::adapter_writer::{AdapterWriter, PairSpec};
    use crate::checkpoint::checkpoint::tests::write;
    use crate::checkpoint::module::Target;
    use crate::checkpoint::provenance::Provenance;
    use crate::checkpoint::weights::SINGLE;
    use crate::cpu::Cpu;
    use crate::tensor::DType;

    fn spectra(dir: &Path, count: usize) -> Result<Vec<Spectrum>> {
        super::spectra(&Cpu::new(2).unwrap(), dir, count, &Common::default())
    }

    /// The singular values of `x[o, i]`, descending.
    fn exact(x: &[f64], o: usize, i: usize) -> Vec<f64> {
        Mat::from_fn(o, i, |r, c| x[r * i + c]).singular_values().unwrap()
    }

    #[test]
    fn of_every_matrix_of_a_model() {
        let dir = tempfile::tempdir().unwrap();
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            write(dir.path(), json!({}), dtype, 1 << 30, "");
            let checkpoint = Checkpoint::open(dir.path(), Default::default()).unwrap();
            let found = spectra(dir.path(), 3).unwrap();
            // The embedding, seven linears in each of two layers, the head; norms have no spectrum.
            assert_eq!(found.len(), 16);
            for one in found {
                let (o, i) = one.size;
                let tensor = checkpoint.weights().tensor(&one.name).unwrap();
                let x: Vec<f64> = tensor.to_f32().into_iter().map(f64::from).collect();
                let exact = exact(&x, o, i);
                assert_eq!((tensor.shape(), one.values.len()), (&[o, i][..], 3));
                // All directions of so small a matrix are searched.
                for (got, want) in one.values.iter().zip(&exact) {
                    assert!((got - want).abs() <= 2e-6 * exact[0], "{dtype} {}: {got} {want}", one.name);
                }
                let energy: f64 = exact.iter().map(|x| x * x).sum();
                assert!((one.norm - energy.sqrt()).abs() <= 1e-6 * energy.sqrt());
                let beyond = exact[3..].iter().map(|x| x * x).sum::<f64>() / energy;
                assert!((one.beyond - beyond).abs() <= 1e-5, "{} {beyond}", one.beyond);
            }
        }
        assert!(spectra(dir.path(), 100).unwrap().iter().all(|s| s.values.len() == s.size.0.min(s.size.1)));
    }

    #[test]
    fn what_holds_nan_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), json!({}), DType::F32, 1 << 30, "");
        let file = dir.path().join(SINGLE);
        let mut bytes = std::fs::read(&file).unwrap();
        // The last matrix of the file, whatever its name.
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        let err = spectra(dir.path(), 2).unwrap_err().to_string();
        assert!(err.contains(".weight holds NaN or infinity at element"), "{err}");
    }

    #[test]
    fn of_the_updates_of_an_adapter() {
        let dir = tempfile::tempdir().unwrap();
        let module = Module { layer: 1, target: Target::V };
        let specs = vec![PairSpec { module, rank: 2, dims: (4, 3), dtypes: (DType::F32, DType::F32) }];
        let config = AdapterConfig::peft(2, 4.0, 0.0, &[Target::V], None);
        let mut writer = AdapterWriter::create(dir.path(), config, specs).unwrap();
        let a = [1.0, 2.0, -1.0, 0.5, 0.0, 3.0];
        let b = [1.0, 0.0, 2.0, -1.0, 0.0, 1.0, 0.25, 0.5];
        writer.write_f32(module, &a, &b).unwrap();
        writer.finish(None, Provenance::new("train")).unwrap();
        let found = spectra(dir.path(), 3).unwrap();
        let at = |o: usize, i: usize| (0..2).map(|r| 2.0 * b[o * 2 + r] * a[r * 3 + i]).sum::<f32>();
        let update: Vec<f64> = (0..12).map(|n| f64::from(at(n / 3, n % 3))).collect();
        let exact = exact(&update, 4, 3);
        assert_eq!((found.len(), found[0].name.as_str(), found[0].size), (1, "layer 1 v", (4, 3)));
        for (got, want) in found[0].values.iter().zip(&exact) {
            assert!((got - want).abs() <= 1e-12 * exact[0], "{got} {want}");
        }
        assert!(found[0].residuals == [0.0; 3] && found[0].beyond <= 1e-12);
        let text = found[0].to_string();
        assert!(text.starts_with("  layer 1 v [4, 3]: norm ") && text.contains(", 0\n"), "{text}");
    }
}
