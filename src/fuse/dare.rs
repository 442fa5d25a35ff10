//! `dare` (Yu, Yu, Yu, Huang, Li, *Language models are super Mario: absorbing abilities from homologous models as a free
//! lunch*, ICML 2024): each entry of an update is dropped at random, the others are multiplied by `1 / (1 − p)`, so that
//! the update stays the same in the mean; then the weighted sum, or under `dare-ties` the election of `ties`.
//!
//! Whether an entry is dropped follows from the seed, the adapter's place among those that are fused, the module, the
//! row and the column, and from nothing else.

use serde::{Deserialize, Serialize};

use crate::checkpoint::module::Module;
use crate::cpu::entries::Keep;
use crate::error::{Error, Result};
use crate::random::{Philox, Purpose};

/// Which entries of an update are kept: a random choice.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drop {
    /// The probability with which an entry is dropped, in [0, 1).
    pub drop: f64,
}

impl Default for Drop {
    fn default() -> Drop {
        Drop { drop: 0.9 }
    }
}

impl Drop {
    /// Whether the probability is one below 1.
    pub fn check(&self) -> Result<()> {
        // The mask's numbers are multiples of 2^-24: a probability closer to 1 would keep nothing at all.
        if self.drop >= 0.0 && self.drop <= 1.0 - 2f64.powi(-24) {
            return Ok(());
        }
        Err(Error::Usage(format!("--drop {}: expected a number from 0 and below 1", self.drop)))
    }

    /// What becomes of the entries of `module` of the adapter at place `adapter`.
    pub(super) fn keep(&self, seed: u64, adapter: usize, module: Module) -> Keep {
        let numbers = Philox::new(seed, Purpose::Drop.stream(adapter as u64)).at_step(module.number());
        Keep::drawn(numbers, self.drop)
    }
}
