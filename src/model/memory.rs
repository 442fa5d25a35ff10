//! The memory plan: every buffer of a run, by name, before the first is made.
//!
//! Rooms and adapters are built by functions that take an [`Allocator`]. With [`super::paper::Paper`] they fill a
//! [`Plan`], with [`Device`] they fill the device: what `budget` prints and what a run takes are the same number by
//! construction.

use serde::Serialize;

use crate::backend::Backend;
pub use crate::error::human_bytes;
use crate::error::{Error, Result};
use crate::tensor::{Elem, Store};

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Frozen weights that are held in memory (not those used from the mapping).
    Weights,
    /// A and B.
    Adapter,
    /// Their gradients.
    Gradients,
    /// Both moments of AdamW.
    Optimizer,
    /// What the forward pass keeps, and what the backward pass needs besides.
    Activations,
    /// The head's chunk of logits.
    Logits,
    /// Scratch of operations and of kept libraries.
    Scratch,
    /// The data set.
    Data,
    /// The device's own: context, modules, the program.
    Driver,
}

impl Part {
    /// All parts, in the order of tables.
    pub const ALL: [Part; 9] = [
        Part::Weights,
        Part::Adapter,
        Part::Gradients,
        Part::Optimizer,
        Part::Activations,
        Part::Logits,
        Part::Scratch,
        Part::Data,
        Part::Driver,
    ];

    /// The word in tables.
    pub fn name(self) -> &'static str {
        match self {
            Part::Weights => "weights",
            Part::Adapter => "adapter",
            Part::Gradients => "gradients",
            Part::Optimizer => "optimizer",
            Part::Activations => "activations",
            Part::Logits => "logits",
            Part::Scratch => "scratch",
            Part::Data => "data",
            Part::Driver => "driver",
        }
    }
}

/// One buffer of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What it is for.
    pub part: Part,
    /// What it holds.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// All buffers of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In the order in which they are made.
    pub rows: Vec<Row>,
}

impl Plan {
    /// Adds a buffer; one of no bytes is left out.
    pub fn add(&mut self, part: Part, name: impl Into<String>, bytes: u64) {
        if bytes > 0 {
            self.rows.push(Row { part, name: name.into(), bytes });
        }
    }

    /// Bytes of all buffers.
    pub fn total(&self) -> u64 {
        sum(self.rows.iter().map(|r| r.bytes))
    }

    /// Bytes of one part.
    pub fn part(&self, part: Part) -> u64 {
        sum(self.rows.iter().filter(|r| r.part == part).map(|r| r.bytes))
    }

    /// Fails with the plan's table, largest first, if it takes more than `limit` bytes.
    pub fn fit(&self, limit: u64) -> Result<()> {
        const SHOWN: usize = 12;
        if self.total() <= limit {
            return Ok(());
        }
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by_key(|r| std::cmp::Reverse(r.bytes));
        let mut text = format!(
            "the plan takes {}, the limit is {}; what would not fit, largest first:",
            human_bytes(self.total()),
            human_bytes(limit)
        );
        for row in rows.iter().take(SHOWN) {
            let size = human_bytes(row.bytes);
            text.push_str(&format!("\n  {size:>10}  {:<11}  {}", row.part.name(), row.name));
        }
        if let Some(rest) = rows.get(SHOWN..).filter(|r| !r.is_empty()) {
            let size = human_bytes(sum(rest.iter().map(|r| r.bytes)));
            text.push_str(&format!("\n  {size:>10}  {} smaller buffers", rest.len()));
        }
        text.push_str("\nlower --batch, --seq or --rank, raise --recompute, or raise --memory-limit");
        Err(Error::Memory(text))
    }
}

/// The sum of sizes, which stays at the largest number where a plan of absurd sizes is beyond it.
pub fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

/// Makes buffers, or notes them.
pub trait Allocator {
    /// Where the buffers lie.
    type Store: Store;
    /// A buffer of `len` zeros.
    fn take<T: Elem>(&mut self, part: Part, name: &str, len: usize)
    -> Result<<Self::Store as Store>::Buf<T>>;
}

/// Makes buffers on a device.
pub struct Device<'a, B: Backend>(pub &'a B);

impl<B: Backend> Allocator for Device<'_, B> {
    type Store = B::Store;
    fn take<T: Elem>(&mut self, _: Part, name: &str, len: usize) -> Result<<B::Store as Store>::Buf<T>> {
        self.0.alloc(name, len)
    }
}
