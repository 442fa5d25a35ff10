//! See [`crate::ops::gate`].

use super::Cuda;
use super::eigh::{LIMIT, grid};
use super::launch::{Kernel, int};
use super::lists::Kind;
use super::store::DeviceMemory;
use crate::backend::Backend;
use crate::cpu;
use crate::error::Result;
use crate::ops::gate::{Gate, Layout};
use crate::tensor::Length;

const GATE: Kernel = Kernel { file: "gate", name: "gate" };
const THREADS: usize = 256;

/// Modules of a P of more than [`LIMIT`] are worked on by the host, which waits for them.
pub fn gate(cuda: &Cuda, op: Gate<'_, DeviceMemory>) -> Result<()> {
    op.check()?;
    let (mut table, mut lists, mut large, mut most) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let (mut squares, mut numbers) = (0, 0);
    for &bounds in op.modules {
        let layout = Layout::of(bounds);
        if layout.rank > LIMIT {
            large.push((squares, numbers, bounds));
        } else {
            for long in [squares as u64, numbers as u64] {
                table.extend([long as u32, (long >> 32) as u32]);
            }
            table.extend([layout.rank as u32, layout.edges as u32, lists.len() as u32, 0]);
            lists.extend(bounds.iter().map(|&b| b as u32));
            most = most.max(layout.rank);
        }
        squares += layout.rank * layout.rank;
        numbers += layout.len();
    }
    if !table.is_empty() {
        let modules = table.len() / 8;
        let (table, lists) = (cuda.list(Kind::Segments, &table)?, cuda.list(Kind::Rows, &lists)?);
        let top = int("top", op.rule.top.min(most))?;
        let (map, directions, scratch) = (op.map.pointer(), op.directions.pointer(), op.scratch.pointer());
        let opposition = i32::from(op.rule.opposition);
        let (table, lists) = (table.view(), lists.view());
        let args = (map, directions, scratch, op.b, op.a, table, lists, top, op.rule.share, opposition);
        let sizes = [("modules", modules), ("P", most)];
        // SAFETY: `check` compared the views with the modules, one after the other as in the table.
        unsafe { cuda.launch(GATE, grid(modules, most, THREADS), &sizes, args)? };
    }
    if large.is_empty() {
        return Ok(());
    }
    let (mut map, mut directions) = (vec![0.0; op.map.len()], vec![0.0; op.directions.len()]);
    cuda.download(&mut map, op.map.reborrow())?;
    cuda.download(&mut directions, op.directions.reborrow())?;
    let (mut b, mut a) = (vec![0.0; op.b.len()], vec![0.0; op.a.len()]);
    cuda.download(&mut b, op.b)?;
    cuda.download(&mut a, op.a)?;
    for (square, number, bounds) in large {
        let layout = Layout::of(bounds);
        let at = square..square + layout.rank * layout.rank;
        let own = &mut directions[number..number + layout.len()];
        cpu::gate_of(&mut map[at.clone()], own, &b[at.clone()], &a[at], bounds, op.rule);
    }
    cuda.upload(op.map, &map)?;
    cuda.upload(op.directions, &directions)
}

#[cfg(test)]
mod tests {
    #[test]
    fn as_the_reference() {
        if let Some(cuda) = crate::cuda::tests::device() {
            crate::ops::cases::gate::conforms(&[cuda]);
        }
    }
}
