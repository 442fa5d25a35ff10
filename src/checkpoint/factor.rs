//! The two factors of a low-rank update, in the bytes of their file.

use std::path::{Path, PathBuf};

use super::bytes::Bytes;
use super::convert;
use super::weights::TensorRef;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// A matrix in a file, row by row. Nothing is copied until values are asked for.
#[derive(Clone, Debug)]
pub struct Factor {
    file: PathBuf,
    name: String,
    dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

impl Factor {
    /// The matrix that `t` holds; an error where it has another number of axes, or none at all of one.
    pub fn new(t: &TensorRef<'_>) -> Result<Factor> {
        match *t.shape() {
            [rows, cols] if rows > 0 && cols > 0 => Ok(Factor {
                file: t.file().to_path_buf(),
                name: t.name().to_string(),
                dtype: t.dtype(),
                rows,
                cols,
                bytes: t.handle()?,
            }),
            ref other => Err(t.error(format!("has shape {other:?}, expected a matrix"))),
        }
    }

    /// Rows: R of A, O of B.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: I of A, R of B.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The element type in the file.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The tensor's name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The values' bytes, little-endian, row by row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The values, exactly, row by row.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        convert::widen(&mut out, &self.bytes, self.dtype);
        out
    }

    /// The values, exactly, row by row.
    pub fn to_f64(&self) -> Vec<f64> {
        let mut out = vec![0.0; self.rows * self.cols];
        convert::widen_f64(&mut out, &self.bytes, self.dtype);
        out
    }

    /// An error where a value is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        match convert::first_non_finite(&self.bytes, self.dtype) {
            None => Ok(()),
            Some(i) => {
                let (row, col) = (i / self.cols, i % self.cols);
                Err(self.error(format!("holds NaN or infinity at row {row}, column {col}")))
            }
        }
    }

    /// An error about this tensor.
    pub fn error(&self, why: impl Into<String>) -> Error {
        Error::tensor(&self.file, self.name.as_str(), why)
    }
}

/// The update of one module: `ΔW[O, I] = scale · B A`.
#[derive(Clone, Debug)]
pub struct Pair {
    /// R.
    pub rank: usize,
    /// `A[R, I]`.
    pub a: Factor,
    /// `B[O, R]`.
    pub b: Factor,
    /// s.
    pub scale: f64,
}

impl Pair {
    /// The update of `a` and `b`; an error where their ranks differ.
    pub fn new(a: Factor, b: Factor, scale: f64) -> Result<Pair> {
        if a.rows != b.cols {
            let why = format!(
                "has shape [{}, {}], so rank {}; {} has shape [{}, {}], so rank {}: the ranks of a pair are equal",
                b.rows, b.cols, b.cols, a.name, a.rows, a.cols, a.rows
            );
            return Err(b.error(why));
        }
        Ok(Pair { rank: a.rows, a, b, scale })
    }

    /// `(O, I)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.b.rows, self.a.cols)
    }

    /// An error where a value is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        self.a.check_finite()?;
        self.b.check_finite()
    }
}
