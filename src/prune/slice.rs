//! The rows or columns of a matrix that stay, as bytes.

use std::ops::Range;

/// Ascending indices as runs of neighbours.
pub fn runs(kept: &[usize]) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for &k in kept {
        match out.last_mut() {
            Some(r) if r.end == k => r.end += 1,
            _ => out.push(k..k + 1),
        }
    }
    out
}

/// Writes the `kept` columns of a row-major matrix, whose rows are `width` elements of `size` bytes, over `out`.
///
/// `kept` ascends below `width`. The rows of a matrix `[O, I]` are the columns of `[1, O]` with elements of I.
pub fn columns(out: &mut Vec<u8>, matrix: &[u8], width: usize, size: usize, kept: &[usize]) {
    out.clear();
    let runs = runs(kept);
    for row in matrix.chunks_exact((width * size).max(1)) {
        for r in &runs {
            out.extend_from_slice(&row[r.start * size..r.end * size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_are_one_run() {
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8]), [0..3, 5..6, 7..9]);
        assert!(runs(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_was_there(rows in 0usize..5, width in 1usize..9, size in 1usize..5, mask in 0usize..512) {
            let kept: Vec<usize> = (0..width).filter(|c| mask >> c & 1 == 1).collect();
            let matrix: Vec<u8> = (0..rows * width * size).map(|i| i as u8).collect();
            let mut out = vec![9];
            columns(&mut out, &matrix, width, size, &kept);
            let expected: Vec<u8> = (0..rows)
                .flat_map(|r| kept.iter().flat_map(move |c| (0..size).map(move |b| ((r * width + c) * size + b) as u8)))
                .collect();
            prop_assert_eq!(out, expected);
        }
    }
}
