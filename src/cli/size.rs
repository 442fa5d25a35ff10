//! Sizes as people type them: `6GiB`, `512MiB`, `1.5GB`, `4096`.

use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(s: &str) -> Result<ByteSize, String> {
        let text = s.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "kib" | "k" => 1024.0,
            "mib" | "m" => 1024f64.powi(2),
            "gib" | "g" => 1024f64.powi(3),
            "tib" | "t" => 1024f64.powi(4),
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            _ => return Err(format!("{s:?} is no size, expected one like 6GiB or 512MiB")),
        };
        let bytes =
            number.parse::<f64>().map_err(|_| format!("{s:?} is no size, expected one like 6GiB"))? * factor;
        if bytes.is_finite() && (1.0..=9.0e18).contains(&bytes) {
            Ok(ByteSize(bytes as u64))
        } else {
            Err(format!("{s:?} is no size above zero, expected one like 6GiB"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_units() {
        assert_eq!("6GiB".parse(), Ok(ByteSize(6 << 30)));
        assert_eq!("512 MiB".parse(), Ok(ByteSize(512 << 20)));
        assert_eq!("1.5GB".parse(), Ok(ByteSize(1_500_000_000)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        for bad in ["", "GiB", "0", "-1", "6 parsecs", "1e3", "nan", "99999999999TiB"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }
}
