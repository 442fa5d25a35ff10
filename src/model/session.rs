//! A room that is ready to run: buffers made, rope tables on the device.

use super::adapters::{Layout, Stack};
use super::forward::DropoutKey;
use super::input::Input;
use super::memory::{Allocator, Device, Part, Plan};
use super::paper::Paper;
use super::room::{Room, RoomSize};
use super::rope::{Run, TableRows, Tables};
use super::weights::Model;
use crate::backend::Backend;
use crate::checkpoint::checkpoint::Checkpoint;
use crate::error::Result;
use crate::ops::attention::Segment;
use crate::tensor::{Real, Store};

/// A room, its rope tables, and adapters.
pub struct Session<B: Backend, T: Real> {
    /// The buffers.
    pub room: Room<B::Store, T>,
    tables: Tables,
}

impl<B: Backend, T: Real> Session<B, T> {
    /// Makes the buffers of `size` (whose `table_rows` is set from `tables`) and fills the rope tables.
    pub fn new(backend: &B, model: &Model<B>, tables: Tables, size: RoomSize) -> Result<Session<B, T>> {
        let size = RoomSize { table_rows: tables.rows(size.tokens), ..size };
        let mut paper = Paper::<B::Store>::new(Plan::default());
        Room::<_, T>::new(&mut paper, backend, &model.config, size)?;
        backend.reserve(paper.plan.total())?;
        let room = Room::new(&mut Device(backend), backend, &model.config, size)?;
        Session::with_room(backend, room, tables)
    }

    /// Fills the rope tables of a room that is made.
    pub fn with_room(backend: &B, room: Room<B::Store, T>, tables: Tables) -> Result<Session<B, T>> {
        let mut session = Session { room, tables };
        let fixed = session.tables.fixed();
        session.put(backend, &fixed)?;
        Ok(session)
    }

    /// A batch of whole documents that do not see each other: `bounds` ascend from 0 to the number of ids.
    pub fn documents(&mut self, backend: &B, ids: Vec<u32>, bounds: &[u32]) -> Result<Input> {
        let runs: Vec<Run> = bounds
            .windows(2)
            .map(|w| {
                let length = w[1].saturating_sub(w[0]) as usize;
                Run { positions: 0..length, length }
            })
            .collect();
        let rows = self.place(backend, &runs)?;
        Ok(Input::packed(ids, rows, bounds))
    }

    /// A batch of runs of tokens, each with its positions; `segments` say who sees whom, `offset` where keys go, `asked`
    /// whose hidden states are wanted.
    pub fn runs(
        &mut self,
        backend: &B,
        ids: Vec<u32>,
        runs: &[Run],
        segments: Vec<Segment>,
        offset: usize,
        asked: Vec<u32>,
    ) -> Result<Input> {
        let table_rows = self.place(backend, runs)?;
        Ok(Input { ids, table_rows, segments, offset, asked: Some(asked) })
    }

    /// The forward pass without dropout.
    pub fn forward(
        &mut self,
        model: &Model<B>,
        backend: &B,
        input: &Input,
        stack: Stack<'_, B::Store>,
    ) -> Result<()> {
        model.forward(&mut self.room, backend, input, stack, DropoutKey::NONE)
    }

    fn place(&mut self, backend: &B, runs: &[Run]) -> Result<Vec<u32>> {
        let (rows, own) = self.tables.place(runs);
        self.put(backend, &own)?;
        Ok(rows)
    }

    fn put(&mut self, backend: &B, rows: &TableRows) -> Result<()> {
        let half = self.tables.half();
        let at = rows.first * half..rows.first * half + rows.cos.len();
        backend.upload(B::Store::view_mut(&mut self.room.tables.0, at.clone()), &rows.cos)?;
        backend.upload(B::Store::view_mut(&mut self.room.tables.1, at), &rows.sin)
    }
}

/// What a session of `size` allocates, with the model, its adapters and what threads keep.
pub fn plan<B: Backend, T: Real>(
    backend: &B,
    checkpoint: &Checkpoint,
    layouts: &[Option<Layout>],
    tables: &Tables,
    size: RoomSize,
) -> Result<Plan> {
    let config = checkpoint.config();
    let mut paper = Paper::<B::Store>::new(Plan::default());
    paper.model(checkpoint)?;
    let size = RoomSize { table_rows: tables.rows(size.tokens), ..size };
    Room::<_, T>::new(&mut paper, backend, config, size)?;
    let adapters = layouts.iter().flatten().map(Layout::end).max().unwrap_or(0);
    paper.take::<f32>(Part::Adapter, "A and B", adapters)?;
    paper.plan.add(Part::Scratch, "kept by threads", backend.kept_bytes(config.head_dim) as u64);
    Ok(paper.plan)
}

/// Adapters in one arena on a device.
pub struct Adapters<B: Backend> {
    /// All A and B.
    pub params: <B::Store as Store>::Buf<f32>,
    /// Where each adapter lies; none is the base.
    pub layouts: Vec<Option<Layout>>,
}

impl<B: Backend> Adapters<B> {
    /// The base alone, once.
    pub fn base(backend: &B) -> Result<Adapters<B>> {
        Ok(Adapters { params: backend.alloc("adapter", 0)?, layouts: vec![None] })
    }

    /// The largest rank of each target over all adapters.
    pub fn ranks(&self) -> [usize; 7] {
        ranks(&self.layouts)
    }

    /// One copy of the batch for each adapter.
    pub fn layouts(&self) -> Vec<Option<&Layout>> {
        self.layouts.iter().map(Option::as_ref).collect()
    }
}

/// The largest rank of each target over `layouts`.
pub fn ranks(layouts: &[Option<Layout>]) -> [usize; 7] {
    let mut ranks = [0; 7];
    for layout in layouts.iter().flatten() {
        for (most, rank) in ranks.iter_mut().zip(layout.ranks()) {
            *most = rank.max(*most);
        }
    }
    ranks
}
