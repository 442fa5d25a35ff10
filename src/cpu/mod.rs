//! The CPU back end: every operation of [`crate::ops`] on the threads of one pool.
//!
//! Results do not depend on the number of threads: work is cut into parts by the shapes alone, each part is computed
//! by one thread in a fixed order, and sums over parts are made in a fixed order.

mod adamw;
mod apply;
mod attention;
mod choice;
mod cross_entropy;
mod dropout;
mod eigh;
mod embed;
pub(crate) mod entries;
mod exp;
mod gate;
mod gram;
mod head;
mod importance;
mod linear;
mod linear_bwd;
mod merge;
mod operand;
pub(crate) mod packed;
mod parts;
pub(crate) mod product;
mod rms_norm;
mod rope;
mod rsvd;
mod scatter;
pub(crate) mod simd;
mod sum_sq;
mod swiglu;
mod thin;
mod tiles;

pub(crate) use eigh::one as eigh_of;
pub(crate) use gate::one as gate_of;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::backend::{Backend, LinearSize, Pass, Scratch};
use crate::error::{Error, Result};
use crate::host::{Host, HostMatrix, MatrixSource};
use crate::ops::adamw::AdamW;
use crate::ops::apply::Apply;
use crate::ops::attention::{Attention, AttentionBwd};
use crate::ops::choice::Choice;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::eigh::Eigh;
use crate::ops::embed::Embed;
use crate::ops::gate::Gate;
use crate::ops::gram::Gram;
use crate::ops::importance::{Importance, Score};
use crate::ops::linear::{Linear, LinearBwd};
use crate::ops::merge::Merge;
use crate::ops::rms_norm::{RmsNorm, RmsNormBwd};
use crate::ops::rope::Rope;
use crate::ops::rsvd::{Rsvd, Sketch};
use crate::ops::scatter::Scatter;
use crate::ops::sum_sq::SumSq;
use crate::tensor::{DType, Elem, Real};
use product::roof;
use simd::Instructions;

/// Host memory and a pool of threads.
#[derive(Debug)]
pub struct Cpu {
    pool: ThreadPool,
}

impl Cpu {
    /// A back end of `threads` threads, at least one. Fails where the system does not give them, and where the environment
    /// asks for instructions that the processor has not.
    pub fn new(threads: usize) -> Result<Cpu> {
        Instructions::asked()?;
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .map_err(|e| Error::Usage(format!("cannot start {threads} threads: {e}")))?;
        Ok(Cpu { pool })
    }

    /// Threads of the pool.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Whether bf16 is what to train and evaluate in: where tiles multiply it, many times as fast as f32.
    pub fn multiplies_halves(&self) -> bool {
        Instructions::used() == Instructions::Amx
    }

    /// Multiplies and adds in registers, on every thread, `rounds` times a few numbers of the dtype that products take apart
    /// into (bf16 in tiles or pairs where those are used, else f32): what no product can outrun. The multiplications and
    /// additions.
    pub fn multiply_adds(&self, dtype: DType, rounds: usize) -> usize {
        let one = || match dtype {
            DType::BF16 => roof::halves(rounds),
            _ => None,
        };
        self.pool
            .broadcast(|_| one().unwrap_or_else(|| simd::run(roof::Singles { rounds })))
            .into_iter()
            .sum()
    }

    /// Runs work on a few modules on the pool that the caller is a thread of, if there is one: one that waited for
    /// another pool would take up the next modules meanwhile, and hold the numbers of all.
    fn here<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match rayon::current_thread_index() {
            Some(_) => work(),
            None => self.pool.install(work),
        }
    }
}

impl Scratch for Cpu {
    fn linear_scratch<T: Real>(&self, size: LinearSize) -> usize {
        linear::linear_scratch::<T>(size, self.threads())
    }
    fn linear_bwd_scratch<T: Real>(&self, size: LinearSize) -> usize {
        linear_bwd::linear_bwd_scratch::<T>(size, self.threads())
    }
    fn attention_bwd_scratch(&self, tokens: usize, heads: usize) -> usize {
        attention::attention_bwd_scratch(tokens, heads)
    }
    fn cross_entropy_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, dtype: DType) -> usize {
        cross_entropy::cross_entropy_scratch::<T>(rows, vocab, width, dtype, self.threads())
    }
    fn choice_scratch<T: Real>(&self, rows: usize, vocab: usize, width: usize, dtype: DType) -> usize {
        choice::choice_scratch::<T>(rows, vocab, width, dtype, self.threads())
    }
    fn importance_scratch<T: Real>(&self, out: usize, inner: usize, scores: &[Score]) -> usize {
        importance::importance_scratch::<T>(out, inner, scores, self.threads())
    }
    fn rsvd_scratch(&self, _: usize, _: (usize, usize), _: &Sketch) -> usize {
        0
    }
    fn kept_bytes(&self, head_dim: usize) -> usize {
        (attention::room_bytes(head_dim) + product::PACKED_BYTES) * self.threads()
    }
    fn packed_bytes<T: Real>(&self, size: (usize, usize), pass: Pass) -> usize {
        packed::bytes::<T>(size, pass)
    }
}

impl Backend for Cpu {
    type Store = Host;

    fn within<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    fn side_by_side(&self) -> bool {
        true
    }

    fn alloc<T: Elem>(&self, name: &str, len: usize) -> Result<Vec<T>> {
        let mut buf = Vec::new();
        buf.try_reserve_exact(len).map_err(|_| {
            let bytes = len.saturating_mul(size_of::<T>());
            Error::Memory(format!("{name}: the system does not give {bytes} bytes"))
        })?;
        buf.resize(len, T::zeroed());
        Ok(buf)
    }

    fn upload<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        copy("upload", dst, src)
    }

    fn download<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        copy("download", dst, src)
    }

    fn copy<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        copy("copy", dst, src)
    }

    fn zero<T: Elem>(&self, dst: &mut [T]) -> Result<()> {
        dst.fill(T::zeroed());
        Ok(())
    }

    fn matrix(&self, source: MatrixSource) -> Result<HostMatrix> {
        HostMatrix::new(source)
    }

    fn pack<T: Real>(&self, w: &mut HostMatrix, pass: Pass) -> Result<()> {
        let packed = self.pool.install(|| packed::Packed::new::<T>(w, pass))?;
        w.keep_packed(pass, packed);
        Ok(())
    }

    fn embed<T: Real>(&self, op: Embed<'_, Host, T>) -> Result<()> {
        self.pool.install(|| embed::embed(op))
    }
    fn rms_norm<T: Real>(&self, op: RmsNorm<'_, Host, T>) -> Result<()> {
        self.pool.install(|| rms_norm::rms_norm(op))
    }
    fn rms_norm_bwd<T: Real>(&self, op: RmsNormBwd<'_, Host, T>) -> Result<()> {
        self.pool.install(|| rms_norm::rms_norm_bwd(op))
    }
    fn linear<T: Real>(&self, op: Linear<'_, Host, T>) -> Result<()> {
        self.pool.install(|| linear::linear(op))
    }
    fn linear_bwd<T: Real>(&self, op: LinearBwd<'_, Host, T>) -> Result<()> {
        self.pool.install(|| linear_bwd::linear_bwd(op))
    }
    fn rope<T: Real>(&self, op: Rope<'_, Host, T>) -> Result<()> {
        self.pool.install(|| rope::rope(op))
    }
    fn attention<T: Real>(&self, op: Attention<'_, Host, T>) -> Result<()> {
        self.pool.install(|| attention::attention(op))
    }
    fn attention_bwd<T: Real>(&self, op: AttentionBwd<'_, Host, T>) -> Result<()> {
        self.pool.install(|| attention::attention_bwd(op))
    }
    fn cross_entropy<T: Real>(&self, op: CrossEntropy<'_, Host, T>) -> Result<()> {
        self.pool.install(|| cross_entropy::cross_entropy(op))
    }
    fn choice<T: Real>(&self, op: Choice<'_, Host, T>) -> Result<()> {
        self.pool.install(|| choice::choice(op))
    }
    fn importance<T: Real>(&self, op: Importance<'_, Host, T>) -> Result<()> {
        self.pool.install(|| importance::importance(op))
    }
    fn scatter(&self, op: Scatter<'_, Host>) -> Result<()> {
        self.pool.install(|| scatter::scatter(op))
    }
    fn gram(&self, op: Gram<'_, Host>) -> Result<()> {
        self.here(|| gram::gram(op))
    }
    fn eigh(&self, op: Eigh<'_, Host>) -> Result<()> {
        self.here(|| eigh::eigh(op))
    }
    fn gate(&self, op: Gate<'_, Host>) -> Result<()> {
        self.here(|| gate::gate(op))
    }
    fn apply(&self, op: Apply<'_, Host>) -> Result<()> {
        self.here(|| apply::apply(op))
    }
    fn rsvd(&self, op: Rsvd<'_, Host>) -> Result<()> {
        self.pool.install(|| rsvd::rsvd(op))
    }
    fn merge<T: Real>(&self, op: Merge<'_, Host, T>) -> Result<()> {
        self.pool.install(|| merge::merge(op))
    }
    fn sum_sq(&self, op: SumSq<'_, Host>) -> Result<()> {
        self.pool.install(|| sum_sq::sum_sq(op))
    }
    fn adamw(&self, op: AdamW<'_, Host>) -> Result<()> {
        self.pool.install(|| adamw::adamw(op))
    }
}

fn copy<T: Elem>(op: &'static str, dst: &mut [T], src: &[T]) -> Result<()> {
    if dst.len() != src.len() {
        return Err(Error::Op {
            op,
            why: format!("the target holds {} elements, the source {}", dst.len(), src.len()),
        });
    }
    dst.copy_from_slice(src);
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::env;
    use std::process::Command;

    use super::*;

    /// Every operation with the other instructions too, in a process of its own that is asked for them: those that the
    /// processor has, and tiles, one instruction at a time where it has none.
    #[test]
    fn with_other_instructions() {
        let here: Vec<Instructions> = Instructions::here().collect();
        let mut others: Vec<Instructions> = here.clone();
        if here.contains(&Instructions::Avx512) && !here.contains(&Instructions::Amx) {
            others.push(Instructions::Amx);
        }
        for set in others.into_iter().filter(|set| *set != Instructions::fastest()) {
            let set = set.name();
            let mut tests = Command::new(env::current_exe().unwrap());
            let done = tests
                .args(["tests::as_the_reference", "cpu::attention::tests", "--skip", "cuda::"])
                .env(simd::VARIABLE, set)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&done.stdout);
            assert!(done.status.success(), "{set}: {said}");
            for test in [
                "linear::tests::as_the_reference_in_bf16",
                "attention::tests::gradients_as_the_reference_in_bf16",
            ] {
                assert!(said.contains(&format!("cpu::{test} ... ok")), "{set}: {said}");
            }
        }
    }

    /// The back end on 1, 2 and 3 threads.
    pub fn on_threads() -> [Cpu; 3] {
        [1, 2, 3].map(|n| Cpu::new(n).expect("threads"))
    }
}
