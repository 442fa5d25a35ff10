//! The thin products of adapters, `kernels/lora.cu`: factors in bf16, `x Aᵀ`, and the gradients of A and B.

use super::Cuda;
use super::launch::{Arg, Grid, Kernel, Pointer, int};
use crate::cuda_sizes::{GRADIENT_COLUMNS, SPAN, partial_row, thin_splits};
use crate::error::Result;
use crate::ops::linear::Dropout;
use crate::random::{Philox, Purpose};

const FACTORS: Kernel = Kernel { file: "lora", name: "lora_factors" };
const THIN: Kernel = Kernel { file: "lora", name: "lora_thin" };
const THIN_SUM: Kernel = Kernel { file: "lora", name: "lora_thin_sum" };
const GRADIENTS: [(usize, Kernel); 3] = [
    (16, Kernel { file: "lora", name: "lora_gradient_16" }),
    (32, Kernel { file: "lora", name: "lora_gradient_32" }),
    (64, Kernel { file: "lora", name: "lora_gradient_64" }),
];
const GRADIENT_SUM: Kernel = Kernel { file: "lora", name: "lora_gradient_sum" };

/// `elements` of `size` bytes on.
pub(super) fn after(pointer: Pointer, elements: usize, size: usize) -> Pointer {
    Pointer(pointer.0 + (elements * size) as u64)
}

/// A table that a kernel takes by value: its first entries count, the others are zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Table<T, const N: usize>(pub [T; N]);

impl<T: Copy + Default, const N: usize> Table<T, N> {
    /// The first N of `entries`.
    pub fn new(entries: &[T]) -> Table<T, N> {
        let mut all = [T::default(); N];
        all.iter_mut().zip(entries).for_each(|(to, from)| *to = *from);
        Table(all)
    }
}

impl Default for Pointer {
    fn default() -> Pointer {
        Pointer::NULL
    }
}

/// Which elements dropout keeps, as kernels have it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Mask {
    key: [u32; 2],
    step: [u32; 2],
    /// An element is kept where its 24-bit number is at least this.
    least: u32,
    /// 1 / (1 − p).
    pub scale: f32,
}

// SAFETY: `struct Dropout` of kernels/lib/philox.cuh.
unsafe impl Arg for Mask {
    const SIZE: usize = size_of::<Mask>();
}

impl Mask {
    /// Without dropout: all, times 1.
    pub fn new(dropout: Option<Dropout>) -> Mask {
        let Some(d) = dropout else { return Mask { scale: 1.0, ..Mask::default() } };
        let key = Philox::new(d.seed, Purpose::Dropout.stream(d.tensor)).key();
        // Uniform numbers are multiples of 2^-24, so this bound is exact.
        let least = (f64::from(d.p) * f64::from(1u32 << 24)).ceil() as u32;
        let scale = (1.0 / (1.0 - f64::from(d.p))) as f32;
        Mask { key, step: [d.step as u32, (d.step >> 32) as u32], least, scale }
    }
}

/// `out[rows, ld] = bf16(scale · in[r · step_row + c · step_column])`, zero from `columns` on.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Factor {
    pub out: Pointer,
    pub from: Pointer,
    pub rows: i32,
    pub columns: i32,
    pub ld: i32,
    pub step_row: i32,
    pub step_column: i32,
    pub scale: f32,
}

// SAFETY: `struct Factors` of lora.cu.
unsafe impl Arg for Table<Factor, 32> {
    const SIZE: usize = size_of::<Self>();
}

/// Columns `first..first + rank` of partial sums as columns of `t`, zero from there to `width`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Part {
    pub t: Pointer,
    pub ld: i32,
    pub first: i32,
    pub rank: i32,
    pub width: i32,
}

// SAFETY: `struct Parts` of lora.cu.
unsafe impl Arg for Table<Part, 4> {
    const SIZE: usize = size_of::<Self>();
}

/// `grad[c · step_column + ρ · step_rank] += scale · Σ` of columns `first..first + rank` of partial sums.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct GradientPart {
    pub grad: Pointer,
    pub first: i32,
    pub rank: i32,
    pub step_column: i32,
    pub step_rank: i32,
    pub scale: f32,
    pub unused: u32,
}

// SAFETY: `struct GradientParts` of lora.cu.
unsafe impl Arg for Table<GradientPart, 4> {
    const SIZE: usize = size_of::<Self>();
}

/// bf16 rows that a thin product reads once.
#[derive(Clone, Copy)]
pub(super) struct Wide {
    pub data: Pointer,
    pub width: usize,
    pub ld: usize,
}

/// Rows `first..first + rows` of y; row r of y is row r mod `tokens` of x.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub first: usize,
    pub rows: usize,
    pub tokens: usize,
}

impl Cuda {
    /// Makes `jobs`.
    ///
    /// # Safety
    /// Every job's matrices hold what it says.
    pub(super) unsafe fn factors(&self, jobs: &[Factor]) -> Result<()> {
        for jobs in jobs.chunks(32) {
            let most = jobs.iter().map(|j| (j.rows as usize * j.ld as usize).div_ceil(8 * 256)).max();
            let grid = Grid { blocks: [most.unwrap_or(0), jobs.len(), 1], threads: 256, more_shared: 0 };
            let sizes = [("adapters", jobs.len())];
            // SAFETY: the caller answers for the jobs.
            unsafe { self.launch(FACTORS, grid, &sizes, (Table::<Factor, 32>::new(jobs),))? };
        }
        Ok(())
    }

    /// `parts = m∘x factorᵀ / (1 − p)`, by way of `partial`; `factor[columns, I]` has x's leading dimension.
    ///
    /// # Safety
    /// x has `span.tokens` rows, the parts have `span.first + span.rows`, partial as many sums as `thin_splits` says.
    pub(super) unsafe fn thin(
        &self,
        parts: &[Part],
        partial: Pointer,
        x: Wide,
        factor: Pointer,
        columns: usize,
        span: Span,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        // SAFETY: the caller answers for the views.
        let splits = unsafe { self.thin_partial(partial, x, factor, columns, span, dropout)? };
        // SAFETY: as above.
        unsafe { self.thin_sum(parts, partial, span, columns, splits, Mask::new(dropout).scale) }
    }

    /// `partial[split] = m∘x factorᵀ` over the I of each split; how many splits there are.
    ///
    /// # Safety
    /// As [`Cuda::thin`].
    pub(super) unsafe fn thin_partial(
        &self,
        partial: Pointer,
        x: Wide,
        factor: Pointer,
        columns: usize,
        span: Span,
        dropout: Option<Dropout>,
    ) -> Result<usize> {
        let (splits, length) = thin_splits(span.rows, columns, x.width);
        let (ld, row) = (int("the row of I", x.ld)?, int("R", partial_row(columns))?);
        let (first, rows) = (int("T", span.first)?, int("T", span.rows)?);
        let sizes = [("T", span.rows), ("I", x.width), ("R", columns)];
        let blocks = [span.rows.div_ceil(64), columns.div_ceil(64), splits];
        let args = (
            partial,
            x.data,
            factor,
            first,
            rows,
            int("T", span.tokens)?,
            int("R", columns)?,
            row,
            int("I", x.width)?,
            ld,
            ld,
            int("K", length)?,
            i32::from(dropout.is_some()),
            Mask::new(dropout),
        );
        // SAFETY: the caller answers for the views; splits and length cover I.
        unsafe { self.launch(THIN, Grid { blocks, threads: 128, more_shared: 0 }, &sizes, args)? };
        Ok(splits)
    }

    /// Adds `splits` partial sums up.
    unsafe fn thin_sum(
        &self,
        parts: &[Part],
        partial: Pointer,
        span: Span,
        columns: usize,
        splits: usize,
        scale: f32,
    ) -> Result<()> {
        let row = int("R", partial_row(columns))?;
        let sizes = [("T", span.rows), ("R", columns)];
        for parts in parts.chunks(4) {
            let most = parts.iter().map(|p| (span.rows * p.width as usize).div_ceil(256)).max();
            let grid = Grid { blocks: [most.unwrap_or(0), parts.len(), 1], threads: 256, more_shared: 0 };
            let table = Table::<Part, 4>::new(parts);
            let (first, rows) = (int("T", span.first)?, int("T", span.rows)?);
            let args = (partial, first, rows, row, int("splits", splits)?, scale, table);
            // SAFETY: the caller answers for the parts.
            unsafe { self.launch(THIN_SUM, grid, &sizes, args)? };
        }
        Ok(())
    }

    /// `parts += (m∘wide)ᵀ thin / (1 − p)` (the division is the parts' scale) by way of `partial`; and where `u` is given,
    /// `u = wide factorᵀ` by way of its partial sums, in the same pass.
    ///
    /// # Safety
    /// `wide` and `thin` have `tokens` rows, `factor[ranks, width]` has wide's leading dimension, and partial sums have
    /// room: `⌈tokens / 512⌉ · width` and `⌈width / 256⌉ · tokens` rows.
    pub(super) unsafe fn gradient(
        &self,
        parts: &[GradientPart],
        u: Option<(Part, Pointer, Pointer)>,
        partial: Pointer,
        wide: Wide,
        thin: Wide,
        tokens: usize,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        let (ranks, row) = (thin.width, int("R", partial_row(thin.width))?);
        let slices = u.as_ref().map(|u| (u.1, u.2));
        // SAFETY: the caller answers for the views.
        let spans = unsafe { self.gradient_partial(partial, slices, wide, thin, tokens, dropout)? };
        let (columns, sizes) = (int("O", wide.width)?, [("T", tokens), ("O", wide.width), ("R", ranks)]);
        for parts in parts.chunks(4) {
            let most = parts.iter().map(|p| (wide.width * p.rank as usize).div_ceil(256)).max();
            let grid = Grid { blocks: [most.unwrap_or(0), parts.len(), 1], threads: 256, more_shared: 0 };
            let table = Table::<GradientPart, 4>::new(parts);
            let args = (partial, columns, row, int("spans", spans)?, table);
            // SAFETY: the caller answers for the parts.
            unsafe { self.launch(GRADIENT_SUM, grid, &sizes, args)? };
        }
        if let Some((part, partial, _)) = u {
            let span = Span { first: 0, rows: tokens, tokens };
            let slices = wide.width.div_ceil(GRADIENT_COLUMNS);
            // SAFETY: as above.
            unsafe { self.thin_sum(&[part], partial, span, ranks, slices, 1.0)? };
        }
        Ok(())
    }

    /// `partial[span] = (m∘wide)ᵀ thin` over the tokens of each span; and where `u`, partial sums and a factor, is given,
    /// those of `wide factorᵀ` of each 256 columns. How many spans there are.
    ///
    /// # Safety
    /// As [`Cuda::gradient`].
    pub(super) unsafe fn gradient_partial(
        &self,
        partial: Pointer,
        u: Option<(Pointer, Pointer)>,
        wide: Wide,
        thin: Wide,
        tokens: usize,
        dropout: Option<Dropout>,
    ) -> Result<usize> {
        let ranks = thin.width;
        let &(n, kernel) = GRADIENTS.iter().find(|(n, _)| *n >= ranks).unwrap_or(&GRADIENTS[2]);
        let blocks = [wide.width.div_ceil(GRADIENT_COLUMNS), ranks.div_ceil(n), tokens.div_ceil(SPAN)];
        let ld = int("the row of O", wide.ld)?;
        let (u_partial, factor) = u.unwrap_or((Pointer::NULL, Pointer::NULL));
        let args = (
            partial,
            u_partial,
            wide.data,
            thin.data,
            factor,
            int("T", tokens)?,
            int("O", wide.width)?,
            int("R", ranks)?,
            int("R", partial_row(ranks))?,
            ld,
            int("the row of R", thin.ld)?,
            ld,
            int("tokens", SPAN)?,
            i32::from(dropout.is_some()),
            Mask::new(dropout),
        );
        let sizes = [("T", tokens), ("O", wide.width), ("R", ranks)];
        // SAFETY: the caller answers for the views.
        unsafe { self.launch(kernel, Grid { blocks, threads: 256, more_shared: 0 }, &sizes, args)? };
        Ok(blocks[2])
    }
}
