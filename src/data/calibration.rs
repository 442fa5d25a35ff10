//! The samples that importance scores are computed from.

use super::documents::Document;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// `samples` windows of at most `tokens` tokens of `documents`, the loss on every token but the first.
///
/// Documents are taken in a random order, those with at least `tokens` tokens before shorter ones, which count
/// whole; of a longer one a random window. Where there are fewer documents than samples, the long ones give further
/// windows. An error if that does not make `samples` windows that differ in place.
pub fn sample(documents: &[Document], samples: usize, tokens: usize, seed: u64) -> Result<Vec<Document>> {
    if samples == 0 || tokens < 2 {
        let why = "--samples must be at least 1 and --sample-tokens at least 2";
        return Err(Error::Usage(format!("{why}, found {samples} and {tokens}")));
    }
    let random = Philox::new(seed, Purpose::Calibration.stream(0));
    let mut order = random.permutation(documents.len());
    order.retain(|&d| documents[d].ids.len() > 1);
    order.sort_by_key(|&d| documents[d].ids.len() < tokens);

    let windows = |d: usize| (documents[d].ids.len() + 1).saturating_sub(tokens).max(1);
    let places = order.iter().map(|&d| windows(d)).fold(0usize, usize::saturating_add);
    if places < samples {
        return Err(Error::Usage(format!(
            "the calibration text has {places} different windows of {tokens} tokens, --samples asks for {samples}: \
             give more text, or lower --sample-tokens or --samples"
        )));
    }
    let mut taken: Vec<(usize, usize)> = Vec::with_capacity(samples);
    let draws = random.at_step(1);
    // Places taken of each document, ascending.
    let mut used: Vec<Vec<usize>> = vec![Vec::new(); documents.len()];
    while taken.len() < samples {
        for &d in order.iter().take(samples - taken.len()) {
            // The chosen place among those of this document that are free.
            let mut start = draws.below(taken.len() as u64, windows(d) - used[d].len());
            for &place in &used[d] {
                start += usize::from(place <= start);
            }
            let at = used[d].partition_point(|&place| place < start);
            used[d].insert(at, start);
            taken.push((d, start));
        }
        order.retain(|&d| used[d].len() < windows(d));
    }
    let cut = |(d, start): (usize, usize)| {
        let ids = &documents[d].ids;
        Document::supervised_from(ids[start..ids.len().min(start + tokens)].to_vec(), 1)
    };
    Ok(taken.into_iter().map(cut).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(from: u32, n: u32) -> Document {
        Document::supervised_from((from..from + n).collect(), 1)
    }

    #[test]
    fn long_documents_come_first_and_windows_differ() {
        let docs = [document(0, 3), document(100, 50), document(200, 8), document(300, 1)];
        let two = sample(&docs, 2, 8, 0).unwrap();
        let mut firsts: Vec<u32> = two.iter().map(|d| d.ids[0] / 100).collect();
        firsts.sort_unstable();
        assert_eq!(firsts, [1, 2]);
        assert!(two.iter().all(|d| d.ids.len() == 8 && d.targets() == 7));
        // 43 windows of the longest, one each of the two others that have two tokens.
        let mut every = sample(&docs, 45, 8, 3).unwrap();
        every.sort_by(|a, b| a.ids.cmp(&b.ids));
        every.dedup();
        assert_eq!(every.len(), 45);
        assert_eq!(every[0].ids, [0, 1, 2]);
        assert!(sample(&docs, 46, 8, 3).unwrap_err().to_string().contains("45 different windows"));
        assert_eq!(sample(&docs, 5, 8, 7).unwrap(), sample(&docs, 5, 8, 7).unwrap());
        assert_ne!(sample(&docs, 5, 8, 7).unwrap(), sample(&docs, 5, 8, 8).unwrap());
        assert!(
            sample(&docs, 0, 8, 0).is_err()
                && sample(&docs, 1, 1, 0).is_err()
                && sample(&[], 1, 2, 0).is_err()
        );
    }
}
