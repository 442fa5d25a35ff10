//! Magnitude scores: `Σ |w|^p` over rows or columns of a weight, read from the file as it is summed.

use crate::checkpoint::convert;
use crate::checkpoint::weights::TensorRef;
use crate::error::Result;

/// `Σ |w|^power` over each row (`rows`) or each column of the matrix `w[O, I]`; sums in f64, rows ascending.
///
/// Holds one row besides the result. It is an error if `w` is no matrix.
pub fn magnitude(w: &TensorRef<'_>, rows: bool, power: u32) -> Result<Vec<f64>> {
    let [o, i] = *w.shape() else {
        return Err(w.error(format!("has shape {:?}, expected a matrix", w.shape())));
    };
    let mut sums = vec![0.0; if rows { o } else { i }];
    let mut row = vec![0.0f32; i];
    let bytes = w.bytes();
    let pitch = i * w.dtype().size();
    for r in 0..o {
        convert::widen(&mut row, &bytes[r * pitch..(r + 1) * pitch], w.dtype());
        let powers = row.iter().map(|x| f64::from(x.abs()).powi(power as i32));
        if rows {
            sums[r] = powers.sum();
        } else {
            sums.iter_mut().zip(powers).for_each(|(s, p)| *s += p);
        }
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::weights::{OpenOptions, Weights};
    use crate::checkpoint::writer::{SafetensorsWriter, TensorSpec};
    use crate::tensor::DType;

    #[test]
    fn rows_and_columns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let specs = vec![TensorSpec::new("m", dtype, [2, 3]), TensorSpec::new("v", dtype, [2])];
            let mut file = SafetensorsWriter::create(&path, specs, &[]).unwrap();
            let mut bytes = Vec::new();
            convert::narrow(&mut bytes, &[1.0, -2.0, 0.5, -0.25, 3.0, -4.0], dtype);
            file.write("m", &bytes).unwrap();
            file.write("v", &bytes[..2 * dtype.size()]).unwrap();
            file.finish().unwrap();
            let w = Weights::open(&path, OpenOptions::default()).unwrap();
            let m = w.tensor("m").unwrap();
            assert_eq!(magnitude(&m, true, 1).unwrap(), [3.5, 7.25]);
            assert_eq!(magnitude(&m, false, 1).unwrap(), [1.25, 5.0, 4.5]);
            assert_eq!(magnitude(&m, true, 2).unwrap(), [5.25, 25.0625]);
            assert_eq!(magnitude(&m, false, 2).unwrap(), [1.0625, 13.0, 16.25]);
            assert!(
                magnitude(&w.tensor("v").unwrap(), true, 1)
                    .unwrap_err()
                    .to_string()
                    .contains("expected a matrix")
            );
        }
    }
}
