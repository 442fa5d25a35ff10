//! Matrices as the tensor memory accelerator of Hopper knows them.

use cudarc::driver::sys;

use super::driver::Driver;
use super::launch::{Arg, Pointer};
use crate::error::Result;

/// Elements of a row of a box: 128 bytes, the span within which chunks are permuted.
const BOX_COLUMNS: u32 = 64;

/// What a kernel copies boxes of a matrix by; part of its parameters.
#[repr(C, align(128))]
#[derive(Clone, Copy, Default)]
pub(super) struct TensorMap([u64; 16]);

// SAFETY: `ptx::TensorMap` of kernels/lib/ptx_sm90.cuh.
unsafe impl Arg for TensorMap {
    const SIZE: usize = size_of::<TensorMap>();
}

/// A bf16 matrix on the device: rows of `ld` elements, of which `columns` count.
#[derive(Clone, Copy, Debug)]
pub(super) struct MatrixAt {
    pub data: Pointer,
    pub rows: usize,
    pub columns: usize,
    pub ld: usize,
}

impl TensorMap {
    /// Boxes of `box_rows` rows by 64 columns. A matrix without elements has no map: nothing may be copied by what
    /// stands for it.
    pub fn new(driver: &Driver, matrix: MatrixAt, box_rows: u32) -> Result<TensorMap> {
        let MatrixAt { data, rows, columns, ld } = matrix;
        let mut made = sys::CUtensorMap { opaque: [0; 16] };
        if rows == 0 || columns == 0 {
            return Ok(TensorMap(made.opaque));
        }
        let (sizes, strides) = ([columns as u64, rows as u64], [2 * ld as u64]);
        // SAFETY: the arrays have as many entries as the two dimensions need; the map is only written. The driver checks
        // addresses and sizes and reads nothing of the matrix.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut made,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                data.0 as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                [BOX_COLUMNS, box_rows].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        let what = |e| {
            driver.failed(&format!("a tensor map of [{rows}, {columns}] in rows of {ld} at {:#x}", data.0), e)
        };
        result.result().map_err(what)?;
        Ok(TensorMap(made.opaque))
    }
}
