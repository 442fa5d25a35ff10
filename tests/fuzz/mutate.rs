//! Changes of an input by seed: some know no structure, some know JSON, lines and the header of a safetensors file.

use std::ops::Range;

use anabranch::random::{Philox, Purpose};
use serde_json::{Value, json};

/// What a change puts in: bytes that end, nest or overflow something.
const PIECES: &[&[u8]] = &[
    b"\0",
    b"\xff",
    b"\"",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"{%",
    b"%}",
    b"{{",
    b"}}",
    b"(",
    b"|",
    b"null",
    b"-1",
    b"0",
    b"1e999",
    b"nan",
    b"18446744073709551615",
    b"9007199254740993",
    b"0.5",
    b"true",
    b"\"\"",
    b"{}",
    b"[]",
    b"\xc3\xa9",
    b"\xf0\x9f\x99\x82",
    b"\\ud800",
    b"<s>",
];

/// Draws by seed.
struct Draws {
    random: Philox,
    next: u64,
}

impl Draws {
    /// A number below `n`; 0 if that is 0.
    fn below(&mut self, n: usize) -> usize {
        self.next += 1;
        self.random.below(self.next, n.max(1))
    }

    fn range(&mut self, n: usize) -> Range<usize> {
        let start = self.below(n + 1);
        start..start + self.below(n - start + 1)
    }
}

/// `bytes` changed one to four times, the same for the same `seed`; `other` gives parts.
pub fn mutate(bytes: &[u8], other: &[u8], seed: u64) -> Vec<u8> {
    let mut draws = Draws { random: Philox::new(seed, Purpose::Test.stream(0)), next: 0 };
    let mut out = bytes.to_vec();
    for _ in 0..=draws.below(4) {
        if draws.below(2) == 0 {
            change_json(&mut out, &mut draws);
        } else {
            change_bytes(&mut out, other, &mut draws);
        }
    }
    out
}

/// A bit, a cut, a piece, a part of itself or of `other`.
fn change_bytes(out: &mut Vec<u8>, other: &[u8], draws: &mut Draws) {
    let at = draws.below(out.len() + 1);
    match draws.below(7) {
        0 if at < out.len() => out[at] ^= 1 << draws.below(8),
        1 => out.truncate(at),
        2 => drop(out.drain(draws.range(out.len()))),
        3 => {
            let part = other[draws.range(other.len())].to_vec();
            out.splice(at..at, part);
        }
        4 => {
            let part = out[draws.range(out.len().min(64))].repeat(1 + draws.below(300));
            out.splice(at..at, part);
        }
        _ => {
            let piece = PIECES[draws.below(PIECES.len())];
            let end = (at + draws.below(2) * piece.len()).min(out.len());
            out.splice(at..end, piece.iter().copied());
        }
    }
}

/// One of the JSON values that begin the input, a line, or what comes after a NUL: a header's length is set right.
fn change_json(out: &mut Vec<u8>, draws: &mut Draws) {
    let begins =
        |&at: &usize| matches!(out[at], b'{' | b'[') && (at == 0 || matches!(out[at - 1], 0 | b'\n'));
    let starts: Vec<usize> = (0..out.len()).filter(begins).collect();
    let Some(&start) = starts.get(draws.below(starts.len())) else { return };
    let mut values = serde_json::Deserializer::from_slice(&out[start..]).into_iter::<Value>();
    let Some(Ok(mut value)) = values.next() else { return };
    let mut end = start + values.byte_offset();
    change_value(&mut value, draws);
    let text = value.to_string().into_bytes();
    if let Some(length) = start.checked_sub(8) {
        let announced = u64::from_le_bytes(out[length..start].try_into().expect("eight bytes"));
        if let Some(padded) = usize::try_from(announced).ok().and_then(|n| start.checked_add(n))
            && (end..=out.len()).contains(&padded)
        {
            end = padded;
            out[length..start].copy_from_slice(&(text.len() as u64).to_le_bytes());
        }
    }
    out.splice(start..end, text);
}

/// Changes one of the nodes of `value`.
fn change_value(value: &mut Value, draws: &mut Draws) {
    let copy = nth(&mut value.clone(), &mut draws.below(count(value))).map(|v| v.take());
    let Some(node) = nth(value, &mut draws.below(count(value))) else { return };
    match draws.below(6) {
        0 => *node = copy.unwrap_or_default(),
        1 => match node {
            Value::Array(list) if !list.is_empty() => drop(list.remove(draws.below(list.len()))),
            Value::Object(map) if !map.is_empty() => {
                let key = map.keys().nth(draws.below(map.len())).cloned().unwrap_or_default();
                map.remove(&key);
            }
            Value::Number(n) => {
                let x = n.as_i64().unwrap_or(1);
                *node = json!(
                    [x.wrapping_add(1), x.wrapping_sub(1), x.wrapping_mul(2), x.wrapping_neg(), x / 2]
                        [draws.below(5)]
                );
            }
            _ => *node = odd(draws),
        },
        2 => match node {
            Value::Array(list) => list.extend(copy),
            Value::Object(map) => drop(map.insert(odd_text(draws), copy.unwrap_or_default())),
            Value::String(s) => s.push_str(&odd_text(draws)),
            _ => *node = json!([node.take()]),
        },
        3 => {
            for _ in 0..[1, 100, 126, 200][draws.below(4)] {
                *node = json!([node.take()]);
            }
        }
        _ => *node = odd(draws),
    }
}

/// Nodes of a value, itself counted.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The node that `left` counts down to, in the order of the text.
fn nth<'v>(value: &'v mut Value, left: &mut usize) -> Option<&'v mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|v| nth(v, left)),
        Value::Object(map) => map.values_mut().find_map(|v| nth(v, left)),
        _ => None,
    }
}

/// A value that few expect.
fn odd(draws: &mut Draws) -> Value {
    let numbers = [
        json!(0),
        json!(1),
        json!(-1),
        json!(2),
        json!(3),
        json!(7),
        json!(64),
        json!(65),
        json!(1u64 << 22),
        json!(1u64 << 31),
        json!((1u64 << 53) + 1),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(0.5),
        json!(-0.0),
        json!(1e-320),
        json!(1e308),
        json!(-1e308),
    ];
    match draws.below(6) {
        0 => Value::Null,
        1 => json!(draws.below(2) == 0),
        2 => json!(odd_text(draws)),
        3 => {
            [json!([]), json!({}), json!([[]]), json!({"": {}}), json!(vec![0; 1000])][draws.below(5)].clone()
        }
        _ => numbers[draws.below(numbers.len())].clone(),
    }
}

fn odd_text(draws: &mut Draws) -> String {
    let texts =
        ["", "\0", " ", "é🙂", "..", "a", "<s>", "<unk>", "(", "a{9999}", "[^", "$A:0 <s>:1", "q_proj", "A"];
    let text = texts[draws.below(texts.len())];
    if draws.below(8) == 0 { text.repeat(2000) } else { text.to_string() }
}
